"""Tri-plane multi-resolution hash encoding of 3-D positions.

Three 2-D grids (planes xy, yz, xz), each a pyramid of vertex tables read bilinearly. A level whose vertices fit into
2^log2_table entries is stored densely; a finer one folds its vertices into the table with a spatial hash.

A plane's levels lie one behind the other in a flat table, so that one gather per corner reads all of them. The backward
pass is written by hand: XLA's CPU scatter costs by the index, not by the byte, so a dense level scatters the four
corners of a cell as one row, and shifted sums fold the rows onto the vertices (five times faster than autodiff there).

Parameter paths of `TriPlaneGrid`: tables.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fg3dgs_jax.model import hashgrid_native

PLANES = ((0, 1), (1, 2), (0, 2))  # coordinate axes of the xy, yz and xz planes
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
_PRIME = 2654435761  # Teschner et al. 2003: the second axis's factor in the spatial hash; the first axis's is 1
_INIT_RANGE = 1e-4


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """Shape of a tri-plane grid; the defaults are the face branch's (TG, implementation details)."""

    levels: int = 12
    min_resolution: float = 16  # cells across the whole bound at the coarsest level
    max_resolution: float = 256  # and at the last; usually the finest
    features: int = 1  # per level and plane
    log2_table: int = 17  # a level never holds more than 2^log2_table entries
    bound: float = 0.15  # world units: the grid covers [-bound, bound]^3

    def __post_init__(self):
        if min(self.min_resolution, self.max_resolution) <= 1:
            raise ValueError(f"A grid needs more than one cell at every level, not {self}.")
        if self.max_resolution < self.min_resolution and self.dense_levels < self.levels:
            raise ValueError(f"A grid that coarsens must hold every vertex: raise log2_table, not {self}.")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Cells along one axis, for every level: a geometric series from the coarsest to the finest."""
        steps = np.linspace(0.0, 1.0, self.levels)
        series = self.min_resolution * (self.max_resolution / self.min_resolution) ** steps
        return tuple(round(float(resolution)) for resolution in series)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Table entries of every level (of one plane)."""
        return tuple(min((resolution + 1) ** 2, 2**self.log2_table) for resolution in self.resolutions)

    @property
    def starts(self) -> tuple[int, ...]:
        """First table entry of every level, and behind the last the number of entries."""
        return tuple(int(start) for start in np.cumsum((0, *self.sizes)))

    @property
    def dense_levels(self) -> int:
        """How many levels, from the coarsest, hold an entry for every vertex; the others hash."""
        return sum((resolution + 1) ** 2 <= 2**self.log2_table for resolution in self.resolutions)

    @property
    def output_dim(self) -> int:
        """Length of the encoding of one position."""
        return len(PLANES) * self.levels * self.features


def init_tables(key: jax.Array, spec: GridSpec) -> jax.Array:
    """Tables f32 [3, entries, features], uniform in +-1e-4 (TG code)."""
    shape = (len(PLANES), spec.starts[-1], spec.features)
    return draw_uniform(key, shape, _INIT_RANGE)


def draw_uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
    """f32 of any shape, uniform in [-limit, limit), a function of the key alone.

    Drawn by numpy on the host: jax.random compiles once per shape, which took most of a network's start.
    """

    def draw(words):
        return np.random.default_rng(np.asarray(words)).uniform(-limit, limit, shape).astype(np.float32)

    return jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, jnp.float32), jax.random.key_data(key))


def encode(tables: jax.Array, positions: jax.Array, spec: GridSpec) -> jax.Array:
    """Encode positions f32 [N, 3] (world units) with tables f32 [3, entries, features].

    Returns f32 [N, 3 * levels * features], the plane varying slowest and the feature fastest. A position with any
    coordinate outside [-bound, bound], or not finite, encodes to zeros. Differentiable in tables and positions.
    """
    return encode_transposed(tables, positions.T, spec).T


def encode_transposed(tables: jax.Array, positions: jax.Array, spec: GridSpec) -> jax.Array:
    """`encode` with the point axis last: positions f32 [3, N] -> f32 [3 * levels * features, N]."""
    columns = [_encode_feature(tables[..., feature], positions, spec) for feature in range(spec.features)]
    return jnp.stack(columns, axis=2).reshape(spec.output_dim, positions.shape[1])


