"""Dataset folders: what is written is read back, splits hold no leak, and damage is named before work starts."""

import dataclasses
import json
import shutil
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import dataset as datasets
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

T, SIZE = 30, 32


def layers(index: int) -> datasets.Layers:
    rows, cols = np.mgrid[0:SIZE, 0:SIZE]
    image = np.stack([rows * 8, cols * 8, np.full_like(rows, 5 * index)], -1).astype(np.uint8)
    labels = np.where((rows > 8) & (rows < 20), Label.HEAD | Label.HAIR, Label.TORSO).astype(np.uint8)
    torso = np.zeros((SIZE, SIZE, 4), np.uint8)
    torso[20:] = [200, 100, 50, 255]
    torso[:10, :, :3] = 255  # rubbish under alpha 0
    torso[15:20] = [200, 100, 50, 51]  # alpha 0.2
    return datasets.Layers(image, labels, torso)


def arrays() -> tuple[datasets.Meta, datasets.Tracks]:
    rng = np.random.default_rng(0)
    train, test = clips.split_ids(T, 25.0)
    meta = datasets.Meta(
        width=SIZE, height=SIZE, fps=25.0, num_frames=T, intrinsics=(70.0, 71.0, 16.0, 15.0),
        expression_names=("browDown", "eyeBlink"), train=tuple(train.tolist()), test=tuple(test.tolist()), extent=0.12,
        source={"test": True},
    )  # fmt: skip
    tracks = datasets.Tracks(
        viewmats=np.tile(np.eye(4, dtype=np.float32), (T, 1, 1)), expression=rng.random((T, 2), np.float32),
        lips_box=np.tile(np.int32([18, 24, 10, 16]), (T, 1)), eye_boxes=np.zeros((T, 2, 4), np.int32),
        landmarks=rng.random((T, 68, 2), np.float32), mouth_open=rng.random(T, np.float32),
    )  # fmt: skip
    return meta, tracks


def write(path, frames=None, **changes):
    meta, tracks = arrays()
    sound = (0.1 * np.sin(np.arange(T * 640) * 0.2)).astype(np.float32)
    features = audio_io.features("logmel", sound, 25.0, T)
    tracks = dataclasses.replace(tracks, **changes)
    frames = map(layers, range(T)) if frames is None else frames
    datasets.write_dataset(path, meta, tracks, frames, np.full((SIZE, SIZE, 3), 100, np.uint8), sound, features)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "clip"
    write(path)
    return path


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "clip")


def test_round_trip(written):
    meta, tracks = arrays()
    clip = datasets.open_dataset(written)
    assert (clip.width, clip.height, clip.num_frames, clip.fps, clip.extent) == (SIZE, SIZE, T, 25.0, 0.12)
    np.testing.assert_array_equal(clip.train_ids, meta.train)
    np.testing.assert_array_equal(clip.intrinsics, np.float32(meta.intrinsics))
    for field in dataclasses.fields(tracks):
        np.testing.assert_array_equal(getattr(clip, field.name), getattr(tracks, field.name))
    frame = clip.frame(7)
    source = layers(7)
    np.testing.assert_array_equal(frame.labels, source.labels)
    # JPEG at quality 95 of a smooth picture errs by a few levels
    assert np.abs(frame.image.astype(int) - source.image).max() <= 8
    assert clip.label_pixels(Label.HEAD).tolist() == [11 * SIZE] * T
    assert clip.label_pixels(Label.LIPS).tolist() == [0] * T
    np.testing.assert_array_equal(clip.metrics["blink"], tracks.expression[:, 1])
    assert clip.audio_name == "logmel" and "30 frames 32x32" in clip.describe()
    assert not (written / ".partial").exists()


def test_backdrop_is_torso_over_background(written):
    backdrop = datasets.open_dataset(written).frame(0).backdrop
    assert (backdrop[:15] == 100).all()  # alpha 0: the colour beneath does not shine through
    np.testing.assert_array_equal(backdrop[25, 3], [200, 100, 50])
    np.testing.assert_array_equal(backdrop[17, 3], [120, 100, 90])  # 0.2 torso + 0.8 of 100


