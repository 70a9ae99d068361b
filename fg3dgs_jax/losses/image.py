"""Image losses of the papers: L1, D-SSIM (TG and FG Eq. 3), the alpha term, and what keeps motion small.

All take float images in [0, 1]; `weight` [H, W] selects the pixels that count.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import native

SSIM_RADIUS = 5  # the usual 11-tap Gaussian window
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2  # stabilisers for a data range of 1
SSIM_C2 = 0.03**2


def l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute error of two [H, W, C] images."""
    return jnp.abs(prediction - target).mean()


def _band(size: int) -> np.ndarray:
    """The zero-padded 11-tap blur of a line of `size` pixels as a matrix [size, size]."""
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :]
    taps = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2).sum()
    band = np.where(np.abs(offsets) <= SSIM_RADIUS, np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2), 0.0)
    return (band / taps).astype(np.float32)


def _blur(maps: jax.Array) -> jax.Array:
    """Separable Gaussian blur of maps [M, H, W], zero-padded, same size.

    Two matrix products: on the CPU XLA runs them several times faster than a depthwise convolution or shifted sums.
    """
    rows, cols = _band(maps.shape[1]), _band(maps.shape[2])
    return jnp.einsum("hg,mgv,wv->mhw", rows, maps, cols, precision="highest")


def ssim_map(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity per channel and pixel of two [H, W, C] images (Wang et al. 2004), zero-padded borders.

    Returns [C, H, W] in [-1, 1].
    """
    a, b = a.transpose(2, 0, 1), b.transpose(2, 0, 1)
    mean_a, mean_b, square_a, square_b, product = jnp.split(_blur(jnp.concatenate([a, b, a * a, b * b, a * b])), 5)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2.0 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    return luminance * (2.0 * covariance + SSIM_C2) / (variances + SSIM_C2)


def dssim_reference(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """`dssim` in plain JAX: the specification of the native kernel, and the way on other devices than the CPU."""
    return 1.0 - ssim_map(prediction, target).mean()


def dssim(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - mean SSIM of two float32 [H, W, C] images, in [0, 2]. Differentiable by the prediction only."""
    return _dssim(prediction, jax.lax.stop_gradient(target))


@jax.custom_vjp
def _dssim(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return _dssim_forward(prediction, target)[0]


def _dssim_forward(prediction: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Value and gradient in one pass, whichever platform this is lowered for."""
    return jax.lax.platform_dependent(
        prediction, target, cpu=_dssim_native, default=jax.value_and_grad(dssim_reference)
    )


def _dssim_native(prediction: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    results = [jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct(prediction.shape, jnp.float32)]
    return native.call("fg3dgs_dssim", results, (prediction, target))


def _dssim_backward(gradient: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent * gradient, None


_dssim.defvjp(_dssim_forward, _dssim_backward)


def alpha(rendered: jax.Array, inside: jax.Array, outside: jax.Array) -> jax.Array:
    """Opaque inside, empty outside: mean (1 - A) over `inside` + mean A over `outside`, all [H, W]."""
    missing = ((1.0 - rendered) * inside).sum() / jnp.maximum(inside.sum(), 1.0)
    stray = (rendered * outside).sum() / jnp.maximum(outside.sum(), 1.0)
    return missing + stray


def mean_abs(values: jax.Array | None, alive: jax.Array) -> jax.Array:
    """Mean |values| [N, D] over the alive Gaussians; 0 where there is nothing to penalise."""
    if values is None:
        return jnp.zeros(())
    total = jnp.where(alive[:, None], jnp.abs(values), 0.0).sum()
    return total / jnp.maximum(alive.sum() * values.shape[-1], 1.0)
