"""From our head, stage and frames to PyTorch's, as plain arrays and JSON: the only file here that knows JAX."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from fg3dgs_jax.losses.terms import RegionView
from fg3dgs_jax.model import deltas
from fg3dgs_jax.model.render import HeadSpec
from fg3dgs_jax.training import optim, views
from fg3dgs_jax.training.state import TrainState
from fg3dgs_jax.training.step import Plan
from fg3dgs_jax.types import Frame, Rendered

KINDS = ("face", "cross_audio", "cross_expression", "mouth_mlp")
TERMS = {"l1", "dssim", "alpha", "delta_means", "delta_quats", "delta_log_scales", "frame_l1", "frame_dssim"}
GAUSSIANS = ("means", "quats", "log_scales", "logit_opacities")


def describe(spec: HeadSpec, alive: Mapping[str, np.ndarray]) -> dict:
    """What `head.Head` is built from, JSON-able. Dead slots are left out. Ends where a region has no twin."""
    regions = []
    for region in spec.regions:
        usual = deltas.of(region.motion, ()) if region.motion in KINDS else None
        if usual is None or deltas.of(region.motion, region.predicts) != usual:
            raise SystemExit(f"the region {region.name}, moved by {region.motion!r}, has no twin in PyTorch here")
        grid = region.grid
        shape = {
            "resolutions": list(grid.resolutions),
            "starts": list(grid.starts),
            "dense": grid.dense_levels,
            "features": grid.features,
            "log2_table": grid.log2_table,
            "bound": grid.bound,
        }
        count = int(np.count_nonzero(alive[region.name]))
        regions.append({"name": region.name, "motion": region.motion, "grid": shape, "count": count})
    return {
        "regions": regions,
        "heard": list(spec.heard),
        "expression_dim": spec.expression_dim,
        "sh_degree": spec.sh_degree,
    }


def tensors(params: Mapping[str, Mapping], alive: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under the names and in the layouts of `head.Head`'s state."""
    found = {}
    for name, region in params.items():
        kept, prefix = np.asarray(alive[name]), f"regions.{name}"
        gaussians = region["gaussians"]
        for field in GAUSSIANS:
            found[f"{prefix}.{field}"] = np.asarray(getattr(gaussians, field))[kept]
        sh = np.asarray(gaussians.sh)[kept]
        found[f"{prefix}.sh_dc"], found[f"{prefix}.sh_rest"] = sh[:, :1], sh[:, 1:]
        for path, leaf in jax.tree_util.tree_flatten_with_path(region["motion"])[0]:
            parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            value = np.asarray(leaf)
            if parts[-1] == "kernel":  # [in, out] or [3, in, out]; PyTorch's axes are the other way round
                parts[-1], value = "weight", value.transpose()
            found[".".join([prefix, "motion", *parts])] = value
    return {name: np.array(value, order="C") for name, value in found.items()}


def stage(plan: Plan, step: int, names: list[str], like: Frame) -> dict:
    """What `training.Trainer` is built from, JSON-able.

    step: steps done; names: the parameters of `head.Head`; like: any frame of the clip.
    """
    unknown = set(plan.stage.weights) - TERMS
    if unknown:
        raise SystemExit(f"the stage {plan.stage.name} weighs {', '.join(sorted(unknown))}, which has no twin here")
    rates = {name: found for name in names if (found := _rates(plan, name)) is not None}
    hears = "audio" in plan.rates.ends
    return {
        "weights": dict(plan.stage.weights),
        "rates": rates,
        "shares": {name: view.share for name, (view, _) in _views(like, plan).items()},
        "start": plan.stage.start - step,
        "steps": plan.stage.steps,
        "audio_noise": [plan.audio_noise, plan.audio_level] if hears else [0.0, 0.0],
    }


def export(folder: Path, spec: HeadSpec, state: TrainState, plan: Plan, source: Frame) -> None:
    """A head, a stage and a frame as files that need no JAX to be read: see `startup`."""
    alive = {name: np.asarray(pool.alive) for name, pool in state.pools.items()}
    weights = tensors(state.params, alive)
    save_file(weights, folder / "head.safetensors")
    save_file(frame(source, plan), folder / "frame.safetensors")
    (folder / "head.json").write_text(json.dumps(describe(spec, alive)))
    (folder / "motion.json").write_text(json.dumps(stage(plan, int(state.step), list(weights), source)))


def _rates(plan: Plan, name: str) -> dict | None:
    """Learning rate at the stage's ends, and decay, of a parameter of `head.Head`; None where it is frozen."""
    _, region, *parts = name.split(".")
    field = "sh" if parts[0].startswith("sh_") else "/".join(parts)
    path = f"{region}/{field}" if parts[0] == "motion" else f"{region}/gaussians/{field}"
    group = optim.group_of(path, plan.rates.groups)
    if group not in plan.rates.ends or region not in plan.rates.only.get(group, (region,)):
        return None
    factor = plan.rates.extent if plan.rates.groups[group].per_extent else 1.0
    factor *= plan.rates.sh_rest if parts[0] == "sh_rest" else 1.0
    ends = [factor * end for end in plan.rates.ends[group]]
    return {"ends": ends, "weight_decay": plan.rates.groups[group].decay}


def frame(source: Frame, plan: Plan) -> dict[str, np.ndarray]:
    """A frame as `training.load_frame` takes it, cropped to what the stage's regions look at."""
    found = {
        "audio": source.condition.audio,
        "expression": source.condition.expression,
        "viewmat": source.viewmat,
        "intrinsics": source.intrinsics,
        "image": source.image,
        "backdrop": source.backdrop,
    }
    if not plan.judges_frames:
        for name, (view, window) in _views(source, plan).items():
            found[f"views.{name}.image"] = view.beside()[1]
            found[f"views.{name}.inside"], found[f"views.{name}.outside"] = (
                np.float32(mask) for mask in (view.inside, view.outside)
            )
            found[f"views.{name}.origin"] = np.float32([0, 0, window.col, window.row])
    return {name: np.array(value, order="C") for name, value in found.items()}


def _views(source: Frame, plan: Plan) -> dict[str, tuple[RegionView, views.Window]]:
    """What our own step judges of each region, over black, and in which window."""
    found = {}
    for name, task in plan.tasks.items():
        window = views.window_of(task, source, plan.whole)
        empty = np.zeros((window.height, window.width), np.float32)
        layer = views.Layer(Rendered(np.zeros((*empty.shape, 3), np.float32), empty, empty, None, None), None)
        view = views.region_view(layer, None, source, task, window, np.zeros(3, np.float32), {})
        found[name] = view, window
    return found
