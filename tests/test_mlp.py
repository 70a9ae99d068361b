"""The native perceptron against its plain JAX twin and finite differences."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax.model import mlp

SIZES = [(36, 32, 32), (77, 64, 64, 10), (32, 3), (5, 7, 1, 2), (1, 1)]


def operands(sizes, points, seed=0):
    rng = np.random.default_rng(seed)
    weights = np.concatenate([rng.normal(size=a * b) / np.sqrt(a) for a, b in itertools.pairwise(sizes)])
    arrays = rng.normal(size=(sizes[0], points)), weights, rng.normal(size=(sizes[-1], points))
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@functools.partial(jax.jit, static_argnums=(0, 4))
def both(function, x, weights, cotangent, sizes):
    value, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, weights)
    return value, *pull(cotangent)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("points", [0, 1, 255, 256, 4500])
def test_equals_plain_jax(sizes, points):
    x, weights, cotangent = operands(sizes, points)
    got, want = (both(f, x, weights, cotangent, sizes) for f in (mlp.multiply, mlp.multiply_reference))
    for name, a, b in zip(("value", "x", "weights"), got, want, strict=True):
        # float32 sums of up to 77 products, or of 4,500 points, in another order
        scale = max(float(jnp.abs(b).max(initial=0.0)), 1.0)
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=name)


def test_finite_differences():
    """The plain twin in float64, along random directions."""
    sizes = (6, 5, 4, 3)
    x, weights, cotangent = (np.asarray(a, np.float64) for a in operands(sizes, 9, seed=3))
    with jax.enable_x64(True):

        def value(x, w):
            return float((mlp.multiply_reference(jnp.asarray(x), jnp.asarray(w), sizes) * cotangent).sum())

        rng, step = np.random.default_rng(4), 1e-6
        along = rng.normal(size=x.shape), rng.normal(size=weights.shape)
        ends = [value(x + s * step * along[0], weights + s * step * along[1]) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
    _, d_x, d_w = both(mlp.multiply, *(jnp.asarray(a, jnp.float32) for a in (x, weights, cotangent)), sizes)
    assert (d_x * along[0]).sum() + (d_w * along[1]).sum() == pytest.approx(slope, rel=1e-4)  # float32 gradients


def test_gradients_are_the_same_from_run_to_run():
    x, weights, cotangent = operands((77, 64, 64, 10), 9000)
    run = functools.partial(both, mlp.multiply, x, weights, cotangent, (77, 64, 64, 10))
    first = run()
    for _ in range(5):
        for a, b in zip(first, run(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on_and_stays_in_its_point(bad):
    sizes = (4, 8, 2)
    x, weights, _ = operands(sizes, 300)
    out = np.asarray(mlp.multiply(x.at[1, 7].set(bad), weights, sizes))
    assert not np.isfinite(out[:, 7]).all()
    np.testing.assert_array_equal(np.delete(out, 7, 1), np.delete(np.asarray(mlp.multiply(x, weights, sizes)), 7, 1))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@pytest.mark.parametrize("tests", ["test_mlp", "test_gated"])
def test_other_instruction_sets(tests, isa):
    """The narrower kernels, in a process of their own: the choice is made once."""
    program = f"import {tests} as t\nfor sizes in t.SIZES:\n    t.test_equals_plain_jax(sizes, 700)"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "FG3DGS_ISA": isa, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
