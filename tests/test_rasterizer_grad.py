"""Values and every gradient of the native rasterizer against the pure-JAX reference, and the reference against
finite differences: the kernel's derivatives are written by hand, so each one needs an independent witness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rasterizer_scenes import FAST, NAMES, random_cotangents, random_scene, reference, render, render_and_pull

# float32 sums of some hundred terms in another order: a few 1e-6 relative to the largest, tenfold margin. The kernel's
# exp2 adds 1e-7 per alpha.
IMAGE_TOLERANCE = 1e-5  # times the largest depth (4) for the depth image
GRADIENT_TOLERANCE = 5e-5  # of the largest entry of the same gradient


def compare(got, want):
    for name, tolerance in (("color", IMAGE_TOLERANCE), ("alpha", IMAGE_TOLERANCE), ("depth", 4 * IMAGE_TOLERANCE)):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_array_equal(got.radii, want.radii)
    assert got.num_pairs == want.num_pairs


def compare_gradients(got, want):
    for name, a, b in zip(NAMES, got, want, strict=True):
        limit = GRADIENT_TOLERANCE * max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
def test_channels(channels):
    """One compiled reference of 8 channels serves all: the surplus gets cotangent 0 and drops out of every gradient."""
    operands, (d_color, *d_rest) = random_scene(channels=8), random_cotangents(8)
    want, want_gradients = reference(operands, (d_color * (np.arange(8) < channels), *d_rest))
    fewer = (*operands[:4], operands[4][:, :channels], *operands[5:])
    got, gradients = render_and_pull(fewer, (d_color[..., :channels], *d_rest))
    compare(got, want.replace(color=want.color[..., :channels]))
    compare_gradients(gradients, (*want_gradients[:4], want_gradients[4][:, :channels], *want_gradients[5:]))


@pytest.mark.parametrize("count", [1, 4, 9, 16])
def test_spherical_harmonics(count):
    """One compiled reference of degree 3 serves all: coefficients of 0 are a lower degree."""
    operands, cotangents = random_scene(sh=16), random_cotangents()
    assert (np.asarray(render(operands).color) >= 0).all()
    kept = operands[4] * (np.arange(16) < count)[:, None]
    want, want_gradients = reference((*operands[:4], kept, *operands[5:]), cotangents)
    got, gradients = render_and_pull((*operands[:4], kept[:, :count], *operands[5:]), cotangents)
    compare(got, want)
    compare_gradients(gradients, (*want_gradients[:4], want_gradients[4][:, :count], *want_gradients[5:]))


def test_opaque_pile():
    """Many opaque layers: pixels stop early, alphas are capped, tiles close before their lists end."""
    operands, cotangents = random_scene(channels=8, seed=3), random_cotangents(8)
    pile = (operands[0] * 0.3, operands[1], operands[2] * 3, np.full_like(operands[3], 0.999), *operands[4:])
    want, want_gradients = reference(pile, cotangents)
    got, gradients = render_and_pull(pile, cotangents)
    assert float(want.alpha.max()) > 0.999
    compare(got, want)
    compare_gradients(gradients, want_gradients)


def test_jacobian_margin():
    """Wide Gaussians beyond the image, where the Jacobian is held at its margin and feeds the principal point."""
    operands, cotangents = random_scene(channels=8, seed=4), random_cotangents(8)
    wide = (operands[0] * [2.5, 2.5, 0.5], operands[1], operands[2] * 4, *operands[3:])
    wide = tuple(np.asarray(x, np.float32) for x in wide)
    want, want_gradients = reference(wide, cotangents)
    got, gradients = render_and_pull(wide, cotangents)
    compare(got, want)
    compare_gradients(gradients, want_gradients)


def test_reference_against_finite_differences():
    """Central differences in float64 along a random direction of each operand, away from cut-offs: the Gaussians are
    wider than the image, so no alpha is near 1/255 or 0.99; nothing stops, and every colour is positive."""
    width, height = 10, 8
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        operands = (
            np.float64(rng.uniform(-0.3, 0.3, (4, 3))),
            rng.normal(size=(4, 4)),
            rng.uniform(0.8, 1.2, (4, 3)),
            rng.uniform(0.3, 0.7, 4),
            rng.normal(size=(4, 16, 3)) * 0.05,
            *(np.float64(x) for x in random_scene(1, width=width, height=height)[5:7]),
            np.zeros((4, 2)),
        )
        cotangents = tuple(np.float64(x) for x in random_cotangents(3, width, height))

        def loss(operands):
            rendered = render(operands, width, height, backend="reference")
            images = (rendered.color, rendered.alpha, rendered.depth)
            return sum(jnp.vdot(x, d) for x, d in zip(images, cotangents, strict=True))

        value = jax.jit(loss, compiler_options=FAST)
        gradients = jax.jit(jax.grad(loss), compiler_options=FAST)(operands)
        for i, (name, gradient) in enumerate(zip(NAMES, gradients, strict=True)):
            direction = rng.normal(size=gradient.shape)
            if name == "viewmat":
                direction[3] = 0
            step = 1e-5
            ahead, behind = (
                value((*operands[:i], operands[i] + sign * step * direction, *operands[i + 1 :])) for sign in (1, -1)
            )
            # Error of the difference: step^2 times a third derivative, and 1e-16 / step of rounding.
            expected = np.vdot(gradient, direction)
            assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-6, abs=1e-7), name


def test_gradients_do_not_depend_on_what_forward_keeps():
    """The lists that forward keeps: used once, spent, and lost to many scenes in between; and two scenes in turn."""

    def pull_of(seed):
        operands = tuple(map(jnp.asarray, random_scene(seed=seed)))
        return jax.vjp(lambda *x: (lambda r: (r.color, r.alpha, r.depth))(render(x)), *operands)[1]

    cotangents = tuple(map(jnp.asarray, random_cotangents()))
    first, other = pull_of(0), pull_of(1)
    want = [first(cotangents), other(cotangents)]  # what was kept
    early = pull_of(0)
    late = [pull_of(seed) for seed in range(2, 22)]
    for name, a, b, c in zip(NAMES, want[0], first(cotangents), early(cotangents), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{name}, made again")
        np.testing.assert_array_equal(a, c, err_msg=f"{name}, after twenty others")
    for name, a, b in zip(NAMES, want[1], other(cotangents), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert any(np.any(a != b) for a, b in zip(want[0], late[-1](cotangents), strict=True))
