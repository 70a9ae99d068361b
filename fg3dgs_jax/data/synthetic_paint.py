"""Pictures of the procedural head: textures, ray casting, shading, the torso and what stands behind.

Colours are RGB in [0, 1]. Everything is drawn with 2x2 samples a pixel.
"""

import dataclasses

import cv2
import numpy as np

from fg3dgs_jax.data import synthetic_head as heads
from fg3dgs_jax.types import Label

SAMPLES = 2  # per pixel and axis
HIT = 0.006  # head units; a ray this close to the surface has met it
KEY_LIGHT = np.array([-0.52, -0.62, -0.59])  # towards the light, camera axes (x right, y down, z away)
FILL_LIGHT = np.array([0.78, -0.1, -0.62])
PEOPLE = (  # skin, hair, iris
    ((0.90, 0.70, 0.59), (0.34, 0.21, 0.12), (0.25, 0.42, 0.55)),
    ((0.58, 0.40, 0.30), (0.09, 0.07, 0.06), (0.26, 0.16, 0.09)),
    ((0.80, 0.59, 0.46), (0.14, 0.10, 0.08), (0.36, 0.24, 0.12)),
    ((0.95, 0.78, 0.68), (0.62, 0.44, 0.22), (0.28, 0.44, 0.28)),
)
SHIRTS = ((0.20, 0.33, 0.52), (0.55, 0.20, 0.22), (0.22, 0.42, 0.33))


@dataclasses.dataclass(frozen=True)
class Look:
    """One person's shape, textures and colours."""

    shape: heads.Shape
    albedo: np.ndarray  # f32 [512, 1024, 3] over (elevation, azimuth) at rest
    skin: np.ndarray
    iris: np.ndarray
    lips: np.ndarray


