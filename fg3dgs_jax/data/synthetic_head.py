"""The procedural head: its surface, how a face moves it, and where the landmarks are.

Head space: x to the image's right, y up, z out of the face; the unit is `UNIT` of the world. The surface is
star-shaped, radius(azimuth, elevation); azimuth 0 looks along z. A face moves it by a warp of these two angles (skin
slides over the skull, the jaw drops), and opens lids and lips along curves that are given in closed form.
"""

import dataclasses

import cv2
import numpy as np

UNIT = 0.1  # world units
ROWS, COLS = 256, 512  # of all maps over (elevation, azimuth)
EYES = ((-0.36, 0.10), (0.36, 0.10))  # azimuth and elevation of the two eyes, the image's left one first
EYE_WIDTH = 0.155  # half, radians
MOUTH = -0.46  # elevation of the closed lips
JAW_DROP = 0.19  # radians at full opening
LIP_POINTS = np.array([-1, -0.66, -0.3, 0, 0.3, 0.66, 1], np.float32)


@dataclasses.dataclass(frozen=True)
class Face:
    """What a face does in one frame; all in [0, 1] except width and gaze in [-1, 1]."""

    open: float = 0.0
    width: float = 0.0
    brow_up: float = 0.0
    brow_outer: float = 0.0
    brow_down: float = 0.0
    wide: float = 0.0
    cheek: float = 0.0
    squint: float = 0.0
    blink: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """The head at rest and the directions it can move in: maps [ROWS, COLS] over (elevation, azimuth)."""

    radius: np.ndarray
    normals: np.ndarray  # [ROWS, COLS, 3], head space
    hair: np.ndarray  # 1 where hair grows, soft edges
    jaw: np.ndarray
    brows: np.ndarray
    brows_outer: np.ndarray
    cheeks: np.ndarray
    lips: np.ndarray


@dataclasses.dataclass(frozen=True)
class Surface:
    """The head with one face on."""

    face: Face
    radius: np.ndarray  # f32 [ROWS, COLS]
    rest: np.ndarray  # f32 [ROWS, COLS, 2], the (azimuth, elevation) at rest of what is seen there now


def angles() -> tuple[np.ndarray, np.ndarray]:
    """Azimuth and elevation of every map entry, f32 [ROWS, COLS] each."""
    az = ((np.arange(COLS) + 0.5) / COLS * 2 - 1) * np.pi
    el = ((np.arange(ROWS) + 0.5) / ROWS - 0.5) * np.pi
    columns, rows = np.meshgrid(az.astype(np.float32), el.astype(np.float32))
    return columns, rows


