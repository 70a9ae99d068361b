"""Region attention in one native pass against its plain JAX twin and finite differences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax.model import gated as module
from fg3dgs_jax.model.gated import gated, gated_reference

FACE = ((77, 64, 64, 10), (36, 32, 32), (36, 16, 9))
SIZES = [FACE, ((9, 4, 3), (5, 3), (5, 2, 2, 1)), ((3, 1), (1, 1), (1, 1))]
NAMES = ("value", "x", "weights", "audio weights", "audio", "expression weights", "expression")


def operands(sizes, points, seed=0):
    """x, then the weights and conditions in the order of the call, then a cotangent."""
    rng = np.random.default_rng(seed)
    packed = [
        np.concatenate([rng.normal(size=a * b) / np.sqrt(a) for a, b in itertools.pairwise(one)]) for one in sizes
    ]
    x, (main, audio, expression) = rng.normal(size=(sizes[1][0], points)), packed
    arrays = [x, main, audio, rng.normal(size=sizes[1][-1]), expression, rng.normal(size=sizes[2][-1])]
    return [jnp.asarray(a, jnp.float32) for a in (*arrays, rng.normal(size=(sizes[0][-1], points)))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(function, sizes, *given):
    value, pull = jax.vjp(lambda *a: function(*a, sizes), *given[:-1])
    return value, *pull(given[-1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("points", [0, 1, 255, 256, 4500])
def test_equals_plain_jax(sizes, points):
    given = operands(sizes, points)
    got, want = (both(f, sizes, *given) for f in (gated, gated_reference))
    for name, a, b in zip(NAMES, got, want, strict=True):
        # float32 sums of up to 77 products, or of 4,500 points, in another order
        scale = max(float(jnp.abs(b).max(initial=0.0)), 1.0)
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=name)


def test_finite_differences():
    """The plain twin in float64, along random directions of every operand."""
    sizes = ((9, 6, 4), (4, 3, 3), (4, 3, 2))
    *given, cotangent = (np.asarray(a, np.float64) for a in operands(sizes, 9, seed=3))
    rng, step = np.random.default_rng(4), 1e-6
    gradients = both(gated, sizes, *(jnp.asarray(a, jnp.float32) for a in (*given, cotangent)))[1:]
    for index, name in enumerate(NAMES[1:]):
        along = rng.normal(size=given[index].shape)
        with jax.enable_x64(True):

            def value(sign, index=index, along=along):
                moved = [a + sign * step * along if i == index else a for i, a in enumerate(given)]
                return float((gated_reference(*map(jnp.asarray, moved), sizes) * cotangent).sum())

            slope = (value(1) - value(-1)) / (2 * step)
        # float32 gradients, sums of terms that cancel in part
        assert float((gradients[index] * along).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4), name


def test_gradients_are_the_same_from_run_to_run():
    given = operands(FACE, 9000)
    first = both(gated, FACE, *given)
    for _ in range(5):
        for a, b in zip(first, both(gated, FACE, *given), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on_and_stays_in_its_point(bad):
    x, *rest, cotangent = operands(FACE, 300)
    spoilt = x.at[1, 7].set(bad)
    out, d_x, *sums = map(np.asarray, both(gated, FACE, spoilt, *rest, cotangent))
    fine, d_fine, *_ = map(np.asarray, both(gated, FACE, x, *rest, cotangent))
    assert not np.isfinite(out[:, 7]).all() and not np.isfinite(sums[0]).all()
    np.testing.assert_array_equal(np.delete(out, 7, 1), np.delete(fine, 7, 1))
    np.testing.assert_array_equal(np.delete(d_x, 7, 1), np.delete(d_fine, 7, 1))


@pytest.mark.parametrize("position, shape", [(1, (9665,)), (2, (2175,)), (3, (31,)), (5, (10,)), (0, (35, 8))])
def test_the_kernel_refuses_operands_that_do_not_fit(position, shape):
    given = operands(FACE, 8)
    given[position] = jnp.zeros(shape, jnp.float32)
    for kernel, count in ((module._native_forward, 6), (module._native_backward, 7)):
        with pytest.raises(Exception, match="gated: operands have the wrong shapes"):
            jax.block_until_ready(jax.jit(functools.partial(kernel, sizes=FACE))(*given[:count]))
