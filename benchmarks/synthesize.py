"""Times speech part by part, learnt and baked: sound to features, motion, painting, host copy, backdrop, encoding.

    python benchmarks/synthesize.py [--workdir RUN ...] [--quick] [--out benchmarks/results/synthesize.json]

Heads: the ellipsoid of rasterizer.py with 30,000 Gaussians as the three regions of configs/fg3dgs.py, at 512 x 512,
before a procedural clip; and each RUN, a training run's folder. Every head is baked, written and read again. Before
anything is timed, the painted frame must equal the layers composited in plain JAX, and the baked head's frames the
head's own. p50 and p95 are over frames of the clip; learnt and baked alternate, so that drift hits both alike.

    features    sound to audio windows, per frame of the whole sound
    motion      condition to the Gaussians' deltas          raster + composite    deltas to the picture, painted at once
    layers      the same by three rasterizer calls and their composition, as training has it (baked)
    host copy   device to numpy                             frame    audio window to RGB on the host, one at a time
    backdrop    torso layer decoded and laid over the background      encode    RGB to H.264
    speech      all of it from features on, two frames at a time, without encoding; speech, mp4    with it
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rasterizer as rasterizer_benchmark
import train_step as training_benchmark

from fg3dgs_jax import cli, types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import hearing, synthetic, writing
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.inference import baked
from fg3dgs_jax.inference.control import Control
from fg3dgs_jax.inference.head import MARGIN, Head
from fg3dgs_jax.model import bake, render
from fg3dgs_jax.model.gaussians import SH_C0

GAUSSIANS, SIZE, CLIP_FRAMES = 30_000, 512, 25


def procedural(folder: Path) -> Head:
    """The ellipsoid of rasterizer.py as a head of three regions before a procedural clip, its networks untrained."""
    synthetic.make(folder / "data", CLIP_FRAMES, SIZE)
    run = training_benchmark.prepare(open_dataset(folder / "data"), GAUSSIANS, folder / "run", {})
    means, quats, scales, opacities, colors, *_ = map(np.asarray, rasterizer_benchmark.head_scene(GAUSSIANS, SIZE))
    sh = 0.05 * np.random.default_rng(1).standard_normal((GAUSSIANS, (run.spec.sh_degree + 1) ** 2, 3))
    sh[:, 0] = (colors - 0.5) / SH_C0
    arrays = (means, quats, np.log(scales), np.log(opacities / (1 - opacities)), sh)
    _, motions = render.create_motions(run.spec, 0)
    params, alive, start = {}, {}, 0
    for region in run.spec.regions:
        stop = start + round(GAUSSIANS * training_benchmark.SHARES[region.name])
        part = types.Gaussians(*(array[start:stop].astype(np.float32) for array in arrays))
        params[region.name] = {"gaussians": part, "motion": motions[region.name]}
        alive[region.name] = np.ones(len(part.means), bool)
        start = stop
    return Head(run.spec, params, alive, run.dataset, {"workdir": "procedural"})


class Parts:
    """The parts of a frame as separate programs, of a head in either form."""

    def __init__(self, head: Head):
        spec, data = head.spec, head.dataset
        intrinsics, self.head = jnp.asarray(data.intrinsics), head

        def camera(viewmat):
            return types.Camera(viewmat, intrinsics, data.width, data.height)

        def regions(params, deltas):
            return [bake._moved(params[region.name], deltas[region.name]) for region in spec.regions]

        self.move = lambda given: head._deltas(head._params, given)
        self.paint = lambda deltas, viewmat, behind: head._posed(head._params, head._alive, deltas, viewmat, behind)
        layered = jax.jit(
            lambda params, deltas, viewmat, behind: render.paint_reference(
                regions(params, deltas), camera(viewmat), behind
            )
        )
        self.layers = lambda deltas, viewmat, behind: layered(head._params, deltas, viewmat, behind)


def scene(head: Head, index: int) -> tuple:
    """Condition, camera and backdrop of a clip's frame."""
    data = head.dataset
    given = clips.condition(data.audio_features, data.expression, index)
    return given, data.viewmats[index], clips.over(data.torso(index), data.background)


def assert_parity(own: Head, other: Head, ids: list[int]) -> dict[str, float]:
    """Painted equals layered, baked equals learnt; returns the largest differences in grey levels."""
    parts, worst = Parts(other), {"painted": 0, "baked": 0, "baked_share_above_1": 0.0}
    for index in ids:
        given, viewmat, behind = scene(own, index)
        want = own.render(given, viewmat, behind).astype(int)
        got = other.render(given, viewmat, behind)
        layers = np.asarray(parts.layers(parts.move(given), viewmat, behind))
        worst["painted"] = max(worst["painted"], int(np.abs(got.astype(int) - layers).max()))
        worst["baked"] = max(worst["baked"], int(np.abs(got - want).max()))
        worst["baked_share_above_1"] = max(worst["baked_share_above_1"], float((np.abs(got - want) > 1).mean()))
    assert worst["painted"] <= bake.TOLERANCE and worst["baked"] <= bake.TOLERANCE, worst
    assert worst["baked_share_above_1"] < 1e-4, worst
    return worst


def milliseconds(call: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start)


