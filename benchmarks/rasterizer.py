"""Times the rasterizer: N x resolution x backend, forward and forward + backward.

    python benchmarks/rasterizer.py [--quick] [--out benchmarks/results/rasterizer.json]

Scene: a head-like ellipsoid shell, 3-sigma radii log-uniform 3-8 px at 512 x 512 (in proportion at other sizes),
opacities uniform 0.1-0.95, RGB. Backends alternate within each round, so that drift of the machine hits all alike;
medians are reported. Before anything is timed, values and gradients must agree with the pure-JAX reference on a small
scene of the same kind.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from fg3dgs_jax.rasterizer import rasterize

REFERENCE_LIMIT = 300 * 128 * 128  # pixel-Gaussian meetings; beyond it the reference takes too long to time


def head_scene(n: int, size: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """means, quats, scales, opacities, colors [N, 3], viewmat, intrinsics of a head-like ellipsoid."""
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(n, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    means = normals * [0.075, 0.1, 0.085] * rng.uniform(0.93, 1.0, (n, 1))
    distance, focal = 0.75, 2.2 * size
    radii = np.exp(rng.uniform(np.log(3), np.log(8), (n, 1))) * size / 512
    scales = radii / 3 * distance / focal * rng.uniform(0.5, 1.0, (n, 3)) ** [0, 1, 1]
    viewmat = np.eye(4)
    viewmat[2, 3] = distance
    arrays = (
        means,
        rng.normal(size=(n, 4)),
        scales,
        rng.uniform(0.1, 0.95, n),
        rng.uniform(size=(n, 3)),
        viewmat,
        [focal, focal, size / 2, size / 2],
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def operations(size: int, backend: str):
    """(forward, forward + backward) jitted over the scene's arrays."""

    def forward(*scene):
        rendered = rasterize(*scene, size, size, backend=backend)
        return rendered.color, rendered.alpha, rendered.depth

    def both(cotangents, *scene):
        images, pull = jax.vjp(forward, *scene)
        return images, pull(cotangents)

    return jax.jit(forward), jax.jit(both)


def assert_parity(size: int = 64, n: int = 300) -> None:
    """Native equals reference: 2e-5 on images, 1e-4 of the largest on gradients (float32 sums of ~100 terms)."""
    scene = head_scene(n, size)
    cotangents = cotangents_like(size)
    want_images, want = operations(size, "reference")[1](cotangents, *scene)
    got_images, got = operations(size, "native")[1](cotangents, *scene)
    for a, b in zip(want_images, got_images, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4 * float(jnp.abs(a).max()))


def cotangents_like(size: int):
    """Random cotangents of color, alpha, depth."""
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((size, size, 3), (size, size), (size, size)))


def milliseconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start)


def time_case(n: int, size: int, rounds: int) -> list[dict]:
    """One row per backend: medians over rounds, the backends alternating."""
    scene, cotangents = head_scene(n, size), cotangents_like(size)
    backends = ["native"] + (["reference"] if n * size * size <= REFERENCE_LIMIT else [])
    ops = {backend: operations(size, backend) for backend in backends}
    times = {backend: ([], []) for backend in backends}
    for i in range(rounds + 2):  # two rounds to warm up
        for backend, (forward, both) in ops.items():
            pair = milliseconds(lambda f=forward: f(*scene)), milliseconds(lambda f=both: f(cotangents, *scene))
            if i >= 2:
                for seen, value in zip(times[backend], pair, strict=True):
                    seen.append(value)
    pairs = int(rasterize(*scene, size, size).num_pairs)
    return [
        {
            "n": n,
            "size": size,
            "backend": backend,
            "pairs": pairs,
            "forward_ms": round(statistics.median(forward), 3),
            "forward_backward_ms": round(statistics.median(both), 3),
            "forward_best_ms": round(min(forward), 3),
            "forward_backward_best_ms": round(min(both), 3),
        }
        for backend, (forward, both) in times.items()
    ]


def machine() -> dict:
    """What a reader needs to judge the numbers."""
    model = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": jax.default_backend(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, few rounds")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds per case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rasterizer.json")
    args = parser.parse_args()
    assert_parity()
    grid = [(n, size) for size in (256, 512, 1024) for n in (10_000, 30_000, 60_000)]
    cases = [(30_000, 512)] if args.quick else [(300, 128), *grid]
    rounds = args.rounds or (10 if args.quick else 30)
    rows = []
    print(f"{'N':>7} {'size':>5} {'backend':>10} {'pairs':>8} {'forward ms':>11} {'fwd+bwd ms':>11} {'(best)':>16}")
    for n, size in cases:
        for row in time_case(n, size, rounds):
            rows.append(row)
            best = f"{row['forward_best_ms']:.2f} / {row['forward_backward_best_ms']:.2f}"
            print(
                f"{n:7d} {size:5d} {row['backend']:>10} {row['pairs']:8d} {row['forward_ms']:11.2f} "
                f"{row['forward_backward_ms']:11.2f} {best:>16}",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".tmp")
    partial.write_text(json.dumps({"machine": machine(), "rounds": rounds, "results": rows}, indent=1) + "\n")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
