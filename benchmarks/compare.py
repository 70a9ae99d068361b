"""The same trained head here and in PyTorch, side by side: frames, rasterizer, training steps, memory, start-up.

    python benchmarks/compare.py [--device cpu|cuda] [--run RUN [--data DIR]] [--out FILE.json]

Needs PyTorch (`python -m pip install torch==2.13.0` is the CPU build; it is not a dependency), and gsplat 1.5.3 for
`--device cuda`. `torch_baseline/` holds PyTorch's side: eager and compiled. Scenes: the head of `--run`, a folder of
`python -m fg3dgs_jax.train`, and an ellipsoid of 30,000 Gaussians at 512 x 512 that wears a fresh head's networks.

First pictures, losses and gradients must agree (torch_baseline/parity.py says how closely, and why not more); then the
sides take turns within each round, so that drift of the machine hits all alike; medians are reported.

frame           everything from audio features to bytes on the host; "constants computed once": both sides keep what no
                sound changes, ours as `export` bakes it
rasterizer      the regions of one posed frame, or the ellipsoid as one RGB layer; gradients of every input
training step   "motion" draws every region in its window, judges it by L1, D-SSIM and the small terms, and Adam moves
                everything; "fusion" judges the finished frame and moves colours and opacities. An eighth of eight steps
                in a row, which ours takes in one call, as its trainer does; no landmark leads the lips
start           from the start of a process to its first frame, with empty caches of compiled code and with filled ones;
                PyTorch's process has no JAX in it. Memory: the peak of those processes, on CUDA the device's
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one device

INSTALL = "compare.py: PyTorch is not installed; `python -m pip install torch==2.13.0` is its CPU build"
INSTALL_GSPLAT = "compare.py: --device cuda compares with gsplat; `python -m pip install gsplat==1.5.3` and try again"
# 30,000 Gaussians, 512 x 512, RGB, an ellipsoid of the same distribution, on two cores of another such server.
QUOTED = {"what": "OpenSplat 1.2.0, CPU", "forward_ms": 57.5, "forward_backward_ms": 109.0, "measured_here": False}
RESULTS = Path(__file__).parent / "results"
PAUSE = 0.02  # seconds in which the other side's threads fall asleep


def alternate(calls: dict[str, Callable[[int], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds by side. Every round each side is called once to warm its caches, then timed three times.

    No round is begun after `seconds`; three are timed in any case.
    """
    times: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        call(0)
    end = time.monotonic() + seconds
    for index in range(rounds):
        if index >= 3 and time.monotonic() > end:
            break
        for side, call in calls.items():
            time.sleep(PAUSE)
            call(index)
            for repeat in range(3):
                start = time.perf_counter()
                call(index + repeat)
                times[side].append(1e3 * (time.perf_counter() - start))
    return {side: statistics.median(found) for side, found in times.items()}


def rivals_of(flags: argparse.Namespace) -> list[str]:
    """PyTorch's sides."""
    return ["eager"] if flags.no_compile else ["compiled", "eager"]


def measure(case, flags: argparse.Namespace) -> dict:
    """Parity, then the rows of one scene."""
    from torch_baseline import parity, report
    from torch_baseline.sides import STEPS, Ours, Theirs

    device, rivals = flags.device, rivals_of(flags)
    sides = {"ours": Ours(case)} | {name: Theirs(case, device, name == "compiled") for name in rivals}
    agreed = {name: parity.check(case, sides["ours"], sides[name]) for name in rivals}
    psnr = min(found["frame_psnr_db"] for found in agreed.values())
    print(f"{case.name}: pictures, losses and gradients agree; frames by {psnr:.1f} dB or more", flush=True)
    rows = [  # what, how many a call makes, the calls
        ("frame, audio to RGB", 1, {name: side.frame for name, side in sides.items()}),
        ("frame, constants computed once", 1, {name: side.baked_frame for name, side in sides.items()}),
        ("rasterizer, forward", 1, {name: side.draw for name, side in sides.items()}),
        ("rasterizer, forward + backward", 1, {name: side.pull for name, side in sides.items()}),
    ]
    rows += [(f"training step, {s}", STEPS, {n: side.stepper(s) for n, side in sides.items()}) for s in case.plans]
    found = []
    for name, count, calls in rows:
        times = alternate(calls, flags.rounds, flags.seconds)
        found.append({"what": name, "unit": "ms", **{side: ms / count for side, ms in times.items()}})
        print("  " + report.line(found[-1]), flush=True)
    frames = {side: 1e3 / min(row[side] for row in found[:2]) for side in sides}
    found.insert(0, {"what": "frames a second", "unit": "1/s", **frames})
    size = [case.width, case.height]
    return {"name": case.name, "gaussians": case.count, "pixels": size, "parity": agreed, "rows": found}


