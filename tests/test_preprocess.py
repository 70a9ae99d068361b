"""preprocess: steps that continue, a folder that is replaced whole, and a real clip from end to end."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fg3dgs_jax import cli, preprocess
from fg3dgs_jax.data import audio, dataset, intake, pose, synthetic, video
from fg3dgs_jax.data.steps import Steps
from fg3dgs_jax.types import Label

SHARED = Path(os.environ.get("FG3DGS_SHARED", Path(__file__).parents[2] / "shared"))
REAL = SHARED / "clips/woman_7s_700x700.mp4"
needs_real_clip = pytest.mark.skipif(not REAL.is_file(), reason=f"no real clips at {SHARED} (FG3DGS_SHARED)")


def counting(log: list[str], name: str, fail: bool = False):
    def make(folder: Path) -> None:
        log.append(name)
        (folder / "result").write_text(name)
        if fail:
            raise KeyboardInterrupt

    return make


def test_steps_continue_where_they_were_stopped(tmp_path):
    log = []
    steps = Steps(tmp_path / "work", "input")
    steps.run("one", counting(log, "one"))
    with pytest.raises(KeyboardInterrupt):
        steps.run("two", counting(log, "two", fail=True))
    assert not (tmp_path / "work" / "two").exists()
    again = Steps(tmp_path / "work", "input")
    again.run("one", counting(log, "one"))
    folder = again.run("two", counting(log, "two"))
    assert log == ["one", "two", "two"]
    assert (folder / "result").read_text() == "two"


def test_a_changed_input_or_option_makes_the_steps_after_it_again(tmp_path):
    log = []

    def all_steps(key: str, size: int) -> None:
        steps = Steps(tmp_path / "work", key)
        steps.run("one", counting(log, "one"))
        steps.run("two", counting(log, "two"), size)
        steps.run("three", counting(log, "three"))

    all_steps("input", 512)
    all_steps("input", 256)
    assert log == ["one", "two", "three", "two", "three"]
    all_steps("other input", 256)
    assert log[5:] == ["one", "two", "three"]


def test_missing_frames_are_named():
    missing = np.zeros(100, bool)
    missing[[3, 10, 11, 12, 99]] = True
    assert intake.name_ranges(missing) == "frames 3, 10-12, 99"
    assert intake.name_ranges(np.arange(40) % 2 == 0, 3) == "frames 0, 2, 4 and 17 more places"


def test_angles_are_those_of_the_head():
    viewmats = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    flip = np.diag([1.0, -1.0, -1.0])
    for index, turn in enumerate(([0, 0.3, 0], [0.2, 0, 0], [0, 0, 0.1])):
        viewmats[index, :3, :3] = pose.Rotation.from_rotvec(turn).as_matrix() @ flip
    # Camera axes: +y is down, so a positive turn about it takes the face (-z) to the image's left; about x, down is up.
    found = intake.angles(viewmats)
    np.testing.assert_allclose(found[0], [np.degrees(-0.3), 0, 0], atol=1e-4)
    np.testing.assert_allclose(found[1], [0, np.degrees(-0.2), 0], atol=1e-4)
    np.testing.assert_allclose(found[2], [0, 0, np.degrees(0.1)], atol=1e-4)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        preprocess.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--models", "contact_sheet.jpg", "continues", "one to five minutes"):
        assert word in text


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory):
    """Three seconds of a real clip, small."""
    path = tmp_path_factory.mktemp("clip") / "short.mp4"
    frames = video.read_frames(REAL, 25, max_side=400)
    sound = audio.load_audio(REAL)[: 3 * audio.SAMPLE_RATE]
    video.write_video(path, (image for image, _ in zip(frames, range(75), strict=False)), 25, sound, crf=20)
    return path


@needs_real_clip
def test_a_real_clip_becomes_a_dataset(tmp_path, short_clip, capsys, monkeypatch):
    pytest.importorskip("mediapipe")
    out = tmp_path / "anna"
    argv = [str(short_clip), f"--out={out}", f"--models={SHARED / 'models'}", "--size=128"]
    look = intake.look
    monkeypatch.setattr(intake, "look", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.exit_code(preprocess.main, argv) == 75  # stopped after cropping
    assert not out.exists()
    monkeypatch.setattr(intake, "look", look)
    monkeypatch.setattr(intake, "cut", None)  # the same command continues: nothing is cropped again
    assert cli.exit_code(preprocess.main, argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]  # finished steps are cleared away

    clip = dataset.open_dataset(out)
    assert (clip.width, clip.num_frames, clip.fps) == (128, 75, 25.0)
    assert clip.audio_features.shape == (75, 16, 64)
    assert clip.expression.shape == (75, 9) and np.isfinite(clip.expression).all()
    frame = clip.frame(30)
    head, torso = ((frame.labels & label) > 0 for label in (Label.HEAD, Label.TORSO))
    assert 0.1 < head.mean() < 0.5 and 0.1 < torso.mean() < 0.5 and not (head & torso).any()
    # Where neither head nor its edge is, the backdrop is the picture itself (JPEG and median: a few levels).
    other = ~grown(head)
    assert np.abs(frame.backdrop.astype(int) - frame.image)[other].mean() < 4
    # The head's centre is the world's origin and its half side HEAD_RADIUS.
    centre = clip.viewmats[30][:3, 3]
    pixel = centre[:2] / centre[2] * clip.intrinsics[:2] + clip.intrinsics[2:]
    rows, columns = np.nonzero(head)
    assert abs(pixel[0] - np.median(columns)) < 12 and abs(pixel[1] - np.median(rows)) < 12
    radius = clip.intrinsics[0] * clip.extent / centre[2]
    assert 0.8 < radius / (max(np.ptp(rows), np.ptp(columns)) / 2) < 1.25
    report = json.loads((out / "report.json").read_text())
    status = {line["name"]: line["status"] for line in report["checks"]}
    assert status["face found"] == "pass" and status["clip length"] == "fail"  # 3 s of 5
    assert (out / "contact_sheet.jpg").stat().st_size > 50_000

    monkeypatch.setattr(intake, "search", None)  # done already: nothing runs, the report is shown again
    capsys.readouterr()
    assert cli.exit_code(preprocess.main, argv) == 0
    assert "clip length" in capsys.readouterr().out


def grown(mask: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0


def test_an_older_dataset_is_replaced_whole_and_nothing_else_is(tmp_path):
    out, new = tmp_path / "out", tmp_path / "work" / "dataset"
    for folder, text in ((out, "old"), (new, "new")):
        folder.mkdir(parents=True)
        source = {"format": "fg3dgs_jax.dataset", "source": {"key": text}}
        (folder / "meta.json").write_text(json.dumps(source))
    (out / "stale").touch()
    preprocess.check_out(out)
    preprocess.replace_folder(new, out)
    assert preprocess.made_from(out) == "new" and not (out / "stale").exists()
    shutil.rmtree(out)
    out.mkdir()
    preprocess.check_out(out)  # empty: fine
    (out / "notes.txt").touch()
    with pytest.raises(preprocess.UserError, match="holds other files"):
        preprocess.check_out(out)


def test_the_fields_layout_remembers_where_it_came_from(tmp_path):
    made, out = tmp_path / "native", tmp_path / "legacy"
    synthetic.make(made, 25, 64)
    for name in ("report.json", "contact_sheet.jpg"):
        (made / name).write_text("{}")
    meta = json.loads((made / "meta.json").read_text())
    meta["source"] = {"key": "abc", "crop": [10, 20, 300, 310]}
    (made / "meta.json").write_text(json.dumps(meta))
    out.mkdir()
    preprocess.write_legacy(made, out)
    assert preprocess.made_from(out) == "abc" == preprocess.made_from(made)
    assert (out / "report.json").is_file() and dataset.open_dataset(out).crop == (
        10,
        20,
        300,
        310,
    ) == dataset.open_dataset(made).crop
    assert preprocess.parse(["clip.mp4", "--out=x", "--layout=legacy"]).layout == "legacy"