def test_frames_have_the_contracted_types(written):
    clip = datasets.open_dataset(written)
    frame = clip.frame(np.int64(3))
    expected = {
        "index": ((), np.int32), "image": ((SIZE, SIZE, 3), np.uint8), "backdrop": ((SIZE, SIZE, 3), np.uint8),
        "labels": ((SIZE, SIZE), np.uint8), "viewmat": ((4, 4), np.float32), "intrinsics": ((4,), np.float32),
        "lips_box": ((4,), np.int32), "eye_boxes": ((2, 4), np.int32),
    }  # fmt: skip
    for name, (shape, dtype) in expected.items():
        value = np.asarray(getattr(frame, name))
        assert (value.shape, value.dtype) == (shape, dtype), name
    assert frame.condition.audio.shape == (8, 16, 64) and frame.condition.expression.shape == (8, 2)
    with pytest.raises(ValueError, match="read-only"):
        frame.image[0] = 0  # cached pictures are shared
    with pytest.raises(IndexError):
        clip.frame(T)


@settings(deadline=None)  # a busy machine is no failure
@given(index=st.integers(-3, 15))
def test_tokens_are_the_frames_around_with_zeros_beyond_the_ends(index):
    track = np.arange(1, 13, dtype=np.float32)[:, None] * [[1.0, 2.0]]
    found = clips.tokens(track, index)
    for place, row in enumerate(range(index - 4, index + 4)):
        np.testing.assert_array_equal(found[place], track[row] if 0 <= row < 12 else [0, 0])


@settings(deadline=None)  # a busy machine is no failure
@given(frames=st.integers(2, 7000), fps=st.sampled_from([25.0, 30.0]))
def test_split_keeps_an_eleventh_and_no_neighbours(frames, fps):
    train, test = clips.split_ids(frames, fps)
    assert len(test) == max(1, round(frames / 11))
    assert len(np.intersect1d(train, test)) == 0
    assert min(*train, *test) >= 0 and max(*train, *test) < frames
    assert len(train) >= 0.5 * frames
    gap = np.abs(train[:, None] - test).min()
    assert gap > 8 or frames < 110  # windows of 8 frames on each side do not meet
    if frames > 120 * fps:
        assert test[-1] == frames - 1 and len(test) == test[-1] - test[0] + 1
    elif frames >= 270:
        assert np.count_nonzero(np.diff(test) > 1) == 4  # five blocks


def test_one_frame_cannot_be_split():
    with pytest.raises(UserError, match="cannot be split"):
        clips.split_ids(1, 25.0)


@settings(deadline=None)  # a busy machine is no failure
@given(x=st.floats(-40, 140), y=st.floats(-40, 140), spread=st.floats(0, 90), scale=st.sampled_from([1.0, 1.5]))
def test_boxes_are_square_and_inside(x, y, spread, scale):
    points = np.array([[x, y], [x + spread, y + spread / 3]])
    row0, row1, col0, col1 = clips.square_box(points, 100, 80, scale)
    assert 0 <= row0 < row1 <= 80 and 0 <= col0 < col1 <= 100 and row1 - row0 == col1 - col0


def test_eye_mask_holds_the_lids_of_open_and_closed_eyes():
    eye = np.array([[20, 40], [27, 36], [33, 36], [40, 40], [33, 43], [27, 43]], float)
    landmarks = np.zeros((68, 2))
    landmarks[36:42], landmarks[42:48] = eye, np.add(eye, [40, 0])
    open_mask = clips.eyes_mask(landmarks, 100, 80)
    closed = landmarks.copy()
    closed[36:48, 1] = 42
    closed_mask = clips.eyes_mask(closed, 100, 80)
    for column in (30, 70):
        assert open_mask[30:46, column].all() and closed_mask[36:44, column].all()
        assert not open_mask[:22, column].any() and not open_mask[52:, column].any()
    assert not open_mask[:, 48:52].any()


def test_prefetch_is_in_order_bounded_and_passes_errors_on(written):
    clip = datasets.open_dataset(written)
    ids = [5, 3, 3, 8, 1, 0]
    assert [int(frame.index) for frame in datasets.prefetch(clip, iter(ids), depth=2)] == ids
    started = []

    def slow(item):
        started.append(item)
        return item

    results = datasets.ahead(slow, iter(range(1000)), workers=1, depth=3)
    assert next(results) == 0
    time.sleep(0.1)
    assert len(started) <= 4  # depth 3 and the one handed out
    results.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
    with pytest.raises(IndexError):
        list(datasets.prefetch(clip, [0, T + 5]))


def test_cache_stays_within_its_bytes(written):
    clip = datasets.open_dataset(written, cache_bytes=7 * SIZE * SIZE * 4)
    frames = [clip.frame(index) for index in range(T)]
    assert len(clip._cache) == 4
    assert clip.pictures(0).image is frames[0].image and clip.pictures(9).image is not frames[9].image


