"""Puts rendered heads back into the video that the clip was cropped from, at its full resolution, without a seam."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from fg3dgs_jax.data import video
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

# Shares of the crop's edge. Around the head the torso layer is a continuation, so the seam lies further out; what is
# there agrees with the video, and a soft edge hides the rest.
GROW, FEATHER, EDGE = 0.035, 0.03, 0.02
ALIKE = 12.0  # mean grey levels between the video's crop and the clip's frame; re-encoding costs 2, another frame 20
KEPT_QUALITY = 97  # JPEG of frames that wait on disk


class Original:
    """The frames of a video at one rate in any order; those decoded wait on disk, so memory stays flat."""

    def __init__(self, path: str | Path, fps: float):
        self._folder = tempfile.TemporaryDirectory(prefix="fg3dgs_jax_")
        self._frames: Iterator[np.ndarray] = video.read_frames(path, fps)
        self._count, self._ended = 0, False

    def __enter__(self) -> "Original":
        return self

    def __exit__(self, *error) -> None:
        self._frames.close()
        self._folder.cleanup()

    def at(self, index: int) -> np.ndarray:
        """Frame `index` u8 [H, W, 3]; the last one where the video ends before."""
        image = None
        while not self._ended and self._count <= index:
            image = next(self._frames, None)
            if image is None:
                self._ended = True
                break
            data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, KEPT_QUALITY])[1]
            self._file(self._count).write_bytes(data.tobytes())
            self._count += 1
        if image is not None:
            return image
        return cv2.imread(str(self._file(min(index, self._count - 1))))[..., ::-1]

    def _file(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index:06d}.jpg"


def find_crop(dataset: Dataset, path: str | Path) -> tuple[int, int, int, int]:
    """Where in the video the clip's frames come from: (x0, y0, x1, y1) in its pixels, which may leave the picture.

    Raises UserError: the dataset does not say, or its frames are not that part of this video.
    """
    info = video.probe(path)
    alike = info.width * dataset.height == info.height * dataset.width  # folders of the field: the video, as it is
    crop = dataset.crop or ((0, 0, info.width, info.height) if alike else None)
    if crop is None:
        raise UserError(f"--paste-back {path}: {dataset.path} does not say where it was cropped; preprocess it again")
    first = int(dataset.frame_ids[0])
    frames = video.read_frames(path, dataset.fps, first=first, crop=crop)
    part = next(frames, None)
    frames.close()
    own = dataset.pictures(first).image
    difference = 255.0
    if part is not None:
        part = cv2.resize(part, own.shape[1::-1], interpolation=cv2.INTER_AREA)
        difference = float(np.abs(part.astype(np.float32) - own).mean())
    if difference > ALIKE:
        raise UserError(f"--paste-back {path}: is not the video that {dataset.path} was made from; give that one")
    return crop


def head_mask(labels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """How much of the rendered picture to show, f32 [H, W] in [0, 1]: the head, in both pictures, with a soft margin.

    labels u8 [H, W]: of the clip's frame, whose own head must vanish. alpha u8 [H, W]: of the rendered head.
    """
    size = labels.shape[0]
    head = (((labels & Label.HEAD) > 0) | (alpha > 8)).astype(np.uint8)
    grow = 2 * round((GROW + FEATHER / 2) * size) + 1
    grown = cv2.dilate(head, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (grow, grow))).astype(np.float32)
    soft = cv2.GaussianBlur(grown, (0, 0), FEATHER * size / 2)
    inside = np.ones_like(soft)
    edge = max(2, round(EDGE * size))
    ramp = np.clip((np.arange(size) + 0.5) / edge, 0, 1)
    inside = np.minimum.outer(np.minimum(ramp, ramp[::-1]), np.minimum(ramp, ramp[::-1]))
    return (soft * inside).astype(np.float32)


def paste(picture: np.ndarray, mask: np.ndarray, original: np.ndarray, crop: tuple[int, int, int, int]) -> np.ndarray:
    """The original u8 [H, W, 3] with the rendered picture u8 [S, S, 3] in its crop, where mask f32 [S, S] is 1; a copy.

    The picture is brought to the crop's size; parts of the crop outside the original are left out.
    """
    x0, y0, x1, y1 = crop
    size = (x1 - x0, y1 - y0)
    how = cv2.INTER_AREA if size[0] < picture.shape[1] else cv2.INTER_LANCZOS4
    large = cv2.resize(picture, size, interpolation=how).astype(np.float32)
    share = np.clip(cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR), 0, 1)[..., None]
    height, width = original.shape[:2]
    rows, columns = slice(max(y0, 0), min(y1, height)), slice(max(x0, 0), min(x1, width))
    inner = slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0)
    out = original.copy()
    mixed = share[inner] * large[inner] + (1 - share[inner]) * original[rows, columns]
    out[rows, columns] = np.clip(np.round(mixed), 0, 255).astype(np.uint8)
    return out
