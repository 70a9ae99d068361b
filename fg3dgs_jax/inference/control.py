"""What a head does besides speaking: pose, expression, how much the mouth moves; planned frame by frame."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fg3dgs_jax.data import hearing
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import expression as expressions
from fg3dgs_jax.inference import paths, poses

MARGIN = hearing.MARGIN
EXPRESSIONS = ("clip", "still", "blinks")
ORBIT_SECONDS = 6.0


@dataclass(frozen=True)
class Control:
    """How a head performs. The defaults follow the training clip."""

    pose: str | Path = "clip"  # clip (back and forth), still, idle (gentle motion), or a file (`poses.read`)
    expression: str = "clip"  # clip, still (at rest) or blinks (at rest, blinking by itself)
    sliders: Mapping[str, float] = field(default_factory=dict)  # coefficient -> constant, over the expression
    timeline: Mapping[str, np.ndarray] = field(default_factory=dict)  # coefficient -> keys (s, value), over the sliders
    gain: float = 1.0  # of the motion that sound causes: 0 keeps the mouth at rest
    gate: float | None = hearing.GATE  # dB below loud speech that count as silence; None: nothing does
    orbit: float = 0.0  # degrees that the camera swings to each side, as far as the clip's angles allow
    orbit_seconds: float = ORBIT_SECONDS
    start: int = 0  # frame of the clip to begin with, or to stay at
    seed: int = 0  # of idle motion and blinks


@dataclass(frozen=True)
class Plan:
    """A control worked out for L frames at the clip's rate."""

    viewmats: np.ndarray  # f32 [L, 4, 4]
    sources: np.ndarray  # f64 [L]: where in the clip each frame's torso and background come from; may be fractional
    expression: np.ndarray  # f32 [L + 8, E], from four frames before the first on
    notes: tuple[str, ...] = ()  # what could not be done as asked


def check(dataset: Dataset, control: Control) -> None:
    """Refuses what cannot be performed by the head of this dataset. Raises UserError."""
    if not 0 <= control.start < dataset.num_frames:
        raise UserError(f"--start {control.start}: the clip has frames 0 to {dataset.num_frames - 1}; choose one")
    if control.expression not in EXPRESSIONS:
        raise UserError(f"--expression {control.expression}: is none of {', '.join(EXPRESSIONS)}")
    if control.expression == "blinks":
        expressions.blink_column(dataset.expression_names)
    for name, value in control.sliders.items():
        expressions.check(name, [value], dataset.expression_names, f"--set {name}={value:g}")
    for name, keys in control.timeline.items():
        expressions.check(name, keys[:, 1], dataset.expression_names, "--timeline")
    if not 0 <= control.gain <= 2:
        raise UserError(f"--mouth-gain {control.gain:g}: is not between 0 and 2; 1 is as trained")
    if control.gate is not None and not 6 <= control.gate <= 80:
        raise UserError(f"--gate {control.gate:g}: is not between 6 and 80 dB; {hearing.GATE:g} is usual")
    if not 0 <= control.orbit <= 45:
        raise UserError(f"--orbit {control.orbit:g}: is not between 0 and 45 degrees; 10 is much for most clips")
    if not 0.1 <= control.orbit_seconds <= 3600:
        raise UserError(
            f"--orbit-seconds {control.orbit_seconds:g}: is not between 0.1 and 3600; {ORBIT_SECONDS:g} is usual"
        )
    if control.seed < 0:
        raise UserError(f"--seed {control.seed}: is negative; give a whole number from 0 on")


def plan(dataset: Dataset, control: Control, length: int) -> Plan:
    """The control worked out for `length` frames. Raises UserError for what cannot be (`check`, a file of poses)."""
    check(dataset, control)
    times = np.arange(length) / dataset.fps
    viewmats, sources, notes = _poses(dataset, control, times)
    if control.orbit:
        safe = poses.safe_yaws(dataset.viewmats)
        viewmats, turn = poses.orbit(viewmats, times, control.orbit, control.orbit_seconds, safe)
        if turn < 0.8 * control.orbit:
            notes += (f"the orbit is held to {turn:.0f} degrees: the clip shows no more of the head",)
    return Plan(viewmats, sources, _expression(dataset, control, length), notes)


def _poses(dataset: Dataset, control: Control, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    length, mode = len(times), control.pose
    if mode == "clip":
        ahead = paths.ping_pong(dataset.num_frames, length, control.start)
        return paths.viewmats_at(dataset.viewmats, ahead), ahead, ()
    if mode in poses.MODES:
        own = dataset.viewmats[control.start]
        viewmats = poses.idle(own, times, control.seed) if mode == "idle" else np.repeat(own[None], length, 0)
        return viewmats, np.full(length, float(control.start)), ()
    given = poses.read(mode)
    viewmats = paths.viewmats_at(given, paths.ping_pong(len(given), length))
    low, high = poses.safe_yaws(dataset.viewmats)
    turns = poses.yaws(viewmats)
    beyond = max(low - turns.min(), turns.max() - high)
    notes = (f"--pose {mode}: turns {beyond:.0f} degrees further than the clip shows the head",) if beyond > 1 else ()
    return viewmats, poses.follow(viewmats, dataset.viewmats, dataset.frame_ids).astype(np.float64), notes


def _expression(dataset: Dataset, control: Control, length: int) -> np.ndarray:
    """f32 [length + 8, E] at the times of frames -4 to length + 3."""
    times = np.arange(-MARGIN, length + MARGIN) / dataset.fps
    if control.expression == "clip":
        ahead = paths.ping_pong(dataset.num_frames, length + MARGIN, control.start)
        before = np.minimum(np.abs(np.arange(control.start - MARGIN, control.start)), dataset.num_frames - 1)
        track = paths.track_at(dataset.expression, np.concatenate([before, ahead]))
    else:
        track = np.repeat(expressions.resting(dataset.expression)[None], length + 2 * MARGIN, 0)
    if control.expression == "blinks":
        column = expressions.blink_column(dataset.expression_names)
        rest, lids = track[:, column], expressions.blinks(times, control.seed)
        track[:, column] = rest + (1.0 - rest) * lids
    return expressions.apply(track, times, dataset.expression_names, control.sliders, control.timeline)
