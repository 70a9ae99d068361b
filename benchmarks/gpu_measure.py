"""Times the CUDA kernels, a frame and a training step of a head, against gsplat in the same process; see gpu.py.

    python benchmarks/gpu_measure.py --out FILE --cases 30000x512,... [--no-gsplat]

Two figures of ours: `call`, calls dispatched one after the other and awaited together, as a host would make them; and
`program`, the same calls inside one program (lax.scan), where the host takes no part. gsplat's is `call`: it asks the
host for its number of intersections, so it cannot be inside one program. Parity is asserted before anything is timed:
with the CPU kernel (2e-3 of the norm), and with gsplat, whose alpha is capped at 0.999 where ours is at 0.99 (2e-2; the
gradients 5e-2). A part that fails is named in its row with the reason, the others are measured, and the exit code is 1.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rasterizer as rasterizer_benchmark

from fg3dgs_jax.rasterizer import rasterize

CALLS, ROUNDS = 30, 7
NAMES = ("means", "quats", "scales", "opacities", "colors")
CONFIG = Path(__file__).parents[1] / "configs" / "fg3dgs.py"
SHARES = {"face": 8 / 14, "mouth": 4 / 14, "eyes": 2 / 14}


def per_call(call, wait, calls: int = CALLS) -> float:
    """Median milliseconds of a call among `calls` in a row, after warming up."""
    for _ in range(5):
        result = call()
    wait(result)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


# The rasterizer alone.


def draw(scene, size: int):
    return rasterize(*scene, size, size)


def draw_and_pull(scene, d_color, size: int):
    """Color, alpha, and the gradients of sum(color * d_color)."""

    def loss(scene):
        rendered = draw(scene, size)
        return jnp.vdot(rendered.color, d_color), rendered

    (_, rendered), gradients = jax.value_and_grad(loss, has_aux=True)(scene)
    return rendered, gradients


def in_one_program(function, state, calls: int = CALLS):
    """`state -> state` that applies a function so many times, for `per_call` with calls=1."""
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: (function(s), None), s, None, length=calls)[0])


def chained(function):
    """Makes a call depend on the one before: XLA may not take it out of the loop. Adds 0 to the means."""

    def step(scene):
        result = jax.tree.leaves(function(scene))
        return (scene[0] + 0.0 * result[0].ravel()[0], *scene[1:])

    return step


def agree(limits, **pairs) -> dict:
    """Relative differences of (ours, theirs), by name; all are printed before one that is too large is an error."""
    found = {name: relative(*pair) for name, pair in pairs.items()}
    for name, value in found.items():
        print(f"  {name}: {value:.2e}", flush=True)
    for name, value in found.items():
        assert value < limits(name), f"{name} is {value:.2e} apart"
    return found


def assert_cpu_parity(scene, d_color, size: int) -> dict:
    pull = functools.partial(draw_and_pull, size=size)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        want, want_gradients = jax.jit(pull)(*jax.device_put((scene, d_color), cpu))
    got, gradients = jax.jit(pull)(scene, d_color)
    images = {name: (getattr(got, name), getattr(want, name)) for name in ("color", "alpha", "depth")}
    pulls = dict(zip((f"d_{name}" for name in NAMES), zip(gradients[:5], want_gradients[:5], strict=True), strict=True))
    return {"cpu_difference": max(agree(lambda name: 2e-3, **images, **pulls).values())}


def time_ours(scene, d_color, size: int) -> dict:
    forward = jax.jit(functools.partial(draw, size=size))
    both = jax.jit(functools.partial(draw_and_pull, size=size))
    row = {
        "forward_call_ms": per_call(lambda: forward(scene), jax.block_until_ready),
        "forward_backward_call_ms": per_call(lambda: both(scene, d_color), jax.block_until_ready),
    }
    for name, function in (
        ("forward_program_ms", functools.partial(draw, size=size)),
        ("forward_backward_program_ms", lambda s: draw_and_pull(s, d_color, size)[1]),
    ):
        program = in_one_program(chained(function), scene)
        row[name] = per_call(lambda p=program: p(scene), jax.block_until_ready, 1) / CALLS
    row["pairs"] = int(forward(scene).num_pairs)
    return row


# gsplat on the same scene.


class Gsplat:
    """gsplat's dense rasterization of a scene, with leaves that take gradients."""

    def __init__(self, scene, d_color, size: int):
        import torch
        from gsplat import rasterization

        self.torch, self.rasterization, self.size = torch, rasterization, size
        arrays = [torch.tensor(np.asarray(x), device="cuda") for x in scene]
        self.leaves = [x.requires_grad_() for x in arrays[:5]]
        self.viewmat = arrays[5][None]
        fx, fy, cx, cy = np.asarray(scene[6])
        self.k = torch.tensor([[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]], dtype=torch.float32, device="cuda")
        self.d_color = torch.tensor(np.asarray(d_color), device="cuda")
        self.adam = torch.optim.Adam(self.leaves, lr=0.0, fused=True)

    def images(self):
        color, alpha, _ = self.rasterization(*self.leaves, self.viewmat, self.k, self.size, self.size, packed=False)
        return color[0], alpha[0, ..., 0]

    def forward(self):
        with self.torch.no_grad():
            return self.images()

    def both(self):
        for leaf in self.leaves:
            leaf.grad = None
        color, alpha = self.images()
        (color * self.d_color).sum().backward()
        return color, alpha

    def frame(self):
        return (self.forward()[0].clamp(0, 1) * 255).round().to(self.torch.uint8)

    def step(self):
        self.adam.zero_grad()
        color, _ = self.images()
        (color - self.d_color).abs().mean().backward()
        self.adam.step()
        return color

    def wait(self, _=None):
        self.torch.cuda.synchronize()


