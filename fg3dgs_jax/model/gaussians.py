"""A fixed-capacity pool of Gaussians that grows, splits and shrinks inside jit.

Every array keeps its length, the capacity; an alive mask says which slots are in use. Densification and pruning follow
3DGS (Kerbl et al. 2023, section 5): a Gaussian whose screen position is pulled hard is cloned if small, split if large,
and one that has become transparent or too large is removed. Departures: the freed slots are taken again in the same
call, and where slots are short the Gaussians that are pulled hardest come first.

Statistics and optimizer moments travel with the parameters through one function, `place`. Dead slots hold finite values
and get opacity 0, so nothing reaches them and no gradient of theirs is NaN.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

from fg3dgs_jax.model.hashgrid import draw_uniform
from fg3dgs_jax.types import Array, Deltas, Gaussians

SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))
_INIT_OPACITY = 0.1  # 3DGS
_SPLIT_SHRINK = 1.6  # 3DGS: a split Gaussian's two children are smaller by this
_MIN_INIT_SCALE = 1e-5  # world units: coincident points still get a volume
_NEIGHBOURS = 3


@flax.struct.dataclass
class Pool:
    """Which slots are alive, and what has been seen of them since the last densification."""

    alive: Array  # bool [N]
    grad_sum: Array  # f32 [N], sum of the screen gradient's norm (NDC units) over the frames that showed the Gaussian
    grad_count: Array  # f32 [N], number of those frames
    max_radii: Array  # f32 [N], largest radius on screen, pixels


def init(key: jax.Array, capacity: int, num_points: int, extent: float, sh_degree: int) -> tuple[Gaussians, Pool]:
    """Grey Gaussians at uniform random points in [-extent, extent]^3 (TG). Arguments as in `from_points`."""
    points = np.asarray(draw_uniform(key, (num_points, 3), extent))
    return from_points(points, np.full((num_points, 3), 0.5, np.float32), capacity, sh_degree)


def from_points(points: np.ndarray, colors: np.ndarray, capacity: int, sh_degree: int) -> tuple[Gaussians, Pool]:
    """Gaussians of opacity 0.1 at given points, each as large as its distance to its three nearest neighbours.

    points f32 [P, 3] world units, colors f32 [P, 3] in [0, 1], P <= capacity; sh_degree 0 to 3. Runs on the host.
    Slots P to capacity - 1 are dead. Raises ValueError where the points do not fit.
    """
    count = len(points)
    if not 0 < count <= capacity:
        raise ValueError(f"{count} points do not fit into a pool of capacity {capacity}; raise the capacity.")
    scales = np.full((count, 3), _mean_neighbour_distance(np.asarray(points, np.float64))[:, None], np.float32)
    sh = np.zeros((count, (sh_degree + 1) ** 2, 3), np.float32)
    sh[:, 0] = (np.asarray(colors, np.float32) - 0.5) / SH_C0
    gaussians = Gaussians(
        means=np.asarray(points, np.float32),
        quats=np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
        log_scales=np.log(scales),
        logit_opacities=np.full(count, _logit(_INIT_OPACITY), np.float32),
        sh=sh,
    )
    pool = Pool(np.ones(count, bool), *(np.zeros(count, np.float32) for _ in range(3)))
    gaussians, _, pool = grow(gaussians, (), pool, capacity)
    return gaussians, pool


def activate(
    gaussians: Gaussians, alive: jax.Array, deltas: Deltas | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Move the raw parameters by one frame's deltas (TG Eq. 4) and bring them to what `rasterize` takes.

    alive bool [N]; deltas None for the static head.
    Returns means [N, 3], quats [N, 4] (not normalised), scales [N, 3] > 0, opacities [N] in [0, 1), 0 for dead slots,
    SH coefficients [N, K, 3].
    """
    means, quats, log_scales = gaussians.means, gaussians.quats, gaussians.log_scales
    logits, sh = gaussians.logit_opacities, gaussians.sh
    if deltas is not None:
        means = means + deltas.means
        quats = quats if deltas.quats is None else quats + deltas.quats
        log_scales = log_scales if deltas.log_scales is None else log_scales + deltas.log_scales
        logits = logits if deltas.opacities is None else logits + deltas.opacities
        sh = sh if deltas.colors is None else sh.at[:, 0].add(deltas.colors)
    opacities = jnp.where(alive, jax.nn.sigmoid(logits), 0.0)
    return means, quats, jnp.exp(log_scales), opacities, sh


