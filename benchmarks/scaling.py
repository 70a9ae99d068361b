"""How a frame's cost grows: with Gaussians, pixels, frames and threads.

    python benchmarks/scaling.py [--quick] [--out benchmarks/results/scaling.json]

Rasterizer, forward, on the ellipsoid of rasterizer.py: 10,000 to 60,000 Gaussians at 512 and 1024 pixels; and the same
as three layers painted over a backdrop, as a baked head is. Frames: 1,000 in one go against 1,000 single ones, and by
how much the process grew meanwhile. Threads: each count in a process of its own, all asserted to show the same bits.
The native rasterizer must agree with the pure-JAX reference before anything is timed.
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rasterizer as rasterizer_benchmark

from fg3dgs_jax import cli
from fg3dgs_jax.model import render
from fg3dgs_jax.rasterizer import rasterize
from fg3dgs_jax.types import Camera

COUNTS, SIZES = (10_000, 20_000, 30_000, 60_000), (512, 1024)
SHARES = (8 / 14, 4 / 14, 2 / 14)  # of face, mouth and eyes
GROWTH_MB = 32  # of memory over the second half of the frames: none, but for what the allocator keeps back


def layers_of(arrays: tuple) -> list[tuple]:
    """The scene's Gaussians as three layers."""
    ends = [0, *np.round(np.cumsum(SHARES) * len(arrays[0])).astype(int)]
    return [tuple(x[a:b] for x in arrays[:5]) for a, b in itertools.pairwise(ends)]


def programs(count: int, size: int) -> dict[str, Callable]:
    """What is timed: name -> call."""
    scene = rasterizer_benchmark.head_scene(count, size)
    forward = rasterizer_benchmark.operations(size, "native")[0]
    camera, layers = Camera(scene[5], scene[6], size, size), layers_of(scene)
    backdrop = np.full((size, size, 3), 90, np.uint8)
    paint = jax.jit(lambda layers, camera, backdrop: render.paint(layers, camera, backdrop))
    return {"rasterize": lambda: forward(*scene), "paint": lambda: paint(layers, camera, backdrop)}


def time_grid(rounds: int) -> list[dict]:
    """Medians of every case, the cases taking turns."""
    cases = [
        {"gaussians": count, "size": size, "program": name, "call": call}
        for size in SIZES for count in COUNTS for name, call in programs(count, size).items()
    ]  # fmt: skip
    times: list[list[float]] = [[] for _ in cases]
    for k in range(rounds + 2):  # two to warm up
        for seen, case in zip(times, cases, strict=True):
            value = rasterizer_benchmark.milliseconds(case["call"])
            if k >= 2:
                seen.append(value)
    return [
        {**{key: value for key, value in case.items() if key != "call"}, "ms": round(statistics.median(seen), 3),
         "best": round(min(seen), 3)} for case, seen in zip(cases, times, strict=True)
    ]  # fmt: skip


