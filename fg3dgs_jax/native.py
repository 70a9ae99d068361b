"""The binary with the native kernels: loaded on first use, by this module only, and called through XLA's FFI."""

import functools
import importlib
from collections.abc import Sequence

import jax

from fg3dgs_jax.errors import UserError


@functools.cache
def register() -> None:
    """Loads the binary and registers its XLA targets, once per process. Raises UserError where that fails."""
    try:
        binary = importlib.import_module("fg3dgs_jax._native")
    except ImportError as error:
        raise UserError(
            f"the native kernels fg3dgs_jax._native cannot be loaded ({error}): build them with `pip install -e .`, "
            "or choose the slow pure-JAX ones with --config.rasterizer.backend=reference"
        ) from error
    for name, platform, handler in binary.registrations():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def call(name: str, results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[jax.Array], **attributes) -> tuple:
    """One FFI call. `sequential` under vmap: every member of a batch is a whole call, with all threads at work."""
    register()
    outputs = jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands, **attributes)
    axes = varying_axes(operands)  # inside shard_map an FFI call's raw outputs count as equal on all devices
    return tuple(jax.lax.pcast(x, axes, to="varying") for x in outputs) if axes else tuple(outputs)


def varying_axes(operands: Sequence[jax.Array]) -> tuple[str, ...]:
    """The shard_map axes along which any operand differs from device to device; empty outside shard_map."""
    kinds = [jax.typeof(x) for x in operands]
    # jax renamed the attribute between 0.9 and 0.10.
    varying = [kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying for kind in kinds]
    return tuple(sorted(frozenset().union(*varying)))