def assert_gsplat_parity(rival: Gsplat, scene, d_color, size: int) -> dict:
    got, gradients = jax.jit(functools.partial(draw_and_pull, size=size))(scene, d_color)
    color, alpha = rival.both()
    images = {"color": (got.color, color.detach().cpu()), "alpha": (got.alpha, alpha.detach().cpu())}
    leaves = [leaf.grad.cpu() for leaf in rival.leaves]
    pulls = dict(zip((f"d_{name}" for name in NAMES), zip(gradients[:5], leaves, strict=True), strict=True))
    found = agree(lambda name: 2e-2 if name in images else 5e-2, **images, **pulls)
    return {"gsplat_difference": max(found.values())}


def time_gsplat(scene, d_color, size: int) -> dict:
    rival = Gsplat(scene, d_color, size)
    return {
        **assert_gsplat_parity(rival, scene, d_color, size),
        "gsplat_forward_ms": per_call(rival.forward, rival.wait),
        "gsplat_forward_backward_ms": per_call(rival.both, rival.wait),
        "gsplat_frame_ms": per_call(rival.frame, rival.wait),
        "gsplat_step_ms": per_call(rival.step, rival.wait),  # rasterizer, L1 and Adam alone: no networks, no D-SSIM
    }


# A head of configs/fg3dgs.py: networks, three regions, all losses of a stage.


