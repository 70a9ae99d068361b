"""Pictures of the procedural head: textures, shading, eyes and mouth. Colours are RGB in [0, 1]."""

import dataclasses

import cv2
import numpy as np

from fg3dgs_jax.data import synthetic_head as heads
from fg3dgs_jax.data.synthetic_rays import Rays, cast, head_box
from fg3dgs_jax.data.synthetic_scene import noise
from fg3dgs_jax.types import Label

KEY_LIGHT = np.array([-0.52, -0.62, -0.59])  # towards the light, camera axes (x right, y down, z away)
FILL_LIGHT = np.array([0.78, -0.1, -0.62])
PEOPLE = (  # skin, hair, iris
    ((0.90, 0.70, 0.59), (0.34, 0.21, 0.12), (0.25, 0.42, 0.55)),
    ((0.58, 0.40, 0.30), (0.09, 0.07, 0.06), (0.26, 0.16, 0.09)),
    ((0.80, 0.59, 0.46), (0.14, 0.10, 0.08), (0.36, 0.24, 0.12)),
    ((0.95, 0.78, 0.68), (0.62, 0.44, 0.22), (0.28, 0.44, 0.28)),
)


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


def _albedo(shape: heads.Shape, skin: np.ndarray, hair: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, cols = size = (2 * heads.ROWS, 2 * heads.COLS)
    az, el = (cv2.resize(grid, size[::-1]) for grid in heads.angles())
    side = np.abs(az)
    spot = lambda a, e, wa, we: np.exp(-(((side - a) / wa) ** 2) - ((el - e) / we) ** 2)[..., None]  # noqa: E731
    tone = 1 + 0.025 * noise(rng, (12, 24), size) + 0.02 * noise(rng, (90, 180), size) + 0.015 * noise(rng, size, size)
    picture = skin * tone[..., None]
    picture = picture * (1 - spot(0.5, -0.2, 0.22, 0.16) * [0.0, 0.13, 0.12])  # blush
    picture = picture * (1 - spot(0.36, 0.02, 0.16, 0.05) * [0.14, 0.17, 0.12])  # under the eyes
    picture = picture * (1 - 0.75 * spot(0.065, -0.236, 0.035, 0.018))  # nostrils
    picture = (
        picture * (1 - 0.10 * spot(0, 0.52, 0.5, 0.012)) * (1 - 0.08 * spot(0, 0.44, 0.45, 0.012))
    )  # forehead lines
    for _ in range(150):  # freckles and moles: what the eye, and a tracker, can hold on to
        a, e = rng.uniform(-0.85, 0.85), rng.uniform(-0.75, 0.5)
        row, col = round((e / np.pi + 0.5) * rows), round((a / (2 * np.pi) + 0.5) * cols)
        cv2.circle(
            picture, (col, row), int(rng.integers(1, 3)), (skin * rng.uniform(0.62, 0.85)).tolist(), -1, cv2.LINE_AA
        )
    strands = noise(rng, (24, 420), size) + 0.5 * noise(rng, (40, 900), size)
    dark = hair * (1 + 0.33 * strands[..., None])
    arc = np.interp(side, [0.12, 0.2, 0.38, 0.5, 0.63], [0.30, 0.335, 0.36, 0.345, 0.28])
    thick = np.interp(side, [0.10, 0.16, 0.36, 0.63, 0.66], [0.0, 0.042, 0.040, 0.012, 0.0])
    brow = np.clip((thick - np.abs(el - arc)) / 0.015, 0, 1) * np.clip(0.85 + 0.12 * strands, 0, 1)
    cover = np.maximum(cv2.resize(shape.hair, size[::-1]), brow)[..., None]
    return np.clip(picture * (1 - cover) + dark * cover, 0.01, 1).astype(np.float32)


def render_head(
    look: Look, surface: heads.Surface, viewmat: np.ndarray, intrinsics: np.ndarray, width: int, height: int
):
    """The head alone: premultiplied colour f32 [H, W, 3], coverage f32 [H, W], and labels u8 [H, W] of its regions."""
    row0, row1, col0, col1 = head_box(surface, viewmat, intrinsics, width, height)
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
    diffuse = (
        0.36
        + 0.62 * np.maximum(normal @ key.astype(np.float32), 0)
        + 0.20 * np.maximum(normal @ fill.astype(np.float32), 0)
    )
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
    at = np.nonzero(
        (np.abs(rays.az) < width) & (rays.el < heads.MOUTH + 0.2) & (rays.el > heads.MOUTH - 0.4) & rays.hit
    )
    if not len(at[0]):
        return lips, inner
    x, v = rays.az[at] / width, rays.el[at]
    top, upper, lower, bottom = heads.mouth_curves(surface.face, x)
    between = (v > lower) & (v < upper)
    on_lip = (v < top) & (v > bottom) & ~between
    thickness = np.where(
        v >= upper, (v - upper) / np.maximum(top - upper, 1e-6), (lower - v) / np.maximum(lower - bottom, 1e-6)
    )
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
