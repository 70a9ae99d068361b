"""Times one whole training step of configs/fg3dgs.py: stage x pixels x Gaussians, and what compiling it costs.

A time is that of a call as the trainer makes it, eight steps at once, divided by eight.

    python benchmarks/train_step.py [--quick] [--judges] [--run RUN] [--out benchmarks/results/train_step.json]

The data is a procedural clip; all slots of the pools are alive, the regions' shares are the config's (face : mouth :
eyes = 8 : 4 : 2). Seeds are larger than what training makes of them, and cost more: so rasterizer.py's ellipsoid of
30,000 Gaussians is timed too, and with --run a trained head on its own clip, the stages of its own config. The native
picture loss and rasterizer must agree with their pure-JAX twins before anything is timed. --judges times fusion with
LPIPS (AlexNet) and alignment, whose step renders five frames, with random weights of the published sizes.
"""

import argparse
import json
import operator
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import gpu_measure
import jax
import jax.numpy as jnp
import numpy as np
import rasterizer as rasterizer_benchmark
from ml_collections import ConfigDict

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic, weights
from fg3dgs_jax.data.dataset import Dataset, open_dataset, snippet_starts
from fg3dgs_jax.losses import image, lpips, sync
from fg3dgs_jax.rasterizer import rasterize
from fg3dgs_jax.train import find_dataset
from fg3dgs_jax.training import checkpoint, loop
from fg3dgs_jax.training.state import TrainState
from fg3dgs_jax.training.step import make_steps

CONFIG = Path(__file__).parents[1] / "configs" / "fg3dgs.py"
SHARES = {"face": 8 / 14, "mouth": 4 / 14, "eyes": 2 / 14}
WARM_STEPS = 40
ELLIPSOID = 30_000  # Gaussians of rasterizer.py's scene


def assert_parity() -> None:
    """The native kernels against their twins; rasterizer.py holds the rasterizer's."""
    rasterizer_benchmark.assert_parity()
    rng = np.random.default_rng(0)
    layer = rng.random((64, 48, 3), np.float32), rng.random((64, 48), np.float32)
    seen = rng.integers(0, 256, (64, 48, 3), np.uint8), rng.integers(0, 8, (64, 48), np.uint8), np.ones(3, np.float32)
    given = [*map(jnp.asarray, (*layer, *seen)), jnp.asarray([1.0, 0.2, 0.1])]
    pulls = [jax.value_and_grad(f, (0, 1), has_aux=True) for f in (image.photo, image.photo_reference)]
    (value, _), gradients = pulls[0](*given)
    (expected, _), slopes = pulls[1](*given)
    assert abs(float(value - expected)) < 1e-5
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert float(jnp.abs(gradient - slope).max()) < 1e-4 * float(jnp.abs(slope).max())


def random_judges(folder: Path) -> dict[str, str]:
    """Weights of the published networks' sizes, with random numbers: the cost of a step does not depend on them."""
    rng, shapes = np.random.default_rng(0), sync.flat(sync.structure(1.0)[1])
    expert = {name: 0.05 * rng.standard_normal(leaf.shape) for name, leaf in shapes.items()}
    expert |= {name: np.ones(leaf.shape) for name, leaf in shapes.items() if name.endswith(("scale", "var"))}
    alex = {name: 0.05 * np.abs(rng.standard_normal(shape)) for name, shape in lpips.shapes("alex").items()}
    weights.save(folder / "lpips.safetensors", "lpips", alex, {"net": "alex"})
    weights.save(folder / "sync.safetensors", "sync-expert", expert, {})
    return {name: str(folder / f"{name}.safetensors") for name in ("lpips", "sync")}


def prepare(dataset: Dataset, gaussians: int, workdir: Path, judges: dict[str, str]) -> loop.Run:
    """The config's run with full pools of `gaussians` slots in all."""
    config = cli.load_config(str(CONFIG))
    config.judges.update(judges)
    for name, share in SHARES.items():
        count = round(gaussians * share / 64) * 64
        config.regions[name].update(points=count, capacity=count)
    return loop.prepare(config, dataset, workdir)


def merged(usual: dict, known: dict) -> dict:
    """`known` over `usual`, also inside dictionaries that both have."""
    both = {key: merged(usual[key], known[key]) for key in usual.keys() & known if isinstance(known[key], dict)}
    return {**usual, **known, **both}


def resume(path: Path, workdir: Path, data: Path | None = None) -> tuple[loop.Run, TrainState]:
    """A trained run and its last state; what its config did not know yet is as it is by default. `data`: where its
    dataset has moved."""
    _, info = checkpoint.load_for_inference(path)
    known = {**info["config"], "judges": {"lpips": "", "sync": ""}}
    known["data"] = str(data or known["data"])
    config = ConfigDict(merged(cli.load_config(str(CONFIG)).to_dict(), known))
    run = loop.prepare(config, find_dataset(config, path), workdir)
    state, _, _ = checkpoint.restore_latest(path, loop.first_state(run))
    return run, jax.tree.map(jnp.asarray, state)


