"""Camera corrections that training learns: per frame by the rasterizer's camera gradient, the focal length by all.

A frame is seen once in many steps, so each has an Adam of its own that moves only when the frame is seen: the usual one
would go on along one picture's gradient for tens of steps.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.model.cameras import SIZE, corrected
from fg3dgs_jax.training.optim import rate
from fg3dgs_jax.types import Array, Frame

OFFSET = "/camera"  # beside the regions' names: the zero offset whose gradient is the camera's
_DECAYS = (0.6, 0.9)  # of the moments, in visits of a frame
_FOCAL_DECAYS = (0.9, 0.999)  # in steps
_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class CameraRule:
    """How the corrections learn in a stage."""

    rate: tuple[float, float]  # radians and head radii a visit, at the stage's first step and its last
    focal_rate: tuple[float, float]  # of the focal length's logarithm, a step
    smooth: float  # weight of the squared second differences of the corrected poses
    near: float  # weight of the squared corrections
    accelerations: np.ndarray  # f32 [T, 6] of the poses as they were measured


@flax.struct.dataclass
class Cameras:
    """The corrections of a clip's T cameras, their moments, and how often each was seen."""

    twists: Array  # f32 [T, 6], see model.cameras
    mu: Array  # f32 [T, 6]
    nu: Array  # f32 [T, 6]
    visits: Array  # i32 [T]
    focal: Array  # f32 [3]: logarithm of the focal length's factor, and its two moments
    focal_steps: Array  # i32 []


def init(count: int) -> Cameras:
    """No corrections yet, of `count` frames."""
    rows = [jnp.zeros((count, SIZE)) for _ in range(3)]
    zero = jnp.zeros((), jnp.int32)
    return Cameras(*rows, visits=jnp.zeros(count, jnp.int32), focal=jnp.zeros(3), focal_steps=zero)


def offset() -> jax.Array:
    """Zeros [7]: the twist of one frame and the focal length's logarithm."""
    return jnp.zeros(SIZE + 1)


def applied(cameras: Cameras | None, frame: Frame, extent: float, moved: jax.Array | None = None) -> Frame:
    """The frame with its corrected camera; `moved` [7] is added to the correction."""
    if cameras is None:
        return frame
    twist, log_focal = cameras.twists[frame.index], cameras.focal[0]
    if moved is not None:
        twist, log_focal = twist + moved[:SIZE], log_focal + moved[SIZE]
    viewmat, intrinsics = corrected(jnp.asarray(frame.viewmat), jnp.asarray(frame.intrinsics), twist, log_focal, extent)
    return frame.replace(viewmat=viewmat, intrinsics=intrinsics)


def prior(twists: jax.Array, index: jax.Array, rule: CameraRule) -> jax.Array:
    """Gradient [6] by one frame's twist of half of `smooth` times the squared second differences of the corrected
    poses, plus half of `near` times the squared corrections."""
    count = len(twists)
    measured = jnp.asarray(rule.accelerations)

    def second(middle: jax.Array) -> jax.Array:
        rows = twists[jnp.clip(middle + jnp.arange(-1, 2), 0, count - 1)]
        inside = (middle >= 1) & (middle <= count - 2)
        found = measured[jnp.clip(middle, 0, count - 1)] + rows[0] - 2.0 * rows[1] + rows[2]
        return jnp.where(inside, found, 0.0)

    bend = second(index - 1) - 2.0 * second(index) + second(index + 1)
    return rule.smooth * bend + rule.near * twists[index]


def learn(cameras: Cameras, index: jax.Array, gradient: jax.Array, progress: jax.Array, rule: CameraRule) -> Cameras:
    """The cameras after frame `index` was seen: gradient [7] of its loss by `offset`, at `progress` of the stage."""
    slope = gradient[:SIZE] + prior(cameras.twists, index, rule)
    visits = cameras.visits.at[index].add(1)
    step, mu, nu = _adam(slope, cameras.mu[index], cameras.nu[index], visits[index], _DECAYS)
    steps = cameras.focal_steps + 1
    focal_step, focal_mu, focal_nu = _adam(gradient[SIZE], *cameras.focal[1:], steps, _FOCAL_DECAYS)
    focal_rate = rate(rule.focal_rate, progress) if rule.focal_rate[0] else 0.0
    log_focal = cameras.focal[0] - focal_rate * focal_step
    return Cameras(
        twists=cameras.twists.at[index].add(-rate(rule.rate, progress) * step),
        mu=cameras.mu.at[index].set(mu),
        nu=cameras.nu.at[index].set(nu),
        visits=visits,
        focal=jnp.stack([log_focal, focal_mu, focal_nu]),
        focal_steps=steps,
    )


def _adam(slope, mu, nu, count, decays: tuple[float, float]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The direction of one step of Adam, the `count`-th, and the moments after it."""
    mu = decays[0] * mu + (1.0 - decays[0]) * slope
    nu = decays[1] * nu + (1.0 - decays[1]) * slope**2
    direction = mu / (1.0 - decays[0] ** count) / (jnp.sqrt(nu / (1.0 - decays[1] ** count)) + _EPS)
    return direction, mu, nu