def accumulate(pool: Pool, means2d_grad: jax.Array, radii: jax.Array, width: int, height: int) -> Pool:
    """Add one frame to the statistics: means2d_grad f32 [N, 2] per pixel, radii [N] pixels (0: not on screen).

    The norm is taken in NDC units, where the image is 2 wide and high, so thresholds do not depend on its size (3DGS).
    """
    seen = radii > 0
    # Not jnp.linalg.norm: XLA's sum over two numbers takes five times as long on a CPU as adding them.
    norm = jnp.sqrt((0.5 * width * means2d_grad[:, 0]) ** 2 + (0.5 * height * means2d_grad[:, 1]) ** 2)
    return pool.replace(
        grad_sum=pool.grad_sum + jnp.where(seen, norm, 0.0),
        grad_count=pool.grad_count + seen,
        max_radii=jnp.maximum(pool.max_radii, radii.astype(jnp.float32)),
    )


def densify_and_prune(
    key: jax.Array,
    gaussians: Gaussians,
    moments: Any,
    pool: Pool,
    *,
    grad_threshold: jax.Array | float,
    percent_dense: jax.Array | float,
    extent: jax.Array | float,
    min_opacity: jax.Array | float,
    max_radius: jax.Array | float = 0.0,
    max_scale: jax.Array | float = 0.0,
) -> tuple[Gaussians, Any, Pool, dict[str, jax.Array]]:
    """Clone, split and prune at fixed shapes, then clear the statistics. To be jitted by the caller.

    moments: any pytree of arrays with leading axis N (Adam's mu and nu); scalars in it are left alone.
    grad_threshold: mean screen gradient in NDC units from which a Gaussian is densified: cloned where its largest
    scale is at most percent_dense * extent (world units), split in two otherwise.
    min_opacity, max_radius (pixels), max_scale (world units): a Gaussian outside them is removed; <= 0 switches
    either maximum off. The children of a split start with no radius, so only Gaussians that stay whole fall by it.

    A new Gaussian (a clone, both children of a split) starts with zero moments. Returns the metrics `cloned`,
    `split`, `pruned`, `dropped_no_slot` (wanted to densify, found no slot, stayed as it was) and `alive`, i32 scalars.
    """
    scale = jnp.exp(gaussians.log_scales).max(-1)
    gradient = pool.grad_sum / jnp.maximum(pool.grad_count, 1.0)
    pulled = pool.alive & (gradient >= grad_threshold)
    large = scale > percent_dense * extent

    too_wide = (max_radius > 0) & ~(pulled & large) & (pool.max_radii > max_radius)
    final_scale = jnp.where(pulled & large, scale / _SPLIT_SHRINK, scale)
    too_long = (max_scale > 0) & (final_scale > max_scale)
    transparent = jax.nn.sigmoid(gaussians.logit_opacities) < min_opacity
    pruned = pool.alive & (transparent | too_wide | too_long)

    kept = pool.alive & ~pruned
    source, new = _allot(pulled & kept, gradient, kept)
    split = _is_parent(source, new) & large
    child = split | (new & large[source])
    moments = place(moments, source, cleared=new | child)
    gaussians = _split_children(key, place(gaussians, source), child)
    alive = kept | new

    metrics = {
        "cloned": new.sum() - split.sum(),
        "split": split.sum(),
        "pruned": pruned.sum(),
        "dropped_no_slot": (pulled & kept).sum() - new.sum(),
        "alive": alive.sum(),
    }
    metrics = {name: value.astype(jnp.int32) for name, value in metrics.items()}
    return gaussians, moments, fresh_pool(alive), metrics


def reset_opacity(gaussians: Gaussians, moments: Any, value: float) -> tuple[Gaussians, Any]:
    """Lower every opacity to at most `value`, in (0, 1), and clear its moments (3DGS)."""
    lowered = jnp.minimum(gaussians.logit_opacities, _logit(value))

    def clear(path, leaf):
        return jnp.zeros_like(leaf) if path and getattr(path[-1], "name", None) == "logit_opacities" else leaf

    return gaussians.replace(logit_opacities=lowered), jax.tree_util.tree_map_with_path(clear, moments)


