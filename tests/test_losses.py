"""Image losses against definitions written from their formulas, and their gradients where they are delicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from fg3dgs_jax.losses import image, terms
from fg3dgs_jax.types import Deltas


def images(shape, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.random(shape, dtype=np.float32)
    return a, np.clip(a + 0.3 * rng.standard_normal(shape).astype(np.float32), 0.0, 1.0)


def ssim_by_scipy(a, b):
    """Wang et al. 2004 in float64 with scipy's filters."""
    offsets = np.arange(-5, 6)
    taps = np.exp(-0.5 * (offsets / 1.5) ** 2)
    taps /= taps.sum()

    def blur(x):
        return correlate1d(correlate1d(x, taps, axis=0, mode="constant"), taps, axis=1, mode="constant")

    a, b = a.astype(np.float64), b.astype(np.float64)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


@pytest.mark.parametrize("shape", [(64, 48, 3), (33, 21, 3), (7, 5, 1), (1, 1, 2)])
def test_dssim_is_one_minus_ssim(shape):
    a, b = images(shape)
    # float32 blurs cancel in the variances: 1e-6 absolute on values around 1.
    assert float(image.dssim(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(1.0 - ssim_by_scipy(a, b), abs=2e-6)


def test_dssim_of_equal_images_is_zero_with_zero_gradient():
    a, _ = images((32, 32, 3))
    value, gradient = jax.value_and_grad(image.dssim)(jnp.asarray(a), jnp.asarray(a))
    assert abs(float(value)) < 1e-6
    assert float(jnp.abs(gradient).max()) < 1e-6  # a maximum of SSIM, up to rounding


def test_dssim_gradient_by_finite_differences():
    a, b = images((24, 20, 3), seed=3)
    gradient = np.asarray(jax.grad(image.dssim)(jnp.asarray(a), jnp.asarray(b)))
    direction = np.random.default_rng(1).standard_normal(a.shape)
    step = 1e-5  # in float64 the truncation error is about 1e-9 of the slope
    slope = (ssim_by_scipy(a - step * direction, b) - ssim_by_scipy(a + step * direction, b)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_alpha_is_zero_only_for_the_mask_itself():
    inside = np.zeros((4, 4), np.float32)
    inside[:2] = 1.0
    assert float(image.alpha(inside, inside, 1 - inside)) == 0.0
    assert float(image.alpha(1 - inside, inside, 1 - inside)) == pytest.approx(2.0)
    assert float(image.alpha(inside, np.zeros((4, 4)), np.zeros((4, 4)))) == 0.0  # an empty mask judges nothing


def test_motion_terms_ignore_dead_slots():
    alive = jnp.asarray([True, False])
    deltas = Deltas(means=jnp.asarray([[1.0, -2.0, 3.0], [9.0, 9.0, 9.0]]))
    view = terms.RegionView(*[jnp.zeros(())] * 5, deltas=deltas, alive=alive, judges={})
    assert float(terms.REGION_TERMS["delta_means"](view)) == pytest.approx(2.0)
    assert float(terms.REGION_TERMS["delta_quats"](view)) == 0.0


@pytest.mark.parametrize("shape", [(512, 384, 3), (130, 67, 3), (64, 64, 1), (1, 3, 2), (5, 1, 3)])
def test_native_dssim_equals_its_twin(shape):
    """The kernel and plain JAX, value and gradient; both are float32, and the variances cancel about four digits."""
    a, b = images(shape, seed=5)
    value, gradient = jax.value_and_grad(image.dssim)(jnp.asarray(a), jnp.asarray(b))
    expected, slopes = jax.value_and_grad(image.dssim_reference)(jnp.asarray(a), jnp.asarray(b))
    assert float(value) == pytest.approx(float(expected), abs=2e-6)
    scale = float(jnp.abs(slopes).max())
    np.testing.assert_allclose(gradient, slopes, atol=1e-5 * scale)


def test_dssim_passes_nan_on():
    """A damaged picture must be seen by the trainer, not averaged away."""
    a, b = images((16, 16, 3))
    a[3, 4, 1] = np.nan
    assert np.isnan(image.dssim(jnp.asarray(a), jnp.asarray(b)))


def test_dssim_lowers_for_cuda():
    shape = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
    lowered = jax.jit(jax.grad(image.dssim)).trace(shape, shape).lower(lowering_platforms=("cuda",))
    assert "fg3dgs_dssim" not in lowered.as_text()
