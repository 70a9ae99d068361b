"""Builds the native extension, nothing else; the metadata is in pyproject.toml.

CUDA kernels are built where nvcc is found (PATH, CUDA_HOME). Environment: FG3DGS_CUDA=0 leaves them out, =1 insists;
FG3DGS_CUDA_ARCHS names the compute capabilities, "90" or "80;90", in place of all.
"""

import os
import platform
import shutil
import subprocess
from glob import glob
from pathlib import Path

import jaxlib
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

X86 = platform.machine().lower() in ("x86_64", "amd64")

# Kernels are compiled once per instruction set; csrc/isa.h chooses among them at run time.
ISA_FLAGS = {
    f"csrc/{kernel}_cpu_{isa}.cc": flags
    for kernel in ("rasterize", "mlp", "photo")
    for isa, flags in (("baseline", []), ("avx2", ["-march=x86-64-v3"]), ("avx512", ["-march=x86-64-v4"]))
}
# No errno, no traps: without these GCC keeps square roots and selections scalar. NaN and Inf keep their meaning.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's own AVX-512 header warns
# Code for one capability serves the later ones of the same generation; newer generations compile the last one's PTX.
CUDA_ARCHS = ("75", "80", "90", "100", "120")
CUDA_SOURCES = sorted(glob("csrc/*.cu"))
CUDA_INPUTS = glob("csrc/*.cu*")


def find_nvcc():
    """The path of nvcc, or None: build without CUDA."""
    wanted = os.environ.get("FG3DGS_CUDA", "")
    if wanted == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    search = os.pathsep.join([*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=search) or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and wanted == "1":
        raise CompileError("FG3DGS_CUDA=1, but nvcc is neither on the PATH nor in $CUDA_HOME/bin")
    return nvcc


def cuda_archs(nvcc):
    """Compute capabilities to build for, oldest first: those named, or those of CUDA_ARCHS that this nvcc knows."""
    named = os.environ.get("FG3DGS_CUDA_ARCHS", "").replace(",", ";").split(";")
    if any(named):
        return [arch.strip() for arch in named if arch.strip()]
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]


def cuda_toolkit(nvcc):
    """The toolkit's folder, as nvcc itself reports it: nvcc may be a script elsewhere."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], check=True, capture_output=True, text=True)
    top = next(line.split("TOP=", 1)[1] for line in done.stderr.splitlines() if "TOP=" in line)
    return Path(top.strip()).resolve()


def static_cudart(nvcc):
    """libcudart_static.a: with it the module needs no CUDA library where it is loaded."""
    top = cuda_toolkit(nvcc)
    found = [path for path in ("lib64", "lib", "targets/*/lib") for path in top.glob(f"{path}/libcudart_static.a")]
    if not found:
        raise CompileError(f"libcudart_static.a is not under {top}; install it, or set FG3DGS_CUDA=0")
    return str(found[0])


class BuildExt(build_ext):
    """Adds each source's own flags to the extension's, and the CUDA sources' objects."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, suffix, cc_args, extra, pp_opts):
            compile_one(obj, src, suffix, cc_args, [*extra, *ISA_FLAGS.get(src.replace(os.sep, "/"), [])], pp_opts)

        self.compiler._compile = compile_with_isa
        nvcc = find_nvcc()
        if nvcc:
            ext.define_macros = [*ext.define_macros, ("FG_CUDA", "1")]
            ext.extra_objects = [*(self.compile_cuda(nvcc, source) for source in CUDA_SOURCES), static_cudart(nvcc)]
            ext.libraries = ["dl", "rt", "pthread"]
        super().build_extension(ext)

    def compile_cuda(self, nvcc, source):
        """The object file of one CUDA source, for all capabilities; an up-to-date one is kept."""
        archs = cuda_archs(nvcc)
        out = Path(self.build_temp, "_".join([Path(source).stem, *archs, "cuda.o"]))
        if out.exists() and out.stat().st_mtime > max(os.path.getmtime(p) for p in [*glob("csrc/*.h"), *CUDA_INPUTS]):
            return str(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        flags = ["-std=c++17", "-O3", "--threads", "0", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [nvcc, *flags, *codes, "-c", source, "-o", str(out)]
        if subprocess.run(command).returncode:
            raise CompileError(f"nvcc could not compile {source}; FG3DGS_CUDA=0 builds without CUDA: {command}")
        return str(out)


sources = sorted(s for s in glob("csrc/*.cc") if X86 or not ISA_FLAGS.get(s))
native = Pybind11Extension(
    "fg3dgs_jax._native",
    sources=sources,
    depends=sorted(glob("csrc/*.h") + CUDA_INPUTS),
    include_dirs=["csrc", os.path.join(os.path.dirname(jaxlib.__file__), "include")],
    define_macros=[("FG_X86", "1")] if X86 else [],
    extra_compile_args=FLAGS,
    cxx_std=17,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildExt})
