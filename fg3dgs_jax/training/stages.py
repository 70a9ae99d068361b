"""A stage is data: which parameters learn how fast, which losses count, whether the head moves, when Gaussians split.

FG-3DGS, TalkingGaussian and their ablations differ in the configs that these records are read from, never in code.
Steps of a config are those of a full run; `schedule_scale` shortens every stage in proportion.
"""

import dataclasses
import logging
from collections.abc import Mapping

from ml_collections import ConfigDict

from fg3dgs_jax.data.sampling import Curriculum
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.losses.terms import NEEDS, SNIPPET_TERMS
from fg3dgs_jax.model.deltas import OUTPUTS
from fg3dgs_jax.model.hashgrid import GridSpec
from fg3dgs_jax.model.motion import KINDS
from fg3dgs_jax.model.render import HeadSpec, RegionSpec
from fg3dgs_jax.types import Label

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RegionTask:
    """What a region must learn: the pixels with a label of `include` and none of `exclude`.

    `box` ("", "lips" or "eyes") names the boxes of the frame inside which pixels outside the mask are not judged:
    the region in front covers them (TG's mouth branch). `crop` holds them, or the head where there is no box.
    `overlap` widens the mask, for a region behind another: where both end, a gap shows in poses the clip hardly has.
    """

    include: int
    exclude: int
    box: str
    crop: tuple[int, int]  # rows, columns
    grad_threshold: float  # mean screen gradient in NDC units above which a Gaussian is cloned or split
    overlap: float = 0.0  # how much further the mask goes on within the head, of the frame's height


