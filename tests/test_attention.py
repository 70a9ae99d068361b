"""Attention and the layers behind it in one native pass against its plain JAX twin and finite differences."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rasterizer import run_python

from fg3dgs_jax.model import attention as module
from fg3dgs_jax.model.attention import attend, attend_reference

MOUTH = (8, 4, 36, 32, 32, 3)  # tokens, heads, rows seen, sizes of the layers
SIZES = [MOUTH, (3, 2, 5, 7, 9, 1), (16, 1, 32, 6, 2, 4)]
NAMES = ("value", "x", "to_scores", "from_weights", "bias", "from_hidden", "past_weights", "last")


def operands(sizes, points, seed=0):
    """The arrays in the order of the call, then a cotangent."""
    tokens, heads, seen, hidden, second, last = sizes
    rng, weights = np.random.default_rng(seed), tokens * heads
    shapes = ((weights, seen), (hidden, weights), (hidden,), (second, hidden), (second, weights), (last, second))
    arrays = [rng.normal(size=shape) / np.sqrt(shape[-1]) for shape in shapes]
    x, cotangent = rng.normal(size=(seen, points)), rng.normal(size=(last, points))
    return [jnp.asarray(a, jnp.float32) for a in (x, *arrays, cotangent)]


def call(x, to_scores, from_weights, bias, from_hidden, past_weights, last, *, heads):
    return attend(x, to_scores, (from_weights, bias), (from_hidden, past_weights), last, heads)


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(function, heads, *given):
    value, pull = jax.vjp(functools.partial(function, heads=heads), *given[:-1])
    return value, *pull(given[-1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("points", [0, 1, 256, 4500])
def test_equals_plain_jax(sizes, points):
    given = operands(sizes, points)
    for name, a, b in zip(NAMES, *(both(f, sizes[1], *given) for f in (call, attend_reference)), strict=True):
        # float32 sums of up to 36 products, or of 4,500 points, in another order; exp2 to 2e-7
        scale = max(float(jnp.abs(b).max(initial=0.0)), 1.0)
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, err_msg=name)


def test_one_token_may_take_all_the_weight():
    given = operands(MOUTH, 300)
    given[0] = given[0].at[:, 0].mul(1e4)
    for name, a, b in zip(NAMES, *(both(f, 4, *given) for f in (call, attend_reference)), strict=True):
        # scores up to 1e5 are rounded to a hundredth
        np.testing.assert_allclose(a, b, atol=2e-2 * float(jnp.abs(b).max()), err_msg=name)


def test_finite_differences():
    """The plain twin in float64, along random directions of every operand."""
    sizes = (3, 2, 4, 5, 6, 2)
    *given, cotangent = (np.asarray(a, np.float64) for a in operands(sizes, 9, seed=3))
    rng, step = np.random.default_rng(4), 1e-6
    gradients = both(call, 2, *(jnp.asarray(a, jnp.float32) for a in (*given, cotangent)))[1:]
    for index, name in enumerate(NAMES[1:]):
        along = rng.normal(size=given[index].shape)
        with jax.enable_x64(True):

            def value(sign, index=index, along=along):
                moved = [a + sign * step * along if i == index else a for i, a in enumerate(given)]
                return float((attend_reference(*map(jnp.asarray, moved), heads=2) * cotangent).sum())

            slope = (value(1) - value(-1)) / (2 * step)
        # float32 gradients, sums of terms that cancel in part
        assert float((gradients[index] * along).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4), name


PRINT = "import json, test_attention\nprint(json.dumps(test_attention.digest()))"


def digest() -> str:
    """Of values and gradients at more points than one chunk of the sums has."""
    found = both(call, 4, *operands(MOUTH, 9000))
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in found)).hexdigest()


def test_bits_do_not_depend_on_threads():
    one, two = (run_python(PRINT, NPROC=count) for count in ("1", "2"))
    assert one == two and len(one) == 64


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa):
    """The narrower kernels, in a process of their own: the choice is made once."""
    run_python(f"import test_attention as t\nt.test_equals_plain_jax({SIZES[1]}, 300)\nprint(0)", FG3DGS_ISA=isa)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on_and_stays_in_its_point(bad):
    x, *rest = operands(MOUTH, 300)
    out, d_x, *sums = map(np.asarray, both(call, 4, x.at[1, 7].set(bad), *rest))
    fine, d_fine, *_ = map(np.asarray, both(call, 4, x, *rest))
    assert not np.isfinite(out[:, 7]).all() and not np.isfinite(sums[0]).all()
    np.testing.assert_array_equal(np.delete(out, 7, 1), np.delete(fine, 7, 1))
    np.testing.assert_array_equal(np.delete(d_x, 7, 1), np.delete(d_fine, 7, 1))


SHAPES = [(35, 8), (30, 36), (32, 31), (31,), (32, 31), (31, 32), (3, 0)]


@pytest.mark.parametrize("position, shape", [*enumerate(SHAPES), (1, (68, 36))])
def test_the_kernel_refuses_operands_that_do_not_fit(position, shape):
    given = operands(MOUTH, 8)
    given[position] = jnp.zeros(shape, jnp.float32)
    for kernel, count in ((module._native_forward, 7), (module._native_backward, 8)):
        with pytest.raises(Exception, match="attend: operands have the wrong shapes"):
            jax.block_until_ready(jax.jit(functools.partial(kernel, heads=4))(*given[:count]))
