"""What every dataset folder is read into, and the rules that all of them share: boxes, split, windows, pictures."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.errors import UserError

TOKENS = 8  # a condition holds the frames [i - 4, i + 4)
LONG_CLIP_SECONDS = 120.0
TEST_SHARE = 11  # one frame in eleven is held out
GUARD_FRAMES = 8  # audio windows of neighbours overlap by this many frames
MOUTH_POINTS = slice(48, 68)
EYE_POINTS = (slice(36, 42), slice(42, 48))  # the eye on the image's left, then the one on its right


class Pictures(NamedTuple):
    """One decoded frame."""

    image: np.ndarray  # u8 [H, W, 3] RGB
    backdrop: np.ndarray  # u8 [H, W, 3] RGB, torso layer over background
    labels: np.ndarray  # u8 [H, W], bits of types.Label


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip without its pictures: T frames on a uniform time axis, the same for every folder layout."""

    path: Path
    width: int
    height: int
    fps: float
    intrinsics: np.ndarray  # f32 [4], pixels
    viewmats: np.ndarray  # f32 [T, 4, 4], world to camera, OpenCV axes
    expression: np.ndarray  # f32 [T, E], normalised per person, about [0, 1]; gaze in [-1, 1]
    expression_names: tuple[str, ...]
    audio_features: np.ndarray  # f32 [T, A, D]
    audio_name: str
    audio_path: Path
    frame_ids: np.ndarray  # i32, ascending: the positions that have pictures
    train_ids: np.ndarray  # i32, ascending
    test_ids: np.ndarray  # i32, ascending
    extent: float  # radius of the head, world units
    lips_box: np.ndarray  # i32 [T, 4]
    eye_boxes: np.ndarray  # i32 [T, 2, 4]
    landmarks: np.ndarray  # f32 [T, L, 2], pixels
    mouth_open: np.ndarray  # f32 [T], inner lip opening / face height
    metrics: dict[str, np.ndarray]  # f32 [T] each: "lips", "mouth", "blink"; what incremental sampling sorts by
    label_pixels: np.ndarray | None  # i32 [T, 6], pixels per bit of types.Label; None: count when asked
    read: Callable[[int], Pictures]
    torso: Callable[[int], np.ndarray]  # frame -> u8 [H, W, 4] RGBA, straight alpha: what backdrops hold of the person
    background: np.ndarray  # u8 [H, W, 3] RGB, behind the torso
    crop: tuple[int, int, int, int] | None  # (x0, y0, x1, y1) in the source video's pixels; None: nobody noted it
    fingerprint: str  # changes when the data changes, not when the folder moves

    @property
    def num_frames(self) -> int:
        return len(self.viewmats)


