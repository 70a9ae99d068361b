"""Runs the native core, which knows neither XLA nor Python, under sanitizers: hostile inputs, and many callers at once.

    python tests/fuzz_native.py        10^6 inputs (in CI by g++), then 24 callers on four threads
    python tests/fuzz_native.py --runs 100000000 --calls 10000      the long form: hours

Inputs: AddressSanitizer and UndefinedBehaviorSanitizer over fuzz_native/fuzz.cc, split among the instruction sets that
this processor has; with clang++ they are chosen by libFuzzer (coverage-guided; --corpus keeps what it finds), with g++
they are pseudo-random (--seed). A crash leaves its input in a file, which `--input FILE` runs again.
Callers: ThreadSanitizer over fuzz_native/threads.cc.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / "tests" / "fuzz_native"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]} if X86 else {"baseline": []}
# As setup.py builds, but for the optimizer: the compiler's time counts here too.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-DFG_SANITIZED", f"-I{ROOT / 'csrc'}"]
# What AddressSanitizer sees too, or x86 allows, costs half of the compiler's time.
LEFT_OUT = "-fno-sanitize=null,alignment,object-size,pointer-overflow,vptr"
MEMORY = ["-fsanitize=address,undefined,float-cast-overflow", LEFT_OUT, "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]
COVERAGE = ["-fsanitize=fuzzer-no-link"]
ENVIRONMENT = {
    **os.environ,
    # Small memories of what was freed, and of who allocated it: both cost time at every call.
    "ASAN_OPTIONS": "quarantine_size_mb=8:malloc_context_size=3:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def isa_of(source: Path) -> str | None:
    """The instruction set that a kernel is compiled for, as in setup.py; None for the sources compiled once."""
    return next((isa for isa in ("baseline", "avx2", "avx512") if source.stem.endswith(f"_cpu_{isa}")), None)


def sources(isas: dict) -> list[Path]:
    core = [path for path in sorted((ROOT / "csrc").glob("*.cc")) if not path.stem.startswith("ffi")]
    return [path for path in core if isa_of(path) in (None, *isas)]


def processor_has(isa: str) -> bool:
    if isa == "baseline":
        return True
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {"avx2": " avx2 ", "avx512": " avx512vl "}[isa] in flags


def compile_one(compiler: str, source: Path, flags: list[str], folder: Path) -> Path:
    """The object of one source; one that is newer than everything it may include is kept."""
    out = folder / f"{source.stem}.o"
    inputs = [source, Path(__file__), *(ROOT / "csrc").glob("*.h"), *source.parent.glob("*.h")]
    if not out.exists() or out.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", out], check=True)
    return out


def build(compiler: str, main: str, sanitizers: list[str], isas: dict, folder: Path, extra: list[str]) -> Path:
    """Compiles the core and one of fuzz_native's programs, as many sources at a time as there are processors."""
    folder.mkdir(parents=True, exist_ok=True)
    several = ["-DFG_X86"] if len(isas) > 1 else []
    link = ["-fsanitize=fuzzer"] if "-DFG_LIBFUZZER" in extra else []
    coverage = COVERAGE if link else []

    def compile_core(source: Path) -> Path:
        isa = ISAS.get(isa_of(source) or "", [])
        return compile_one(compiler, source, [*sanitizers, *coverage, *several, *isa], folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The harness's own arrays are guarded by the allocator; instrumenting its code would only slow it down.
        harness = pool.submit(
            compile_one, compiler, HARNESS / f"{main}.cc", [*extra, *(THREADS if main == "threads" else [])], folder
        )
        objects = [*pool.map(compile_core, sources(isas)), harness.result()]
    program = folder / main
    subprocess.run([compiler, *sanitizers, *link, *objects, "-o", program, "-pthread"], check=True)
    return program


def run(command: list, **environment: str) -> str:
    """Runs a program to its end and returns the last line that it wrote; SystemExit with all of it if it failed."""
    done = subprocess.run(
        [str(x) for x in command],
        env={**ENVIRONMENT, **environment},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr[-8000:]}\n{' '.join(map(str, command))} {environment} failed")
    return next((line for line in reversed(done.stderr.splitlines()) if line.startswith("Done")), "")


def fuzz(options: argparse.Namespace, compiler: str, folder: Path) -> None:
    libfuzzer = "clang" in Path(compiler).name
    isas = {isa: flags for isa, flags in ISAS.items() if processor_has(isa)}
    extra = ["-DFG_LIBFUZZER"] if libfuzzer else []
    program = build(compiler, "fuzz", MEMORY, isas, folder / "fuzz", extra)
    share = -(-options.runs // len(isas))

    def one(number: int, isa: str) -> str:
        arguments = [f"-runs={share}", f"-seed={options.seed + number}"]
        if libfuzzer:
            corpus = Path(options.corpus or folder / "corpus")
            corpus.mkdir(parents=True, exist_ok=True)
            arguments += ["-max_len=128", "-rss_limit_mb=4096", "-timeout=60", "-print_final_stats=0", corpus]
        return run([program, *([options.input] if options.input else arguments)], FG3DGS_ISA=isa)

    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for isa, line in zip(isas, pool.map(one, range(len(isas)), isas), strict=True):
            print(f"{isa}: {line}", flush=True)
    kind = "libFuzzer" if libfuzzer else "pseudo-random"
    print(f"{share * len(isas)} {kind} inputs, 0 findings, {time.monotonic() - start:.0f} s", flush=True)


def threads(options: argparse.Namespace, compiler: str, folder: Path) -> None:
    # The instruction sets share their threads' code: one is enough, and has the most parts in plain C++.
    program = build(compiler, "threads", THREADS, {"baseline": []}, folder / "threads", [])
    command = [program, options.callers, options.calls, 4]
    if shutil.which("setarch"):  # ThreadSanitizer of GCC 12 knows no addresses as random as newer kernels' are
        command = ["setarch", platform.machine(), "--addr-no-randomize", *command]
    start = time.monotonic()
    print(f"{run(command)}, 0 findings, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("fuzz", "threads"), help="one of the two; default both")
    parser.add_argument("--runs", type=int, default=1_000_000, help="hostile inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", help="run this one input and nothing else")
    parser.add_argument("--corpus", help="folder of inputs that libFuzzer begins with and adds to")
    parser.add_argument("--callers", type=int, default=24)
    parser.add_argument("--calls", type=int, default=100, help="of each caller")
    parser.add_argument("--compiler", help="default: clang++ where it is installed, else g++")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz_native", help="where objects are kept")
    options = parser.parse_args()
    compiler = options.compiler or shutil.which("clang++") or shutil.which("g++")
    if not compiler:
        sys.exit("fuzz_native: neither clang++ nor g++ is on the path; install one, or name it with --compiler")
    folder = options.build / Path(compiler).name
    if options.only != "threads":
        fuzz(options, compiler, folder)
    if options.only != "fuzz" and not options.input:
        threads(options, compiler, folder)


if __name__ == "__main__":
    main()
