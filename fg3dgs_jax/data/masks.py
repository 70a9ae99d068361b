"""Region masks of a portrait: head against torso, hair, lips, inner mouth, eyes, from outline, landmarks and colours.

MediaPipe's person mask gives the outline. What belongs to the head is decided by landmarks down to the ear lobes and
inside the face's contour; below that only hair does, told from neck and clothes by colours learned from the clip.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter

from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data.face import POINTS_68, ROW_CHIN, ROW_FOREHEAD
from fg3dgs_jax.data.models import hushed, import_mediapipe
from fg3dgs_jax.types import Label

OVAL = np.array([
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152,
    148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
])  # fmt: skip
LIPS_OUTER = np.array([61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185])
LIPS_INNER = np.array([78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191])
LOBES, LOBE_MARGIN = (132, 361), 0.04  # where the ears end, on the image's left and right; face heights
BROWS = np.array([70, 63, 105, 66, 107, 336, 296, 334, 293, 300])
CELLS = (32, 16, 16, 4)  # of lightness, chroma a and b, texture
NUM_CELLS = int(np.prod(CELLS))
TEXTURES = (1.0, 2.0, 4.0)  # mean absolute fine detail of the lightness, 0 to 255


class FaceAxes(NamedTuple):
    """Coordinates in the face's own frame, in face heights: f32 [H, W] each, (0, 0) at the chin."""

    across: np.ndarray  # to the image's right
    down: np.ndarray  # positive below the chin
    height: float  # of the face in pixels


@contextlib.contextmanager
def person_segmenter(model: str | Path, part: int = 0) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """A function from an image u8 [H, W, 3] to the probability f32 [H, W] that a pixel shows the person.

    With the multi-class model, part 1 is hair (0 background, 2 body skin, 3 face skin, 4 clothes, 5 other).
    """
    mp = import_mediapipe()
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.ImageSegmenterOptions(
        base_options=BaseOptions(model_asset_path=str(model)), output_confidence_masks=True, output_category_mask=False
    )
    with hushed():
        made = vision.ImageSegmenter.create_from_options(options)
    with made as segmenter:

        def segment(image: np.ndarray) -> np.ndarray:
            picture = mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(image))
            found = segmenter.segment(picture).confidence_masks
            return found[min(part, len(found) - 1)].numpy_view().reshape(image.shape[:2]).copy()

        yield segment