def test_fingerprint_follows_the_data_not_the_place(written, folder):
    first, moved = (datasets.open_dataset(path).fingerprint for path in (written, folder))
    assert first == moved
    write(folder, expression=np.zeros((T, 2), np.float32))
    assert datasets.open_dataset(folder).fingerprint != first


def test_another_front_end_by_file(folder):
    np.save(folder / "mine.npy", np.ones((T - 2, 2, 7), np.float32))  # two frames short, as HuBERT's are
    clip = datasets.open_dataset(folder, audio_features=str(folder / "mine.npy"))
    assert clip.audio_features.shape == (T, 2, 7) and clip.audio_name == "mine"
    with pytest.raises(UserError, match="no such audio front end"):
        datasets.open_dataset(folder, audio_features="hubert")
    own = audio_io.load_features(folder / "audio_features.npz")
    for name in ("hubert", "other"):  # the folder's own from now on, and one beside it
        stored = dataclasses.replace(own, name=name, values=own.values + len(name))
        audio_io.save_features(
            folder / ("audio_features.npz" if name == "hubert" else f"audio_features_{name}.npz"), stored
        )
        np.testing.assert_array_equal(datasets.open_dataset(folder, audio_features=name).audio_features, stored.values)
    computed = datasets.open_dataset(folder, audio_features="logmel")
    sound = audio_io.load_audio(folder / "audio.wav")
    np.testing.assert_array_equal(computed.audio_features, audio_io.features("logmel", sound, 25.0, T).values)
    assert computed.audio_name == "logmel"


def cut(name, keep=0.5):
    def damage(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit_meta(**changes):
    def damage(folder):
        file = folder / "meta.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def short_tracks(folder):
    with np.load(folder / "tracks.npz") as tracks:
        content = dict(tracks)
    np.savez(folder / "tracks.npz", **{**content, "mouth_open": content["mouth_open"][:-3]})


def other_size(folder):
    (folder / "background.png").write_bytes(
        datasets.native._encode(".png", np.zeros((SIZE, SIZE - 2, 3), np.uint8), [])
    )


def few_features(folder):
    features = audio_io.load_features(folder / "audio_features.npz")
    audio_io.save_features(folder / "audio_features.npz", dataclasses.replace(features, values=features.values[:9]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("images/000004.jpg"), r"000004\.jpg: is not a whole .* picture"),
        (
            cut("images/000004.jpg", 0.97),
            r"000004\.jpg: is not a whole .* picture",
        ),  # a decoder would fill it with grey
        (cut("torso/000004.png"), r"torso/000004\.png: is not a whole"),
        (cut("labels/000004.png"), r"labels/000004\.png: is not a whole"),
        (cut("tracks.npz"), r"tracks\.npz: is missing, damaged"),
        (cut("audio_features.npz"), r"audio_features\.npz"),
        (remove("images/000011.jpg"), r"images: frame 000011\.jpg is missing"),
        (remove("audio.wav"), r"audio\.wav: is missing"),
        (remove("background.png"), r"background\.png: is missing"),
        (short_tracks, r"mouth_open has 27 rows for 30 frames"),
        (few_features, r"does not fit 30 frames"),
        (other_size, r"frame 4 is not 32x32"),
        (edit_meta(num_frames=40), r"rows for 40 frames"),
        (edit_meta(version=9), r"version 9, not"),
        (edit_meta(train=[1, 400]), r"not a complete"),
        (edit_meta(unknown=1), r"not a complete"),
        (edit_meta(expression_names=["a"]), r"does not fit the names"),
        (lambda folder: shutil.rmtree(folder / "labels"), r"labels: frame 000000\.png is missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), r"not a complete"),
        (remove("meta.json"), r"is not a dataset"),
        (shutil.rmtree, r"no such dataset folder"),
    ],
)
def test_damage_is_one_clear_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        datasets.open_dataset(folder).frame(4)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_dataset(folder):
    def broken():
        yield layers(0)
        raise RuntimeError("no more frames")

    with pytest.raises(RuntimeError):
        write(folder, broken())
    with pytest.raises(ValueError, match="announced"):
        write(folder, map(layers, range(T - 1)))
    assert datasets.open_dataset(folder).frame(T - 1).image.shape == (SIZE, SIZE, 3)
    assert not (folder / ".partial").exists()


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.native.np, "savez", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "clip")
    assert list((tmp_path / "clip").iterdir()) == []
