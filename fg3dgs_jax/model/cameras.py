"""Corrections of a clip's cameras: a small rigid motion for every frame, and one focal length for all of them.

Poses from landmarks are off by a pixel or so, and no focal length was ever measured. Corrections are parametrised about
the head: it turns about the world's origin, which lies in it, and shifts in camera axes in units of its radius, so that
all six numbers move it about as many pixels. A change of the focal length moves the camera along with it (a dolly
zoom): the head keeps its size, only its perspective changes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solveh_banded
from scipy.spatial.transform import Rotation

SIZE = 6  # numbers of a twist: rotation vector in radians, shift (x, y, z) in head radii
_TINY = 1e-12  # keeps the root of an angle differentiable at zero
REACH = 25.0  # weight of neighbours where a correction is filled in; its root is how many frames it reaches
RIDGES = (np.inf, 7.0, 2.0, 0.7, 0.2, 0.07)  # of `foretold`, for each frame
SLIPPED = 4.0  # deviations of a sign, more than which tell of a tracker that lost the face
FOLDS, GAP = 6, 5  # blocks of frames that choose among them, and the frames next to a block that do not help it


def rotation(vector: jax.Array) -> jax.Array:
    """Rotation matrices f32 [..., 3, 3] of rotation vectors [..., 3], differentiable at zero (Rodrigues)."""
    angle = jnp.sqrt((vector * vector).sum(-1) + _TINY)[..., None, None]
    x, y, z = jnp.moveaxis(vector, -1, 0)
    zero = jnp.zeros_like(x)
    cross = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vector.shape[:-1], 3, 3)
    turned = 2.0 * (jnp.sin(0.5 * angle) / angle) ** 2
    return jnp.eye(3) + jnp.sin(angle) / angle * cross + turned * (cross @ cross)


def corrected(
    viewmat: jax.Array, intrinsics: jax.Array, twist: jax.Array, log_focal: jax.Array, extent: float
) -> tuple[jax.Array, jax.Array]:
    """World-to-camera matrices f32 [..., 4, 4] and intrinsics [..., 4] moved by twists [..., 6] and a focal factor.

    log_focal: f32 [], the logarithm of that factor; extent: the head's radius in world units.
    """
    viewmat, twist, zoom = jnp.asarray(viewmat), jnp.asarray(twist), jnp.exp(log_focal)
    turned = viewmat[..., :3, :3] @ rotation(twist[..., :3])
    shifted = (viewmat[..., :3, 3] + extent * twist[..., 3:]) * jnp.stack([jnp.ones(()), jnp.ones(()), zoom])
    moved = viewmat.at[..., :3, :3].set(turned).at[..., :3, 3].set(shifted)
    return moved, intrinsics * jnp.stack([zoom, zoom, jnp.ones(()), jnp.ones(())])


def accelerations(viewmats: np.ndarray, extent: float) -> np.ndarray:
    """Second differences of a clip's poses [T, 4, 4] as twists f32 [T, 6]; 0 at both ends.

    To first order those of corrected poses are these plus the second differences of their twists.
    """
    found = np.zeros((len(viewmats), SIZE), np.float32)
    found[1:-1] = np.diff(_steps(viewmats, extent), axis=0)
    return found


def velocities(viewmats: np.ndarray, extent: float) -> np.ndarray:
    """How a clip's poses [T, 4, 4], at least two, change a frame: twists f64 [T, 6], the mean of the steps to a frame
    and from it."""
    steps = _steps(viewmats, extent)
    return 0.5 * (np.concatenate([steps[:1], steps]) + np.concatenate([steps, steps[-1:]]))


def _steps(viewmats: np.ndarray, extent: float) -> np.ndarray:
    """Twists f64 [T - 1, 6] from each pose to the next."""
    turns = Rotation.from_matrix(np.asarray(viewmats, np.float64)[:, :3, :3])
    shifts = np.diff(viewmats[:, :3, 3], axis=0) / extent
    return np.concatenate([(turns[:-1].inv() * turns[1:]).as_rotvec(), shifts], 1)


def filled(twists: np.ndarray, known: np.ndarray, expected: np.ndarray | None = None) -> np.ndarray:
    """Twists f32 [T, 6] in which frames that are not `known`, bool [T], follow a smooth curve through the others', that
    far from them ends at what is `expected`, [T, 6]: by default the others' mean.

    Held-out frames have no pixels to learn from. What all corrections have in common holds for them too; what the
    nearest ones add to it holds for a few frames only (measured corrections five frames apart correlate at about 0.3).
    """
    known = np.asarray(known, bool)
    if not known.any() or known.all():
        return np.asarray(twists, np.float32)
    if expected is None:
        expected = np.mean(twists, axis=0, dtype=np.float64, where=known[:, None])
    between = np.full(len(twists) - 1, REACH)
    diagonal = 1.0 + np.append(between, 0.0) + np.insert(between, 0, 0.0)
    bands = np.stack([np.append(0.0, -between), diagonal])
    smooth = expected + solveh_banded(bands, known[:, None] * (np.asarray(twists, np.float64) - expected))
    return np.where(known[:, None], twists, smooth).astype(np.float32)


def foretold(twists: np.ndarray, known: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Twists f64 [T, 6] as `signs` [T, M] tell them, which every frame has: a ridge regression on the known frames.

    Each of the six numbers has the ridge by which blocks of the known frames, bool [T], are told best by the others,
    and is their mean where no ridge tells more than that.
    """
    ids = np.flatnonzero(known)
    wanted, rows = np.asarray(twists, np.float64), np.asarray(signs, np.float64)
    rows = np.clip((rows - rows[ids].mean(0)) / np.maximum(rows[ids].std(0), 1e-9), -SLIPPED, SLIPPED)
    errors = np.zeros((len(RIDGES), SIZE))
    for block in np.array_split(ids, FOLDS) if len(ids) >= FOLDS * GAP else ():
        others = ids[(ids < block[0] - GAP) | (ids > block[-1] + GAP)]
        errors += [np.square(_told(rows, wanted, others, ridge)[block] - wanted[block]).sum(0) for ridge in RIDGES]
    told = np.stack([_told(rows, wanted, ids, ridge) for ridge in RIDGES])
    return np.take_along_axis(told, errors.argmin(0)[None, None], axis=0)[0]


