"""The tri-plane encoder against a brute-force oracle: loops in float64, one point, plane, level and corner at a time.

A hand-written backward pass and reads that promise to be in bounds deserve an independent program beside them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fg3dgs_jax.model import hashgrid
from fg3dgs_jax.model.hashgrid import GridSpec

# 5 levels of 4, 7, 13, 23, 40 cells in tables of 256 entries: 16 vertices a side still fit, so the last two hash.
HASHING = GridSpec(levels=5, min_resolution=4, max_resolution=40, features=2, log2_table=8, bound=0.15)
DENSE = GridSpec(levels=3, min_resolution=4, max_resolution=9, features=1, log2_table=17, bound=0.2)
ALL_HASHED = GridSpec(levels=2, min_resolution=16, max_resolution=16, features=1, log2_table=6, bound=1.0)


def contributions(position, spec):
    """Yields (plane, level, table entry within the level, bilinear weight) of the 12 * levels vertices of a point."""
    if not all(abs(x) <= spec.bound for x in position):
        return
    for plane, (first, second) in enumerate(((0, 1), (1, 2), (0, 2))):
        for level in range(spec.levels):
            ratio = (spec.max_resolution / spec.min_resolution) ** (level / max(spec.levels - 1, 1))
            resolution = round(spec.min_resolution * ratio)
            p, q = (
                (float(position[axis]) + spec.bound) / (2 * spec.bound) * (resolution - 1) + 0.5
                for axis in (first, second)
            )
            for di, dj in itertools.product((0, 1), repeat=2):
                i, j = int(np.floor(p)) + di, int(np.floor(q)) + dj
                weight = abs(1 - di - (p - np.floor(p))) * abs(1 - dj - (q - np.floor(q)))
                if (resolution + 1) ** 2 <= 2**spec.log2_table:
                    entry = i * (resolution + 1) + j
                else:
                    entry = (i ^ ((j * 2654435761) % 2**32)) % 2**spec.log2_table
                yield plane, level, entry, weight


def oracle(tables, positions, spec):
    """`encode`, f64 [N, 3 * levels * features]."""
    out = np.zeros((len(positions), 3, spec.levels, spec.features))
    for n, position in enumerate(positions):
        for plane, level, entry, weight in contributions(position, spec):
            out[n, plane, level] += weight * np.asarray(tables[plane, spec.starts[level] + entry], np.float64)
    return out.reshape(len(positions), -1)


def oracle_table_gradient(shape, positions, cotangent, spec):
    gradient = np.zeros(shape)
    cotangent = cotangent.reshape(len(positions), 3, spec.levels, spec.features)
    for n, position in enumerate(positions):
        for plane, level, entry, weight in contributions(position, spec):
            gradient[plane, spec.starts[level] + entry] += weight * cotangent[n, plane, level]
    return gradient


def scene(spec, count=40, seed=0):
    """Random tables and points, some of them outside the bound, two exactly on its corners."""
    rng = np.random.default_rng(seed)
    tables = rng.normal(size=(3, spec.starts[-1], spec.features)).astype(np.float32)
    positions = rng.uniform(-1.1 * spec.bound, 1.1 * spec.bound, (count, 3)).astype(np.float32)
    positions[0], positions[1] = np.float32(spec.bound), np.float32(-spec.bound)
    cotangent = rng.normal(size=(count, spec.output_dim)).astype(np.float32)
    return jnp.asarray(tables), jnp.asarray(positions), jnp.asarray(cotangent)


encode = jax.jit(hashgrid.encode, static_argnums=2)


@functools.partial(jax.jit, static_argnums=3)
def pull_back(tables, positions, cotangent, spec):
    """Gradients of `encode` for tables and positions."""
    return jax.vjp(lambda t, p: hashgrid.encode(t, p, spec), tables, positions)[1](cotangent)


@pytest.mark.parametrize("spec", [DENSE, HASHING, ALL_HASHED])
def test_encode_equals_the_oracle(spec):
    tables, positions, _ = scene(spec)
    got = encode(tables, positions, spec)
    # Fractions of a cell come from coordinates up to 40 in float32, so weights are good to 40 * 2^-24 = 2.4e-6 each.
    np.testing.assert_allclose(got, oracle(np.asarray(tables), np.asarray(positions), spec), atol=3e-5)
    assert np.any(np.asarray(got)[2:] != 0)


@pytest.mark.parametrize("spec", [DENSE, HASHING, ALL_HASHED])
def test_table_gradient_equals_the_oracle(spec):
    tables, positions, cotangent = scene(spec)
    got = pull_back(tables, positions, cotangent, spec)[0]
    want = oracle_table_gradient(tables.shape, np.asarray(positions), np.asarray(cotangent), spec)
    # Coarse vertices sum some ten shares, each with the weight's error of 2.4e-6.
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("spec", [DENSE, HASHING])
def test_position_gradient_equals_finite_differences_of_the_oracle(spec):
    tables, positions, cotangent = scene(spec)
    got = np.asarray(pull_back(tables, positions, cotangent, spec)[1])
    step = 1e-7 * spec.bound  # the oracle is bilinear inside a cell: any step is exact unless it crosses a border
    for n, axis in itertools.product(range(2, 12), range(3)):  # not the two corners: one-sided there
        ends = [np.asarray(positions[n], np.float64) for _ in range(2)]
        ends[0][axis] += step
        ends[1][axis] -= step
        values = oracle(np.asarray(tables), ends, spec) @ np.asarray(cotangent[n], np.float64)
        want = (values[0] - values[1]) / (2 * step)
        # Relative to slopes of order resolution / bound = 300, weights good to 2.4e-6, 24 terms.
        assert abs(got[n, axis] - want) < 1e-4 * 40 / spec.bound, (n, axis)


def test_outside_and_not_finite_encode_to_zero_with_zero_gradients():
    tables, _, _ = scene(HASHING)
    bad = jnp.asarray([[0.16, 0, 0], [0, -0.2, 0], [0, 0, 9e9], [jnp.nan, 0, 0], [0, jnp.inf, 0]], jnp.float32)
    bad = jnp.tile(bad, (8, 1))
    assert not np.any(encode(tables, bad, HASHING))
    to_tables, to_positions = pull_back(tables, bad, jnp.ones((len(bad), HASHING.output_dim)), HASHING)
    assert not np.any(to_tables) and not np.any(to_positions)


def test_gradients_do_not_depend_on_which_are_asked_for():
    tables, positions, cotangent = scene(HASHING)
    alone = jax.jit(lambda t: jax.vjp(lambda t: hashgrid.encode(t, positions, HASHING), t)[1](cotangent)[0])(tables)
    # The same shares, added in the same order, but with other roundings where XLA fuses differently.
    np.testing.assert_allclose(pull_back(tables, positions, cotangent, HASHING)[0], alone, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    low=st.floats(2, 64),
    ratio=st.floats(1, 8),
    log2_table=st.integers(2, 14),
    bound=st.floats(1e-3, 10),
)
def test_every_read_is_in_bounds(low, ratio, log2_table, bound):
    """Reads and scatters promise XLA to be in bounds; the extreme points keep the promise at every level."""
    levels = 4  # one shape: operations compile once
    spec = GridSpec(levels, low, low * ratio, 1, log2_table, bound)
    edge = np.float32(bound)
    positions = jnp.asarray(np.array(list(itertools.product((-edge, 0, edge), repeat=3)), np.float32).T)
    unit, _ = hashgrid._to_unit(positions, spec)
    for plane in range(3):
        cells = hashgrid._locate(unit, plane, spec)
        rows = np.stack([hashgrid._rows(cells, corner, spec) for corner in hashgrid._CORNERS])
        for level in range(levels):
            assert rows[:, level].min() >= spec.starts[level]
            assert rows[:, level].max() < spec.starts[level + 1]


def test_the_papers_grids():
    face, mouth = GridSpec(), GridSpec(min_resolution=64, max_resolution=384)
    assert (face.resolutions[0], face.resolutions[-1], face.output_dim) == (16, 256, 36)
    assert (mouth.resolutions[0], mouth.resolutions[-1]) == (64, 384)
    assert face.dense_levels == 12
    assert mouth.dense_levels == 11  # in 2-D, 2^17 entries hold every vertex of up to 361 cells
    assert mouth.sizes[-1] == 2**17
    tables = hashgrid.init_tables(jax.random.key(0), face)
    assert tables.shape == (3, sum(face.sizes), 1)
    assert 0.9e-4 < float(jnp.abs(tables).max()) <= 1e-4


def test_a_grid_may_coarsen_where_no_level_hashes():
    """TG's released recipe does; hashed levels must come last, which a coarsening grid has first."""
    assert GridSpec(min_resolution=64, max_resolution=57.6).resolutions[-1] == 58
    with pytest.raises(ValueError, match="log2_table"):
        GridSpec(min_resolution=64, max_resolution=16, log2_table=10)
    with pytest.raises(ValueError, match="one cell"):
        GridSpec(min_resolution=1)