def start(side: str, arguments: list[str], folder: Path) -> tuple[float, dict]:
    """One process: seconds to its first frame, and what it says of its memory."""
    caches = {name: str(folder / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")}
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    program = Path(__file__).parent / "torch_baseline" / "startup.py"
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(program), side, *arguments],
        env={**os.environ, **caches, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        first = process.stdout.readline()
        took = time.perf_counter() - begin
        said = process.stdout.read()
    if first.strip() != "frame" or process.returncode:
        raise SystemExit(f"compare.py: the start-up of {side} failed; what it wrote is above")
    return took, json.loads(said.splitlines()[-1])


def measure_starts(case, flags: argparse.Namespace) -> list[dict]:
    """Rows of start-up and memory."""
    from torch_baseline import convert

    cold, cached, memory, sides = {}, {}, {}, ["ours", *rivals_of(flags)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert.export(folder, case.head.spec, case.state, case.plans["motion"], case.frames[0])
        ours = [flags.device, str(flags.run), *([str(flags.data)] if flags.data else [])]
        for side in sides:
            arguments = ours if side == "ours" else [flags.device, name]
            cold[side], _ = start(side, arguments, folder)
            cached[side], memory[side] = start(side, arguments, folder)
    rows = [{"what": "start to first frame, cold", "unit": "s", **cold}]
    rows.append({"what": "start to first frame, cached", "unit": "s", **cached})
    for kind in ("frames", "training"):
        rows.append({"what": f"peak memory, {kind}", "unit": "MB", **{s: memory[s][f"{kind}_mb"] for s in sides}})
    return rows


def write(out: Path, results: dict) -> None:
    """JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out)


def check(flags: argparse.Namespace) -> None:
    """Ends in one sentence where something is missing, before anything is loaded."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(INSTALL)
    if flags.device == "cuda":
        import jax
        import torch

        if not torch.cuda.is_available() or jax.default_backend() != "gpu":
            raise SystemExit("compare.py: --device cuda needs a GPU that both PyTorch and JAX see; use --device cpu")
        if importlib.util.find_spec("gsplat") is None:
            raise SystemExit(INSTALL_GSPLAT)
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if flags.run is not None and not (flags.run / "checkpoints").is_dir():
        raise SystemExit(f"compare.py: --run {flags.run} holds no checkpoint; give a folder that train wrote")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--run", type=Path, help="a trained head; without it the ellipsoid alone")
    parser.add_argument("--data", type=Path, help="its dataset, where the folder has moved")
    parser.add_argument("--gaussians", type=int, default=30_000, help="of the ellipsoid; 0 leaves it out")
    parser.add_argument("--size", type=int, default=512, help="pixels of the ellipsoid")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20, help="for a row; no round is begun after them")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/compare_DEVICE.json, picture beside it")
    flags = parser.parse_args()
    check(flags)
    run_all(flags, flags.out or RESULTS / f"compare_{flags.device}.json")


def run_all(flags: argparse.Namespace, out: Path) -> None:
    """Everything, written after every scene."""
    import rasterizer
    import torch
    from torch_baseline import cases, report
    from torch_baseline.startup import cores

    from fg3dgs_jax import cli

    cli.keep_memory()
    torch.set_num_threads(cores())
    torch._dynamo.config.recompile_limit = 64  # three regions, two stages, two scenes, with and without gradients
    machine = {**rasterizer.machine(), "torch": torch.__version__, "device": flags.device}
    if flags.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    results = {"machine": machine, "quoted": QUOTED, "scenes": [], "process": []}
    if flags.run is not None:
        case = cases.prepared(cases.trained(flags.run, flags.data), flags.device)
        results["scenes"].append(measure(case, flags))
        write(out, results)
        results["process"] = measure_starts(case, flags)
        write(out, results)
    if flags.gaussians:
        case = cases.prepared(cases.ellipsoid(flags.gaussians, flags.size), flags.device)
        results["scenes"].append(measure(case, flags))
    machine["load_after"] = round(os.getloadavg()[0], 2)
    write(out, results)
    print(report.table(results))
    report.picture(out.with_suffix(".png"), results)
    print(f"wrote {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