def time_frames(heads: dict[str, Head], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every part, frame by frame, the heads alternating."""
    parts = {form: Parts(head) for form, head in heads.items()}
    seen: dict[str, dict[str, list[float]]] = {form: {} for form in heads}
    frames = len(heads["learnt"].dataset.viewmats)
    for k in range(rounds + 3):  # three to warm up
        given, viewmat, behind = scene(heads["learnt"], (7 * k) % frames)
        for form, part in parts.items():
            deltas = jax.block_until_ready(part.move(given))
            picture = jax.block_until_ready(part.paint(deltas, viewmat, behind))
            calls = {
                "motion": lambda p=part, g=given: p.move(g),
                "raster + composite": lambda p=part, d=deltas, v=viewmat, b=behind: p.paint(d, v, b),
                "host copy": lambda x=picture: np.array(x),
                "frame": lambda p=part, g=given, v=viewmat, b=behind: p.head.render(g, v, b),
            }
            if form == "baked":
                calls["layers"] = lambda p=part, d=deltas, v=viewmat, b=behind: p.layers(d, v, b)
            for name, call in calls.items():
                value = milliseconds(call)
                if k >= 3:
                    seen[form].setdefault(name, []).append(value)
    return seen


def time_around(head: Head, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds a frame of what surrounds rendering and is the same in both forms."""
    out: dict[str, list[float]] = {}
    if head.dataset.audio_name == hearing.LOGMEL.name:
        sound = audio_io.load_audio(head.dataset.audio_path)
        times = []
        for _ in range(max(rounds // 10, 3)):
            begin = time.perf_counter()
            count = sum(1 for _ in head.hear(sound))
            times.append(1e3 * (time.perf_counter() - begin) / count)
        out["features"] = times
    ids = head.dataset.frame_ids.tolist()
    pictures = [head.render(*scene(head, index)) for index in ids[:25]]

    def given():
        for k in range(rounds):
            begin = time.perf_counter()
            yield pictures[k % len(pictures)]
            out.setdefault("encode", []).append(1e3 * (time.perf_counter() - begin))

    writing.write_video(folder / "encode.mp4", given(), head.dataset.fps)
    return out


def time_backdrops(head: Head, rounds: int) -> list[float]:
    ids = head.dataset.frame_ids.tolist()
    return [milliseconds(functools.partial(scene, head, ids[k % len(ids)])) for k in range(rounds)]


def time_speech(head: Head, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds from frame to frame of a whole speech."""
    windows = head.own_windows()
    windows = windows[np.arange(rounds + 2 * MARGIN) % len(windows)]
    out = {}
    for name, control in (("speech", Control()), ("speech, still", Control(pose="still"))):
        next(iter(head.speak(windows, control)))
        last, times = time.perf_counter(), []
        for _ in head.speak(windows, control):
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        out[name] = times
    begin = time.perf_counter()
    writing.write_video(folder / "speech.mp4", head.speak(windows), head.dataset.fps)
    out["speech, mp4"] = [1e3 * (time.perf_counter() - begin) / rounds]
    return out


def measure(name: str, own: Head, rounds: int, folder: Path) -> dict:
    """Everything about one head."""
    path = folder / f"{name}.safetensors"
    kept = baked.write(path, own)
    loading = []
    for _ in range(3):
        begin = time.perf_counter()
        other = Head.load(path)
        loading.append(time.perf_counter() - begin)
    ids = [int(own.dataset.frame_ids[k]) for k in np.linspace(0, len(own.dataset.frame_ids) - 1, 5).astype(int)]
    worst = assert_parity(own, other, ids)
    heads = {"learnt": own, "baked": other}
    seen = time_frames(heads, rounds)
    around = time_around(own, rounds, folder)
    for form, head in heads.items():
        seen[form] |= around | {"backdrop": time_backdrops(head, rounds)} | time_speech(head, rounds, folder)
    return {
        "head": name,
        "size": own.dataset.width,
        "gaussians": {region: int(np.sum(alive)) for region, alive in own._alive.items()},
        "baked_gaussians": kept,
        "baked_bytes": path.stat().st_size,
        "load_s": min(loading),
        "grey_levels_apart": worst,
        "ms": {form: {part: summary(times) for part, times in parts.items()} for form, parts in seen.items()},
    }


def summary(times: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(times, [50, 95])
    numbers = {"p50": p50, "p95": p95, "mean": np.mean(times), "best": np.min(times)}
    return {name: round(float(value), 3) for name, value in numbers.items()}


PARTS = (
    "features", "motion", "raster + composite", "layers", "host copy", "frame", "backdrop", "encode", "speech",
    "speech, still", "speech, mp4",
)  # fmt: skip


def show(row: dict) -> None:
    count = sum(row["gaussians"].values())
    size, apart = row["size"], row["grey_levels_apart"]["baked"]
    print(f"\n{row['head']}: {count} Gaussians, {size} x {size}; baked: {row['baked_bytes'] / 1e6:.0f} MB, "
          f"loads in {row['load_s']:.2f} s, differs by {apart} grey levels")  # fmt: skip
    print(f"{'ms':20} {'learnt p50':>11} {'p95':>8} {'baked p50':>11} {'p95':>8} {'FPS, baked':>11}")
    for part in PARTS:
        own, other = (row["ms"][form].get(part) for form in ("learnt", "baked"))
        if other is None:
            continue
        left = f"{own['p50']:11.2f} {own['p95']:8.2f}" if own else " " * 20
        print(f"{part:20} {left} {other['p50']:11.2f} {other['p95']:8.2f} {1000 / other['mean']:11.0f}")


def main() -> None:
    """Prints a table per head and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, action="append", default=[], help="a trained run; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--rounds", type=int, help="frames timed (default: 200, quick: 20)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "synthesize.json")
    flags = parser.parse_args()
    rounds = flags.rounds or (20 if flags.quick else 200)
    cli.keep_memory()
    rasterizer_benchmark.assert_parity()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = [("procedural", lambda: procedural(folder))]
        makers += [(path.name, lambda path=path: Head.load(path)) for path in flags.workdir]
        for name, make in makers:
            rows.append(measure(name, make(), rounds, folder))
            show(rows[-1])
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": rasterizer_benchmark.machine(), "rounds": rounds, "results": rows}
    flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
