"""The native rasterizer as two JAX calls, forward and backward. Only this module loads the binary, on first use."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Rendered


@functools.cache
def register() -> None:
    """Loads the binary and registers its XLA targets, once per process. Raises UserError where that fails."""
    try:
        native = importlib.import_module("fg3dgs_jax._native")
    except ImportError as error:
        raise UserError(
            f"the native rasterizer fg3dgs_jax._native cannot be loaded ({error}): build it with `pip install -e .`, "
            "or pass backend='reference' for the slow pure-JAX one"
        ) from error
    for name, platform, handler in native.registrations():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def _call(name, results, operands, options):
    """One FFI call. `sequential` under vmap: every camera of a batch is a whole call, with all threads at work."""
    register()
    width, height, near, max_pairs = options
    outputs = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        *operands,
        width=np.int64(width),
        height=np.int64(height),
        near_plane=np.float32(near),
        max_pairs=np.int64(-1 if max_pairs is None else max_pairs),
    )
    axes = varying_axes(operands)  # inside shard_map an FFI call's raw outputs count as equal on all devices
    return tuple(jax.lax.pcast(x, axes, to="varying") for x in outputs) if axes else tuple(outputs)


def varying_axes(operands) -> tuple[str, ...]:
    """The shard_map axes along which any operand differs from device to device; empty outside shard_map."""
    kinds = [jax.typeof(x) for x in operands]
    # jax renamed the attribute between 0.9 and 0.10.
    varying = [kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying for kind in kinds]
    return tuple(sorted(frozenset().union(*varying)))


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
