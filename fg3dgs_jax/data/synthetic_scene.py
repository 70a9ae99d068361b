"""What stands still in the procedural clip: neck and shoulders, and the room behind. Colours are RGB in [0, 1]."""

import cv2
import numpy as np

SAMPLES = 2  # per pixel and axis
SHIRTS = ((0.20, 0.33, 0.52), (0.55, 0.20, 0.22), (0.22, 0.42, 0.33))


def noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Smooth noise of zero mean and about unit deviation, [rows, cols]."""
    return cv2.resize(rng.standard_normal(cells).astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)


def render_torso(
    seed: int, unit: float, centre: tuple[float, float], skin: np.ndarray, width: int, height: int
) -> np.ndarray:
    """Neck and shoulders, u8 [H, W, 4] RGBA; the neck goes on behind the chin and jaw.

    `unit`: pixels of one head unit, `centre`: the pixel (x, y) of the head at rest.
    """
    rng = np.random.default_rng([seed, 4])
    x = ((np.arange(SAMPLES * width) + 0.5) / SAMPLES - centre[0]) / unit
    y = (centre[1] - (np.arange(SAMPLES * height) + 0.5) / SAMPLES) / unit
    x, y = np.meshgrid(x, y)
    side = np.abs(x)
    slope = np.interp(side, [0, 0.42, 0.62, 1.0, 1.5, 1.95, 2.1], [-0.35, -0.98, -1.16, -1.30, -1.44, -1.72, -2.2])
    neck_top = np.where(side < 0.45, -0.25 - 0.5 * (side / 0.45) ** 4, slope)
    cover = np.where(side < 0.45, y < neck_top, y < slope)
    size = x.shape
    light = 0.80 - 0.22 * x
    neck = (
        skin
        * (light * np.interp(side, [0, 0.3, 0.46], [1.0, 0.92, 0.7]) * np.interp(y, [-1.3, -0.9], [0.95, 0.62]))[
            ..., None
        ]
    )
    weave = 1 + 0.10 * np.sin(26 * x + 4 * y) * np.sin(26 * y) + 0.05 * noise(rng, (14, 14), size)
    shirt = np.array(SHIRTS[rng.integers(len(SHIRTS))]) * (1.15 * light * weave)[..., None]
    collar = -1.42 + 0.42 * (side / 0.62) ** 2
    picture = np.where((y < collar)[..., None], shirt, neck)
    picture = np.where((np.abs(y - collar) < 0.035)[..., None] & (side < 0.66)[..., None], shirt * 0.55, picture)
    rgba = np.concatenate([np.clip(picture, 0, 1) * cover[..., None], cover[..., None]], -1).astype(np.float32)
    small = cv2.resize(rgba, (width, height), interpolation=cv2.INTER_AREA)
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    return np.round(small * 255).astype(np.uint8)


def render_background(seed: int, width: int, height: int) -> np.ndarray:
    """A wall with soft light, a picture frame and a shelf of books, u8 [H, W, 3]."""
    rng = np.random.default_rng([seed, 5])
    y, x = np.mgrid[0 : 2 * height, 0 : 2 * width] / (2 * np.array([height, width]))[:, None, None]
    wall = rng.uniform([0.55, 0.58, 0.60], [0.78, 0.76, 0.74])
    picture = wall * (1.12 - 0.45 * x - 0.12 * y + 0.03 * noise(rng, (9, 9), x.shape))[..., None]
    for left in np.arange(0.0, 0.32, 0.04):  # books on the image's left
        top = rng.uniform(0.38, 0.48)
        book = (x >= left) & (x < left + 0.036) & (y > top) & (y < 0.62)
        picture[book] = rng.uniform(0.15, 0.7, 3) * (0.85 + 0.3 * np.sin((x[book] - left) / 0.036 * np.pi))[:, None]
    picture[(x < 0.34) & (y >= 0.62) & (y < 0.645)] = [0.36, 0.25, 0.16]
    frame = (x > 0.72) & (x < 0.98) & (y > 0.1) & (y < 0.42)
    inner = (x > 0.735) & (x < 0.965) & (y > 0.12) & (y < 0.40)
    picture[frame] = [0.22, 0.18, 0.15]
    waves = 0.5 + 0.3 * np.sin(14 * y + 3 * np.sin(9 * x))
    picture[inner] = np.stack([waves, 0.6 * waves + 0.2, 0.75 - 0.4 * waves], -1)[inner]
    soft = cv2.GaussianBlur(np.clip(picture, 0, 1).astype(np.float32), (0, 0), height / 110)
    return np.round(255 * cv2.resize(soft, (width, height), interpolation=cv2.INTER_AREA)).astype(np.uint8)