def load_config(n: int):
    spec = importlib.util.spec_from_file_location("fg3dgs_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for name, share in SHARES.items():
        count = round(n * share / 64) * 64
        config.regions[name].update(points=count, capacity=count)
    return config


def make_frame(size: int):
    """A frame of noise whose boxes and labels lie where a face has them."""
    from fg3dgs_jax.types import Condition, Frame, Label

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, size, size, 3), np.uint8)
    labels = np.zeros((size, size), np.uint8)
    fifth = size // 5
    labels[fifth : 4 * fifth, fifth : 4 * fifth] = Label.HEAD
    labels[3 * fifth : 3 * fifth + size // 10, 2 * fifth : 3 * fifth] |= np.uint8(Label.LIPS)
    labels[2 * fifth : 2 * fifth + size // 20, 2 * fifth : 3 * fifth] |= np.uint8(Label.EYES)
    lips = np.int32([3 * fifth - size // 20, 3 * fifth + 3 * size // 20, 2 * fifth, 3 * fifth])
    eyes = np.int32([[2 * fifth, 2 * fifth + size // 10, k * size // 10, (k + 1) * size // 10] for k in (4, 5)])
    scene = rasterizer_benchmark.head_scene(1, size)
    condition = Condition(rng.normal(size=(8, 16, 64)).astype(np.float32), rng.normal(size=(8, 7)).astype(np.float32))
    return Frame(
        np.int32(0), image[0], image[1], labels, np.asarray(scene[5]), np.asarray(scene[6]), condition, lips, eyes
    )


def make_region(count: int, size: int, sh_degree: int, seed: int):
    """rasterizer.py's scene as the Gaussians of a region and their pool, every slot alive."""
    from fg3dgs_jax.model import gaussians as pool_lib

    means, quats, scales, opacities, colors, *_ = rasterizer_benchmark.head_scene(count, size, seed)
    gaussians, pool = pool_lib.from_points(np.asarray(means), np.asarray(colors), count, sh_degree)
    logits = jnp.log(opacities / (1 - opacities))
    return gaussians.replace(quats=quats, log_scales=jnp.log(scales), logit_opacities=logits), pool


def make_head(n: int, size: int):
    """The motion stage's plan, a state with every slot alive and Gaussians as large as a head's, and a frame."""
    from fg3dgs_jax.model import render
    from fg3dgs_jax.training import optim, stages
    from fg3dgs_jax.training.state import TrainState
    from fg3dgs_jax.training.step import Plan

    config = load_config(n)
    spec = stages.head_spec(config, (16, 64), 7, 0.1)
    graphs, motions = render.create_motions(spec, 0)
    params, pools = {}, {}
    for i, region in enumerate(spec.regions):
        count = config.regions[region.name].capacity
        gaussians, pools[region.name] = make_region(count, size, spec.sh_degree, seed=i)
        params[region.name] = {"gaussians": gaussians, "motion": motions[region.name]}
    stage = next(stage for stage in stages.stages(config) if stage.moving)
    groups = {name: optim.Group(**fields.to_dict()) for name, fields in config.groups.items()}
    crop, head = -(-size // 80) * 16, -(-size // 12) * 8  # a fifth and two thirds of the picture
    plan = Plan(
        spec=spec,
        graphs=graphs,
        tasks=stages.tasks(config, {"": (head, head), "lips": (crop, crop), "eyes": (crop, crop)}),
        stage=stage,
        rates=optim.Rates(groups, stage.rates, 0.1, config.sh_rest),
        options=render.RasterOptions(),
    )
    zero = jnp.zeros((), jnp.int32)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(stage.start), params, optim.init(params), pools, key, zero, zero)
    return plan, jax.tree.map(jnp.array, state), jax.device_put(make_frame(size))  # copies: the step donates its state


def time_head(n: int, size: int) -> dict:
    from fg3dgs_jax.model.render import render_frame
    from fg3dgs_jax.training.step import make_step
    from fg3dgs_jax.types import Camera

    plan, state, frame = make_head(n, size)
    alive = {name: pool.alive for name, pool in state.pools.items()}

    def picture(params, condition):
        camera = Camera(frame.viewmat, frame.intrinsics, size, size)
        return render_frame(plan.spec, plan.graphs, params, alive, condition, camera, frame.backdrop)

    def again(condition):  # each frame's condition depends on the last picture
        nothing = 0.0 * picture(state.params, condition)[0, 0, 0].astype(jnp.float32)
        return condition.replace(audio=condition.audio + nothing)

    show, step = jax.jit(picture), make_step(plan)
    frames = in_one_program(again, frame.condition)
    steps = in_one_program(lambda s: step(s, frame)[0], state)
    row = {
        "frame_call_ms": per_call(lambda: show(state.params, frame.condition), jax.block_until_ready),
        "frame_program_ms": per_call(lambda: frames(frame.condition), jax.block_until_ready, 1) / CALLS,
        "step_program_ms": per_call(lambda: steps(state), jax.block_until_ready, 1) / CALLS,
    }
    held = {"state": state}

    def advance():
        held["state"], metrics = step(held["state"], frame)
        return metrics

    row["step_call_ms"] = per_call(advance, jax.block_until_ready)
    assert int(held["state"].trouble) == 0, "the step met a loss that is not finite"
    return row


def peak_mb() -> int:
    """Most of the device's memory that XLA held so far in this process."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats.get("peak_bytes_in_use", 0) / 2**20)


def attempt(row: dict, name: str, part) -> bool:
    """Adds what a part measures to the row, or the reason why it does not. Whether it did."""
    try:
        row |= {key: round(value, 6) if isinstance(value, float) else value for key, value in part().items()}
        return True
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        row.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:600]
        return False


def measure(row: dict, rival: bool, keep) -> None:
    """Fills a row part by part; `keep` is called after each."""
    n, size = row["n"], row["size"]
    scene, d_color = rasterizer_benchmark.head_scene(n, size), rasterizer_benchmark.cotangents_like(size)[0]
    good = attempt(row, "parity with the CPU", lambda: assert_cpu_parity(scene, d_color, size))
    parts = {"rasterizer": lambda: time_ours(scene, d_color, size) | {"rasterizer_peak_mb": peak_mb()}} if good else {}
    if importlib.util.find_spec("ml_collections"):
        parts["head"] = lambda: time_head(n, size) | {"peak_mb": peak_mb()}
    if rival:
        parts["gsplat"] = lambda: time_gsplat(scene, d_color, size)
    keep()
    for name, part in parts.items():
        attempt(row, name, part)
        keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", required=True, help="GaussiansxPIXELS, with commas between")
    parser.add_argument("--no-gsplat", action="store_true")
    parser.add_argument("--any-device", action="store_true", help="also without a GPU: to try the script itself")
    flags = parser.parse_args()
    if jax.default_backend() != "gpu" and not flags.any_device:
        raise SystemExit(f"JAX runs on {jax.default_backend()!r}, not on a GPU")
    rows: list[dict] = []

    def keep():
        partial = flags.out.with_suffix(".tmp")
        partial.write_text(json.dumps({"machine": rasterizer_benchmark.machine(), "rows": rows}, indent=1) + "\n")
        partial.replace(flags.out)

    for case in flags.cases.split(","):
        n, size = map(int, case.split("x"))
        rows.append({"n": n, "size": size})
        measure(rows[-1], not flags.no_gsplat, keep)
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    raise SystemExit(1 if any("failed" in row for row in rows) else 0)


if __name__ == "__main__":
    main()
