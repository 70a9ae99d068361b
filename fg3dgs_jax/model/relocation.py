"""Densification with a budget: faint Gaussians move to where opaque ones are, at a count that only grows (3DGS as MCMC,
Kheradmand et al. 2024).

Nothing is pruned and nothing splits by a threshold. A Gaussian that has faded is put where a live one is, drawn with
probability in proportion to opacity, and the count grows by a share per round until every slot is taken. Where N then
lie in one place, their opacity and size are such that together they show what the one showed: opacity
o' = 1 - (1 - o)^(1/N) at the centre, and along a line through it the same sum,

    s' * integral of 1 - (1 - o' exp(-u^2))^N du = s * integral of o exp(-u^2) du.

The paper writes the left side as a double sum with alternating binomials; the integral is the same number for any N,
without their cancellation. Between rounds, noise shakes the faint ones (`shaken`), so that they explore.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.model.gaussians import Pool, fresh_pool, place, rotate
from fg3dgs_jax.types import Gaussians

_NODES = (np.arange(96) + 0.5) * (4.5 / 96)  # midpoints in u; exp(-4.5^2) is 1.6e-9
_STEEPNESS, _FAINT = 100.0, 0.005  # of the switch that lets noise act on what is nearly transparent
_HIGHEST = 1.0 - 1e-6  # opacity whose logit is finite in float32


def shares(opacities: jax.Array, copies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each of N equal Gaussians in one place must be to show what one of opacity o showed.

    opacities f32 [n] in (0, 1), copies [n] N >= 1. Returns their opacity f32 [n] and the factor of their scales [n].
    """
    count = copies.astype(jnp.float32)
    opacities = jnp.clip(opacities, 1e-6, _HIGHEST)
    each = -jnp.expm1(jnp.log1p(-opacities) / count)
    bump = jnp.exp(-(_NODES.astype(np.float32) ** 2))
    together = -jnp.expm1(count[:, None] * jnp.log1p(-each[:, None] * bump))
    factor = opacities * bump.sum() / together.sum(axis=1)
    return jnp.where(copies > 1, each, opacities), jnp.where(copies > 1, factor, 1.0)


def relocate(
    key: jax.Array, gaussians: Gaussians, moments: Any, pool: Pool, *, faint: float, growth: float
) -> tuple[Gaussians, Any, Pool, dict[str, jax.Array]]:
    """Move Gaussians fainter than `faint` to live ones and grow by the share `growth`, at fixed shapes.

    Arguments and results as in `gaussians.densify_and_prune`; the pool's capacity is the budget. Moments of every
    Gaussian that is moved or shared start again at zero. Metrics: `relocated`, `added`, `alive`, i32 scalars.
    """
    capacity = pool.alive.shape[0]
    opacities = jax.nn.sigmoid(gaussians.logit_opacities)
    live = pool.alive & (opacities > faint)
    living, before = live.sum(), pool.alive.sum()
    target = jnp.minimum(capacity, jnp.ceil(before * (1.0 + growth)).astype(before.dtype))
    filled = ~live & (jnp.cumsum(~live) <= jnp.where(living > 0, target - living, 0))

    weights = jnp.cumsum(jnp.where(live, opacities, 0.0))
    drawn = jax.random.uniform(key, (capacity,), maxval=weights[-1])
    source = jnp.clip(jnp.searchsorted(weights, drawn, side="right"), 0, capacity - 1)
    source = jnp.where(filled, source, jnp.arange(capacity)).astype(jnp.int32)

    copies = jnp.zeros(capacity, jnp.int32).at[source].add(jnp.where(filled, 1, 0)) + 1
    each, factor = shares(opacities, copies)
    shared = live & (copies > 1)
    logits = jnp.log(each) - jnp.log1p(-each)
    gaussians = gaussians.replace(
        logit_opacities=jnp.where(shared, logits, gaussians.logit_opacities),
        log_scales=gaussians.log_scales + jnp.where(shared, jnp.log(factor), 0.0)[:, None],
    )
    alive = live | filled
    moments = place(moments, source, cleared=filled | shared)
    relocated = jnp.minimum(before - living, filled.sum())
    metrics = {"relocated": relocated, "added": filled.sum() - relocated, "alive": alive.sum()}
    metrics = {name: value.astype(jnp.int32) for name, value in metrics.items()}
    return place(gaussians, source), moments, fresh_pool(alive), metrics


def shaken(key: jax.Array, gaussians: Gaussians, alive: jax.Array, reach: jax.Array | float) -> jax.Array:
    """Means f32 [N, 3] with noise of covariance (reach * Sigma)^2, for nearly transparent Gaussians alone.

    reach: per world unit; the paper's 5e5 times the means' learning rate, over the head's radius.
    """
    opacities = jax.nn.sigmoid(gaussians.logit_opacities)
    switch = jax.nn.sigmoid(-_STEEPNESS * (opacities - _FAINT))
    inverse = gaussians.quats * jnp.asarray([1.0, -1.0, -1.0, -1.0])
    local = rotate(inverse, jax.random.normal(key, gaussians.means.shape)) * jnp.exp(2.0 * gaussians.log_scales)
    noise = rotate(gaussians.quats, local) * (reach * jnp.where(alive, switch, 0.0))[:, None]
    return gaussians.means + noise
