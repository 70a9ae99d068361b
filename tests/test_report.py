"""The report: each check turns from pass to warn at a clip that deserves it; sound against lips by lag."""

import dataclasses

import numpy as np
import pytest

from fg3dgs_jax.data import report, sheet

FRAMES = 300


def talk(random, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """Noise bursts f32 [n] at 16 kHz, and how loud they are at each frame: what lips would do."""
    steps = np.repeat(random.random(frames // 6 + 1) * (random.random(frames // 6 + 1) > 0.3), 6)[:frames]
    envelope = np.convolve(steps, np.hanning(7) / np.hanning(7).sum(), "same")
    sound = random.normal(size=frames * 640) * np.interp(np.arange(frames * 640) / 640, np.arange(frames), envelope)
    return (0.1 * sound).astype(np.float32), (0.01 + 0.1 * envelope).astype(np.float32)


def test_lips_that_follow_the_sound_correlate_at_their_lag():
    sound, opening = talk(np.random.default_rng(0))
    curve = report.sync_curve(sound, opening)
    assert curve[report.MAX_LAG] > 0.6  # the level is seen through the logarithm of noisy bands
    late = report.sync_curve(sound, np.roll(opening, 12))  # the lips come 12 frames after the sound
    assert np.argmax(late) - report.MAX_LAG == pytest.approx(-12, abs=3)  # windows are 8 frames wide
    assert late[report.MAX_LAG - 2 : report.MAX_LAG + 3].max() < report.SYNC_R


def test_lips_of_another_speech_do_not():
    random = np.random.default_rng(1)
    (sound, _), (_, opening) = talk(random), talk(random)
    assert report.sync_curve(sound, opening).max() < report.SYNC_R


def test_a_mouth_that_never_opens_is_no_division_by_zero():
    sound, _ = talk(np.random.default_rng(2))
    assert np.isfinite(report.sync_curve(sound, np.zeros(FRAMES, np.float32))).all()


def good_facts() -> report.Facts:
    sound, _ = talk(np.random.default_rng(3))
    angles = np.zeros((FRAMES, 3), np.float32)
    angles[:, 0] = 10 * np.sin(np.arange(FRAMES) / 9)
    curve = np.exp(-((np.arange(31) - 15.0) ** 2) / 20).astype(np.float32) * 0.6
    seen = np.ones(FRAMES, bool)
    return report.Facts(25.0, 90.0, seen, 0.0, 80.0, angles, 0.6, np.full(40, 130.0), 1.0, sound, curve)


CASES = [
    ("clip length", {"seconds": 20.0}, report.WARN),
    ("clip length", {"seconds": 3.0}, report.FAIL),
    ("frame rate", {"fps": 24.0}, report.WARN),
    ("frame rate", {"fps": 10.0}, report.FAIL),
    ("face found", {"seen": np.arange(FRAMES) > 15}, report.WARN),
    ("one person", {"rivals": 0.05}, report.WARN),
    ("mouth size", {"mouth_pixels": 30.0}, report.WARN),
    ("head turns", {"angles": np.zeros((FRAMES, 3), np.float32)}, report.WARN),
    ("head turns", {"angles": np.full((FRAMES, 3), 60, np.float32)}, report.WARN),
    ("head pose", {"pose_error": 2.5}, report.WARN),
    ("exposure", {"face_light": np.full(40, 30.0)}, report.WARN),
    ("steady light", {"face_light": np.linspace(80, 160, 40)}, report.WARN),
    ("sharpness", {"sharpness": 0.3}, report.WARN),
    ("speech", {"audio": np.zeros(16000, np.float32)}, report.FAIL),
    ("sound level", {"audio": np.ones(16000, np.float32)}, report.WARN),
    ("sound and lips", {"sync": np.full(31, 0.25, np.float32)}, report.WARN),
    ("sound and lips", {"sync": np.roll(good_facts().sync, 9)}, report.WARN),
    ("file", {"notes": ("the video ends after 3.0 s of 9.0 s",)}, report.WARN),
]


def test_a_good_clip_passes_everywhere():
    lines = report.checks(good_facts())
    assert {line.status for line in lines} == {report.PASS}, lines
    assert all(not line.fix for line in lines)


@pytest.mark.parametrize(("name", "change", "status"), CASES, ids=[f"{n} {s}" for n, _, s in CASES])
def test_what_is_wrong_is_named_with_its_fix(name, change, status):
    lines = {line.name: line for line in report.checks(dataclasses.replace(good_facts(), **change))}
    assert lines[name].status == status
    assert lines[name].fix and lines[name].value


def test_the_fix_for_a_late_sound_says_so():
    facts = dataclasses.replace(good_facts(), seconds=FRAMES / 25, sync=np.roll(good_facts().sync, 9))
    line = next(line for line in report.checks(facts) if line.name == "sound and lips")
    assert "360 ms late" in line.fix  # lips at i follow from the sound at i + 9


def test_sharpness_falls_with_blur():
    import cv2

    random = np.random.default_rng(4)
    face = cv2.resize(random.integers(0, 255, (50, 50, 3), dtype=np.uint8), (200, 200), interpolation=cv2.INTER_CUBIC)
    face = np.clip(face.astype(int) + random.normal(0, 20, face.shape), 0, 255).astype(np.uint8)
    values = [report.sharpness(cv2.GaussianBlur(face, (0, 0), sigma)) for sigma in (0.01, 1.0, 2.0, 4.0)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.3 * values[0]


def test_the_page_has_room_for_everything():
    cells = [np.full((sheet.CELL, sheet.CELL, 3), 50 * k, np.uint8) for k in range(5)]
    width = 4 * sheet.CELL
    strip = sheet.curves([("a", np.arange(9.0), (255, 0, 0)), ("flat", np.ones(9), (0, 255, 0))], width, 120, "t", "x")
    text = sheet.table([("name", "warn", "value", "fix"), ("b", "pass", "v", "")], width)
    page = sheet.page(cells, 4, [strip, text])
    assert page.shape == (2 * sheet.CELL + strip.shape[0] + text.shape[0], width, 3)
    assert (strip[:, :, 0] > 200).any() and (page[: sheet.CELL, sheet.CELL] == 50).all()