def grow(gaussians: Gaussians, moments: Any, pool: Pool, capacity: int) -> tuple[Gaussians, Any, Pool]:
    """Append dead slots up to `capacity`. Shapes change: call it between jitted segments."""
    extra = capacity - pool.alive.shape[0]
    if extra < 0:
        raise ValueError(f"A pool of {pool.alive.shape[0]} slots cannot shrink to {capacity}.")

    def pad(leaf):
        leaf = np.asarray(leaf)  # on the host: nothing compiles
        return jnp.asarray(np.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1)) if leaf.ndim else leaf)

    identity = np.concatenate([np.asarray(gaussians.quats), np.tile(np.float32([1, 0, 0, 0]), (extra, 1))])
    gaussians, moments, pool = jax.tree.map(pad, (gaussians, moments, pool))
    return gaussians.replace(quats=jnp.asarray(identity)), moments, pool


def _allot(wanting: jax.Array, priority: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give every wanting Gaussian a free slot, the highest priority first, while there are any.

    Returns per slot the slot its content comes from, i32 [N], and whether it is newly filled, bool [N].
    """
    capacity = wanting.shape[0]
    slots = jnp.arange(capacity, dtype=jnp.int32)
    givers = jnp.argsort(jnp.where(wanting, -priority, jnp.inf))
    takers = jnp.argsort(kept)  # stable: free slots first, in order
    count = jnp.minimum(wanting.sum(), capacity - kept.sum())
    target = jnp.where(slots < count, takers, capacity)  # beyond the count: out of range, dropped
    source = slots.at[target].set(givers.astype(jnp.int32), mode="drop")
    return source, jnp.zeros(capacity, bool).at[target].set(True, mode="drop")


def _is_parent(source: jax.Array, new: jax.Array) -> jax.Array:
    """Whether some new slot took its content from this one, bool [N]."""
    capacity = source.shape[0]
    return jnp.zeros(capacity, bool).at[jnp.where(new, source, capacity)].set(True, mode="drop")


def place(tree: Any, source: jax.Array, cleared: jax.Array | None = None) -> Any:
    """The one mover: fill every slot of every array from `source`, zero where `cleared`. Scalars stay."""

    def move(leaf):
        if jnp.ndim(leaf) == 0:
            return leaf
        moved = leaf[source]
        if cleared is None:
            return moved
        return jnp.where(cleared.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros((), leaf.dtype), moved)

    return jax.tree.map(move, tree)


def _split_children(key: jax.Array, gaussians: Gaussians, child: jax.Array) -> Gaussians:
    """Draw the children's means from the parent they are still a copy of, and shrink them (3DGS)."""
    local = jax.random.normal(key, gaussians.means.shape) * jnp.exp(gaussians.log_scales)
    means = gaussians.means + rotate(gaussians.quats, local)
    return gaussians.replace(
        means=jnp.where(child[:, None], means, gaussians.means),
        log_scales=gaussians.log_scales - jnp.where(child[:, None], math.log(_SPLIT_SHRINK), 0.0),
    )


def rotate(quats: jax.Array, vectors: jax.Array) -> jax.Array:
    """Rotate vectors f32 [N, 3] by quaternions f32 [N, 4] wxyz of any length."""
    unit = quats / jnp.maximum(jnp.linalg.norm(quats, axis=-1, keepdims=True), 1e-12)
    w, axis = unit[:, :1], unit[:, 1:]
    cross = jnp.cross(axis, vectors)
    return vectors + 2.0 * (w * cross + jnp.cross(axis, cross))


def fresh_pool(alive: jax.Array) -> Pool:
    """Empty statistics around an alive mask."""
    return Pool(alive, *(jnp.zeros(alive.shape, jnp.float32) for _ in range(3)))


def _mean_neighbour_distance(points: np.ndarray) -> np.ndarray:
    """Mean distance [P] to the three nearest other points; fewer points: to all there are."""
    neighbours = min(_NEIGHBOURS, len(points) - 1)
    if neighbours == 0:
        return np.full(1, _MIN_INIT_SCALE)
    distances, _ = cKDTree(points).query(points, k=neighbours + 1)
    return np.maximum(distances[:, 1:].mean(-1), _MIN_INIT_SCALE)


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)
