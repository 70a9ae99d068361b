"""The binary with the native kernels: loaded on first use, by this module only, and called through XLA's FFI."""

import functools
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

import jax

from fg3dgs_jax.errors import UserError

INTERFACE = 9  # of the binary: counts up with every change that Python must know of (csrc/ffi.cc)


@functools.cache
def binary() -> ModuleType:
    """The binary, its XLA targets registered: loaded once per process. Raises UserError where that fails."""
    try:
        module = importlib.import_module("fg3dgs_jax._native")
    except ImportError as error:
        raise UserError(
            f"the native kernels fg3dgs_jax._native cannot be loaded ({error}): build them with `pip install -e .`, "
            "or choose the slow pure-JAX ones with --config.rasterizer.backend=reference"
        ) from error
    if getattr(module, "INTERFACE", 1) != INTERFACE:
        raise UserError(
            "the native kernels fg3dgs_jax._native are of another version than the Python code: build them again with "
            "`pip install -e .`"
        )
    for name, platform, handler in module.registrations():
        jax.ffi.register_ffi_target(name, handler, platform=platform)
    return module


def has_cuda() -> bool:
    """Whether the binary was built with the CUDA kernels; says nothing of this machine's devices."""
    return any(platform == "CUDA" for _, platform, _ in binary().registrations())


def check_platform() -> None:
    """Raises UserError where JAX would run on a GPU and the binary has no CUDA kernels."""
    if has_cuda():
        return
    device = jax.config.jax_default_device
    if (getattr(device, "platform", device) or jax.default_backend()) in ("gpu", "cuda"):
        raise UserError(
            "JAX runs on a GPU here and the native kernels were built without CUDA: install the CUDA toolkit (nvcc) "
            "and build again with `FG3DGS_CUDA=1 pip install -e .`, or run on the CPU with JAX_PLATFORMS=cpu"
        )


def call(
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[jax.Array],
    aliases: Mapping[int, int] | None = None,
    **attributes,
) -> tuple:
    """One FFI call. `sequential` under vmap: every member of a batch is a whole call, with all threads at work.

    aliases: operand -> the result that is the same memory, changed in place; XLA copies where somebody still reads it.
    """
    binary()
    outputs = jax.ffi.ffi_call(name, results, vmap_method="sequential", input_output_aliases=dict(aliases or {}))(
        *operands, **attributes
    )
    axes = varying_axes(operands)  # inside shard_map an FFI call's raw outputs count as equal on all devices
    return tuple(jax.lax.pcast(x, axes, to="varying") for x in outputs) if axes else tuple(outputs)


def varying_axes(operands: Sequence[jax.Array]) -> tuple[str, ...]:
    """The shard_map axes along which any operand differs from device to device; empty outside shard_map."""
    kinds = [jax.typeof(x) for x in operands]
    # jax renamed the attribute between 0.9 and 0.10.
    varying = [kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying for kind in kinds]
    return tuple(sorted(frozenset().union(*varying)))
