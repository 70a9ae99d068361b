"""The differentiable Gaussian rasterizer: one public op, `rasterize`."""

import functools

import jax
import jax.numpy as jnp

from fg3dgs_jax import native
from fg3dgs_jax.rasterizer import ffi, reference
from fg3dgs_jax.types import Array, Rendered

__all__ = ["NEAR", "rasterize"]

BACKENDS = ("auto", "native", "reference")
SH_COUNTS = (1, 4, 9, 16)  # coefficients of degrees 0 to 3
MAX_SIDE = 65535  # pixels
NEAR = 0.01  # world units


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _native(operands, options):
    return ffi.forward(operands, options)[0]


def _native_forward(operands, options):
    rendered, ticket = ffi.forward(operands, options, keeps=True)
    return rendered, (operands, (rendered.color, rendered.alpha, rendered.depth), ticket)


def _native_backward(options, residuals, cotangent):
    operands, images, ticket = residuals
    return (ffi.backward(operands, options, images, (cotangent.color, cotangent.alpha, cotangent.depth), ticket),)


_native.defvjp(_native_forward, _native_backward)


def _vary(x, axes):
    missing = tuple(a for a in axes if a not in native.varying_axes([x]))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _check(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d):
    """Raises ValueError or TypeError on a wrong shape or dtype, naming the argument."""
    n = means.shape[0] if means.ndim == 2 else -1
    expected = {
        "means": (means, (n, 3)),
        "quats": (quats, (n, 4)),
        "scales": (scales, (n, 3)),
        "opacities": (opacities, (n,)),
        "viewmat": (viewmat, (4, 4)),
        "intrinsics": (intrinsics, (4,)),
        "means2d": (means2d, (n, 2)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            wanted = "[N, 3]" if name == "means" else str(list(shape))
            raise ValueError(f"rasterize: {name} has shape {list(array.shape)}, expected {wanted} (N from means)")
    if colors.ndim == 3:
        if colors.shape[0] != n or colors.shape[1] not in SH_COUNTS or colors.shape[2] != 3:
            shape = list(colors.shape)
            raise ValueError(f"rasterize: SH colors have shape {shape}, expected [{n}, K, 3], K in 1, 4, 9, 16")
    elif colors.ndim != 2 or colors.shape[0] != n or colors.shape[1] < 1:
        raise ValueError(f"rasterize: colors have shape {list(colors.shape)}, expected [{n}, C] or [{n}, K, 3]")
    for name, array in {"colors": colors, **{name: array for name, (array, _) in expected.items()}}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"rasterize: {name} has dtype {array.dtype}, expected a floating one")


def _check_options(width, height, near, max_pairs, backend):
    for name, side in (("width", width), ("height", height)):
        if not 1 <= side <= MAX_SIDE:
            raise ValueError(f"rasterize: {name} is {side}, expected 1 to {MAX_SIDE} pixels")
    if not 0 < near < float("inf"):
        raise ValueError(f"rasterize: near is {near}, expected a positive distance")
    if max_pairs is not None and max_pairs < 0:
        raise ValueError(f"rasterize: max_pairs is {max_pairs}, expected None or a count >= 0")
    if backend not in BACKENDS:
        raise ValueError(f"rasterize: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")


def rasterize(
    means: Array,
    quats: Array,
    scales: Array,
    opacities: Array,
    colors: Array,
    viewmat: Array,
    intrinsics: Array,
    width: int,
    height: int,
    *,
    means2d: Array | None = None,
    near: float = NEAR,
    max_pairs: int | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Rendered:
    """Renders N Gaussians, front to back (3DGS, Kerbl et al. 2023). Differentiable in every array argument.

    Args:
      means: [N, 3] world units. A Gaussian with a NaN or an infinity in any of its values is not drawn.
      quats: [N, 4] (w, x, y, z), of any length but zero.
      scales: [N, 3] standard deviations, world units.
      opacities: [N] in [0, 1]; below 1/255 (a dead slot: 0) a Gaussian costs nothing.
      colors: [N, C] any C >= 1, or spherical harmonics [N, K, 3], K in (1, 4, 9, 16), giving
        max(0, 1/2 + SH(direction)) with the direction from the camera's centre to the mean.
      viewmat: [4, 4] world to camera, rigid; x right, y down, z forward.
      intrinsics: [4] (fx, fy, cx, cy), pixels; pixel centres at +0.5.
      width, height: pixels, static.
      means2d: [N, 2] pixels, added to the projected means: a zero offset whose gradient is the screen gradient.
      near: distance of the near plane, world units; what lies before it is not drawn.
      max_pairs: None, or a limit to the tile-Gaussian pairs: if `num_pairs` of the result is larger, the images
        and the gradients are NaN, never silently incomplete. The reference has no limit.
      backend: "native", "reference" (pure JAX, slow), or "auto" (native; an error that names the fix if absent).
      deterministic: gradients equal from run to run, bit for bit, on CUDA too, for a second backward pass over the
        pixels. Images always are, and on the CPU gradients as well.

    Returns:
      Rendered: color [H, W, C] and depth [H, W] premultiplied by alpha [H, W]; radii [N] (3 sigma, pixels, 0 where
      culled); num_pairs. 2-D covariances get 0.3 pixels^2 on the diagonal; alpha is capped at 0.99, skipped below
      1/255; a pixel stops before the Gaussian that would take its transmittance below 1e-4.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option. UserError: the native binary cannot be loaded, or has no
      kernels for the GPU that JAX runs on.
    """
    _check_options(width, height, near, max_pairs, backend)
    arrays = [jnp.asarray(x) for x in (means, quats, scales, opacities, colors, viewmat, intrinsics)]
    arrays.append(jnp.zeros((*arrays[0].shape[:1], 2), arrays[0].dtype) if means2d is None else jnp.asarray(means2d))
    _check(*arrays)
    if backend == "reference":
        return reference.rasterize(*arrays, int(width), int(height), near)
    # Inside shard_map, replicated operands become per-device ones out here, where autodiff sees the cast and sums
    # their gradients over the devices.
    axes = native.varying_axes(arrays)
    operands = tuple(_vary(x.astype(jnp.float32), axes) for x in arrays)
    return _native(operands, ffi.Options(int(width), int(height), float(near), max_pairs, bool(deterministic)))