def split_ids(num_frames: int, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """Train and test frames of a clip that brings no split of its own, i32 ascending each.

    Over two minutes: the last eleventh is the test set, as the papers have it. Shorter: five blocks spread over the
    clip, together one eleventh. Eight frames on each side of a test block are in neither set, because audio windows
    overlap. Where that would leave less than 60 % of the frames for training (under about ten seconds) there are fewer
    blocks, then a narrower guard.
    """
    if num_frames < 2:
        raise UserError(
            f"a clip of {num_frames} frames cannot be split into training and test frames; use a longer clip"
        )
    held = max(1, round(num_frames / TEST_SHARE))
    if num_frames > LONG_CLIP_SECONDS * fps:
        return _cut(num_frames, [(num_frames - held, num_frames)], GUARD_FRAMES)
    for blocks, guard in [(b, GUARD_FRAMES) for b in (5, 4, 3, 2, 1)] + [(1, 4), (1, 2), (1, 1), (1, 0)]:
        train, test = _cut(num_frames, _spread(num_frames, held, min(blocks, held)), guard)
        if len(train) >= 0.6 * num_frames:
            break
    return train, test


def _spread(num_frames: int, held: int, blocks: int) -> list[tuple[int, int]]:
    """`blocks` half-open ranges of together `held` frames, each in the middle of its share of the clip."""
    sizes = [held // blocks + (k < held % blocks) for k in range(blocks)]
    starts = [round((k + 0.5) * num_frames / blocks - size / 2) for k, size in enumerate(sizes)]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _cut(num_frames: int, ranges: list[tuple[int, int]], guard: int) -> tuple[np.ndarray, np.ndarray]:
    test, near = np.zeros((2, num_frames), bool)
    for start, stop in ranges:
        test[start:stop] = True
        near[max(start - guard, 0) : stop + guard] = True
    return np.flatnonzero(~near).astype(np.int32), np.flatnonzero(test).astype(np.int32)


def square_box(points: np.ndarray, width: int, height: int, scale: float = 1.0) -> np.ndarray:
    """Square box (row0, row1, col0, col1), half-open, of pixel points [L, 2] (x, y); i32 [4].

    Centre and half side come from the integer bounds of the points (for `scale` 1 this is the lip box TalkingGaussian's
    figures are measured in). A box that leaves the image is moved back inside.
    """
    bounds = np.floor([points.min(0), points.max(0)]).astype(np.int64)
    half = max(int((bounds[1] - bounds[0]).max() * scale) // 2, 1)
    half = min(half, width // 2, height // 2)
    col, row = bounds.sum(0) // 2
    col = min(max(col, half), width - half)
    row = min(max(row, half), height - half)
    return np.array([row - half, row + half, col - half, col + half], np.int32)


def region_boxes(landmarks: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Lip boxes i32 [T, 4] and eye boxes i32 [T, 2, 4] of 68-style landmarks [T, 68, 2] in pixels."""
    lips = np.stack([square_box(points[MOUTH_POINTS], width, height) for points in landmarks])
    eyes = np.stack([[square_box(points[eye], width, height, 1.5) for eye in EYE_POINTS] for points in landmarks])
    return lips, eyes


def eyes_mask(landmarks: np.ndarray, width: int, height: int) -> np.ndarray:
    """Both eyes with their lids, bool [H, W], from 68-style landmarks [68, 2] in pixels: the contour dilated.

    The margin is 0.22 of the eye's width all around and twice that upwards, where the upper lid folds.
    """
    mask = np.zeros((height, width), np.uint8)
    for eye in EYE_POINTS:
        points = landmarks[eye]
        eye_width = float(np.linalg.norm(points[3] - points[0]))
        raised = points - [0.0, 0.22 * eye_width]
        hull = cv2.convexHull(np.concatenate([points, raised]).astype(np.float32))
        polygon = _fixed_point(hull[:, 0])
        cv2.fillPoly(mask, [polygon], 1, shift=4)
        cv2.polylines(mask, [polygon], True, 1, max(1, round(0.44 * eye_width)), shift=4)
    return mask.astype(bool)


def polygon_mask(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pixels inside a polygon [L, 2] (x, y in pixels), bool [H, W]."""
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [_fixed_point(points)], 1, shift=4)
    return mask.astype(bool)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    # OpenCV's integer coordinates name pixel centres (ours are at +0.5), with 4 fractional bits here.
    return np.round((np.asarray(points) - 0.5) * 16).astype(np.int32)


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
    """Inner lip opening / face height (nose bridge to chin), f32 [T], of 68-style landmarks [T, 68, 2]."""
    opening = np.linalg.norm(landmarks[:, [61, 62, 63]] - landmarks[:, [67, 66, 65]], axis=-1).mean(-1)
    face = np.linalg.norm(landmarks[:, 8] - landmarks[:, 27], axis=-1)
    return (opening / np.maximum(face, 1.0)).astype(np.float32)


def tokens(track: np.ndarray, index: int) -> np.ndarray:
    """The rows [index - 4, index + 4) of a track [T, ...] as [8, ...], zeros where the clip has no such row."""
    rows = np.arange(index - TOKENS // 2, index + TOKENS // 2)
    inside = (rows >= 0) & (rows < len(track))
    out = np.zeros((TOKENS, *track.shape[1:]), track.dtype)
    out[inside] = track[rows[inside]]
    return out


def nearest(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """For each position the nearest of the ascending frame numbers `ids`, the earlier of two as near; i64 [L]."""
    ids = np.asarray(ids, np.int64)
    after = np.clip(np.searchsorted(ids, positions), 0, len(ids) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(positions - ids[before] <= ids[after] - positions, ids[before], ids[after])


def condition(audio_features: np.ndarray, expression: np.ndarray, index: int) -> types.Condition:
    """The condition of frame `index` from audio windows [T, A, D] and expression [T, E]; any two lengths."""
    return types.Condition(audio=tokens(audio_features, index), expression=tokens(expression, index))


def crop_of(source: dict) -> tuple[int, int, int, int] | None:
    """Where in its video the clip was cut out, if `preprocess` noted it."""
    crop = source.get("crop")
    whole = isinstance(crop, list) and len(crop) == 4 and all(isinstance(edge, int) for edge in crop)
    return tuple(crop) if whole and crop[0] < crop[2] and crop[1] < crop[3] else None


def read_picture(path: Path, channels: int) -> np.ndarray:
    """A JPEG or PNG as u8 [H, W] (1 channel), RGB [H, W, 3] or RGBA [H, W, 4]; UserError unless whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); restore the file or make the dataset again"
        ) from None
    return decode_picture(data, str(path), channels)


def decode_picture(data: bytes, name: str, channels: int, width: int | None = None) -> np.ndarray:
    """The content of a JPEG or PNG file as `read_picture` returns it; `width`: what a PNG's must be."""
    if width is not None and data[16:20] != width.to_bytes(4, "big"):  # before anything is made of that size
        raise UserError(f"{name}: is no PNG picture {width} pixels wide; restore the file")
    # Some decoders fill what is missing of a cut file with grey, so the end marks are looked for first.
    whole = b"\xff\xd9" in data[-64:] if data[:2] == b"\xff\xd8" else b"IEND" in data[-64:]
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR, 4: cv2.IMREAD_UNCHANGED}[channels]
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if whole else None
    if picture is None or picture.dtype != np.uint8:
        raise UserError(f"{name}: is not a whole 8-bit JPEG or PNG picture; restore the file or make the dataset again")
    if (1 if picture.ndim == 2 else picture.shape[2]) != channels:
        raise UserError(f"{name}: has no transparency channel; save it as an RGBA picture")
    return picture if channels == 1 else cv2.cvtColor(picture, _TO_RGB[channels])


_TO_RGB = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}


def over(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """A straight-alpha u8 [H, W, 4] layer over a u8 [H, W, 3] background; colour under alpha 0 does not matter."""
    rows, out = np.flatnonzero(rgba[..., 3].any(1)), background.copy()
    if not rows.size:
        return out
    part = slice(rows[0], rows[-1] + 1)
    alpha = cv2.merge([rgba[part, :, 3]] * 3).astype(np.uint16)  # three equal channels: numpy is slow over short axes
    total = cv2.cvtColor(rgba[part], cv2.COLOR_RGBA2RGB) * alpha + background[part] * (255 - alpha) + 127
    out[part] = (total + 1 + (total >> 8)) >> 8  # total // 255, for every total that there can be
    return out


def count_labels(labels: np.ndarray) -> np.ndarray:
    """Pixels per bit of types.Label in a label image, i32 [6]."""
    return np.array([np.count_nonzero(labels & bit) for bit in types.Label], np.int32)
