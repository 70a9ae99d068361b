"""The CUDA kernels' own sources on the CPU: compiled with `cuda_emulation/`, called with numpy arrays."""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from fg3dgs_jax.types import Rendered

ROOT = Path(__file__).parents[1]
# setjmp's checked form refuses to jump between stacks. No fused products: the same bits on every machine.
FLAGS = (
    "-ffp-contract=off",
    "-std=c++17",
    "-O2",
    "-U_FORTIFY_SOURCE",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wno-unused-function",
)


COMPILED = "FG3DGS_EMULATED_KERNELS"  # where a process that this one starts finds them compiled


@functools.cache
def load() -> ctypes.CDLL:
    """Compiled once per test run, by $CXX or the system's C++ compiler, without which the package does not build."""
    return ctypes.CDLL(os.environ.get(COMPILED) or _compile())


@functools.cache
def _compile() -> str:
    compiler = os.environ.get("CXX") or "c++"
    folder = tempfile.mkdtemp(prefix="fg3dgs_emulated_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    out, emulation = f"{folder}/kernels.so", ROOT / "tests" / "cuda_emulation"
    includes = (f"-I{ROOT / 'csrc'}", f"-I{emulation}")
    subprocess.run([*compiler.split(), *FLAGS, *includes, str(emulation / "kernels.cc"), "-o", out], check=True)
    return out


def environment() -> dict[str, str]:
    """For a process that uses them too."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, COMPILED: os.environ.get(COMPILED) or _compile()}


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))


def _inputs(operands, width, height, max_pairs):
    arrays = [np.ascontiguousarray(x, np.float32) for x in operands]
    colors = arrays[4]
    sh = colors.ndim == 3
    limit = -1 if max_pairs is None else max_pairs
    sizes = [len(colors), 3 if sh else colors.shape[1], colors.shape[1] if sh else 0, width, height, limit]
    return arrays, (ctypes.c_int64 * 6)(*sizes), sizes[1]


def forward(operands, width=70, height=50, *, near=0.01, max_pairs=None, room=-1, order=0) -> Rendered:
    """What `rasterize` returns. `room`: pairs that the tiles' lists may hold; `order` of threads: 0, 1 or a seed."""
    arrays, sizes, channels = _inputs(operands, width, height, max_pairs)
    images = [
        np.full(shape, 7e7, np.float32) for shape in ((height, width, channels), (height, width), (height, width))
    ]
    radii, pairs = np.full(sizes[0], -7, np.int32), np.full(1, -7, np.int32)
    load().emulated_forward(
        _pointers(arrays), sizes, ctypes.c_float(near), ctypes.c_int64(room), ctypes.c_uint(order), _pointers(images),
        ctypes.c_void_p(radii.ctypes.data), ctypes.c_void_p(pairs.ctypes.data),
    )  # fmt: skip
    return Rendered(*images, radii, pairs[0])


def backward(
    operands, images, cotangents, width=70, height=50, *, near=0.01, max_pairs=None, room=-1, order=0, exact=False
) -> tuple:
    """Cotangents of the eight operands, of images (color, alpha, depth) with cotangents of them."""
    arrays, sizes, _ = _inputs(operands, width, height, max_pairs)
    gradients = [np.full(x.shape, 7e7, np.float32) for x in arrays]
    rendered, cotangents = ([np.ascontiguousarray(x, np.float32) for x in y] for y in (images, cotangents))
    load().emulated_backward(
        _pointers(arrays), sizes, ctypes.c_float(near), ctypes.c_int64(room), ctypes.c_uint(order),
        _pointers(rendered), _pointers(cotangents), ctypes.c_int(exact), _pointers(gradients),
    )  # fmt: skip
    return tuple(gradients)


def render_and_pull(operands, cotangents, width=70, height=50, *, exact=False, **options):
    """The rendering and the cotangents of the eight operands, as in rasterizer_scenes."""
    rendered = forward(operands, width, height, **options)
    images = (rendered.color, rendered.alpha, rendered.depth)
    return rendered, backward(operands, images, cotangents, width, height, exact=exact, **options)


def grid(which: int, tables, positions, cotangent, spec) -> np.ndarray:
    """The grid encoder's encode (0), backward_tables (1) or backward_positions (2); see `hashgrid_native`."""
    arrays = [np.ascontiguousarray(x, np.float32) for x in (tables, positions, cotangent)]
    out = np.full((arrays[2], arrays[0], arrays[1])[which].shape, 7e7, np.float32)
    resolutions = np.asarray(spec.resolutions, np.int32)
    load().emulated_grid(
        ctypes.c_int(which), ctypes.c_void_p(resolutions.ctypes.data), ctypes.c_int(spec.levels),
        ctypes.c_int(spec.log2_table), ctypes.c_float(spec.bound), ctypes.c_int64(arrays[1].shape[1]),
        *(ctypes.c_void_p(x.ctypes.data) for x in arrays), ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    return out
