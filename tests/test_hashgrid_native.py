"""The grid's native kernels against their plain JAX twin, which the oracle in test_hashgrid.py cannot reach on a CPU.

The CUDA kernels' sources run by the emulation: see test_cuda_emulation.py.
"""

import dataclasses
import functools

import emulated
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax.model import hashgrid, hashgrid_native

DENSE = hashgrid.GridSpec()
HASHED = hashgrid.GridSpec(levels=5, max_resolution=64, log2_table=9, bound=1.0)  # 512 entries: all but one level fold
# Positions on 256 cells are known to 256 * 2^-23 of a cell, in a few roundings; values below 1, slopes below 1 a cell.
TOLERANCE = 1e-4


@functools.cache
def plain_jax(function, operands):
    return jax.jit(function, static_argnums=operands)


def emulated_kernel(which, *operands):
    """A kernel with the operands of its CPU counterpart; the emulation's one entry takes all three arrays."""
    *arrays, spec = operands
    positions = arrays[0] if which == 1 else arrays[1]
    tables = np.zeros((3, spec.starts[-1])) if which == 1 else arrays[0]
    cotangent = np.zeros((3, spec.levels, positions.shape[1])) if which == 0 else arrays[-1]
    return emulated.grid(which, tables, positions, cotangent, spec)


CPU = (hashgrid_native.encode, hashgrid_native.backward_tables, hashgrid_native.backward_positions)
CUDA = tuple(functools.partial(emulated_kernel, which) for which in range(3))


@pytest.mark.parametrize("kernels", [CPU, CUDA], ids=["cpu", "cuda, emulated"])
@pytest.mark.parametrize("spec", [DENSE, HASHED])
@pytest.mark.parametrize("points", [0, 1, 511, 1537])
def test_equals_plain_jax(spec, points, kernels):
    rng = np.random.default_rng(points)
    tables = jnp.asarray(rng.uniform(-1, 1, (3, spec.starts[-1])), jnp.float32)
    positions = jnp.asarray(rng.uniform(-1.1, 1.1, (3, points)) * spec.bound, jnp.float32)  # some of them outside
    if points > 1:
        positions = positions.at[:, :2].set(jnp.array([[jnp.nan, 0.0], [0.0, jnp.inf], [0.0, 0.0]]))
    cotangent = jnp.asarray(rng.normal(size=(3, spec.levels, points)), jnp.float32)
    encode, backward_tables, backward_positions = kernels
    for native, plain, operands in (
        (encode, hashgrid.interpolate, (tables, positions)),
        (backward_tables, hashgrid.tables_gradient, (positions, cotangent)),
        (backward_positions, hashgrid.positions_gradient, (tables, positions, cotangent)),
    ):
        got, want = native(*operands, spec), plain_jax(plain, len(operands))(*operands, spec)
        scale = float(jnp.abs(want).max()) if points else 1.0
        np.testing.assert_allclose(got, want, atol=TOLERANCE * max(scale, 1.0), err_msg=plain.__name__)


def test_cotangents_outside_are_ignored():
    """NaN where nothing is drawn must not reach the tables."""
    positions = jnp.array([[0.0, 9.0], [0.0, 0.0], [0.0, 0.0]])
    cotangent = jnp.ones((3, HASHED.levels, 2)).at[..., 1].set(jnp.nan)
    tables = jnp.ones((3, HASHED.starts[-1]))
    assert np.isfinite(hashgrid_native.backward_tables(positions, cotangent, HASHED)).all()
    assert np.isfinite(hashgrid_native.backward_positions(tables, positions, cotangent, HASHED)).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="wrong shapes"):
        hashgrid_native.encode(jnp.zeros((3, 7)), jnp.zeros((3, 4)), HASHED).block_until_ready()


@pytest.mark.parametrize("change", [{"bound": 0.0}, {"bound": np.nan}, {"bound": np.inf}, {"bound": -1.0}], ids=str)
def test_impossible_bounds_are_refused(change):
    """No position would have a cell: indices into the tables would be made of NaN."""
    spec = dataclasses.replace(HASHED, **change)
    operands = jnp.zeros((3, spec.starts[-1])), jnp.zeros((3, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="bound"):
        hashgrid_native.encode(*operands, spec).block_until_ready()
