"""The native rasterizer as two JAX calls, forward and backward, each for the platform that it is lowered for."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import native
from fg3dgs_jax.types import Camera, Rendered


class Options(NamedTuple):
    """Everything static about a call: see `rasterizer.rasterize`."""

    width: int
    height: int
    near: float
    max_pairs: int | None
    deterministic: bool


def _attributes(options: Options) -> dict:
    return {
        "width": np.int64(options.width),
        "height": np.int64(options.height),
        "near_plane": np.float32(options.near),
        "max_pairs": np.int64(-1 if options.max_pairs is None else options.max_pairs),
    }


def _workspace(operands: tuple, options: Options, backward: bool) -> jax.ShapeDtypeStruct:
    """Memory that the kernels need on CUDA: one more result, so that XLA plans it; nobody reads it."""
    colors = operands[4]
    bytes_needed = native.binary().cuda_workspace_bytes(
        n=colors.shape[0],
        channels=colors.shape[-1],
        sh_count=colors.shape[1] if colors.ndim == 3 else 0,
        width=options.width,
        height=options.height,
        max_pairs=-1 if options.max_pairs is None else options.max_pairs,
        backward=backward,
        deterministic=options.deterministic,
    )
    return jax.ShapeDtypeStruct((bytes_needed,), jnp.uint8)


TICKET = jax.ShapeDtypeStruct((), jnp.int32)


def _forward_cpu(results, options, keeps, *operands):
    return native.call("fg3dgs_rasterize_forward", [*results, TICKET], operands, keeps=keeps, **_attributes(options))


def _forward_cuda(results, options, *operands):
    results = [*results, _workspace(operands, options, backward=False)]
    made = native.call("fg3dgs_rasterize_forward", results, operands, **_attributes(options))
    return *made[:-1], 0 * made[-2]  # a ticket for nothing


def _backward_cpu(results, options, *operands):
    return native.call("fg3dgs_rasterize_backward", results, operands, **_attributes(options))


def _backward_cuda(results, options, *operands):
    results = [*results, _workspace(operands[:8], options, backward=True)]
    extra = {"deterministic": options.deterministic}
    return native.call("fg3dgs_rasterize_backward", results, operands[:-1], **_attributes(options), **extra)[:-1]


def forward(operands: tuple, options: Options, keeps: bool = False) -> tuple[Rendered, jax.Array]:
    """`operands`: means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, all float32.

    With the picture comes a ticket i32 [] for `backward`. On a CPU that `keeps`, tiles' lists stay in memory for a
    while, so that they need not be made twice; nothing else depends on it.
    """
    width, height = options.width, options.height
    means, colors = operands[0], operands[4]
    results = [
        jax.ShapeDtypeStruct((height, width, colors.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((height, width), jnp.float32),
        jax.ShapeDtypeStruct((height, width), jnp.float32),
        jax.ShapeDtypeStruct(means.shape[:1], jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    ]
    native.check_platform()
    *made, ticket = jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(_forward_cpu, results, options, keeps),
        cuda=functools.partial(_forward_cuda, results, options),
    )
    return Rendered(*made), ticket


def backward(operands: tuple, options: Options, images: tuple, cotangents: tuple, ticket: jax.Array) -> tuple:
    """Cotangents of the eight operands, from `images` (color, alpha, depth, as rendered) and their cotangents."""
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands]
    native.check_platform()
    return jax.lax.platform_dependent(
        *operands,
        *images,
        *cotangents,
        ticket,
        cpu=functools.partial(_backward_cpu, results, options),
        cuda=functools.partial(_backward_cuda, results, options),
    )


def paint(regions: Sequence[tuple], camera: Camera, backdrop: jax.Array, near: float) -> jax.Array:
    """A finished picture u8, on the CPU alone: see `model.render.paint`, whose arguments these are."""
    operands = [backdrop, camera.viewmat, camera.intrinsics, *(array for region in regions for array in region)]
    result = jax.ShapeDtypeStruct(backdrop.shape, jnp.uint8)
    return native.call("fg3dgs_paint", [result], operands, near_plane=np.float32(near))[0]