def make_look(seed: int) -> Look:
    """The look of a seed."""
    rng = np.random.default_rng([seed, 3])
    shape = heads.build(seed)
    skin, hair, iris = (np.array(color) for color in PEOPLE[seed % len(PEOPLE)])
    return Look(shape, _albedo(shape, skin, hair, rng), skin, iris, lips=skin * [0.86, 0.58, 0.60])


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Smooth noise of zero mean and about unit deviation, [rows, cols]."""
    return cv2.resize(rng.standard_normal(cells).astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)


def _albedo(shape: heads.Shape, skin: np.ndarray, hair: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, cols = size = (2 * heads.ROWS, 2 * heads.COLS)
    az, el = (cv2.resize(grid, size[::-1]) for grid in heads.angles())
    side = np.abs(az)
    spot = lambda a, e, wa, we: np.exp(-(((side - a) / wa) ** 2) - ((el - e) / we) ** 2)[..., None]  # noqa: E731
    tone = 1 + 0.025 * _noise(rng, (12, 24), size) + 0.02 * _noise(rng, (90, 180), size) + 0.015 * _noise(rng, size, size)
    picture = skin * tone[..., None]
    picture = picture * (1 - spot(0.5, -0.2, 0.22, 0.16) * [0.0, 0.13, 0.12])  # blush
    picture = picture * (1 - spot(0.36, 0.02, 0.16, 0.05) * [0.14, 0.17, 0.12])  # under the eyes
    picture = picture * (1 - 0.75 * spot(0.065, -0.236, 0.035, 0.018))  # nostrils
    picture = picture * (1 - 0.10 * spot(0, 0.52, 0.5, 0.012)) * (1 - 0.08 * spot(0, 0.44, 0.45, 0.012))  # forehead lines
    for _ in range(150):  # freckles and moles: what the eye, and a tracker, can hold on to
        a, e = rng.uniform(-0.85, 0.85), rng.uniform(-0.75, 0.5)
        row, col = round((e / np.pi + 0.5) * rows), round((a / (2 * np.pi) + 0.5) * cols)
        cv2.circle(picture, (col, row), int(rng.integers(1, 3)), (skin * rng.uniform(0.62, 0.85)).tolist(), -1, cv2.LINE_AA)
    strands = _noise(rng, (24, 420), size) + 0.5 * _noise(rng, (40, 900), size)
    dark = hair * (1 + 0.33 * strands[..., None])
    arc = np.interp(side, [0.12, 0.2, 0.38, 0.5, 0.63], [0.30, 0.335, 0.36, 0.345, 0.28])
    thick = np.interp(side, [0.10, 0.16, 0.36, 0.63, 0.66], [0.0, 0.042, 0.040, 0.012, 0.0])
    brow = np.clip((thick - np.abs(el - arc)) / 0.015, 0, 1) * np.clip(0.85 + 0.12 * strands, 0, 1)
    cover = np.maximum(cv2.resize(shape.hair, size[::-1]), brow)[..., None]
    return np.clip(picture * (1 - cover) + dark * cover, 0.01, 1).astype(np.float32)


@dataclasses.dataclass
class Rays:
    """Where the samples of a box of the image meet the head; maps [h, w]."""

    direction: np.ndarray  # [h, w, 3], unit, head space
    origin: np.ndarray  # [3], head units
    hit: np.ndarray
    az: np.ndarray
    el: np.ndarray


def render_head(look: Look, surface: heads.Surface, viewmat: np.ndarray, intrinsics: np.ndarray, width: int, height: int):
    """The head alone: premultiplied colour f32 [H, W, 3], coverage f32 [H, W], and labels u8 [H, W] of its regions."""
    row0, row1, col0, col1 = _bounds(surface, viewmat, intrinsics, width, height)
    rays = cast(surface, viewmat, intrinsics, (row0, row1, col0, col1))
    color, labels = _shade(look, surface, viewmat, rays)
    color = color * rays.hit[..., None]
    size = (col1 - col0, row1 - row0)
    shrink = lambda picture: cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # noqa: E731
    out, alpha, bits = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32), 0
    out[row0:row1, col0:col1] = shrink(color)
    alpha[row0:row1, col0:col1] = shrink(rays.hit.astype(np.float32))
    for label, mask in labels.items():  # a pixel belongs to what most of its samples show
        region = np.zeros((height, width), np.uint8)
        region[row0:row1, col0:col1] = shrink((mask & rays.hit).astype(np.float32)) >= 0.5
        bits = bits | region * np.uint8(label)
    return out, alpha, bits


def _bounds(surface: heads.Surface, viewmat: np.ndarray, intrinsics: np.ndarray, width: int, height: int):
    """Rows and columns that hold the whole head."""
    az, el = (grid[::8, ::8] for grid in heads.angles())
    points = heads.UNIT * cv2.resize(surface.radius, az.shape[::-1])[..., None] * heads.direction(az, el)
    pixels = project(points.reshape(-1, 3), viewmat, intrinsics)
    low, high = pixels.min(0) - 6, pixels.max(0) + 6
    (col0, row0), (col1, row1) = np.clip(np.floor([low, high]).astype(int), 0, [width - 8, height - 8]) + [[0, 0], [8, 8]]
    return row0, row1, col0, col1


def project(points: np.ndarray, viewmat: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels [n, 2] (x, y) of world points [n, 3]."""
    camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    return camera[:, :2] / camera[:, 2:] * intrinsics[:2] + intrinsics[2:]


