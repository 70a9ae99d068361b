"""Builds the native extension, nothing else; the metadata is in pyproject.toml."""

import os
import platform
from glob import glob

import jaxlib
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")

# One unit per instruction set; the driver chooses among them at run time.
ISA_FLAGS = {
    "csrc/rasterize_cpu_baseline.cc": [],
    "csrc/rasterize_cpu_avx2.cc": ["-march=x86-64-v3"],
    "csrc/rasterize_cpu_avx512.cc": ["-march=x86-64-v4"],
}
# No errno, no traps: without these GCC keeps square roots and selections scalar. NaN and Inf keep their meaning.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's own AVX-512 header warns


class BuildExt(build_ext):
    """Adds each source's own flags to the extension's."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, suffix, cc_args, extra, pp_opts):
            compile_one(obj, src, suffix, cc_args, [*extra, *ISA_FLAGS.get(src.replace(os.sep, "/"), [])], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extension(ext)


sources = sorted(s for s in glob("csrc/*.cc") if X86 or not ISA_FLAGS.get(s))
native = Pybind11Extension(
    "fg3dgs_jax._native",
    sources=sources,
    depends=sorted(glob("csrc/*.h")),
    include_dirs=["csrc", os.path.join(os.path.dirname(jaxlib.__file__), "include")],
    define_macros=[("FG_X86", "1")] if X86 else [],
    extra_compile_args=FLAGS,
    cxx_std=17,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildExt})
