"""The test protocol with a fake renderer: what is given to it, what is timed, scored and written, and the probes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import face, video
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import heldout, metrics, papers, probes

SIZE, FRAMES = 48, 60
LIPS, EYES = (30, 40, 20, 30), ((10, 18, 8, 16), (10, 18, 30, 38))


def paint(backdrop, mouth, lids):
    """The picture of a "head" whose mouth and lids are grey levels."""
    image = backdrop.copy()
    image[4:44, 4:44] = 120
    for (row0, row1, col0, col1), level in ((LIPS, mouth), *((box, lids) for box in EYES)):
        image[row0:row1, col0:col1] = level
    return image


@pytest.fixture
def dataset(tmp_path):
    """A clip whose mouth follows the audio and whose lids follow the expression exactly."""
    rng = np.random.default_rng(0)
    audio, expression = rng.random((FRAMES, 2, 1), np.float32), rng.random((FRAMES, 1), np.float32)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[4:44, 4:44] = types.Label.HEAD

    def read(index):
        backdrop = np.full((SIZE, SIZE, 3), index, np.uint8)
        image = paint(backdrop, round(200 * float(audio[index, 0, 0])), round(200 * float(expression[index, 0])))
        return clips.Pictures(image, backdrop, labels.copy())

    audio_io.save_wav(tmp_path / "audio.wav", 0.1 * np.sin(np.arange(FRAMES * 640) / 9.0).astype(np.float32))
    viewmats = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    viewmats[:, 0, 3] = np.arange(FRAMES)
    fields = {
        "path": tmp_path, "width": SIZE, "height": SIZE, "fps": 25.0, "intrinsics": np.ones(4, np.float32),
        "viewmats": viewmats, "expression": expression, "expression_names": ("AU45",), "audio_features": audio,
        "audio_name": "test", "audio_path": tmp_path / "audio.wav", "frame_ids": np.arange(FRAMES),
        "train_ids": np.arange(40, dtype=np.int32),
        "test_ids": np.arange(45, 60, dtype=np.int32), "extent": 1.0, "lips_box": np.tile(LIPS, (FRAMES, 1)),
        "eye_boxes": np.tile(EYES, (FRAMES, 1, 1)), "landmarks": np.zeros((FRAMES, 68, 2), np.float32),
        "mouth_open": np.zeros(FRAMES, np.float32), "metrics": {}, "label_pixels": None, "read": read,
        "torso": lambda index: np.zeros((SIZE, SIZE, 4), np.uint8), "background": np.zeros((SIZE, SIZE, 3), np.uint8),
        "crop": None,
        "fingerprint": "x",
    }  # fmt: skip
    return Dataset(clips.Clip(**fields))


def perfect(condition, viewmat, backdrop):
    """Token 4 is the frame itself."""
    mouth, lids = condition.audio[4, 0, 0], condition.expression[4, 0]
    return paint(backdrop, round(200 * float(mouth)), round(200 * float(lids)))


def frozen(condition, viewmat, backdrop):
    return paint(backdrop, 100, 100)


def test_each_frame_gets_its_own_pose_backdrop_and_condition(dataset):
    seen = []

    def render(condition, viewmat, backdrop):
        seen.append((int(viewmat[0, 3]), int(backdrop.max()), float(condition.audio[4, 0, 0])))
        return perfect(condition, viewmat, backdrop)

    result = heldout.predict(dataset, render)
    np.testing.assert_array_equal(result.predictions, result.truth)
    assert seen[0] == seen[1]  # the warm-up is the first frame again
    assert seen[1:] == [(i, i, float(dataset.audio_features[i, 0, 0])) for i in dataset.test_ids]
    assert (result.seconds > 0).all()


def test_scores_tell_the_regions_apart(dataset):
    scores = heldout.score_pixels(dataset, heldout.predict(dataset, perfect))
    assert (scores["psnr"] == 100.0).all() and (scores["mouth_error"] == 0.0).all()

    def wrong_lids(condition, viewmat, backdrop):
        image = perfect(condition, viewmat, backdrop)
        for row0, row1, col0, col1 in EYES:
            image[row0:row1, col0:col1] = 255 - image[row0:row1, col0:col1]
        return image

    scores = heldout.score_pixels(dataset, heldout.predict(dataset, wrong_lids))
    assert (scores["psnr_mouth"] == 100.0).all() and (scores["eye_error"] > 0.5).all()
    # The same squared error over fewer pixels: the eyes' PSNR is the lowest, the whole frame's the highest.
    assert (scores["psnr_eyes"] < scores["psnr_head"]).all() and (scores["psnr_head"] < scores["psnr"]).all()
    similarity = heldout.score_similarity(dataset, heldout.predict(dataset, wrong_lids))
    assert (similarity["ssim_head"] < similarity["ssim"]).all()


def test_evaluate_writes_everything_and_says_what_is_missing(dataset, tmp_path):
    out = tmp_path / "deep" / "out"
    report = heldout.evaluate(dataset, frozen, out, info={"step": 3})
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.json", "heldout.jpg", "heldout.mp4", "heldout.npz"]
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["run"] == {"step": 3} and len(stored["frames"]) == 15
    assert stored["summary"]["psnr_mouth"] == pytest.approx(report["summary"]["psnr_mouth"])
    assert "--models" in stored["unavailable"]["lmd"] and "lmd" not in stored["summary"]
    assert stored["summary"]["seconds_per_frame"] > 0
    arrays = np.load(out / "heldout.npz")
    assert arrays["pred"].dtype == np.uint8 and arrays["pred"].shape == arrays["gt"].shape == (15, SIZE, SIZE, 3)
    np.testing.assert_array_equal(arrays["ids"], dataset.test_ids)
    info = video.probe(out / "heldout.mp4")
    assert info.num_frames == 15 and info.has_audio and info.width == 3 * SIZE
    sound = audio_io.load_audio(out / "heldout.mp4")
    assert len(sound) == pytest.approx(15 * 640, abs=1024)  # AAC packs 1024 samples


def test_a_wrong_model_path_is_a_reason_and_not_a_crash(dataset, tmp_path):
    report = heldout.score(dataset, heldout.predict(dataset, frozen), tmp_path)
    assert "face_landmarker.task" in report["unavailable"]["jitter"]


def test_faces_are_looked_for_once_in_each_set_of_frames(dataset, monkeypatch, tmp_path):
    """LMD, jitter, AUE and the lips in silence all come from the same two tracks."""
    looked = []

    def track_face(images, model):
        looked.append(len(images))
        shapes = np.full((len(images), 1), 0.1 * len(looked), np.float32)
        points = np.random.default_rng(0).random((len(images), face.NUM_LANDMARKS, 3)).astype(np.float32)
        return face.FaceTrack(points, shapes, ("jawOpen",))

    monkeypatch.setattr(face, "track_face", track_face)
    monkeypatch.setattr(heldout, "find_model", lambda *names: tmp_path)
    monkeypatch.setattr(metrics, "LOWER_UNITS", ("jawOpen",))
    monkeypatch.setattr(metrics, "UPPER_UNITS", ("jawOpen",))
    frames = heldout.predict(dataset, perfect)
    report = heldout.score(dataset, frames, tmp_path)
    table = papers.table(dataset, frames, report, papers.Networks(), tmp_path)
    assert looked == [15, 15]
    ours = table["rows"]["ours"]
    assert ours["aue_lower"] == report["summary"]["aue_lower"] == pytest.approx((5 * 0.1) ** 2, rel=1e-5)  # f32
    assert ours["lmd"] == 0.0 and "silence_motion" in ours and not {"lmd", "aue_lower"} & set(table["unavailable"])


def test_the_sound_of_frames_follows_the_frames(dataset):
    sound = heldout.sound_of(dataset, np.array([3, 10]))
    audio = audio_io.load_audio(dataset.audio_path)
    np.testing.assert_array_equal(sound, np.concatenate([audio[1920:2560], audio[6400:7040]]))
    assert heldout.sound_of(Dataset(_with(dataset.clip, audio_path=Path("missing.wav"))), np.array([0])) is None


def _with(clip, **changes):
    return dataclasses.replace(clip, **changes)


def test_no_held_out_frames_is_said_in_one_sentence(dataset):
    empty = Dataset(_with(dataset.clip, test_ids=np.array([], np.int32)))
    with pytest.raises(UserError, match="no frames are held out"):
        heldout.predict(empty, frozen)


def test_json_has_no_nan(tmp_path):
    heldout.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [np.float32(1.5), np.int64(2)], "c": (None, "x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, 2], "c": [None, "x"]}


def test_shifts_mean_what_they_say(dataset):
    for seconds in (-1.0, 1.0):
        condition = probes.shifted_audio(dataset, seconds)(30)
        own = clips.condition(dataset.audio_features, dataset.expression, 30 + round(25 * seconds))
        np.testing.assert_array_equal(condition.audio, own.audio)
        np.testing.assert_array_equal(condition.expression, clips.tokens(dataset.expression, 30))
    assert set(probes.wrong_audio(dataset)) == {"audio -2 s", "audio -1 s", "audio +1 s", "audio +2 s", "random audio"}


def test_probes_find_a_head_that_listens_and_one_that_does_not(dataset):
    report = probes.probe(dataset, perfect, render_static=frozen)
    assert report["conditions"]["right"]["mouth_error"] == 0.0
    assert report["conditions"]["shuffled expression"]["mouth_error"] == 0.0  # its audio is right
    for name in ("wrong audio, mean", "audio -1 s", "random audio", "static head", "shuffled expression"):
        relative = report["reductions"][name]["relative"]
        assert relative.mean == 1.0 and relative.low == 1.0, name
    assert report["reductions"]["shuffled expression"]["metric"] == "eye_error"

    deaf = probes.probe(dataset, frozen)
    assert "static head" not in deaf["conditions"]
    assert deaf["reductions"]["wrong audio, mean"]["difference"] == (0.0, 0.0, 0.0)