@dataclasses.dataclass(frozen=True)
class Densify:
    """When and how the pools grow and shrink; `start`, `stop`, `every` in steps of the stage."""

    start: int
    stop: int
    every: int
    percent_dense: float  # of the extent: larger Gaussians split, smaller ones are cloned
    min_opacity: tuple[float, float]  # prune below, from start to stop
    max_radius: float  # prune above, pixels at 512; 0: never
    max_scale: float  # prune above, in extents; 0: never
    reset_every: int = 0  # steps of the stage from one lowering of all opacities to the next; 0: never
    kind: str = "classic"
    growth: float = 0.0  # relocation: share by which a pool grows a round, up to its capacity
    faint: float = 0.0  # relocation: opacity below which a Gaussian is put elsewhere
    noise: float = 0.0  # relocation: of the means of faint Gaussians, in units of their learning rate


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stretch of training at constant rules. `start` is its first step over the whole run."""

    name: str
    start: int
    steps: int
    moving: bool
    rates: Mapping[str, tuple[float, float]]  # group -> learning rate at the first and last step, log-linear between
    only: Mapping[str, tuple[str, ...]]  # group -> the regions in which it learns; a group left out: in all
    weights: Mapping[str, float]  # loss term -> weight
    sh_every: int  # steps of the run per additional SH degree
    densify: Densify | None
    curricula: tuple[Curriculum, ...]  # steps over the whole run
    frames: int = 1  # consecutive frames that a step renders

    @property
    def stop(self) -> int:
        return self.start + self.steps


def _scaled(steps: int, scale: float) -> int:
    return max(1, round(steps * scale)) if steps else 0


def _densify(config: ConfigDict, scale: float) -> Densify | None:
    if not config.every:
        return None
    return Densify(
        start=_scaled(config.start, scale),
        stop=_scaled(config.stop, scale),
        every=max(config.shortest, _scaled(config.every, scale)),
        percent_dense=config.percent_dense,
        min_opacity=tuple(config.min_opacity),
        max_radius=config.max_radius,
        max_scale=config.max_scale,
        reset_every=_scaled(config.reset_every, scale),
        kind=config.kind,
        growth=config.growth,
        faint=config.faint,
        noise=config.noise,
    )


def _curricula(config: ConfigDict, first: int, scale: float) -> tuple[Curriculum, ...]:
    found = []
    for fields in config.values():
        start, stop = (first + round(fields[end] * scale) for end in ("start", "stop"))
        window = {"lower": tuple(fields.lower), "upper": tuple(fields.upper)}
        found.append(Curriculum(**{**fields.to_dict(), "start": start, "stop": stop, **window}))
    return tuple(found)


def _present(config: ConfigDict) -> list[tuple[str, int]]:
    """(name, steps of a full run) of the stages whose judge is there.

    A stage of several frames exists for what judges them together. Without its weights it is left out, and the stage
    before it runs for its steps too (FG without HRPA: fusion without L_lip).
    """
    found: list[tuple[str, int]] = []
    for name in config.schedule:
        entry = config.stages[name]
        judge = next((NEEDS[term] for term in SNIPPET_TERMS if entry.frames > 1 and entry.weights.get(term)), "")
        if not judge or config.judges[judge]:
            found.append((name, entry.steps))
            continue
        log.info("stage %s is left out: no lip-sync weights are given (--config.judges.%s)", name, judge)
        if found and entry.steps:
            found[-1] = found[-1][0], found[-1][1] + entry.steps
    return found


def _weights(config: ConfigDict, name: str) -> dict[str, float]:
    """The terms of a stage that count: their weight is not 0, and the network they ask is there."""
    kept = {term: weight for term, weight in config.stages[name].weights.items() if weight}
    missing = [term for term in kept if term in NEEDS and not config.judges[NEEDS[term]]]
    if missing:
        judges = ", ".join(f"--config.judges.{NEEDS[term]}" for term in missing)
        log.info("stage %s does without %s: no weights are given (%s)", name, ", ".join(missing), judges)
    return {term: weight for term, weight in kept.items() if term not in missing}


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """The stages of a run in order, from `config.schedule` (names) and `config.stages` (their fields)."""
    found, start = [], 0
    for name, full_steps in _present(config):
        entry = config.stages[name]
        steps = _scaled(full_steps, config.schedule_scale)
        found.append(
            Stage(
                name=name,
                start=start,
                steps=steps,
                moving=entry.moving,
                rates={group: tuple(ends) for group, ends in entry.rates.items() if ends is not None},
                only={group: tuple(regions) for group, regions in entry.only.items()},
                weights=_weights(config, name),
                sh_every=_scaled(config.sh_every, config.schedule_scale),
                densify=_densify(entry.densify, config.schedule_scale),
                curricula=_curricula(entry.curricula, start, config.schedule_scale),
                frames=entry.frames,
            )
        )
        start += steps
    return tuple(found)


def _bits(names: tuple[str, ...], field: str) -> int:
    bits = 0
    for name in names:
        if name.upper() not in Label.__members__:
            raise UserError(f"{field}: no label {name!r}; there are {', '.join(m.lower() for m in Label.__members__)}.")
        bits |= Label[name.upper()]
    return int(bits)


def tasks(config: ConfigDict, crops: Mapping[str, tuple[int, int]]) -> dict[str, RegionTask]:
    """What each region of `config.layers` learns. `crops`: rows and columns that hold a kind of box, "" the head."""
    found = {}
    for name in config.layers:
        region = config.regions[name]
        field = f"--config.regions.{name}"
        if region.box not in crops:
            raise UserError(f"{field}.box: {region.box!r} is none of {', '.join(map(repr, crops))}.")
        found[name] = RegionTask(
            include=_bits(region.include, f"{field}.include"),
            exclude=_bits(region.exclude, f"{field}.exclude"),
            box=region.box,
            crop=crops[region.box],
            grad_threshold=region.grad_threshold,
            overlap=region.overlap,
        )
    return found


def head_spec(config: ConfigDict, audio_shape: tuple[int, int], expression_dim: int, extent: float) -> HeadSpec:
    """The static description of the head that a config asks for, on a dataset with these inputs."""
    regions = []
    for name in config.layers:
        region = config.regions[name]
        if region.motion not in KINDS:
            raise UserError(f"--config.regions.{name}.motion: {region.motion!r} is none of {', '.join(KINDS)}.")
        if strange := [name for name in region.predicts if name not in OUTPUTS or region.predicts.count(name) > 1]:
            raise UserError(
                f"--config.regions.{name}.predicts: {strange[0]!r} is not one of {', '.join(OUTPUTS)}, or there twice."
            )
        try:
            grid = GridSpec(**{**region.grid.to_dict(), "bound": region.grid.bound * extent})
        except ValueError as error:
            raise UserError(f"--config.regions.{name}.grid: {error}") from None
        regions.append(RegionSpec(name, region.motion, grid, tuple(region.predicts)))
    if config.audio_components < 0:
        raise UserError(f"--config.audio_components={config.audio_components}: give a number of components, or 0")
    return HeadSpec(tuple(regions), tuple(audio_shape), expression_dim, config.sh_degree, config.audio_components)
