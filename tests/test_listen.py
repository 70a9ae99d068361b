"""The encoder of sound in one native pass against its plain JAX twin and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax.model import listen as module
from fg3dgs_jax.model.listen import listen, listen_reference

BANDS, COMPONENTS, ODD = (8, 16, 29, 32), (8, 1, 24, 32), (5, 7, 3, 6)  # tokens, steps, channels, features


def operands(sizes, seed=0):
    """Windows, kernels and biases in the order of the call, then cotangents of tokens and of the pooled vector."""
    tokens, steps, channels, features = sizes
    rng = np.random.default_rng(seed)
    wide = [channels, 32, 32, 64, 64] if features == 32 else [channels, 4, 5, 3, 7]
    kernels = [(3, *wide[i : i + 2]) for i in range(4)] + [(wide[-1], 9), (9, features)]
    thin = [features, 16, 8, 4, 2, 1]
    kernels += [(3, *thin[i : i + 2]) for i in range(5)] + [(tokens, tokens)]
    arrays = [rng.normal(size=(tokens, steps, channels))]
    for shape in kernels:
        arrays += [rng.normal(size=shape) * 1.5 / np.sqrt(np.prod(shape[:-1])), 0.1 * rng.normal(size=shape[-1])]
    arrays += [rng.normal(size=(tokens, features)), rng.normal(size=features)]
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def native(windows, *arrays):
    return listen(windows, list(zip(arrays[::2], arrays[1::2], strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def both(function, *given):
    values, pull = jax.vjp(function, *given[:-2])
    return *values, *pull(given[-2:])


@pytest.mark.parametrize("sizes", [BANDS, COMPONENTS, ODD, (1, 1, 1, 2)], ids=str)
def test_equals_plain_jax(sizes):
    given = operands(sizes)
    got, want = (both(f, *given) for f in (native, listen_reference))
    assert len(got) == 2 + 25
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        # float32 sums of at most 192 products in another order, through twelve layers
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=str(index))


def test_finite_differences():
    """The plain twin in float64, along random directions of every operand."""
    *given, d_tokens, d_pooled = (np.asarray(a, np.float64) for a in operands(ODD, seed=3))
    rng, step = np.random.default_rng(4), 1e-6
    gradients = both(native, *(jnp.asarray(a, jnp.float32) for a in (*given, d_tokens, d_pooled)))[2:]
    for index, gradient in enumerate(gradients):
        along = rng.normal(size=given[index].shape)
        with jax.enable_x64(True):

            def value(sign, index=index, along=along):
                moved = [a + sign * step * along if i == index else a for i, a in enumerate(given)]
                tokens, pooled = listen_reference(*map(jnp.asarray, moved))
                return float((tokens * d_tokens).sum() + (pooled * d_pooled).sum())

            slope = (value(1) - value(-1)) / (2 * step)
        # float32 gradients, sums of terms that cancel in part
        assert float((gradient * along).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4), index


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on_and_stays_in_its_token(bad):
    windows, *rest = operands(BANDS)
    tokens, pooled, *_ = both(native, windows.at[3, 5, 7].set(bad), *rest)
    fine = both(native, windows, *rest)[0]
    assert not np.isfinite(tokens[3]).all() and not np.isfinite(pooled).all()
    np.testing.assert_array_equal(np.delete(tokens, 3, 0), np.delete(fine, 3, 0))


@pytest.mark.parametrize("position, shape", [(0, (8, 16, 28)), (1, (2, 29, 32)), (9, (64, 9, 1)), (10, (8,)),
                                             (21, (3, 2, 2)), (23, (8, 7))])  # fmt: skip
def test_the_kernel_refuses_operands_that_do_not_fit(position, shape):
    given = operands(BANDS)
    given[position] = jnp.zeros(shape, jnp.float32)
    for kernel, args in ((module._native_forward, given[:-2]), (module._native_backward, given[-2:] + given[:-2])):
        with pytest.raises(Exception, match="listen: operands have the wrong shapes"):
            jax.block_until_ready(jax.jit(kernel)(*args))
