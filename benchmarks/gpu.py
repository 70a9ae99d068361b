"""Everything that a CUDA device must prove, in one run of under nine minutes, without internet:

    python benchmarks/gpu.py [--wheels DIR] [--seconds 520] [--out benchmarks/results/gpu.json]

Needs nvcc, a CUDA build of JAX, flax, optax, pytest, pybind11 and setuptools 77; PyTorch for the comparison. `--wheels`
is a folder of wheels for what the machine lacks, put on the path of this run alone: gsplat 1.5.3 (it compiles itself
with nvcc, beside the other work) and ml-collections; a part whose packages are missing is left out and said so. Steps,
each in a process of its own, none of which can take another's time or results with it:

1. build the extension for this device, in place
2. `pytest -m gpu`
3. compute-sanitizer (memcheck, racecheck, initcheck, synccheck) on gpu_smoke.cu
4. gpu_measure.py for one scene after the other: parity, then times against gsplat

The JSON is written after every step, so that a run that is cut off leaves what it knew. Exit code 1 if a step failed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SMOKE = "smoke: ok"
CASES = ("30000x512", "10000x512", "100000x512", "30000x1024", "10000x1024", "100000x1024")  # the important ones first
CASE_LIMIT = 150  # seconds
MEASURING = 240  # seconds that gsplat's compilation leaves to it, and half of them compute-sanitizer


def finish(process: subprocess.Popen, limit: float) -> tuple[int | None, str]:
    """Exit code, or None where it took longer, and output. Ends what the process itself has started as well."""
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, (output or b"").decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, (output or b"").decode("utf-8", "replace")


class Run:
    """The clock, the environment and the results of one run."""

    def __init__(self, seconds: float, out: Path, folder: Path):
        self.end = time.monotonic() + seconds
        self.out, self.folder = out, folder
        self.env = {**os.environ, "JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
        self.env["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(toolkit / "bin")])
        self.results: dict = {"steps": {}, "measured": []}

    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def start(self, command: list[str], stdout=subprocess.PIPE, **env: str) -> subprocess.Popen:
        """A process that heads a group of its own."""
        every = {**self.env, **env}
        program = shutil.which(command[0], path=every["PATH"]) or command[0]
        return subprocess.Popen(
            [program, *command[1:]],
            cwd=ROOT,
            env=every,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def step(self, name: str, command: list[str], limit: float, **env: str) -> str | None:
        """Runs a command; its output where it succeeded, else None. Notes status, seconds and the output's end."""
        begin, limit = time.monotonic(), min(limit, self.left())
        try:
            code, output = finish(self.start(command, **env), limit)
        except OSError as error:
            code, output = -1, f"{error}"
        status = "ok" if code == 0 else f"cut off after {limit:.0f} s" if code is None else f"exit code {code}"
        self.note(name, status, time.monotonic() - begin, output)
        return output if code == 0 else None

    def note(self, name: str, status: str, seconds: float, output: str = "") -> None:
        """Prints and writes how a step went."""
        print(f"{name:28} {status:20} {seconds:6.1f} s", flush=True)
        if status != "ok":
            print(output[-3000:], flush=True)
        self.results["steps"][name] = {"status": status, "seconds": round(seconds, 1), "end": output[-1500:]}
        self.write()

    def write(self) -> None:
        partial = self.out.with_suffix(".tmp")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.out)


def describe(run: Run) -> str | None:
    """Name, driver and capability of the device; the capability as nvcc wants it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    said = run.step("device", query, 30)
    if not said:
        return None
    name, driver, capability, memory = (x.strip() for x in said.splitlines()[0].split(","))
    run.results["device"] = {"name": name, "driver": driver, "capability": capability, "memory": memory}
    return capability.replace(".", "")


def install(run: Run, wheels: Path) -> None:
    """The wheels into a folder of this run, for this run's processes only."""
    site = run.folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
    run.step("wheels", [*command, *(str(wheel.resolve()) for wheel in sorted(wheels.glob("*.whl")))], 60)
    run.env["PYTHONPATH"] = os.pathsep.join([str(site), run.env["PYTHONPATH"]])


