"""Everything that a CUDA device must prove, in one run of under nine minutes, without internet:

    python benchmarks/gpu.py [--wheels DIR] [--seconds 520] [--out benchmarks/results/gpu.json]

Needs nvcc, a CUDA build of JAX, pytest, pybind11; PyTorch for the comparison. `--wheels` is a folder of wheels for what
the machine lacks, put on the path of this run alone: gsplat 1.5.3 (it compiles itself with nvcc, beside the other work)
and ml-collections; a part whose packages are missing is left out and said so. Steps, each in a process of its own:

1. build the extension for this device, in place
2. `pytest -m gpu`
3. compute-sanitizer (memcheck, racecheck, initcheck, synccheck) on gpu_smoke.cu
4. gpu_measure.py: parity, then times against gsplat

The JSON is written after every step, so that a run that is cut off leaves what it knew. Exit code 1 if a step failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SMOKE = "smoke: ok"


class Run:
    """The clock, the environment and the results of one run."""

    def __init__(self, seconds: float, out: Path, folder: Path):
        self.end = time.monotonic() + seconds
        self.out, self.folder = out, folder
        self.env = {**os.environ, "JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.results: dict = {"steps": {}}

    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def step(self, name: str, command: list[str], limit: float, **env: str) -> str | None:
        """Runs a command; its output where it succeeded, else None. Notes status, seconds and the output's end."""
        start, limit = time.monotonic(), min(limit, self.left())
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**self.env, **env},
                timeout=limit,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            status, output = ("ok" if done.returncode == 0 else f"exit code {done.returncode}"), done.stdout
        except subprocess.TimeoutExpired as late:
            status, output = f"cut off after {limit:.0f} s", late.stdout or b""
        except OSError as error:
            status, output = str(error), b""
        output = output.decode("utf-8", "replace")
        took = time.monotonic() - start
        print(f"{name:28} {status:20} {took:6.1f} s", flush=True)
        if status != "ok":
            print(output[-3000:], flush=True)
        self.results["steps"][name] = {"status": status, "seconds": round(took, 1), "end": output[-1500:]}
        self.write()
        return output if status == "ok" else None

    def fail(self, name: str, why: str) -> None:
        """A step that ended well and still proves nothing."""
        print(f"{name:28} {why}", flush=True)
        self.results["steps"][name]["status"] = why
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
    run.step("wheels", [*command, *map(str, sorted(wheels.glob("*.whl")))], 60)
    run.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), run.env.get("PYTHONPATH")]))


def start_gsplat(run: Run, capability: str) -> subprocess.Popen:
    """gsplat compiles its kernels where it is first imported: minutes, while the rest goes on."""
    run.env["TORCH_CUDA_ARCH_LIST"] = f"{capability[:-1]}.{capability[-1]}"
    run.env["TORCH_EXTENSIONS_DIR"] = str(run.folder / "torch_extensions")
    code = "from gsplat.cuda._backend import _C; raise SystemExit(_C is None)"
    log = (run.folder / "gsplat.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**run.env, "MAX_JOBS": "8"}, stdout=log, stderr=subprocess.STDOUT
    )


def wait_for_gsplat(run: Run, process: subprocess.Popen) -> bool:
    """Whether gsplat is ready; it gets what time is left but for two minutes of measuring."""
    try:
        good = process.wait(max(1.0, run.left() - 120)) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        good = False
    said = (run.folder / "gsplat.log").read_text()[-1500:]
    run.results["steps"]["gsplat"] = {"status": "ok" if good else "not there", "end": "" if good else said}
    print(f"{'gsplat':28} {'ok' if good else 'not there: rows without it'}", flush=True)
    return good


def sanitize(run: Run, capability: str) -> None:
    """compute-sanitizer on the smoke test, which then also runs plain."""
    binary = str(run.folder / "smoke")
    flags = ["-std=c++17", "-O2", "-lineinfo", f"-arch=sm_{capability}", "-Icsrc"]
    if run.step("smoke: compile", ["nvcc", *flags, "benchmarks/gpu_smoke.cu", "-o", binary], 90) is None:
        return
    if SMOKE not in (run.step("smoke: run", [binary], 30) or ""):
        return
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in TOOLS:
        run.step(f"sanitizer: {tool}", [checker, "--tool", tool, "--error-exitcode", "9", binary], 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--seconds", type=float, default=520, help="for the whole run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    flags = parser.parse_args()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(flags.seconds, flags.out.resolve(), Path(folder))
        capability = describe(run)
        if capability is None:
            raise SystemExit("no CUDA device: nvidia-smi does not answer")
        if flags.wheels:
            install(run, flags.wheels)
        gsplat = start_gsplat(run, capability)
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        built = run.step("build", build, 200, FG3DGS_CUDA="1", FG3DGS_CUDA_ARCHS=capability)
        if built is not None:
            pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "tests/test_gpu.py"]
            run.step("pytest -m gpu", pytest, 200)
        sanitize(run, capability)
        rivals = [] if wait_for_gsplat(run, gsplat) else ["--no-gsplat"]
        if built is not None:
            rows = run.folder / "rows.json"
            measure = [sys.executable, "benchmarks/gpu_measure.py", "--out", str(rows), *rivals]
            run.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), run.env.get("PYTHONPATH", "")])
            said = run.step("measure", [*measure, "--seconds", str(run.left() - 15)], run.left())
            print(said or "", flush=True)
            if rows.exists():
                run.results["measured"] = json.loads(rows.read_text())
                run.write()
        failed = [name for name, step in run.results["steps"].items() if step["status"] != "ok"]
        print(f"wrote {flags.out}; " + (f"failed: {', '.join(failed)}" if failed else "every step passed"))
        raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