def _told(rows: np.ndarray, wanted: np.ndarray, ids: np.ndarray, ridge: float) -> np.ndarray:
    """All rows' values by a ridge regression on those of `ids`; an infinite ridge is their mean."""
    mean = wanted[ids].mean(0)
    if np.isinf(ridge):
        return np.tile(mean, (len(rows), 1))
    centre, given = rows[ids].mean(0), rows[ids]
    given = given - centre
    square = given.T @ given + ridge * len(ids) * np.eye(rows.shape[1])
    return mean + (rows - centre) @ np.linalg.solve(square, given.T @ (wanted[ids] - mean))


def project(points: np.ndarray, viewmats: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """World points f64 [N, 3] seen by cameras [..., 4, 4], in pixels f64 [..., N, 2]."""
    viewmats = np.asarray(viewmats, np.float64)
    camera = points @ viewmats[..., :3, :3].swapaxes(-1, -2) + viewmats[..., None, :3, 3]
    fx, fy, cx, cy = intrinsics
    return camera[..., :2] / np.maximum(camera[..., 2:], 1e-6) * (fx, fy) + (cx, cy)


def triangulate(pixels: np.ndarray, viewmats: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """The world point f64 [3] nearest to the rays through one pixel f64 [T, 2] per view (linear least squares)."""
    views = np.asarray(viewmats, np.float64)
    slopes = (np.asarray(pixels, np.float64) - intrinsics[2:]) / intrinsics[:2]
    rows = views[:, :2, :3] - slopes[..., None] * views[:, 2:3, :3]
    right = slopes * views[:, 2:3, 3] - views[:, :2, 3]
    return np.linalg.lstsq(rows.reshape(-1, 3), right.reshape(-1), rcond=None)[0]
