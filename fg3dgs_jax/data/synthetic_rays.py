"""Where rays meet the procedural head: a star-shaped surface, |p| = radius(direction of p)."""

import dataclasses

import cv2
import numpy as np

from fg3dgs_jax.data import synthetic_head as heads

SAMPLES = 2  # per pixel and axis
HIT = 0.006  # head units; a ray this close to the surface has met it
REACH = 1.4  # head units; all of the head lies within
STRIDE = 0.06  # head units; a chord this short lies less than HIT under a surface as round as a head


@dataclasses.dataclass
class Rays:
    """Where the samples of a box of the image meet the head; maps [h, w]."""

    direction: np.ndarray  # [h, w, 3], unit, head space
    origin: np.ndarray  # [3], head units
    hit: np.ndarray
    az: np.ndarray
    el: np.ndarray


def head_box(surface: heads.Surface, viewmat: np.ndarray, intrinsics: np.ndarray, width: int, height: int):
    """Rows and columns that hold the whole head."""
    az, el = (grid[::8, ::8] for grid in heads.angles())
    points = heads.UNIT * cv2.resize(surface.radius, az.shape[::-1])[..., None] * heads.direction(az, el)
    pixels = project(points.reshape(-1, 3), viewmat, intrinsics)
    edge = 8  # pixels around, and the least that stays of a head outside the image
    low = np.clip(np.floor(pixels.min(0)).astype(int) - edge, 0, [width - edge, height - edge])
    high = np.clip(np.ceil(pixels.max(0)).astype(int) + edge, low + edge, [width, height])
    return low[1], high[1], low[0], high[0]


def project(points: np.ndarray, viewmat: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels [n, 2] (x, y) of world points [n, 3]."""
    camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    return camera[:, :2] / camera[:, 2:] * intrinsics[:2] + intrinsics[2:]


def cast(surface: heads.Surface, viewmat: np.ndarray, intrinsics: np.ndarray, box: tuple[int, int, int, int]) -> Rays:
    """Meets the star-shaped surface by stepping along rays, first on every fourth sample, then on all."""
    row0, row1, col0, col1 = box
    x = ((np.arange(SAMPLES * (col1 - col0)) + 0.5) / SAMPLES + col0 - intrinsics[2]) / intrinsics[0]
    y = ((np.arange(SAMPLES * (row1 - row0)) + 0.5) / SAMPLES + row0 - intrinsics[3]) / intrinsics[1]
    grid = np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))], -1).astype(np.float32)
    direction = grid @ viewmat[:3, :3].astype(np.float32)  # R^T applied to each
    direction /= np.sqrt(np.square(grid).sum(-1, keepdims=True))
    origin = (-viewmat[:3, :3].T @ viewmat[:3, 3] / heads.UNIT).astype(np.float32)
    coarse = direction[1::4, 1::4]
    nearest = -(coarse @ origin)
    start = nearest - np.sqrt(np.maximum(REACH**2 - (origin @ origin - nearest**2), 0))
    hit, distance, _, _ = _scan(surface, origin, coarse.reshape(-1, 3), start.ravel(), 2 * REACH)
    distance = np.where(hit, distance, start.max() + 2 * REACH).reshape(start.shape)
    # The nearest of the neighbours, a little before it: never start a ray behind an edge that a neighbour sees.
    distance = cv2.resize(cv2.erode(distance, np.ones((5, 5))), direction.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    distance = distance - np.float32(0.01)
    gap, az, el = _march(surface, origin, direction, distance, 4)
    hit = np.abs(gap) < HIT
    again = np.nonzero(~hit & (cv2.dilate(hit.astype(np.uint8), np.ones((15, 15))) > 0))
    if len(again[0]):
        hit[again], _, az[again], el[again] = _scan(surface, origin, direction[again], distance[again], REACH)
    return Rays(direction, origin, hit, az, el)


def _gap(surface: heads.Surface, origin: np.ndarray, direction: np.ndarray, distance: np.ndarray):
    """How far points along rays are outside the surface, their azimuth, elevation and slope; maps like `distance`."""
    dx, dy, dz = direction
    x, y, z = origin[0] + distance * dx, origin[1] + distance * dy, origin[2] + distance * dz
    flat = x * x + z * z
    length = np.sqrt(flat + y * y)
    az, el = np.arctan2(x, z), np.arctan2(y, np.sqrt(flat))
    slope = -(x * dx + y * dy + z * dz) / length
    return length - heads.lookup(surface.radius, az, el), az, el, slope


def _march(surface: heads.Surface, origin: np.ndarray, direction: np.ndarray, distance: np.ndarray, steps: int):
    """Newton steps along rays [h, w, 3] towards |p| = radius(p): remaining gap, azimuth and elevation, maps [h, w].

    The slope is a ball's or, where the radius itself changes fast, the one that the last step met (secant).
    """
    direction = np.ascontiguousarray(np.moveaxis(direction, -1, 0))
    before, step = None, None
    for _ in range(steps):
        gap, _, _, slope = _gap(surface, origin, direction, distance)
        if before is not None:
            slope = np.maximum(slope, np.minimum((before - gap) / np.where(np.abs(step) < 1e-5, 1e-5, step), 6))
        before, step = gap, gap / np.maximum(slope, 0.5)
        distance = distance + step
    return _gap(surface, origin, direction, distance)[:3]


def _scan(surface: heads.Surface, origin: np.ndarray, direction: np.ndarray, start: np.ndarray, length: float):
    """Where rays [n, 3] first cross the surface, in even strides: hit, distance, azimuth, elevation, each [n].

    Slow but safe: Newton steps lose their way at ears, hair ends and outlines.
    """
    direction = direction.T[..., None]
    distances = start[:, None] + np.arange(-0.1, length, STRIDE, dtype=np.float32)
    gap = _gap(surface, origin, direction, distances)[0]
    crossed = gap < 0
    after = np.maximum(crossed.argmax(1), 1)
    rows = np.arange(len(gap))
    before, behind = gap[rows, after - 1], gap[rows, after]
    met = distances[rows, after - 1] + STRIDE * np.clip(before / np.where(before == behind, 1, before - behind), 0, 1)
    _, az, el, _ = _gap(surface, origin, direction, met[:, None])
    return crossed.any(1), met, az[:, 0], el[:, 0]
