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
EMULATION = ROOT / "tests" / "cuda_emulation"
# setjmp's checked form refuses to jump between stacks.
FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unused-function")
LIBRARY = ("-fPIC", "-shared", str(EMULATION / "kernels.cc"), "-ldl")
PLAIN = ("-ffp-contract=off",)  # no fused products: the same bits on every machine
# As nvcc's: the compiler fuses products and sums where it likes, in one kernel so and in another otherwise. Processors
# of before 2013 cannot; Arm's need not be told.
CPUINFO = Path("/proc/cpuinfo")
FUSED = ("-ffp-contract=fast", *(["-mfma"] if CPUINFO.exists() and " fma " in CPUINFO.read_text() else []))

COMPILED = "FG3DGS_EMULATED_KERNELS"  # where a process that this one starts finds them compiled
GUARD = 1024  # bytes on either side of an array, which nobody may write or believe


@functools.cache
def load(fused: bool = False) -> ctypes.CDLL:
    """Compiled once per test run, by $CXX or the system's C++ compiler, without which the package does not build."""
    plain = None if fused else os.environ.get(COMPILED)
    library = ctypes.CDLL(plain or compiled(*(FUSED if fused else PLAIN), *LIBRARY))
    for name in ("forward", "backward", "grid", "launch"):
        getattr(library, f"emulated_{name}").restype = ctypes.c_char_p
    return library


@functools.cache
def compiled(*arguments: str) -> str:
    """The file that the compiler makes of these flags and sources."""
    compiler = os.environ.get("CXX") or "c++"
    folder = tempfile.mkdtemp(prefix="fg3dgs_emulated_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    includes = (f"-I{ROOT / 'csrc'}", f"-I{EMULATION}")
    subprocess.run([*compiler.split(), *FLAGS, *includes, *arguments, "-o", f"{folder}/out"], check=True)
    return f"{folder}/out"


def environment() -> dict[str, str]:
    """For a process that uses them too."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, COMPILED: os.environ.get(COMPILED) or compiled(*PLAIN, *LIBRARY)}


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))


def _guarded(shape, dtype=np.float32) -> np.ndarray:
    """An array between guards, all of it NaN (integers: -1). Never at the start of 256 bytes: XLA's are, by chance."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    whole = np.full(count + 2 * GUARD, 0xFF, np.uint8)
    return whole[GUARD : GUARD + count].view(dtype).reshape(shape)


def _inside(array) -> np.ndarray:
    """A copy between guards."""
    out = _guarded(np.shape(array))
    out[...] = array
    return out


def _done(message, written) -> None:
    """After a call: it went well, and wrote between the guards only."""
    for array in written:
        whole = array
        while whole.base is not None:
            whole = whole.base
        assert (whole[:GUARD] == 0xFF).all() and (whole[-GUARD:] == 0xFF).all(), "a write beside an array"
    if message:
        raise RuntimeError(message.decode())


def _inputs(operands, width, height, max_pairs):
    arrays = [_inside(x) for x in operands]
    colors = arrays[4]
    sh = colors.ndim == 3
    limit = -1 if max_pairs is None else max_pairs
    sizes = [len(colors), 3 if sh else colors.shape[1], colors.shape[1] if sh else 0, width, height, limit]
    return arrays, (ctypes.c_int64 * 6)(*sizes), sizes[1]


def forward(operands, width=70, height=50, *, near=0.01, max_pairs=None, room=-1, order=0, fused=False) -> Rendered:
    """What `rasterize` returns. `room`: pairs that the tiles' lists may hold; `order` of threads: 0, 1 or a seed."""
    arrays, sizes, channels = _inputs(operands, width, height, max_pairs)
    images = [_guarded(shape) for shape in ((height, width, channels), (height, width), (height, width))]
    radii, pairs = _guarded(sizes[0], np.int32), _guarded(1, np.int32)
    said = load(fused).emulated_forward(
        _pointers(arrays), sizes, ctypes.c_float(near), ctypes.c_int64(room), ctypes.c_uint(order), _pointers(images),
        ctypes.c_void_p(radii.ctypes.data), ctypes.c_void_p(pairs.ctypes.data),
    )  # fmt: skip
    _done(said, [*images, radii, pairs])
    return Rendered(*images, radii, pairs[0])


def backward(
    operands, images, cotangents, width=70, height=50, *, near=0.01, max_pairs=None, room=-1, order=0, exact=False,
    fused=False,
) -> tuple:  # fmt: skip
    """Cotangents of the eight operands, of images (color, alpha, depth) with cotangents of them."""
    arrays, sizes, _ = _inputs(operands, width, height, max_pairs)
    gradients = [_guarded(x.shape) for x in arrays]
    rendered, cotangents = ([_inside(x) for x in y] for y in (images, cotangents))
    said = load(fused).emulated_backward(
        _pointers(arrays), sizes, ctypes.c_float(near), ctypes.c_int64(room), ctypes.c_uint(order),
        _pointers(rendered), _pointers(cotangents), ctypes.c_int(exact), _pointers(gradients),
    )  # fmt: skip
    _done(said, gradients)
    return tuple(gradients)


def render_and_pull(operands, cotangents, width=70, height=50, *, exact=False, **options):
    """The rendering and the cotangents of the eight operands, as in rasterizer_scenes."""
    rendered = forward(operands, width, height, **options)
    images = (rendered.color, rendered.alpha, rendered.depth)
    return rendered, backward(operands, images, cotangents, width, height, exact=exact, **options)


def grid(which: int, tables, positions, cotangent, spec) -> np.ndarray:
    """The grid encoder's encode (0), backward_tables (1) or backward_positions (2); see `hashgrid_native`."""
    arrays = [_inside(x) for x in (tables, positions, cotangent)]
    out = _guarded((arrays[2], arrays[0], arrays[1])[which].shape)
    resolutions = np.asarray(spec.resolutions, np.int32)
    said = load().emulated_grid(
        ctypes.c_int(which), ctypes.c_void_p(resolutions.ctypes.data), ctypes.c_int(spec.levels),
        ctypes.c_int(spec.log2_table), ctypes.c_float(spec.bound), ctypes.c_int64(arrays[1].shape[1]),
        *(ctypes.c_void_p(x.ctypes.data) for x in arrays), ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    _done(said, [out])
    return out