def cast(surface: heads.Surface, viewmat: np.ndarray, intrinsics: np.ndarray, box: tuple[int, int, int, int]) -> Rays:
    """Meets the star-shaped surface by stepping along rays, first on every fourth sample, then on all."""
    row0, row1, col0, col1 = box
    x = ((np.arange(SAMPLES * (col1 - col0)) + 0.5) / SAMPLES + col0 - intrinsics[2]) / intrinsics[0]
    y = ((np.arange(SAMPLES * (row1 - row0)) + 0.5) / SAMPLES + row0 - intrinsics[3]) / intrinsics[1]
    grid = np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))], -1) @ viewmat[:3, :3]  # = R^T applied to each
    direction = (grid / np.linalg.norm(grid, axis=-1, keepdims=True)).astype(np.float32)
    origin = (-viewmat[:3, :3].T @ viewmat[:3, 3] / heads.UNIT).astype(np.float32)
    coarse = direction[1::4, 1::4]
    nearest = -(coarse @ origin)
    start = nearest - np.sqrt(np.maximum(1.4**2 - (origin @ origin - nearest**2), 0))
    distance = _march(surface, origin, coarse, start, 20, shortest=0.0)[0]
    # The nearest of the neighbours, a little before it: never start a ray behind an edge that a neighbour sees.
    distance = cv2.resize(cv2.erode(distance, np.ones((3, 3))), direction.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    _, gap, az, el = _march(surface, origin, direction, distance - 0.01, 4, shortest=0.5)
    hit = np.abs(gap) < HIT
    again = np.nonzero(~hit & (cv2.dilate(hit.astype(np.uint8), np.ones((9, 9))) > 0))
    if len(again[0]):
        hit[again], az[again], el[again] = _scan(surface, origin, direction[again], distance[again])
    return Rays(direction, origin, hit, az, el)


def _gap(surface: heads.Surface, origin: np.ndarray, direction: np.ndarray, distance: np.ndarray):
    """How far points along rays are outside the surface, their azimuth, elevation and slope; maps like `distance`."""
    x, y, z = (origin[k] + distance * direction[..., k] for k in range(3))
    flat = x * x + z * z
    length = np.sqrt(flat + y * y)
    az, el = np.arctan2(x, z), np.arctan2(y, np.sqrt(flat))
    slope = -(x * direction[..., 0] + y * direction[..., 1] + z * direction[..., 2]) / length
    return length - heads.lookup(surface.radius, az, el), az, el, slope


def _march(surface, origin, direction: np.ndarray, distance: np.ndarray, steps: int, shortest: float):
    """Steps towards |p| = radius(p): distance, remaining gap, azimuth and elevation, maps [h, w].

    Newton steps with slopes of at least `shortest`; 0 makes them short and safe instead, for the first approach.
    The slope is a ball's or, where the radius itself changes fast, the one that the last step met (secant).
    """
    direction, distance = np.asarray(direction, np.float32), distance.astype(np.float32)
    before, step = None, None
    for _ in range(steps):
        gap, _, _, slope = _gap(surface, origin, direction, distance)
        if before is not None and shortest:
            slope = np.maximum(slope, np.minimum((before - gap) / np.where(np.abs(step) < 1e-5, 1e-5, step), 6))
        before, step = gap, gap / np.maximum(slope, shortest) if shortest else 0.6 * gap
        distance = distance + step
    return distance, *_gap(surface, origin, direction, distance)[:3]


def _scan(surface, origin, direction: np.ndarray, distance: np.ndarray):
    """First crossing of rays [n] that Newton steps lost at ears, hair ends and outlines: hit, azimuth, elevation."""
    distances = distance[:, None] + np.arange(-0.12, 0.5, 0.025, dtype=np.float32)
    gap, _, _, _ = _gap(surface, origin, direction[:, None], distances)
    crossed = gap < 0
    after = np.maximum(crossed.argmax(1), 1)
    rows = np.arange(len(gap))
    before, behind = gap[rows, after - 1], gap[rows, after]
    met = distances[rows, after - 1] + 0.025 * np.clip(before / np.where(before == behind, 1, before - behind), 0, 1)
    _, az, el, _ = _gap(surface, origin, direction[:, None], met[:, None])
    return crossed.any(1), az[:, 0], el[:, 0]


def _shade(look: Look, surface: heads.Surface, viewmat: np.ndarray, rays: Rays):
    """Colour f32 [h, w, 3] of every sample, and masks [h, w] of the labels."""
    rest = heads.lookup(surface.rest, rays.az, rays.el)
    rest_az, rest_el = rest[..., 0], rest[..., 1]
    color = heads.lookup(look.albedo, rest_az, rest_el)
    hair = heads.lookup(look.shape.hair, rest_az, rest_el)
    labels = {Label.HEAD: rays.hit, Label.HAIR: hair > 0.5}
    labels[Label.EYES] = np.zeros_like(rays.hit)
    glossy = 0.10 + 0.10 * hair
    for eye in heads.EYES:
        _paint_eye(look, surface, rays, eye, color, glossy, labels[Label.EYES])
    labels[Label.LIPS], labels[Label.INNER_MOUTH] = _paint_mouth(look, surface, rays, color, glossy)
    normal = heads.lookup(look.shape.normals, rest_az, rest_el)
    key, fill = ((light / np.linalg.norm(light)) @ viewmat[:3, :3] for light in (KEY_LIGHT, FILL_LIGHT))
    diffuse = 0.36 + 0.62 * np.maximum(normal @ key.astype(np.float32), 0) + 0.20 * np.maximum(normal @ fill.astype(np.float32), 0)
    half = key - rays.direction.reshape(-1, 3).mean(0)
    shine = np.maximum(normal @ (half / np.linalg.norm(half)).astype(np.float32), 0)
    return np.clip(color * diffuse[..., None] + (glossy * shine**18)[..., None], 0, 1), labels


def _paint_eye(look: Look, surface: heads.Surface, rays: Rays, eye: tuple[float, float], color, glossy, region) -> None:
    """Lid, lashes and eyeball into `color` and `glossy`; the eye's region into `region`."""
    az, el = rays.az - np.float32(eye[0]), rays.el - np.float32(eye[1])
    region |= (az / 0.215) ** 2 + ((el - 0.03) / 0.16) ** 2 < 1
    at = np.nonzero((np.abs(az) < 1.1 * heads.EYE_WIDTH) & (np.abs(el) < 0.2) & rays.hit)
    if not len(at[0]):
        return
    x, v = az[at] / heads.EYE_WIDTH, el[at]
    upper, lower = heads.eye_curves(surface.face, np.clip(x, -1, 1))
    crease = 0.125 * np.sqrt(np.maximum(1 - 0.8 * x * x, 0))
    tint = 1 - 0.30 * np.exp(-(((v - crease) / 0.012) ** 2)) - 0.10 * ((v > upper) & (v < crease))
    inside = (np.abs(x) < 1) & (v > lower) & (v < upper)
    lashes = (np.abs(x) < 1.04) & (v >= upper) & (v < upper + 0.020)
    rim = (np.abs(x) < 1) & (v <= lower) & (v > lower - 0.010)
    out = color[at] * tint[:, None] * np.where(rim, 0.72, 1.0)[:, None]
    out[lashes] *= 0.25
    shadow = 0.55 + 0.45 * np.clip((upper - v) / 0.05, 0, 1)
    out[inside] = _eyeball(look, surface, rays, eye, tuple(k[inside] for k in at)) * shadow[inside, None]
    color[at] = out
    glossy[at] = np.where(inside, 0.0, glossy[at])


def _eyeball(look: Look, surface: heads.Surface, rays: Rays, eye: tuple[float, float], at) -> np.ndarray:
    """Colour [n, 3] of a ball that sits behind the lids and turns with the gaze."""
    face = surface.face
    centre = heads.points_on(surface, *eye)[0] / heads.UNIT - 0.155 * heads.direction(0.25 * eye[0], eye[1])
    normal = _meet_ball(rays.origin - centre, rays.direction[at], 0.17)
    gaze = np.array([np.sin(0.45 * face.gaze_x), np.sin(0.32 * face.gaze_y), 1.0])
    off = normal - gaze / np.linalg.norm(gaze)
    radius = np.linalg.norm(off, axis=-1)
    streaks = 1 + 0.18 * np.sin(17 * np.arctan2(off[:, 1], off[:, 0]))
    iris = look.iris * (streaks * np.interp(radius, [0.15, 0.3, 0.38, 0.44], [0.8, 1.15, 0.9, 0.35]))[:, None]
    out = np.where(radius[:, None] < 0.44, iris, [0.95, 0.93, 0.92])
    out = np.where(radius[:, None] < 0.17, 0.03, out)
    glint = np.linalg.norm(normal - np.array([-0.22, 0.28, 0.93]), axis=-1) < 0.085
    return np.where(glint[:, None], 1.2, out)


def _meet_ball(origin: np.ndarray, direction: np.ndarray, radius: float) -> np.ndarray:
    """Unit normals [n, 3] where rays meet a ball round 0; where they pass it by, of its nearest point."""
    along = direction @ origin
    inside = np.maximum(along**2 - (origin @ origin - radius**2), 0)
    point = origin + (-along - np.sqrt(inside))[:, None] * direction
    return point / np.linalg.norm(point, axis=-1, keepdims=True)


def _paint_mouth(look: Look, surface: heads.Surface, rays: Rays, color, glossy) -> tuple[np.ndarray, np.ndarray]:
    """Lips and what is between them into `color` and `glossy`; returns their masks."""
    lips, inner = np.zeros_like(rays.hit), np.zeros_like(rays.hit)
    width = heads.mouth_half_width(surface.face)
    at = np.nonzero((np.abs(rays.az) < width) & (rays.el < heads.MOUTH + 0.2) & (rays.el > heads.MOUTH - 0.4) & rays.hit)
    if not len(at[0]):
        return lips, inner
    x, v = rays.az[at] / width, rays.el[at]
    top, upper, lower, bottom = heads.mouth_curves(surface.face, x)
    between = (v > lower) & (v < upper)
    on_lip = (v < top) & (v > bottom) & ~between
    thickness = np.where(v >= upper, (v - upper) / np.maximum(top - upper, 1e-6), (lower - v) / np.maximum(lower - bottom, 1e-6))
    edge = 1 - 0.5 * np.exp(-((np.minimum(np.abs(v - upper), np.abs(v - lower)) / 0.010) ** 2))
    round_ = (0.80 + 0.28 * np.sin(np.pi * np.clip(thickness, 0, 1))) * (1 + 0.05 * np.sin(55 * x))
    out = color[at]
    out[on_lip] = look.lips * (edge * round_)[on_lip, None]
    out[between] = _inside(surface.face, rays, tuple(k[between] for k in at))
    color[at] = out
    glossy[at] = np.where(on_lip & (v < lower), 0.28, np.where(between, 0.0, glossy[at]))
    lips[at], inner[at] = on_lip, between
    return lips, inner


def _inside(face: heads.Face, rays: Rays, at) -> np.ndarray:
    """Colour [n, 3] behind the lips: two rows of teeth on an arch (a vertical cylinder), the tongue, and the dark."""
    direction, (ox, oy, oz) = rays.direction[at], rays.origin
    oz = oz - 0.40
    a = direction[:, 0] ** 2 + direction[:, 2] ** 2
    b = ox * direction[:, 0] + oz * direction[:, 2]
    root = np.sqrt(np.maximum(b * b - a * (ox * ox + oz * oz - 0.35**2), 0))
    t = (-b - root) / a
    x, y, z = (o + t * direction[:, k] for k, o in enumerate((ox, oy, oz)))
    upper_edge = -0.425
    lower_edge = upper_edge - 0.012 - 0.125 * face.open
    gaps = np.abs(np.mod(np.arctan2(x, z) / 0.155, 1) - 0.5) * 2  # 1 between two teeth
    enamel = (1.08 - 0.35 * np.clip((gaps - 0.82) / 0.18, 0, 1) - 0.8 * np.abs(x))[:, None] * [0.93, 0.90, 0.83]
    tongue = np.exp(-((x / 0.13) ** 2) - ((y - lower_edge) / 0.05) ** 2)[:, None]
    out = np.array([0.16, 0.04, 0.04]) * (1 - tongue) + np.array([0.62, 0.25, 0.25]) * tongue
    out = np.where((y > upper_edge)[:, None], enamel, out)
    return np.where((y < lower_edge)[:, None], 0.85 * enamel, out)


def render_torso(seed: int, unit: float, centre: tuple[float, float], skin: np.ndarray, width: int, height: int) -> np.ndarray:
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
    neck = skin * (light * np.interp(side, [0, 0.3, 0.46], [1.0, 0.92, 0.7]) * np.interp(y, [-1.3, -0.9], [0.95, 0.62]))[..., None]
    weave = 1 + 0.10 * np.sin(26 * x + 4 * y) * np.sin(26 * y) + 0.05 * _noise(rng, (14, 14), size)
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
    picture = wall * (1.12 - 0.45 * x - 0.12 * y + 0.03 * _noise(rng, (9, 9), x.shape))[..., None]
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