def lookup(table: np.ndarray, az: np.ndarray, el: np.ndarray) -> np.ndarray:
    """Bilinear values of a map [h, w] or [h, w, c] at angles of any 2-D shape [a, b]."""
    rows, cols = table.shape[:2]
    x = az * np.float32(cols / (2 * np.pi)) + np.float32(cols / 2 - 0.5)
    y = el * np.float32(rows / np.pi) + np.float32(rows / 2 - 0.5)
    return cv2.remap(table, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def direction(az: np.ndarray | float, el: np.ndarray | float) -> np.ndarray:
    """Unit vectors [..., 3]."""
    return np.stack([np.sin(az) * np.cos(el), np.sin(el), np.cos(az) * np.cos(el)], -1)


def build(seed: int) -> Shape:
    """The head of a seed: proportions differ a little."""
    rng = np.random.default_rng([seed, 2])
    az, el = angles()
    bump = lambda a, e, wa, we: np.exp(-(((np.abs(az) - a) / wa) ** 2) - ((el - e) / we) ** 2)  # noqa: E731
    hair = _hair(az, el, rng)
    d = direction(az, el)
    axes = np.where(el[..., None] > 0, [0.72, 1.03, 0.86], [0.72, 1.0, 0.86]) * rng.uniform(0.97, 1.03, 3)
    radius = 1 / np.linalg.norm(d / axes, axis=-1)
    ridge = np.interp(el, [-0.29, -0.20, -0.14, 0.0, 0.22], [0, 0.8, 1, 0.55, 0.1])
    nose_width = 0.085 - 0.12 * np.minimum(el, 0)
    radius += rng.uniform(0.17, 0.21) * ridge * np.exp(-((az / nose_width) ** 2)) + 0.05 * bump(0.11, -0.19, 0.05, 0.05)
    radius += 0.035 * bump(0.30, 0.27, 0.22, 0.08) - 0.05 * bump(0.36, 0.10, 0.17, 0.11)  # brow ridge, sockets
    radius += 0.035 * bump(0.55, -0.15, 0.22, 0.2) - 0.13 * bump(0.92, -0.62, 0.42, 0.3)  # cheeks, jaw
    radius += 0.035 * bump(0, MOUTH, 0.24, 0.11)
    radius += 0.08 * bump(0, -0.88, 0.22, 0.15) - 0.02 * bump(0, -0.66, 0.3, 0.06)  # chin
    radius += 0.13 * bump(1.52, -0.02, 0.14, 0.16)  # ears
    radius += hair * _smoothstep((el + 0.5) / 0.9) * (0.09 + 0.02 * np.sin(9 * az + 5 * el))
    radius = cv2.GaussianBlur(radius.astype(np.float32), (0, 0), 1.2)
    below = _smoothstep((MOUTH - el) / 0.1)
    maps = {
        "jaw": below * np.exp(-((az / 0.95) ** 4)), "brows": bump(0.22, 0.34, 0.34, 0.16),
        "brows_outer": bump(0.6, 0.32, 0.22, 0.15), "cheeks": bump(0.5, -0.16, 0.3, 0.16),
        "lips": bump(0, MOUTH, 0.28, 0.14), "hair": hair,
    }  # fmt: skip
    maps = {name: values.astype(np.float32) for name, values in maps.items()}
    return Shape(radius=radius, normals=_normals(radius, d), **maps)


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _hair(az: np.ndarray, el: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1 above the hairline, with a soft and slightly wavy edge."""
    knots = [0, 0.45, 0.8, 0.98, 1.12, 1.28, 1.72, 1.85, np.pi]
    line = np.interp(np.abs(az), knots, [0.64, 0.66, 0.5, 0.12, -0.08, 0.24, 0.24, -0.25, -0.4])
    line = line + 0.03 * np.sin(11 * az + rng.uniform(0, 6)) + 0.02 * np.sin(23 * az + rng.uniform(0, 6))
    return _smoothstep((el - line) / 0.09 + 0.5)


def _normals(radius: np.ndarray, d: np.ndarray) -> np.ndarray:
    points = radius[..., None] * d
    along_el, along_az = np.gradient(points, axis=0), np.gradient(points, axis=1)
    normal = np.cross(along_az, along_el)
    return (normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)).astype(np.float32)


def deform(shape: Shape, face: Face) -> Surface:
    """The surface with a face on."""
    az, el = angles()
    rise = 0.075 * face.brow_up - 0.06 * face.brow_down
    raised = rise * shape.brows + 0.055 * face.brow_outer * shape.brows_outer + 0.045 * face.cheek * shape.cheeks
    rest_el = el + JAW_DROP * face.open * shape.jaw - raised
    rest_az = az + 0.03 * face.brow_down * shape.brows * np.sign(az) - 0.05 * face.width * shape.lips * az
    radius = lookup(shape.radius, rest_az, rest_el)
    radius *= 1 + 0.05 * face.open * shape.jaw
    radius += 0.045 * max(-face.width, 0) * shape.lips + 0.02 * face.cheek * shape.cheeks
    return Surface(face, radius, np.stack([rest_az, rest_el], -1))


def mouth_half_width(face: Face) -> float:
    """Azimuth from the mouth's centre to a corner, radians."""
    return 0.25 * (1 + 0.24 * face.width - 0.05 * face.open)


def mouth_curves(face: Face, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Elevations of outer upper, inner upper, inner lower, outer lower lip edge at x in [-1, 1] between the corners."""
    arch = np.maximum(1 - x * x, 0)
    full = 1 + 0.3 * max(-face.width, 0)
    middle = MOUTH + 0.03 * face.width * x * x
    upper, lower = middle + 0.035 * face.open * arch, middle - JAW_DROP * face.open * arch
    bow = 1 - 0.22 * np.exp(-((x / 0.16) ** 2))
    return upper + 0.062 * full * bow * arch**0.6, upper, lower, lower - 0.075 * full * arch**0.7


def eye_curves(face: Face, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elevations of the upper and lower lid's edge above the eye's centre, at x in [-1, 1] between the corners."""
    arch = np.maximum(1 - x * x, 0)
    low = 0.048 * (1 - 0.45 * face.squint - 0.15 * face.cheek)
    high = 0.085 * (1 + 0.35 * face.wide - 0.25 * face.squint)
    return (high + (-low - high) * face.blink) * arch, -low * arch


def points_on(surface: Surface, az: np.ndarray | float, el: np.ndarray | float) -> np.ndarray:
    """World points [n, 3] of the surface at angles [n]."""
    az, el = (np.atleast_2d(np.asarray(angle, np.float32)) for angle in (az, el))
    return (UNIT * lookup(surface.radius, az, el)[..., None] * direction(az, el))[0]


def landmarks(surface: Surface) -> np.ndarray:
    """The 68 landmarks in world space, f32 [68, 3], in the usual order, each group from the image's left.

    0-16 jaw, 17-26 brows, 27-35 nose, 36-47 eyes, 48-59 outer lips, 60-67 inner lips. Lids and lips are exact; the rest
    moves with the skin.
    """
    az = np.linspace(-1.25, 1.25, 17)
    jaw = np.stack([az, -0.98 + 0.75 * (az / 1.25) ** 2], -1)
    brow = np.stack([np.linspace(0.58, 0.16, 5), [0.29, 0.345, 0.36, 0.345, 0.31]], -1)
    bridge = np.stack([np.zeros(4), np.linspace(0.12, -0.13, 4)], -1)
    nostrils = np.stack([np.linspace(-0.13, 0.13, 5), [-0.21, -0.235, -0.25, -0.235, -0.21]], -1)
    skin = np.concatenate([jaw, brow * [-1, 1], brow[::-1], bridge, nostrils])
    now = skin.copy()
    for _ in range(8):  # where has the skin point gone: invert the warp by fixed-point iteration
        rest = lookup(surface.rest, *(np.atleast_2d(column.astype(np.float32)) for column in now.T))[0]
        now = now + skin - rest
    curves = np.concatenate([now, *(_eye_points(surface.face, eye) for eye in EYES), _lip_points(surface.face)])
    return points_on(surface, curves[:, 0], curves[:, 1]).astype(np.float32)


def _eye_points(face: Face, eye: tuple[float, float]) -> np.ndarray:
    x = np.array([-1, -0.4, 0.4, 1, 0.4, -0.4])
    upper, lower = eye_curves(face, x)
    return np.stack([eye[0] + EYE_WIDTH * x, eye[1] + np.where(np.arange(6) < 4, upper, lower)], -1)


def _lip_points(face: Face) -> np.ndarray:
    outer = np.concatenate([LIP_POINTS, LIP_POINTS[-2:0:-1]])
    inner = np.array([-0.92, -0.35, 0, 0.35, 0.92, 0.35, 0, -0.35])
    outer_upper, _, _, outer_lower = mouth_curves(face, outer)
    _, inner_upper, inner_lower, _ = mouth_curves(face, inner)
    el = np.concatenate([
        np.where(np.arange(12) < 7, outer_upper, outer_lower), np.where(np.arange(8) < 5, inner_upper, inner_lower)
    ])  # fmt: skip
    return np.stack([mouth_half_width(face) * np.concatenate([outer, inner]), el], -1)