class TriPlaneGrid(nnx.Module):
    """The encoder with its tables as one parameter, f32 [3, entries, features]."""

    def __init__(self, spec: GridSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.tables = nnx.Param(init_tables(rngs.params(), spec))

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Positions f32 [N, 3] in world units -> f32 [N, 3 * levels * features]; see `encode`."""
        return encode(self.tables[...], positions, self.spec)


class _Cells(NamedTuple):
    """Which cell of one plane each point lies in, at every level, and where inside it."""

    i: jax.Array  # i32 [levels, N], lower vertex along the plane's first axis
    j: jax.Array  # i32 [levels, N], along its second
    u: jax.Array  # f32 [levels, N], fraction of the cell along the first axis
    v: jax.Array  # f32 [levels, N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _encode_feature(tables, positions, spec):
    """Encode one feature: tables [3, entries], positions [3, N] -> [3, levels, N]."""
    return _by_platform(hashgrid_native.encode, interpolate, spec)(tables, positions)


def _encode_forward(tables, positions, spec):
    return _encode_feature(tables, positions, spec), (tables, positions)


def _encode_backward(spec, saved, cotangent):
    """Everything is computed again from the inputs; of a gradient that a caller drops, XLA drops the work."""
    tables, positions = saved
    to_tables = _by_platform(hashgrid_native.backward_tables, tables_gradient, spec)
    to_positions = _by_platform(hashgrid_native.backward_positions, positions_gradient, spec)
    return to_tables(positions, cotangent), to_positions(tables, positions, cotangent)


_encode_feature.defvjp(_encode_forward, _encode_backward)


def _by_platform(native, plain, spec):
    """The native kernel where the call is lowered for the CPU or CUDA, its plain JAX twin elsewhere.

    A binary that was built without CUDA leaves CUDA to the twin as well.
    """
    kernel, twin = functools.partial(native, spec=spec), functools.partial(plain, spec=spec)
    platforms = {"cpu": kernel, "cuda": kernel} if hashgrid_native.on_cuda() else {"cpu": kernel}
    return functools.partial(jax.lax.platform_dependent, **platforms, default=twin)


def interpolate(tables: jax.Array, positions: jax.Array, spec: GridSpec) -> jax.Array:
    """One feature in plain JAX, the native kernel's specification: f32 [3, entries], [3, N] -> [3, levels, N]."""
    unit, inside = _to_unit(positions, spec)
    planes = []
    for plane, table in enumerate(tables):
        cells = _locate(unit, plane, spec)
        planes.append(_blend(_read_corners(table, cells, spec), cells))
    return jnp.where(inside, jnp.stack(planes), 0.0)


def tables_gradient(positions: jax.Array, cotangent: jax.Array, spec: GridSpec) -> jax.Array:
    """Gradient f32 [3, entries] of `interpolate`'s tables, from that of its result [3, levels, N]."""
    unit, inside = _to_unit(positions, spec)
    cotangent = jnp.where(inside, cotangent, 0.0)
    return jnp.stack([_scatter(_locate(unit, plane, spec), cotangent[plane], spec) for plane in range(len(PLANES))])


def positions_gradient(tables: jax.Array, positions: jax.Array, cotangent: jax.Array, spec: GridSpec) -> jax.Array:
    """Gradient f32 [3, N] of `interpolate`'s positions, likewise."""
    unit, inside = _to_unit(positions, spec)
    cotangent = jnp.where(inside, cotangent, 0.0)
    axes = [jnp.zeros_like(unit[0])] * 3
    for plane, (table, upstream) in enumerate(zip(tables, cotangent, strict=True)):
        cells = _locate(unit, plane, spec)
        # Without the barrier XLA repeats the reads for every use of a corner.
        corners = jax.lax.optimization_barrier(_read_corners(table, cells, spec))
        for axis, slope in zip(PLANES[plane], _slopes(corners, cells), strict=True):
            # A product, not a sum over the levels: XLA's CPU reduction of a leading axis takes twenty times as long.
            axes[axis] += (_spans(spec)[:, 0] / (2 * spec.bound)) @ (slope * upstream)
    return jnp.stack(axes)


def _to_unit(positions, spec):
    """Coordinates in [0, 1] of positions [3, N] (0.5 for a point outside), and which points are inside, bool [N]."""
    inside = jnp.all(jnp.abs(positions) <= spec.bound, axis=0)  # False for NaN
    return jnp.where(inside, positions, 0.0) / (2 * spec.bound) + 0.5, inside


def _spans(spec):
    """Cells from one end of the bound to the other, f32 [levels, 1]: one less than the resolution, because the first
    and the last cell stick out by half. That offset keeps the levels' vertices from coinciding there (TG code)."""
    return np.asarray(spec.resolutions, np.float32)[:, None] - 1


def _locate(unit, plane, spec):
    """Cells, on all levels of a plane, of points with coordinates unit [3, N]."""
    along = [unit[axis] * _spans(spec) + 0.5 for axis in PLANES[plane]]  # in [0.5, resolution - 0.5]
    i, j = (x.astype(jnp.int32) for x in along)
    return _Cells(i, j, along[0] - i.astype(jnp.float32), along[1] - j.astype(jnp.float32))


def _rows(cells, corner, spec):
    """Table entries i32 [levels, N] of one corner of every cell."""
    i, j = cells.i + corner[0], cells.j + corner[1]
    rows = i * (np.asarray(spec.resolutions, np.int32)[:, None] + 1) + j
    if spec.dense_levels < spec.levels:
        mixed = i.astype(jnp.uint32) ^ (j.astype(jnp.uint32) * np.uint32(_PRIME))
        folded = (mixed & np.uint32(2**spec.log2_table - 1)).astype(jnp.int32)
        rows = jnp.where(np.arange(spec.levels)[:, None] < spec.dense_levels, rows, folded)
    return rows + np.asarray(spec.starts[:-1], np.int32)[:, None]


def _read_corners(table, cells, spec):
    """Four reads of a table [entries], f32 [levels, N] each."""
    return [table.at[_rows(cells, corner, spec)].get(mode="promise_in_bounds") for corner in _CORNERS]


def _blend(corners, cells):
    """Bilinear interpolation f32 [levels, N]."""
    low, high = ((1 - cells.v) * corners[k] + cells.v * corners[k + 1] for k in (0, 2))
    return (1 - cells.u) * low + cells.u * high


def _slopes(corners, cells):
    """Derivatives of `_blend` along u and v, f32 [levels, N] each."""
    c00, c01, c10, c11 = corners
    along_u = (1 - cells.v) * (c10 - c00) + cells.v * (c11 - c01)
    return along_u, (1 - cells.u) * (c01 - c00) + cells.u * (c11 - c10)


def _scatter(cells, upstream, spec):
    """Gradient f32 [entries] of one plane's table, from that of its encoding, upstream [levels, N]."""
    high = upstream * cells.u
    low = upstream - high
    low_v, high_v = low * cells.v, high * cells.v
    shares = (low - low_v, low_v, high - high_v, high_v)  # in the order of _CORNERS
    dense = spec.dense_levels
    folded = _fold(_scatter_quads(_rows(cells, (0, 0), spec)[:dense], [share[:dense] for share in shares], spec), spec)
    if dense == spec.levels:
        return folded
    hashed = jnp.zeros(spec.starts[-1] - spec.starts[dense])
    for corner, share in zip(_CORNERS, shares, strict=True):
        rows = _rows(cells, corner, spec)[dense:] - spec.starts[dense]
        hashed += jnp.zeros_like(hashed).at[rows].add(share[dense:], mode="promise_in_bounds")
    return jnp.concatenate([folded, hashed])


def _scatter_quads(rows, shares, spec):
    """Sum the four corners' shares [dense levels, N] into one row of four per cell, f32 [dense entries, 4]."""
    quads = jnp.zeros((spec.starts[spec.dense_levels], len(_CORNERS)))
    return quads.at[rows].add(jnp.stack(shares, axis=-1), mode="promise_in_bounds")


def _fold(quads, spec):
    """Add each cell's four shares to its vertices, f32 [dense entries]: corner c of cell k is vertex k + shift(c)."""
    levels = []
    for level in range(spec.dense_levels):
        cells = quads[spec.starts[level] : spec.starts[level + 1]]
        shifts = [di * (spec.resolutions[level] + 1) + dj for di, dj in _CORNERS]
        levels.append(sum(jnp.pad(cells[: len(cells) - s, c], (s, 0)) for c, s in enumerate(shifts)))
    return jnp.concatenate([*levels, jnp.zeros(0)])
