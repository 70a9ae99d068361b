"""Image losses against definitions written from their formulas, and their gradients where they are delicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d
from test_rasterizer import run_python

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
    view = terms.RegionView(*[jnp.zeros(())] * 6, deltas=deltas, alive=alive, judges={})
    assert float(terms.REGION_TERMS["delta_means"](view)) == pytest.approx(2.0)
    assert float(terms.REGION_TERMS["delta_quats"](view)) == 0.0


def photos(height, width, seed=5):
    """Operands of `image.photo` but the weights: some pixels inside, some outside, some neither."""
    rng = np.random.default_rng(seed)
    color, opacity = rng.random((height, width, 3), dtype=np.float32), rng.random((height, width), dtype=np.float32)
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    picture[: height // 2] = np.uint8(255 * color[: height // 2])  # alike, as late in training
    marks, background = rng.integers(0, 8, (height, width), np.uint8), rng.random(3, np.float32)
    return [jnp.asarray(x) for x in (color, opacity, picture, marks, background)]


PULL = jax.value_and_grad(image.photo, (0, 1), has_aux=True)
TWIN = jax.jit(jax.value_and_grad(image.photo_reference, (0, 1), has_aux=True))
WEIGHTS = (1.0, 0.2, 0.5)


@pytest.mark.parametrize("size", [(150, 290), (64, 128), (65, 129), (33, 21), (1, 3), (5, 1)])
def test_native_photo_equals_its_twin(size):
    """The kernel and plain JAX, value and gradient; both are float32, and the variances cancel about four digits."""
    given = photos(*size)
    (loss, values), slopes = PULL(*given, WEIGHTS)
    (expected, terms), twins = TWIN(*given, jnp.asarray(WEIGHTS))
    assert float(loss) == pytest.approx(float(expected), rel=3e-6)
    np.testing.assert_allclose(values, terms, rtol=1e-5, atol=2e-6)
    for slope, twin in zip(slopes, twins, strict=True):
        np.testing.assert_allclose(slope, twin, atol=2e-5 * float(jnp.abs(twin).max()))


@pytest.mark.parametrize("part", range(3))
def test_photo_gradient_is_each_terms_own(part):
    """One weight at a time: a term's gradient must not hide behind a larger one's."""
    given, weights = photos(40, 30), [float(i == part) for i in range(3)]
    _, slopes = PULL(*given, weights)
    _, twins = TWIN(*given, jnp.asarray(weights))
    for slope, twin in zip(slopes, twins, strict=True):
        np.testing.assert_allclose(slope, twin, atol=2e-5 * float(jnp.abs(twin).max()) + 1e-12)


def test_photo_gradient_by_finite_differences():
    """Of D-SSIM, in float64: everything inside and opaque, so that the prediction is the layer."""
    a, b = images((24, 20, 3), seed=3)
    picture = np.uint8(255 * b)
    marks, opaque = jnp.full((24, 20), 1, jnp.uint8), jnp.ones((24, 20))
    _, (gradient, _) = PULL(jnp.asarray(a), opaque, jnp.asarray(picture), marks, jnp.zeros(3), (0.0, 1.0, 0.0))
    direction, target = np.random.default_rng(1).standard_normal(a.shape), picture / 255.0
    step = 1e-5  # the truncation error is about 1e-9 of the slope
    slope = (ssim_by_scipy(a - step * direction, target) - ssim_by_scipy(a + step * direction, target)) / (2 * step)
    assert float((np.asarray(gradient) * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_photo_follows_its_cotangent_and_reports_without_one():
    given = photos(20, 17)

    def pulled(color, opacity):
        loss, seen = image.photo(color, opacity, *given[2:], WEIGHTS)
        return 3.0 * loss + seen.l1 + seen.error

    threefold = jax.grad(pulled, (0, 1))(*given[:2])
    for slope, once in zip(threefold, PULL(*given, WEIGHTS)[1], strict=True):
        np.testing.assert_allclose(slope, 3.0 * once, rtol=1e-6)


def test_photo_passes_nan_on():
    """A damaged picture must be seen by the trainer, not averaged away; where nothing is judged it does not count."""
    color, opacity, picture, _, background = photos(16, 16)
    color = color.at[3, 4, 1].set(np.nan)
    judged = jnp.full((16, 16), 3, jnp.uint8)
    assert np.isnan(image.photo(color, opacity, picture, judged, background, WEIGHTS)[0])
    (loss, _), slopes = PULL(color, opacity, picture, judged.at[3, 4].set(0), background, WEIGHTS)
    assert all(np.isfinite(x).all() for x in (loss, *slopes))


def test_photo_lowers_for_cuda():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in photos(32, 32)]
    lowered = jax.jit(lambda *given: PULL(*given, WEIGHTS)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "fg3dgs_photo" not in lowered.as_text()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_photo_kernels_give_the_same(isa):
    """The kernels of other instruction sets, in a process that must not use the widest: they sum in another order."""
    given = photos(70, 135)
    program = (
        "import json, numpy as np, test_losses as t; (_, v), g = t.PULL(*t.photos(70, 135), t.WEIGHTS);"
        "print(json.dumps([np.asarray(x).ravel().tolist() for x in (*v, *g)]))"
    )
    (_, values), slopes = PULL(*given, WEIGHTS)
    for got, want in zip(run_python(program, FG3DGS_ISA=isa), (*values, *slopes), strict=True):
        np.testing.assert_allclose(got, np.ravel(want), rtol=1e-5, atol=2e-5 * float(jnp.abs(want).max()))