def start_gsplat(run: Run, capability: str) -> subprocess.Popen:
    """gsplat compiles its kernels where it is first imported: minutes, while the rest goes on."""
    run.env["TORCH_CUDA_ARCH_LIST"] = f"{capability[:-1]}.{capability[-1]}"
    run.env["TORCH_EXTENSIONS_DIR"] = str(run.folder / "torch_extensions")
    code = "from gsplat.cuda._backend import _C; raise SystemExit(_C is None)"
    with (run.folder / "gsplat.log").open("w") as log:
        return run.start([sys.executable, "-c", code], stdout=log, MAX_JOBS="8")


def wait_for_gsplat(run: Run, process: subprocess.Popen, begin: float) -> bool:
    """Whether gsplat is ready; it gets what time is left but for the measuring."""
    code, _ = finish(process, max(1.0, run.left() - MEASURING))
    status = "ok" if code == 0 else "cut off: rows without it" if code is None else "not there: rows without it"
    run.note("gsplat", status, time.monotonic() - begin, (run.folder / "gsplat.log").read_text())
    return code == 0


def test(run: Run) -> None:
    """The tests marked `gpu`; the project's own options name plugins and versions that the machine may lack."""
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # most of their time is compilation
    options = ["-q", "-o", "addopts=", "-o", "minversion=7", "-W", "default", "-p", "no:benchmark", *parallel]
    run.step("pytest -m gpu", [sys.executable, "-m", "pytest", *options, "-m", "gpu", "tests/test_gpu.py"], 200)


def sanitize(run: Run, capability: str) -> None:
    """compute-sanitizer on the smoke test, which then also runs plain."""
    binary = str(run.folder / "smoke")
    flags = ["-std=c++17", "-O2", "-lineinfo", f"-arch=sm_{capability}", "-Icsrc"]
    if run.step("smoke: compile", ["nvcc", *flags, "benchmarks/gpu_smoke.cu", "-o", binary], 90) is None:
        return
    said = run.step("smoke: run", [binary], 30)
    if said is None:
        return
    if SMOKE not in said:
        return run.note("smoke: run", "did not reach its end", 0.0, said)
    for tool in TOOLS:
        limit = min(40.0, max(1.0, run.left() - MEASURING / 2))
        run.step(f"sanitizer: {tool}", ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", binary], limit)


def measure(run: Run, rivals: list[str]) -> None:
    """A process for each scene: none inherits another's memory or errors. Keeps what a scene measured before it
    failed, and leaves out what would not end in time."""
    longest = 10.0
    for case in CASES:
        name, rows = f"measure {case}", run.folder / f"{case}.json"
        if run.left() < longest:
            run.note(name, "no time left", 0.0)
            continue
        begin = time.monotonic()
        command = [sys.executable, "benchmarks/gpu_measure.py", "--out", str(rows), "--cases", case, *rivals]
        print(run.step(name, command, CASE_LIMIT) or "", flush=True)
        if rows.exists():
            found = json.loads(rows.read_text())
            run.results["machine"] = found["machine"]
            run.results["measured"] += found["rows"]
            run.write()
        longest = max(longest, time.monotonic() - begin)


def prove(run: Run, wheels: Path | None) -> None:
    """All steps, in order."""
    capability = describe(run)
    if capability is None:
        raise SystemExit("no CUDA device: nvidia-smi does not answer")
    if wheels:
        install(run, wheels)
    gsplat, begin = start_gsplat(run, capability), time.monotonic()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = run.step("build", build, 200, FG3DGS_CUDA="1", FG3DGS_CUDA_ARCHS=capability)
    if built is not None:
        test(run)
    sanitize(run, capability)
    rivals = [] if wait_for_gsplat(run, gsplat, begin) else ["--no-gsplat"]
    if built is not None:
        measure(run, rivals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--seconds", type=float, default=520, help="for the whole run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    flags = parser.parse_args()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(flags.seconds, flags.out.resolve(), Path(folder))
        prove(run, flags.wheels)
        failed = [name for name, step in run.results["steps"].items() if step["status"] != "ok"]
        print(f"wrote {flags.out}; " + (f"failed: {', '.join(failed)}" if failed else "every step passed"))
        raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
