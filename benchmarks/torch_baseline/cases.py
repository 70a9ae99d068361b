"""What both sides are given: a trained head, or an ellipsoid of Gaussians that wears a head's networks."""

import dataclasses
import types as python_types
from pathlib import Path

import gpu_measure
import jax
import jax.numpy as jnp
import numpy as np
import rasterizer as rasterizer_benchmark
import train_step

from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.model import gaussians as pool_lib
from fg3dgs_jax.model import render
from fg3dgs_jax.training import loop, optim
from fg3dgs_jax.training.state import TrainState
from fg3dgs_jax.training.step import Plan
from fg3dgs_jax.types import Frame

CAP = 0.98  # of opacities on CUDA
FRAMES = 8  # that frames and steps go through in turn


@dataclasses.dataclass(frozen=True)
class Case:
    """One head. `scenes` is what the rasterizer alone draws, a list of layers: means, quats, scales, opacities, colours
    [N, 3] or SH [N, K, 3], all numpy and of living Gaussians only."""

    name: str
    head: Head
    state: TrainState
    plans: dict[str, Plan]  # by stage, "motion" and "fusion" where the run has them
    frames: list[Frame]  # numpy
    scenes: list[list[np.ndarray]]
    viewmat: np.ndarray  # of the scenes
    intrinsics: np.ndarray
    width: int
    height: int

    @property
    def alive(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(pool.alive) for name, pool in self.state.pools.items()}

    @property
    def count(self) -> int:
        return sum(int(alive.sum()) for alive in self.alive.values())


def trained(workdir: Path, data: Path | None) -> Case:
    """The newest checkpoint of a run, its stages by today's rules where its config does not name one."""
    head = Head.load(workdir, data)
    run, state = train_step.resume(workdir, workdir, head.dataset.path)
    dataset = run.dataset
    ids = dataset.test_ids[np.linspace(0, len(dataset.test_ids) - 1, FRAMES).astype(int)]
    # Both sides keep to the cameras that the head renders with, which may have been learned.
    seen = head.dataset
    frames = [dataset.frame(i).replace(viewmat=seen.viewmats[i], intrinsics=seen.intrinsics) for i in ids]
    state = state.replace(cameras=None)
    plans = {stage.name: shared(loop.plan(run, stage, None)) for stage in run.stages}
    first = frames[0]
    return Case(
        name=f"trained head, {Path(dataset.path).name}",
        head=head,
        state=state,
        plans=timed(plans),
        frames=frames,
        scenes=posed(run.spec, state, first),
        viewmat=first.viewmat,
        intrinsics=first.intrinsics,
        width=dataset.width,
        height=dataset.height,
    )


def shared(plan: Plan) -> Plan:
    """The part of a plan that PyTorch's side has too: cameras stay, no landmark leads the lips."""
    weights = {term: weight for term, weight in plan.stage.weights.items() if term != "landmarks"}
    return plan.replace(stage=dataclasses.replace(plan.stage, weights=weights), camera_rule=None, lips=None)


def timed(plans: dict[str, Plan]) -> dict[str, Plan]:
    """Of a run's stages those of single frames of a moving head: one that judges regions, one that judges frames."""
    found = {}
    for plan in plans.values():
        if plan.stage.moving and plan.stage.frames == 1:
            found["fusion" if plan.judges_frames else "motion"] = plan
    return found


def posed(spec: render.HeadSpec, state: TrainState, frame: Frame) -> list[list[np.ndarray]]:
    """The layers of one frame as the rasterizer gets them."""
    graphs, _ = render.motion_structure(spec)
    scenes = []
    for region in spec.regions:
        gaussians, alive = state.params[region.name]["gaussians"], np.asarray(state.pools[region.name].alive)
        motion = state.params[region.name]["motion"]
        deltas, _ = jax.jit(lambda *given, g=graphs[region.name]: render.move(g, *given))(
            motion, gaussians.means, frame.condition
        )
        arrays = pool_lib.activate(gaussians, alive, deltas)
        scenes.append([np.asarray(array)[alive] for array in arrays])
    return scenes


def ellipsoid(count: int, size: int) -> Case:
    """`count` Gaussians in all; the rasterizer alone draws them as one layer, RGB, as benchmarks/rasterizer.py does."""
    plan, state, frame = gpu_measure.make_head(count, size)
    plan = shared(plan)
    frame = jax.tree.map(np.asarray, frame)
    stage = dataclasses.replace(
        plan.stage,
        weights={"frame_l1": 1.0, "frame_dssim": 0.2},
        rates={name: plan.stage.rates[name] for name in ("sh", "opacities")},
    )
    fusion = plan.replace(stage=stage, rates=dataclasses.replace(plan.rates, ends=stage.rates))
    alive = {name: pool.alive for name, pool in state.pools.items()}
    clip = python_types.SimpleNamespace(intrinsics=frame.intrinsics, width=size, height=size)
    *scene, viewmat, intrinsics = (np.asarray(array) for array in rasterizer_benchmark.head_scene(count, size))
    return Case(
        name="ellipsoid",
        head=Head(plan.spec, state.params, alive, clip),
        state=state,
        plans={"motion": plan, "fusion": fusion},
        frames=[frame] * FRAMES,
        scenes=[scene],
        viewmat=viewmat,
        intrinsics=intrinsics,
        width=size,
        height=size,
    )


def fresh(case: Case, stage: str) -> TrainState:
    """A copy of the state for a step that donates it, with zero moments."""
    state = jax.tree.map(jnp.array, case.state)
    return state.replace(opt=optim.init(state.params), step=jnp.maximum(state.step, case.plans[stage].stage.start))


def prepared(case: Case, device: str) -> Case:
    """The case as a device's rasterizers can agree on it: gsplat caps alpha at 0.999 and we at 0.99, so for CUDA no
    opacity may reach either. Costs nothing and saves nothing."""
    if device != "cuda":
        return case
    params = {}
    for name, region in case.state.params.items():
        gaussians = region["gaussians"]
        lowered = jnp.minimum(gaussians.logit_opacities, np.log(CAP / (1 - CAP)))
        params[name] = {**region, "gaussians": gaussians.replace(logit_opacities=lowered)}
    scenes = [[*layer[:3], np.minimum(layer[3], CAP), layer[4]] for layer in case.scenes]
    head = Head(case.head.spec, params, case.alive, case.head.dataset, case.head.run)
    return dataclasses.replace(case, head=head, state=case.state.replace(params=params), scenes=scenes)
