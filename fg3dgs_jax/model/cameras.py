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
    turns = Rotation.from_matrix(np.asarray(viewmats, np.float64)[:, :3, :3])
    steps = np.concatenate(
        [(turns[:-1].inv() * turns[1:]).as_rotvec(), np.diff(viewmats[:, :3, 3], axis=0) / extent], 1
    )
    found = np.zeros((len(viewmats), SIZE), np.float32)
    found[1:-1] = np.diff(steps, axis=0)
    return found


def filled(twists: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Twists f32 [T, 6] in which frames that are not `known`, bool [T], follow a smooth curve through the others', that
    far from them ends at their mean.

    Held-out frames have no pixels to learn from. What all corrections have in common holds for them too; what the
    nearest ones add to it holds for a few frames only (measured corrections five frames apart correlate at about 0.3).
    """
    known = np.asarray(known, bool)
    if not known.any() or known.all():
        return np.asarray(twists, np.float32)
    mean = np.mean(twists, axis=0, dtype=np.float64, where=known[:, None])
    between = np.full(len(twists) - 1, REACH)
    diagonal = 1.0 + np.append(between, 0.0) + np.insert(between, 0, 0.0)
    bands = np.stack([np.append(0.0, -between), diagonal])
    smooth = mean + solveh_banded(bands, known[:, None] * (np.asarray(twists, np.float64) - mean))
    return np.where(known[:, None], twists, smooth).astype(np.float32)
