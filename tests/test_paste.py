"""Rendered heads back in the video they came from: nothing changes away from the head, and nothing shows a seam."""

from types import SimpleNamespace

import numpy as np
import pytest

from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import video
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import paste
from fg3dgs_jax.types import Label

SIZE, WIDTH, HEIGHT = 64, 96, 128
CROP = (-8, 20, 88, 116)  # leaves the picture on the left


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A video of soft stripes that move; its frames."""
    path = tmp_path_factory.mktemp("original") / "clip.mp4"
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pictures = [
        np.stack([128 + 90 * np.sin((rows + k * 4) / 19), 128 + 90 * np.cos(columns / 23), 0 * rows + 8 * k + 20], -1)
        .astype(np.uint8) for k in range(20)
    ]  # fmt: skip
    video.write_video(path, iter(pictures), 25, crf=4)
    return path


@pytest.fixture
def dataset(original):
    images = list(video.read_frames(original, 25, crop=CROP, size=SIZE))
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[20:44, 24:40] = Label.HEAD
    return SimpleNamespace(
        path="data", width=SIZE, height=SIZE, fps=25.0, crop=CROP, frame_ids=np.arange(20),
        pictures=lambda index: clips.Pictures(images[index], images[index], labels),
    )  # fmt: skip


def test_frames_in_any_order_and_beyond_the_end(original):
    whole = list(video.read_frames(original, 25))
    with paste.Original(original, 25.0) as frames:
        for index in (3, 0, 7, 7, 2, 19, 40, 5):
            wanted = whole[min(index, 19)]
            # Frames that waited on disk went through a JPEG of quality 97.
            assert np.abs(frames.at(index).astype(int) - wanted).mean() < 2


def test_an_unchanged_head_leaves_the_video_unchanged(original, dataset):
    crop = paste.find_crop(dataset, original)
    assert crop == CROP
    frame = next(video.read_frames(original, 25))
    image, _, labels = dataset.pictures(0)
    mask = paste.head_mask(labels, np.zeros((SIZE, SIZE), np.uint8))
    out = paste.paste(image, mask, frame, crop)
    assert out.shape == frame.shape
    difference = np.abs(out.astype(int) - frame)
    # Resampling down and up again by 1.5 loses the noise that H.264 at crf 4 leaves in such a soft picture.
    assert difference.mean() < 0.5 and difference.max() <= 12


def test_the_new_head_is_there_whole_and_nothing_else_is_touched(original, dataset):
    frame = next(video.read_frames(original, 25))
    image, _, labels = dataset.pictures(0)
    red = np.where((labels > 0)[..., None], np.uint8([255, 0, 0]), image)
    mask = paste.head_mask(labels, np.zeros((SIZE, SIZE), np.uint8))
    assert (mask[labels > 0] > 0.99).all()  # the clip's own head vanishes whole
    assert mask[0].max() == mask[:, 0].max() == 0 or mask[0].max() < 0.5
    assert np.abs(np.diff(mask, axis=0)).max() < 0.5  # soft
    out = paste.paste(red, mask, frame, CROP)
    scale = 96 / SIZE
    middle = out[20 + round(32 * scale), -8 + round(32 * scale)]
    np.testing.assert_allclose(middle, [255, 0, 0], atol=1)
    np.testing.assert_array_equal(out[:20], frame[:20])
    np.testing.assert_array_equal(out[:, 89:], frame[:, 89:])
    # A head that reaches further than the clip's own is shown whole too.
    larger = np.zeros((SIZE, SIZE), np.uint8)
    larger[10:54, 24:40] = 200
    assert paste.head_mask(labels, larger)[12, 30] > 0.99


def test_another_video_is_refused(original, dataset, tmp_path):
    other = tmp_path / "other.mp4"
    video.write_video(other, (np.full((HEIGHT, WIDTH, 3), 250, np.uint8) for _ in range(5)), 25)
    with pytest.raises(UserError, match=r"other\.mp4: is not the video"):
        paste.find_crop(dataset, other)
    dataset.crop = None
    with pytest.raises(UserError, match="does not say where it was cropped"):
        paste.find_crop(dataset, original)
    small = tmp_path / "small.mp4"  # a folder of the field: the video itself is the clip
    video.write_video(small, (dataset.pictures(k).image for k in range(20)), 25, crf=4)
    assert paste.find_crop(dataset, small) == (0, 0, SIZE, SIZE)
