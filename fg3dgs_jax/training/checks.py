"""Whether a config can run, before anything is made or written: every field that is a name or a number."""

import math
import operator
import re
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from fg3dgs_jax import native
from fg3dgs_jax.data.sampling import METRICS
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.losses import sync
from fg3dgs_jax.losses.terms import FRAME_NAMES, REGION_NAMES, SNIPPET_TERMS
from fg3dgs_jax.model.render import RasterOptions
from fg3dgs_jax.training.stages import Stage, head_spec, tasks

KINDS_OF_DENSIFYING = ("classic", "relocation")
# Lowest and highest value of the fields that are counted, drawn from or divided by.
RANGES = {
    "seed": (0, 2**31 - 1), "synthetic.seed": (0, 2**31 - 1), "schedule_scale": (1e-6, 1e3), "sh_degree": (0, 3),
    "sh_every": (1, math.inf), "audio_noise.each": (0, math.inf), "audio_noise.level": (0, math.inf),
    "rasterizer.max_pairs": (0, 2**31 - 1), "log_every": (1, math.inf), "preview_every": (1, math.inf),
    "save_every": (1, math.inf), "keep": (0, math.inf),
}  # fmt: skip
REGION_RANGES = {
    "points": (16, 2**24), "capacity": (16, 2**24), "grid.levels": (1, 32), "grid.features": (1, 16),
    "grid.log2_table": (1, 24), "grid.min_resolution": (2, 2**14), "grid.max_resolution": (2, 2**14),
    "grid.bound": (1e-3, 1e3), "overlap": (0, 0.1),
}  # fmt: skip
STAGE_RANGES = {
    "steps": (0, 2**31 - 1), "frames": (1, 100), "densify.every": (0, math.inf), "densify.growth": (0, 1e3),
    "densify.reset_every": (0, 2**31 - 1), "densify.faint": (0, 0.5), "densify.noise": (0, math.inf),
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Refuses a config that cannot run here, whatever the dataset. Raises UserError."""
    _check_ranges(config, RANGES, "--config")
    _check_regions(config)
    for name, group in config.groups.items():
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise UserError(f"--config.groups.{name}.pattern: is no regular expression ({error}).") from None
    try:
        RasterOptions(config.rasterizer.backend)
    except ValueError as error:
        raise UserError(f"--config.rasterizer.backend: {error}") from None
    if config.rasterizer.backend != "reference":
        native.check_platform()
    if not config.schedule:
        raise UserError("--config.schedule: names no stage; a run needs at least one.")
    for name in config.schedule:
        _check_stage(config, name)
    tasks(config, dict.fromkeys(("", "lips", "eyes"), (8, 8)))
    head_spec(config, (16, 64), 1, 0.1)


def _check_regions(config: ConfigDict) -> None:
    if not config.layers or len(set(config.layers)) != len(config.layers):
        raise UserError(f"--config.layers={config.layers!r}: must name the regions, each of them once.")
    for name in config.layers:
        if name not in config.regions:
            raise UserError(f"--config.layers names the region {name!r}, which --config.regions does not define.")
        region, field = config.regions[name], f"--config.regions.{name}"
        _check_ranges(region, REGION_RANGES, field)
        if region.points > region.capacity:
            raise UserError(f"{field}.points={region.points}: is more than its capacity of {region.capacity}.")


def _check_ranges(config: ConfigDict, ranges: Mapping[str, tuple[float, float]], field: str) -> None:
    for name, (low, high) in ranges.items():
        value = operator.attrgetter(name)(config)
        if not low <= value <= high:  # also NaN
            wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{field}.{name}={value}: must be {wanted}.")


def _check_stage(config: ConfigDict, name: str) -> None:
    """Raises UserError where a stage names what does not exist, or its numbers cannot be."""
    if name not in config.stages:
        raise UserError(f"--config.schedule names the stage {name!r}, which --config.stages does not define.")
    entry, field = config.stages[name], f"--config.stages.{name}"
    if entry.densify.kind not in KINDS_OF_DENSIFYING:
        raise UserError(f"{field}.densify.kind: {entry.densify.kind!r} is none of {', '.join(KINDS_OF_DENSIFYING)}.")
    known = {*REGION_NAMES, *FRAME_NAMES, *(SNIPPET_TERMS if entry.frames > 1 else ())}
    for term in entry.weights:
        if term not in known:
            raise UserError(f"{field}.weights.{term}: no such loss term; there are {', '.join(sorted(known))}.")
    for group in [*entry.rates, *entry.only]:
        if group not in config.groups:
            raise UserError(f"{field}.rates.{group}: no such group in --config.groups.")
    _check_ranges(entry, STAGE_RANGES, field)
    for group, ends in entry.rates.items():
        if ends is not None and (len(ends) != 2 or not all(rate > 0 for rate in ends)):
            raise UserError(f"{field}.rates.{group}={ends}: must be two rates above 0; a group left out is frozen.")
    if entry.weights.get("sync") and entry.frames not in (1, sync.FRAMES):
        raise UserError(f"{field}.frames={entry.frames}: a lip-sync expert judges {sync.FRAMES} frames.")
    for curriculum, fields in entry.curricula.items():
        if fields.metric not in METRICS or fields.every < 1:
            raise UserError(f"{field}.curricula.{curriculum}: needs a metric of {', '.join(METRICS)} and every >= 1.")
    for group, regions in entry.only.items():
        if unknown := set(regions) - set(config.layers):
            raise UserError(f"{field}.only.{group}: no region {min(unknown)!r} among --config.layers.")


def check_pose(config: ConfigDict, found: Sequence[Stage]) -> None:
    """Raises UserError where `config.pose` asks for what cannot be."""
    pose, names = config.pose, {stage.name: stage for stage in found}
    if not pose.refine:
        return
    for name in pose.stages:
        if name not in names:
            raise UserError(f"--config.pose.stages: no stage {name!r} runs; there are {', '.join(names)}.")
        if names[name].frames > 1:
            raise UserError(f"--config.pose.stages: {name!r} renders several frames a step; cameras learn from one.")
    for field in ("rate", "focal_rate"):
        ends = tuple(pose[field])
        if (len(ends) != 2 or min(ends) <= 0.0) and not (field == "focal_rate" and ends == (0.0, 0.0)):
            raise UserError(f"--config.pose.{field}={ends}: expected two rates above 0.")
    for field in ("smooth", "near"):
        if pose[field] < 0.0:
            raise UserError(f"--config.pose.{field}={pose[field]}: a weight is 0 or above.")