def main_part(person: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The person mask u8 [H, W] without specks and other people: the connected part that holds the face."""
    count, parts = cv2.connectedComponents((person > 100).astype(np.uint8))
    if count <= 2:
        return person
    inside = clips.polygon_mask(landmarks[OVAL, :2], person.shape[1], person.shape[0])
    part = np.argmax(np.bincount(parts[inside], minlength=count)[1:]) + 1 if (inside & (parts > 0)).any() else 1
    near = cv2.dilate((parts == part).astype(np.uint8), np.ones((5, 5), np.uint8))
    return person * near


def face_axes(landmarks: np.ndarray, width: int, height: int) -> FaceAxes:
    """The face's own axes from the landmarks [478, >=2] of one frame."""
    chin, forehead = landmarks[ROW_CHIN, :2], landmarks[ROW_FOREHEAD, :2]
    length = float(np.linalg.norm(chin - forehead))
    x, y = ((chin - forehead) / length).tolist()
    columns = (np.arange(width) + 0.5 - chin[0]).astype(np.float32)
    rows = (np.arange(height)[:, None] + 0.5 - chin[1]).astype(np.float32)
    return FaceAxes((y * columns - x * rows) / length, (x * columns + y * rows) / length, length)


def below_lobes(landmarks: np.ndarray, axes: FaceAxes) -> np.ndarray:
    """Pixels lower than the ear lobes, bool [H, W]; the line between the lobes continues to both sides."""
    chin, forehead = landmarks[ROW_CHIN, :2], landmarks[ROW_FOREHEAD, :2]
    y = (chin - forehead) / axes.height
    x = np.array([y[1], -y[0]])
    (u0, v0), (u1, v1) = (((landmarks[i, :2] - chin) @ np.stack([x, y], 1)) / axes.height for i in LOBES)
    slope = np.clip((v1 - v0) / max(abs(u1 - u0), 1e-3), -0.3, 0.3)
    return axes.down > (v0 + v1) / 2 + LOBE_MARGIN + slope * (axes.across - (u0 + u1) / 2)


def colour_bins(image: np.ndarray) -> np.ndarray:
    """Index i32 [H, W] of each pixel's cell of lightness, chroma and texture: hair has strands, skin is smooth."""
    lab = cv2.cvtColor(cv2.GaussianBlur(image, (0, 0), 0.8), cv2.COLOR_RGB2LAB)
    light = lab[..., 0].astype(np.float32)
    detail = cv2.blur(np.abs(light - cv2.GaussianBlur(light, (0, 0), 1.5)), (7, 7))
    texture = np.digitize(detail, TEXTURES)
    chroma = np.clip((lab[..., 1:].astype(np.int32) - 128) * 3 + 128, 0, 255) >> 4
    cells = (lab[..., 0] >> 3, chroma[..., 0], chroma[..., 1], texture)
    return np.ravel_multi_index(cells, CELLS).astype(np.int32)


def hair_prior(axes: FaceAxes, low: np.ndarray, oval: np.ndarray) -> np.ndarray:
    """How likely hair is by place alone, f32 [H, W]: low on face, ears and neck, falling with the distance below."""
    under_chin = np.exp(-((axes.across / 0.33) ** 2)) * (axes.down > -0.15)
    sides = 0.5 / (1.0 + np.exp((axes.down - 0.4) / 0.1)) * np.exp(-np.clip(np.abs(axes.across) - 0.6, 0, None) / 0.2)
    high = np.where(oval, 0.25, np.where(axes.down > -1.2, 0.5, 0.8))
    return np.where(low, sides * (1 - 0.9 * under_chin) + 1e-3, high).astype(np.float32)


def hair_posterior(ratio: np.ndarray, prior: np.ndarray, low: np.ndarray, face: float) -> np.ndarray:
    """Probability of hair f32 [H, W] from colour (ratio) and place. Hair falls: below the lobes it needs hair above."""
    posterior = _posterior(ratio, prior)
    length = max(3, round(0.2 * face))
    for _ in range(2):
        above = cv2.blur(posterior, (5, length), anchor=(-1, length - 1))
        posterior = np.where(low, _posterior(ratio, prior * (0.2 + 1.4 * above)), posterior)
    return posterior.astype(np.float32)


def learn_hair(images: list[np.ndarray], persons: list[np.ndarray], landmarks: np.ndarray) -> np.ndarray:
    """Likelihood ratio hair / (hair + neck + clothes) per colour cell, f32 [NUM_CELLS], from some frames of the clip.

    Seeds: hair is around the face above the lobes, clothes are at the lower edge, skin on the face and the neck under
    the chin. Two more rounds add what the first ones find, for hair that changes its colour towards the tips.
    """
    frames = []
    for full, outline, points in zip(images, persons, landmarks / 2, strict=True):
        height, width = full.shape[0] // 2, full.shape[1] // 2  # half size, as in `label_frame`: texture depends on it
        image, person = (cv2.resize(a, (width, height), interpolation=cv2.INTER_AREA) for a in (full, outline))
        axes = face_axes(points, width, height)
        low = below_lobes(points, axes)
        oval = clips.polygon_mask(_grown(points[OVAL, :2], 1.12), width, height)
        solid = cv2.erode(person, np.ones((5, 5), np.uint8)) > 230
        ears = (axes.down > -0.8) & (np.abs(axes.across) < 0.65)
        hair = solid & ~oval & ~low & ~ears & ((axes.down < -1.2) | (np.abs(axes.across) > 0.5))
        other = solid & (clips.polygon_mask(_grown(points[OVAL, :2], 0.7), width, height) & (axes.down > -0.6))
        other |= solid & (np.arange(height)[:, None] > 0.9 * height) & low & (axes.down > 0.3)
        other |= solid & (np.abs(axes.across) < 0.22) & (axes.down > 0.07) & (axes.down < 0.27)
        place = (hair_prior(axes, low, oval), low, axes.height)
        frames.append((colour_bins(image), hair, other, solid & low & ~oval, place))
    ratio = None
    for _ in range(3):
        counts = np.zeros((2, NUM_CELLS))
        for cells, hair, other, open_region, place in frames:
            weight = np.zeros((2, *cells.shape))
            weight[0], weight[1] = hair, other
            if ratio is not None:
                posterior = hair_posterior(ratio[cells], *place)
                weight[0] *= ratio[cells] > 0.4  # bald places and ears
                weight[0] += 0.5 * open_region * np.clip(2 * posterior - 1, 0, 1)
                weight[1] += 0.5 * open_region * np.clip(1 - 2 * posterior, 0, 1) * (place[0] < 0.35)
            for row in range(2):
                counts[row] += np.bincount(cells.ravel(), weight[row].ravel(), NUM_CELLS)
        if counts[0].sum() < 0.004 * sum(place[2] ** 2 for *_, place in frames):  # hardly any hair to learn from
            return np.zeros(NUM_CELLS, np.float32)
        density = [_spread(row / max(row.sum(), 1)) for row in counts]
        ratio = (density[0] / (density[0] + density[1])).astype(np.float32)
    return ratio


def _spread(density: np.ndarray) -> np.ndarray:
    """Colours that the seeds hardly hold go with the nearest colours that they do."""
    cube = density.reshape(CELLS)
    near, far = (gaussian_filter(cube, (s, s / 2, s / 2, 0.5), mode="constant") for s in (0.7, 2.5))
    return (0.8 * near + 0.2 * far).ravel() + 1e-6


def _posterior(ratio: np.ndarray, prior: np.ndarray) -> np.ndarray:
    return ratio * prior / (ratio * prior + (1 - ratio) * (1 - prior) + 1e-9)


def _grown(points: np.ndarray, factor: float) -> np.ndarray:
    middle = points.mean(0)
    return middle + factor * (points - middle)


def label_frame(
    image: np.ndarray,
    person: np.ndarray,
    landmarks: np.ndarray,
    hair_ratio: np.ndarray,
    seen_hair: np.ndarray | None = None,
) -> np.ndarray:
    """Bits of `types.Label`, u8 [H, W].

    image u8 [H, W, 3]; person u8 [H, W], 255 where it surely is; landmarks [478, >=2] in pixels; hair_ratio of
    `learn_hair`; seen_hair u8 [H, W], 255 where a model sees hair, takes its place.
    """
    height, width = image.shape[:2]
    points = landmarks[:, :2]
    face = float(np.linalg.norm(points[ROW_CHIN] - points[ROW_FOREHEAD]))
    oval = clips.polygon_mask(_grown(points[OVAL], 1.02), width, height)
    hair, low, forehead = _soft_regions(image, points, hair_ratio)
    hair = hair if seen_hair is None else seen_hair > 127
    hair &= ~oval | forehead
    solid = person > 127
    head = _tidy(solid & low & hair, solid & (oval | ~low)) & solid
    torso = _main_parts(solid & ~head)
    head |= solid & ~torso  # what lies between locks of hair
    hair |= low & ~oval
    labels = head * np.uint8(Label.HEAD) | (head & hair) * np.uint8(Label.HAIR)
    labels |= torso * np.uint8(Label.TORSO)
    inner = clips.polygon_mask(points[LIPS_INNER], width, height)
    inner &= np.linalg.norm(points[13] - points[14]) > 0.006 * face  # closed lips have no inside
    lips = clips.polygon_mask(points[LIPS_OUTER], width, height) & ~inner
    eyes = clips.eyes_mask(points[POINTS_68], width, height)
    for mask, label in ((lips, Label.LIPS), (inner, Label.INNER_MOUTH), (eyes, Label.EYES)):
        labels |= mask * np.uint8(label | Label.HEAD)
    labels[(labels & Label.HEAD) > 0] &= np.uint8(255 ^ Label.TORSO)
    return labels


def _soft_regions(
    image: np.ndarray, points: np.ndarray, ratio: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hair, below the lobes, above the brows: bool [H, W] each, computed at half size; these edges are soft anyway."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    small, half = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), points / 2
    axes = face_axes(half, width, height)
    low = below_lobes(half, axes)
    oval = clips.polygon_mask(half[OVAL], width, height)
    posterior = hair_posterior(ratio[colour_bins(small)], hair_prior(axes, low, oval), low, axes.height)
    guide = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    hair = guided_filter(guide, posterior, max(2, round(0.02 * axes.height)), 4e-3)
    soft = (hair, low.astype(np.float32), _above_brows(half, axes).astype(np.float32))
    full = (image.shape[1], image.shape[0])
    return tuple(cv2.resize(mask, full, interpolation=cv2.INTER_LINEAR) > 0.5 for mask in soft)


def guided_filter(guide: np.ndarray, image: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """He et al. 2010: locally linear in the guide, f32 [H, W] each; smooths without crossing the guide's edges."""
    size = (2 * radius + 1, 2 * radius + 1)
    mean_guide, mean_image = cv2.blur(guide, size), cv2.blur(image, size)
    slope = (cv2.blur(guide * image, size) - mean_guide * mean_image) / (
        cv2.blur(guide * guide, size) - mean_guide**2 + eps
    )
    return cv2.blur(slope, size) * guide + cv2.blur(mean_image - slope * mean_guide, size)


def _above_brows(landmarks: np.ndarray, axes: FaceAxes) -> np.ndarray:
    """Where hair may fall over the forehead: higher than the brows with a margin, bool [H, W]."""
    chin, forehead = landmarks[ROW_CHIN, :2], landmarks[ROW_FOREHEAD, :2]
    along = (landmarks[BROWS, :2] - chin) @ (chin - forehead) / axes.height**2
    return axes.down < along.min() - 0.06


def _tidy(low_hair: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The head: `rest` (face, ears, hair above the lobes) and the larger parts of the hair below that touch it."""
    size = max(3, round(0.012 * rest.shape[0]) | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    low_hair = cv2.morphologyEx(low_hair.astype(np.uint8), cv2.MORPH_OPEN, kernel)
    mask = cv2.morphologyEx(low_hair | rest, cv2.MORPH_CLOSE, kernel)
    count, parts = cv2.connectedComponents(mask)
    if count > 2:
        mask = parts == np.argmax(np.bincount(parts[rest], minlength=count))
    mask = mask.astype(np.uint8)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    for index in range(1, count):  # holes
        if stats[index, cv2.CC_STAT_AREA] < 0.002 * mask.size:
            mask[parts == index] = 1
    return mask.astype(bool)


def _main_parts(mask: np.ndarray, share: float = 0.03) -> np.ndarray:
    """The connected parts that are not small against the whole mask."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    large = stats[:, cv2.CC_STAT_AREA] >= share * max(np.count_nonzero(mask), 1)
    large[0] = False
    return large[parts]