def pairs(run: loop.Run, state) -> int:
    """Tile-Gaussian pairs of a frame's regions at rest: what its rasterizer works on."""
    camera, total = run.dataset.camera(int(run.dataset.train_ids[0])), 0
    for name, pool in state.pools.items():
        shape = state.params[name]["gaussians"]
        opacities = jax.nn.sigmoid(shape.logit_opacities) * pool.alive
        given = (shape.means, shape.quats, jnp.exp(shape.log_scales), opacities, shape.sh)
        total += int(rasterize(*given, camera.viewmat, camera.intrinsics, camera.width, camera.height).num_pairs)
    return total


def fill(state):
    """Every slot alive, since a dead one costs the rasterizer nothing: those left empty copy live ones in turn."""
    params, pools = dict(state.params), dict(state.pools)
    for name, pool in state.pools.items():
        live = np.flatnonzero(pool.alive)
        source = np.where(pool.alive, np.arange(len(pool.alive)), live[np.arange(len(pool.alive)) % len(live)])
        copied = jax.tree.map(operator.itemgetter(source), params[name]["gaussians"])
        params[name] = {**params[name], "gaussians": copied}
        pools[name] = pool.replace(alive=jnp.ones_like(pool.alive))
    return state.replace(params=params, pools=pools)


def ellipsoid(run: loop.Run):
    """The run's first state with rasterizer.py's scene in its full pools: Gaussians no larger than training makes."""
    state = loop.first_state(run)
    params, pools = dict(state.params), dict(state.pools)
    for seed, (name, pool) in enumerate(state.pools.items()):
        made = gpu_measure.make_region(len(pool.alive), run.dataset.width, run.spec.sh_degree, seed)
        params[name], pools[name] = {**params[name], "gaussians": made[0]}, made[1]
    return state.replace(params=params, pools=pools)


def time_stage(run: loop.Run, begin, stage, rounds: int) -> dict:
    """Median and spread of a step in milliseconds, and the seconds its first call took, from the state `begin`."""
    state = jax.tree.map(jnp.array, begin)  # a copy: steps change their state in place
    ids = run.dataset.train_ids
    if stage.frames > 1:
        starts = snippet_starts(ids, stage.frames)
        frames = [run.dataset.snippet(int(starts[i % len(starts)]), stage.frames) for i in range(2)]
    else:
        frames = [run.dataset.frame(int(ids[i % len(ids)])) for i in range(loop.STEPS)]
    count = 1 if run.judges else loop.STEPS
    given = jax.device_put(loop.stacked([frames[i % len(frames)] for i in range(loop.STEPS)]))
    steps = make_steps(loop.plan(run, stage, None))
    start = time.perf_counter()
    state, _ = jax.block_until_ready(steps(state, given, 1, run.judges))
    first = time.perf_counter() - start
    for _ in range(WARM_STEPS // count // stage.frames):
        state, metrics = steps(state, given, count, run.judges)
    jax.block_until_ready(state)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(steps(state, given, count, run.judges))
        times.append(1e3 * (time.perf_counter() - start) / count)
    assert np.isfinite(float(metrics["loss"])) and int(state.trouble) == 0
    return {
        "stage": stage.name,
        "size": run.dataset.width,
        "gaussians": int(sum(int(pool.alive.sum()) for pool in begin.pools.values())),
        "pairs": pairs(run, begin),
        "ms": statistics.median(times),
        "ms_low": min(times),
        "first_call_s": first,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def time_stages(head: str, run: loop.Run, begin, flags: argparse.Namespace) -> list[dict]:
    """A row for each stage of a run, printed as it is there."""
    rows = []
    for stage in run.stages[2:] if flags.judges else run.stages:
        row = {"head": head, **time_stage(run, begin, stage, 5 if flags.quick else flags.rounds)}
        rows.append(row)
        print(
            f"{head:11} {row['stage']:9} {row['size']:7} {row['gaussians']:10} {row['pairs']:8} {row['ms']:11.1f} "
            f"{row['ms_low']:8.1f} {row['first_call_s']:14.1f} {row['peak_gb']:9.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds")
    parser.add_argument("--judges", action="store_true", help="fusion with LPIPS, and alignment, alone")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a trained run to time too, beside its dataset")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    flags = parser.parse_args()
    cli.keep_memory()
    assert_parity()
    cases = [(512, 20_000)] if flags.quick else [(256, 14_000), (512, 20_000), (512, 30_000)]
    rows = []
    print("head        stage      pixels  Gaussians    pairs  ms, median  fastest  first call, s  peak, GB")
    with tempfile.TemporaryDirectory() as folder:
        for size, gaussians in cases:
            path = Path(folder) / str(size)
            synthetic.make(path, 25, size)
            judges = random_judges(Path(folder)) if flags.judges else {}
            run = prepare(open_dataset(path), gaussians, Path(folder) / "run", judges)
            rows += time_stages("seeds", run, fill(loop.first_state(run)), flags)
            if gaussians == ELLIPSOID:
                rows += time_stages("ellipsoid", run, ellipsoid(run), flags)
            shutil.rmtree(path)
        if flags.run:
            rows += time_stages("trained", *resume(flags.run, Path(folder) / "run"), flags)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps({"machine": rasterizer_benchmark.machine(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