def time_frames(count: int, frames: int) -> dict:
    """Frames one by one and in one program, and the growth of the process's peak over their second half."""
    scene = rasterizer_benchmark.head_scene(count, SIZES[0])
    layers = layers_of(scene)
    backdrop = np.full((SIZES[0], SIZES[0], 3), 90, np.uint8)
    viewmats = np.repeat(np.asarray(scene[5])[None], frames, 0)
    viewmats[:, 0, 3] = 0.01 * np.sin(np.arange(frames))

    def paint(viewmat):
        return render.paint(layers, Camera(viewmat, scene[6], SIZES[0], SIZES[0]), backdrop)

    single = jax.jit(paint)
    # All frames in one program; of each a sum comes back, so that memory is that of one frame.
    together = jax.jit(lambda all_views: jax.lax.map(lambda v: paint(v).astype(jnp.int32).sum(), all_views))
    sums = np.asarray(jax.block_until_ready(together(viewmats)))
    np.asarray(single(viewmats[0]))
    begin, peaks, alike = time.perf_counter(), [], []
    for k in range(frames):
        alike.append(int(np.asarray(single(viewmats[k])).sum()) == sums[k])
        if k in (frames // 2, frames - 1):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    singly = time.perf_counter() - begin
    begin = time.perf_counter()
    jax.block_until_ready(together(viewmats))
    at_once = time.perf_counter() - begin
    assert all(alike), "a frame differs from the same frame in a longer program"
    assert peaks[1] - peaks[0] < GROWTH_MB, f"memory grew by {peaks[1] - peaks[0]:.0f} MB"
    return {
        "frames": frames, "single_ms": round(1e3 * singly / frames, 3), "together_ms": round(1e3 * at_once / frames, 3),
        "peak_mb": round(peaks[1], 1), "growth_mb": round(peaks[1] - peaks[0], 1),
    }  # fmt: skip


def time_threads(rounds: int) -> dict:
    """In a process with so many threads: milliseconds, and what the images hash to."""
    rendered = rasterize(*rasterizer_benchmark.head_scene(COUNTS[2], SIZES[0]), SIZES[0], SIZES[0])
    calls = programs(COUNTS[2], SIZES[0])
    digest = hashlib.sha256()
    for image in (rendered.color, rendered.alpha, rendered.depth, calls["paint"]()):
        digest.update(np.asarray(image).tobytes())
    out = {"sha256": digest.hexdigest()}
    for name, call in calls.items():
        times = [rasterizer_benchmark.milliseconds(call) for _ in range(rounds + 2)]
        out[name] = round(statistics.median(times[2:]), 3)
    return out


def compare_threads(rounds: int) -> list[dict]:
    """One process per number of threads; the images must be equal bit for bit."""
    rows = []
    for threads in (1, 2):
        environment = {**os.environ, "NPROC": str(threads)}  # the size of XLA's pool
        command = [sys.executable, __file__, "--threads-only", "--rounds", str(rounds)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append({"threads": threads, **json.loads(done.stdout.splitlines()[-1])})
    assert len({row["sha256"] for row in rows}) == 1, "the images depend on the number of threads"
    return rows


def ratio(rows: list[dict], program: str, over: dict, under: dict) -> float:
    """How much longer one case takes than another."""

    def find(wanted):
        return next(r["ms"] for r in rows if r["program"] == program and wanted.items() <= r.items())

    return round(find(over) / find(under), 2)


def main() -> None:
    """Prints tables and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, 100 frames")
    parser.add_argument("--rounds", type=int, help="timed rounds per case (default: 30, quick: 5)")
    parser.add_argument("--threads-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    flags = parser.parse_args()
    rounds = flags.rounds or (5 if flags.quick else 30)
    if flags.threads_only:
        print(json.dumps(time_threads(rounds)))
        return
    cli.keep_memory()
    rasterizer_benchmark.assert_parity()
    grid = time_grid(rounds)
    print(f"{'program':>10} {'size':>5} {'N':>7} {'ms':>8} {'best':>8}")
    for row in grid:
        print(f"{row['program']:>10} {row['size']:5d} {row['gaussians']:7d} {row['ms']:8.2f} {row['best']:8.2f}")
    growth = {}
    for program in ("rasterize", "paint"):
        growth[f"{program}, 10k to 60k"] = ratio(
            grid, program, {"gaussians": 60_000, "size": 512}, {"gaussians": 10_000, "size": 512}
        )
        growth[f"{program}, 512 to 1024"] = ratio(
            grid, program, {"gaussians": 30_000, "size": 1024}, {"gaussians": 30_000, "size": 512}
        )
    frames = time_frames(COUNTS[2], 100 if flags.quick else 1000)
    growth["all frames together over singly"] = round(frames["together_ms"] / frames["single_ms"], 2)
    threads = compare_threads(rounds)
    for name, value in growth.items():
        print(f"{name}: {value} x")
    print(f"{frames['frames']} frames: {frames['single_ms']} ms each singly, {frames['together_ms']} together; "
          f"memory grew by {frames['growth_mb']} MB")  # fmt: skip
    for row in threads:
        print(f"{row['threads']} thread(s): rasterize {row['rasterize']} ms, paint {row['paint']} ms; same bits")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": rasterizer_benchmark.machine(), "rounds": rounds, "grid": grid, "growth": growth}
    flags.out.write_text(json.dumps({**report, "frames": frames, "threads": threads}, indent=1) + "\n")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
