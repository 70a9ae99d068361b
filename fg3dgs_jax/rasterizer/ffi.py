"""The native rasterizer as two JAX calls, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import native
from fg3dgs_jax.types import Rendered


def _call(name, results, operands, options):
    width, height, near, max_pairs = options
    return native.call(
        name,
        results,
        operands,
        width=np.int64(width),
        height=np.int64(height),
        near_plane=np.float32(near),
        max_pairs=np.int64(-1 if max_pairs is None else max_pairs),
    )


def forward(operands: tuple, options: tuple) -> Rendered:
    """`operands`: means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, all float32;
    `options`: width, height, near, max_pairs (None: no limit)."""
    width, height = options[:2]
    means, colors = operands[0], operands[4]
    results = [
        jax.ShapeDtypeStruct((height, width, colors.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((height, width), jnp.float32),
        jax.ShapeDtypeStruct((height, width), jnp.float32),
        jax.ShapeDtypeStruct(means.shape[:1], jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    ]
    return Rendered(*_call("fg3dgs_rasterize_forward", results, operands, options))


def backward(operands: tuple, options: tuple, images: tuple, cotangents: tuple) -> tuple:
    """Cotangents of the eight operands, from `images` (color, alpha, depth, as rendered) and their cotangents."""
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands]
    return _call("fg3dgs_rasterize_backward", results, (*operands, *images, *cotangents), options)
