"""The grid's native kernel against its plain JAX twin, which the oracle in test_hashgrid.py cannot reach on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax.model import hashgrid, hashgrid_native

DENSE = hashgrid.GridSpec()
HASHED = hashgrid.GridSpec(levels=5, max_resolution=64, log2_table=9, bound=1.0)  # 512 entries: all but one level fold
# Positions on 256 cells are known to 256 * 2^-23 of a cell, in a few roundings; values below 1, slopes below 1 a cell.
TOLERANCE = 1e-4


@pytest.mark.parametrize("spec", [DENSE, HASHED])
@pytest.mark.parametrize("points", [0, 1, 511, 1537])
def test_equals_plain_jax(spec, points):
    rng = np.random.default_rng(points)
    tables = jnp.asarray(rng.uniform(-1, 1, (3, spec.starts[-1])), jnp.float32)
    positions = jnp.asarray(rng.uniform(-1.1, 1.1, (3, points)) * spec.bound, jnp.float32)  # some of them outside
    if points > 1:
        positions = positions.at[:, :2].set(jnp.array([[jnp.nan, 0.0], [0.0, jnp.inf], [0.0, 0.0]]))
    cotangent = jnp.asarray(rng.normal(size=(3, spec.levels, points)), jnp.float32)
    for native, plain, operands in (
        (hashgrid_native.encode, hashgrid.interpolate, (tables, positions)),
        (hashgrid_native.backward_tables, hashgrid.tables_gradient, (positions, cotangent)),
        (hashgrid_native.backward_positions, hashgrid.positions_gradient, (tables, positions, cotangent)),
    ):
        got, want = native(*operands, spec), jax.jit(plain, static_argnums=len(operands))(*operands, spec)
        scale = float(jnp.abs(want).max()) if points else 1.0
        np.testing.assert_allclose(got, want, atol=TOLERANCE * max(scale, 1.0), err_msg=native.__name__)


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
