"""Image losses of the papers: L1, D-SSIM (TG and FG Eq. 3), the alpha term, and what keeps motion small.

All take float images in [0, 1]; `weight` [H, W] selects the pixels that count.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

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


def dssim(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - mean SSIM of two [H, W, C] images, in [0, 2]."""
    return 1.0 - ssim_map(prediction, target).mean()


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


class Marks(enum.IntFlag):
    """Bits of a pixel's mark, u8, for `photo`."""

    INSIDE = 1  # its target is the picture; elsewhere it is the background
    OUTSIDE = 2  # must stay empty; what is neither inside nor outside is not judged
    COUNTED = 4  # for the squared error


class Photo(NamedTuple):
    """What `photo` reports of a layer, unweighted; no gradient flows through it. All f32 []."""

    l1: jax.Array
    dssim: jax.Array
    alpha: jax.Array
    error: jax.Array  # sum of squared errors of the counted pixels, prediction clipped to [0, 1]
    count: jax.Array  # number of counted pixels


def photo(
    color: jax.Array,
    opacity: jax.Array,
    picture: jax.Array,
    marks: jax.Array,
    background: jax.Array,
    weights: Sequence[float],
) -> tuple[jax.Array, Photo]:
    """A layer over a background beside its picture: the weighted sum of L1, D-SSIM and the alpha term, and what it is
    the sum of. Differentiable by the layer only: value and gradient come of one pass.

    color f32 [H, W, 3] premultiplied by opacity [H, W]; picture u8 [H, W, 3]; marks u8 [H, W], bits of `Marks`;
    background f32 [3]; weights of the three terms.
    """
    given = jax.lax.stop_gradient((picture, marks, background, jnp.asarray(weights, jnp.float32)))
    loss, values = _photo(color, opacity, *given)
    return loss, Photo(*jax.lax.stop_gradient(values))


def photo_reference(
    color: jax.Array,
    opacity: jax.Array,
    picture: jax.Array,
    marks: jax.Array,
    background: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`photo` in plain JAX: the specification of the native kernel, and the way on other devices than the CPU.

    Returns the loss and f32 [5], the fields of `Photo`.
    """
    inside, outside, counted = ((marks & jnp.uint8(bit)) != 0 for bit in Marks)
    prediction, target = beside(color, opacity, picture, inside, outside, background)
    terms = jnp.stack([l1(prediction, target), dssim(prediction, target), alpha(opacity, 1.0 * inside, 1.0 * outside)])
    error = (((jnp.clip(prediction, 0.0, 1.0) - target) ** 2).sum(-1) * counted).sum()
    return weights @ terms, jnp.concatenate([terms, jnp.stack([error, 1.0 * counted.sum()])])


def beside(
    color: jax.Array,
    opacity: jax.Array,
    picture: jax.Array,
    inside: jax.Array,
    outside: jax.Array,
    background: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Prediction and target f32 [H, W, 3]: the layer, and the picture `inside`, over a background f32 [3].

    Where a pixel is neither `inside` nor `outside`, bool [H, W], the prediction is the target.
    """
    target = jnp.where(inside[..., None], picture.astype(jnp.float32) / 255.0, background)
    prediction = color + (1.0 - opacity)[..., None] * background
    return jnp.where((inside | outside)[..., None], prediction, target), target


@jax.custom_vjp
def _photo(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _photo_forward(*operands)[0]


def _photo_forward(*operands: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Value and gradient, whichever platform this is lowered for."""
    loss, values, *slopes = jax.lax.platform_dependent(*operands, cpu=_photo_native, default=_photo_plain)
    return (loss, values), tuple(slopes)


def _photo_native(*operands: jax.Array) -> tuple[jax.Array, ...]:
    shapes = [(), (len(Photo._fields),), operands[0].shape, operands[1].shape]
    return native.call("fg3dgs_photo", [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes], operands)


def _photo_plain(*operands: jax.Array) -> tuple[jax.Array, ...]:
    (loss, values), slopes = jax.value_and_grad(photo_reference, (0, 1), has_aux=True)(*operands)
    return loss, values, *slopes


def _photo_backward(slopes: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    return *(cotangents[0] * slope for slope in slopes), None, None, None, None


_photo.defvjp(_photo_forward, _photo_backward)
