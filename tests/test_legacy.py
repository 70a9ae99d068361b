"""The field's folder layout, made here from known cameras and labels; and a real one where it is at hand."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import legacy, legacy_gaps, legacy_writing, synthetic
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

T, SIZE = 12, 64
TEST_IDS = [9, 10, 11]
SHARED = Path(os.environ.get("FG3DGS_SHARED", Path(__file__).parents[2] / "shared"))


def landmarks() -> np.ndarray:
    """68 points of a face of 64x64 pixels."""
    points = np.full((68, 2), 32.0)
    points[8], points[27] = [32, 56], [32, 24]
    eye = np.array([[0, 2], [3, 0], [6, 0], [9, 2], [6, 4], [3, 4]])
    points[36:42], points[42:48] = np.add(eye, [18, 24]), np.add(eye, [37, 24])
    turn = np.linspace(np.pi, 3 * np.pi, 13)[:-1]
    points[48:60] = np.stack([32 + 9 * np.cos(turn), 46 + 4 * np.sin(turn)], -1)
    turn = np.linspace(np.pi, 3 * np.pi, 9)[:-1]
    points[60:68] = np.stack([32 + 6 * np.cos(turn), 46 + 1.5 * np.sin(turn)], -1)
    return points


def camera_to_world(index: int) -> np.ndarray:
    """OpenGL: 0.7 in front of the head on +z, a little aside, looking along -z."""
    matrix = np.eye(4)
    matrix[:3, 3] = [0.01 * index, -0.02, 0.7]
    return matrix


def make(path: Path) -> Path:
    for name in ("gt_imgs", "ori_imgs", "torso_imgs", "parsing", "teeth_mask"):
        (path / name).mkdir(parents=True)
    parsing = np.full((SIZE, SIZE, 3), 255, np.uint8)  # RGB codes
    parsing[8:20, 12:52] = [0, 0, 0]
    parsing[20:54, 12:52] = [0, 0, 255]
    parsing[54:58, 20:44] = [0, 255, 0]
    parsing[58:, 4:60] = [255, 0, 0]
    parsing[45:47, 28:36] = [100, 100, 100]
    torso = np.full((SIZE, SIZE, 4), 255, np.uint8)
    torso[:50, :, 3] = 0
    for index in range(T):
        image = np.full((SIZE, SIZE, 3), 20 * index, np.uint8)
        cv2.imwrite(str(path / "gt_imgs" / f"{index}.jpg"), image)
        cv2.imwrite(str(path / "parsing" / f"{index}.png"), parsing[..., ::-1])
        cv2.imwrite(str(path / "torso_imgs" / f"{index}.png"), torso)
        np.savetxt(path / "ori_imgs" / f"{index}.lms", np.add(landmarks(), [0, 0.5 * index / T]), "%.3f")
        teeth = np.zeros((SIZE, SIZE), bool)
        teeth[44, 30:34] = True
        np.save(path / "teeth_mask" / f"{index}.npy", teeth)
    cv2.imwrite(str(path / "bc.jpg"), np.full((SIZE, SIZE, 3), 40, np.uint8))
    train = [index for index in range(T) if index not in TEST_IDS]
    write_transforms(path, "train", train)
    write_transforms(path, "val", TEST_IDS)
    rows = [f"{i}, {0.1 * i:.3f}, {2.0 if i == 5 else 0.0}, 0.0001, {0.3 * i:.2f}, 1" for i in range(T)]
    header = "frame, AU01_r, AU45_r, AU06_r, AU25_r, AU01_c"
    (path / "au.csv").write_text("\n".join([header, *rows]) + "\n")
    np.save(path / "aud_ds.npy", np.arange(T, dtype=np.float32)[:, None, None] + np.zeros((T, 16, 29), np.float32))
    np.save(path / "aud_hu.npy", np.ones((T - 1, 2, 1024), np.float32))
    audio_io.save_wav(path / "aud.wav", (0.1 * np.sin(np.arange(T * 640) * 0.2)).astype(np.float32))
    return path


def write_transforms(path: Path, split: str, ids: list[int], shift: int = 0) -> None:
    frames = [{"img_id": i, "aud_id": i + shift, "transform_matrix": camera_to_world(i).tolist()} for i in ids]
    content = {"focal_len": 90.0, "cx": 32.0, "cy": 31.0, "frames": frames}
    (path / f"transforms_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("legacy") / "clip")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "clip")


def test_cameras_and_splits(made):
    clip = open_dataset(made)
    assert (clip.num_frames, clip.width, clip.height, clip.fps) == (T, SIZE, SIZE, 25.0)
    assert clip.test_ids.tolist() == TEST_IDS and clip.train_ids.tolist() == list(range(9))
    assert clip.intrinsics.tolist() == [90, 90, 32, 31]
    # a world point right of, above and before the origin: OpenCV camera x right, y down, z forward
    camera = clip.viewmats[3] @ [0.05, 0.1, 0.2, 1]
    np.testing.assert_allclose(camera[:3], [0.02, -0.12, 0.5], atol=1e-6)  # f32


def test_label_bits(made):
    labels = open_dataset(made).frame(0).labels
    has = lambda row, col, bit: bool(labels[row, col] & bit)  # noqa: E731
    assert has(12, 30, Label.HAIR) and has(12, 30, Label.HEAD)
    assert has(40, 15, Label.HEAD) and not has(40, 15, Label.HAIR | Label.TORSO)
    assert has(46, 30, Label.INNER_MOUTH) and has(44, 31, Label.INNER_MOUTH)  # parsing, teeth
    assert has(46, 30, Label.HEAD) and not has(46, 30, Label.LIPS)
    assert has(43, 32, Label.LIPS) and has(49, 32, Label.LIPS) and not has(40, 32, Label.LIPS)
    assert has(26, 22, Label.EYES) and has(26, 41, Label.EYES) and not has(26, 32, Label.EYES)
    assert has(56, 30, Label.TORSO) and has(60, 30, Label.TORSO) and not has(60, 30, Label.HEAD)
    assert labels[2, 2] == 0
    lips_box = open_dataset(made).lips_box[0]
    assert lips_box.tolist() == [37, 55, 23, 41]  # half side 9 around (46, 32)


def test_backdrop_and_image(made):
    frame = open_dataset(made).frame(4)
    assert (frame.backdrop[:50] == 40).all() and (frame.backdrop[50:] == 255).all()
    assert np.abs(frame.image.astype(int) - 80).max() <= 2  # JPEG


def test_expression_is_normalised_robustly():
    rng = np.random.default_rng(0)
    calm, lively = rng.uniform(0, 0.01, 1000), np.concatenate([rng.uniform(1, 3, 999), [5]])
    names, values = legacy.normalise_action_units({"AU45": lively, "AU06": calm, "AU25": lively})
    assert names == ("AU06", "AU45")
    assert (values[:, 0] == 0).all()  # noise is not blown up
    assert values[:, 1].min() == 0 and values[:, 1].max() == 1
    # 90 % of a uniform spread between its 5th and 99th percentile; the one outlier does not squeeze it
    assert 0.45 < values[:, 1].mean() < 0.55


def test_metrics_and_names(made):
    clip = open_dataset(made)
    assert clip.expression_names == ("AU01", "AU06", "AU45")
    assert clip.metrics["blink"].argmax() == 5
    np.testing.assert_allclose(clip.metrics["mouth"], 0.3 * np.arange(T), atol=1e-6)
    assert 0.05 < clip.mouth_open[0] < 0.12  # about 3 of 32 pixels


def test_extent_is_the_heads_radius(made):
    # the head's far corner is about (20, 24) pixels from the centre, at 0.7 / 90 world units a pixel
    assert 0.7 / 90 * 22 < open_dataset(made).extent < 0.7 / 90 * 34


def test_audio_by_preference_name_file_and_front_end(made, folder):
    assert open_dataset(made).audio_features[5, 0, 0] == 5
    hubert = open_dataset(made, audio_features="hu")
    assert hubert.audio_features.shape == (T, 2, 1024) and hubert.audio_name == "hu"
    assert open_dataset(made, audio_features="logmel").audio_features.shape == (T, 16, 64)
    assert open_dataset(made, audio_features=str(made / "aud_hu.npy")).audio_features.shape == (T, 2, 1024)
    for file in ("aud_ds.npy", "aud_hu.npy"):
        (folder / file).unlink()
    assert open_dataset(folder).audio_name == "logmel"


def test_missing_frames_keep_the_time_axis(folder):
    """Frame 4 has no face: it leaves the split, its neighbours keep their audio."""
    write_transforms(folder, "train", [0, 1, 2, 3, 5, 6, 7, 8])
    (folder / "gt_imgs" / "4.jpg").unlink()
    clip = open_dataset(folder)
    assert clip.num_frames == T and 4 not in clip.train_ids
    assert clip.frame(5).condition.audio[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(clip.viewmats[4], clip.viewmats[3])
    assert clip.label_pixels(Label.HAIR)[4] == 0 < clip.label_pixels(Label.HAIR)[5]


def test_aud_id_and_face_rect(folder):
    write_transforms(folder, "train", list(range(9)), shift=-1)
    content = json.loads((folder / "transforms_train.json").read_text())
    content["frames"] = [{**f, "aud_id": max(f["aud_id"], 0), "face_rect": [0, 0, 9, 9]} for f in content["frames"]]
    (folder / "transforms_train.json").write_text(json.dumps(content))
    assert open_dataset(folder).audio_features[:, 0, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]


def test_folders_without_teeth_masks_use_the_landmarks(folder):
    shutil.rmtree(folder / "teeth_mask")
    labels = open_dataset(folder).frame(0).labels
    assert labels[45, 27] & Label.INNER_MOUTH  # inside the inner lip line, skin in the parsing


def test_action_unit_header_variants(folder):
    text = (folder / "au.csv").read_text()
    expected = open_dataset(folder).expression
    (folder / "au.csv").write_text(text.replace(", ", ",").replace("_r", "_R"))
    np.testing.assert_array_equal(open_dataset(folder).expression, expected)


def test_variants_of_the_layout_train_as_they_are(folder):
    """AD-NeRF: aud.npy, com_imgs, no torso pictures, no action units. RAD-NeRF: PNG pictures."""
    usual = open_dataset(folder)
    (folder / "aud_ds.npy").rename(folder / "aud.npy")
    (folder / "aud_hu.npy").unlink()
    (folder / "gt_imgs").rename(folder / "com_imgs")
    (folder / "au.csv").unlink()
    shutil.rmtree(folder / "torso_imgs")
    shutil.rmtree(folder / "teeth_mask")
    background = cv2.imread(str(folder / "bc.jpg"))
    (folder / "bc.jpg").unlink()
    cv2.imwrite(str(folder / "bc.png"), background)
    clip = open_dataset(folder)
    assert clip.audio_name == "aud" and clip.audio_features.shape == (T, 16, 29)
    assert clip.expression_names == ("AU02", "AU45") and clip.expression.shape == (T, 2)
    np.testing.assert_array_equal(clip.frame(4).image, usual.frame(4).image)
    torso = clip.torso(4)
    assert (torso[58:, 4:60, 3] == 255).all() and (torso[:40, :, 3] == 0).all()
    assert (torso[52, 25:40, 3] == 255).all()  # goes on behind the chin
    np.testing.assert_array_equal(torso[60, 10, :3], clip.frame(4).image[60, 10])
    np.testing.assert_array_equal(clip.frame(4).backdrop[2, 2], background[2, 2])
    for file in sorted((folder / "com_imgs").glob("*.jpg")):
        cv2.imwrite(str(folder / "com_imgs" / f"{file.stem}.png"), cv2.imread(str(file)))
        file.unlink()
    np.testing.assert_array_equal(open_dataset(folder).frame(4).image, usual.frame(4).image)


def test_lids_and_brows_from_landmarks_alone():
    points = np.repeat(landmarks()[None], 40, 0)
    points[:, 17:27, 1] = 18.0
    shut = [10, 11, 30]
    for eye in (slice(36, 42), slice(42, 48)):
        points[shut, eye, 1] = points[shut, eye, 1].mean()
    points[20:25, 17:27, 1] -= 3
    names, values = legacy.normalise_action_units(legacy_gaps.action_units(points))
    assert names == ("AU02", "AU45")
    assert sorted(np.flatnonzero(values[:, 1] > 0.5)) == shut and sorted(np.flatnonzero(values[:, 0] > 0.5)) == [
        20, 21, 22, 23, 24]  # fmt: skip


def round_trip(dataset, out):
    """What comes back from the writer agrees with what went in; labels exactly, pictures up to JPEG."""
    legacy_writing.write(dataset, out)
    back = open_dataset(out)
    ids = np.concatenate([dataset.train_ids, dataset.test_ids])
    np.testing.assert_array_equal(back.train_ids, dataset.train_ids)
    np.testing.assert_array_equal(back.test_ids, dataset.test_ids)
    np.testing.assert_allclose(back.intrinsics, dataset.intrinsics, rtol=1e-6)
    np.testing.assert_allclose(back.viewmats[ids], dataset.viewmats[ids], atol=1e-5)  # inverted twice
    np.testing.assert_allclose(back.landmarks[ids], dataset.landmarks[ids], atol=1e-4)  # four digits
    np.testing.assert_array_equal(back.lips_box[ids], dataset.lips_box[ids])
    for index in ids[:: max(1, len(ids) // 5)].tolist():
        (image, backdrop, labels), expected = back.pictures(index), dataset.pictures(index)
        np.testing.assert_array_equal(labels, expected.labels)
        assert np.abs(image.astype(int) - expected.image).mean() < 1.0  # one more JPEG of quality 98
        assert np.abs(backdrop.astype(int) - expected.backdrop).mean() < 1.0
        np.testing.assert_array_equal(back.torso(index), dataset.torso(index))
    return back


def test_a_written_folder_reads_back_the_same(made, tmp_path):
    back = round_trip(open_dataset(made), tmp_path / "out")
    assert back.expression_names == ("AU01", "AU06", "AU45")
    np.testing.assert_array_equal(back.audio_features, open_dataset(made).audio_features)
    np.testing.assert_allclose(back.metrics["mouth"], open_dataset(made).metrics["mouth"], atol=1e-5)


def test_a_native_dataset_in_the_fields_layout(tmp_path):
    synthetic.make(tmp_path / "native", 30, 64)
    native = open_dataset(tmp_path / "native")
    legacy_writing.write(native, tmp_path / "out")
    back = open_dataset(tmp_path / "out")
    index = int(native.test_ids[0])
    inner = Label.HEAD | Label.HAIR | Label.INNER_MOUTH  # lips and eyes are found from the landmarks here
    difference = (back.frame(index).labels ^ native.frame(index).labels) & np.uint8(inner)
    assert (difference > 0).mean() < 0.01
    assert np.abs(back.frame(index).backdrop.astype(int) - native.frame(index).backdrop).mean() < 1
    np.testing.assert_allclose(back.viewmats[index], native.viewmats[index], atol=1e-5)
    assert back.audio_features.shape == native.audio_features.shape  # log-mel, heard again in aud.wav


def remove(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def array(name, content):
    return lambda folder: np.save(folder / name, content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (text("au.csv", "frame, AU01_r\n1, x\n"), r"au\.csv: cannot be used"),
        (text("au.csv", "frame, AU12_r\n" + "1, 0\n" * T), r"none of the columns"),
        (text("au.csv", "frame, AU01_r\n" + "1, 0\n" * 5), r"5 rows for 12 frames"),
        (remove("transforms_val.json"), r"transforms_val\.json: cannot be used \(No such file"),
        (text("transforms_train.json", "{}"), r"'focal_len' is missing|'fl_x' is missing"),
        (text("transforms_train.json", "[1]"), r"wrong format"),
        (remove("ori_imgs/3.lms"), r"3\.lms: cannot be used"),
        (text("ori_imgs/3.lms", "1 2 3"), r"3\.lms: cannot be used \(wrong format"),
        (remove("bc.jpg"), r"bc\.jpg: cannot be read"),
        (remove("parsing/4.png"), r"4\.png: cannot be read"),
        (cut("torso_imgs/4.png"), r"torso_imgs/4\.png: is not a whole"),
        (cut("gt_imgs/4.jpg"), r"4\.jpg: is not a whole"),
        (array("teeth_mask/4.npy", np.zeros((3, 3), bool)), r"4\.npy: has shape \(3, 3\)"),
        (array("aud_ds.npy", np.zeros((3, 16, 29))), r"holds 3 frames and the clip 12"),
        (array("aud_ds.npy", np.zeros((16, 29))), r"has shape \(16, 29\)"),
        (text("aud_ds.npy", "no array"), r"aud_ds\.npy: cannot be used"),
        (lambda folder: write_transforms(folder, "train", []), r"lists no frames"),
        (lambda folder: write_transforms(folder, "train", [0, 10**12]), r"transforms_train\.json: .*wrong format"),
    ],
)
def test_damage_is_one_clear_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(folder).frame(4)
    assert "\n" not in str(caught.value)


def test_a_pickled_array_is_refused(folder):
    np.save(folder / "aud_ds.npy", np.array([{"a": 1}], object))
    with pytest.raises(UserError, match="cannot be used"):
        open_dataset(folder)


@pytest.mark.skipif(not (SHARED / "datasets/man2_256").is_dir(), reason=f"no real dataset at {SHARED} (FG3DGS_SHARED)")
def test_a_real_folder_agrees_with_independent_figures():
    """Held-out ids, lip boxes and head masks of a published-method run, made by other code from the same folder."""
    clip = open_dataset(SHARED / "datasets/man2_256")
    with np.load(SHARED / "anchors/talkinggaussian_man2_256.npz") as anchor:
        ids, head, lips_box, truth = (anchor[name] for name in ("ids", "head", "lips_box", "gt"))
    np.testing.assert_array_equal(clip.test_ids, ids)
    np.testing.assert_array_equal(clip.lips_box[ids], lips_box)
    for place in range(0, len(ids), 9):
        frame = clip.frame(ids[place])
        np.testing.assert_array_equal((frame.labels & Label.HEAD) > 0, head[place])
        # JPEG decoders may round chroma differently by a few levels
        assert np.abs(frame.image.astype(int) - truth[place]).max() <= 8
    assert clip.audio_features.shape == (500, 16, 29) and 0.1 < clip.extent < 0.2


@pytest.mark.skipif(not (SHARED / "datasets/man2_256").is_dir(), reason=f"no real dataset at {SHARED} (FG3DGS_SHARED)")
def test_a_real_folder_survives_the_round_trip(tmp_path):
    dataset = open_dataset(SHARED / "datasets/man2_256")
    few = dataclasses.replace(dataset.clip, train_ids=dataset.train_ids[::40], test_ids=dataset.test_ids[-6:])
    back = round_trip(Dataset(few), tmp_path / "out")
    ids = np.concatenate([few.train_ids, few.test_ids])
    # Normalised once more, over nearly the same frames: what was 0 and 1 stays so.
    assert np.abs(back.expression[ids] - dataset.expression[ids]).max() < 0.06
    np.testing.assert_array_equal(back.audio_features[ids], dataset.audio_features[ids])
