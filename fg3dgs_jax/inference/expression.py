"""Where the upper face gets its expression: from the clip, at rest, blinking by itself, from sliders or a timeline."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fg3dgs_jax.errors import UserError

BLINKS = ("eyeBlink", "AU45")  # names of a blink: MediaPipe's, OpenFace's
# A blink in seconds: lids fall faster than they rise (spontaneous blinks last 0.2 to 0.4 s).
CLOSING, SHUT, OPENING = 0.09, 0.04, 0.19
# Seconds between blinks, about log-normal: 15 to 20 a minute while people talk.
PAUSE_MEDIAN, PAUSE_SPREAD, PAUSE_LEAST = 3.0, 0.5, 0.8
SLIDER_RANGE = 2.0  # of normalised coefficients; far beyond what any clip showed


def resting(track: np.ndarray) -> np.ndarray:
    """The expression between expressions: the median of each coefficient of a track f32 [T, E]; f32 [E]."""
    return np.median(track, axis=0).astype(np.float32)


def blinks(times: np.ndarray, seed: int) -> np.ndarray:
    """How closed the lids are at ascending `times` in seconds, f64 [L] in [0, 1], blinking at natural intervals."""
    random, out = np.random.default_rng(seed), np.zeros(len(times))
    begin, last = PAUSE_LEAST, float(times[-1]) if len(times) else 0.0
    while begin < last:
        near = slice(*np.searchsorted(times, [begin, begin + CLOSING + SHUT + OPENING]))
        out[near] = _lids(times[near] - begin)
        pause = PAUSE_MEDIAN * math.exp(PAUSE_SPREAD * random.standard_normal())
        begin += CLOSING + SHUT + OPENING + max(pause, PAUSE_LEAST)
    return out


def _lids(since: np.ndarray) -> np.ndarray:
    """One blink, that begins at 0 s."""
    falling = since / CLOSING
    rising = 1.0 - (since - CLOSING - SHUT) / OPENING
    open_share = np.clip(np.minimum(falling, rising), 0.0, 1.0)
    return 0.5 - 0.5 * np.cos(np.pi * open_share)


def blink_column(names: Sequence[str]) -> int:
    """Where the blink is among a head's coefficients. Raises UserError if it has none."""
    for name in BLINKS:
        if name in names:
            return list(names).index(name)
    raise UserError(f"--expression blinks: this head knows no blink, only {', '.join(names)}; use clip or still")


def read_sliders(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Constant coefficients of ["name=value", ...]. Raises UserError for what is not one of the head's `names`."""
    sliders = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            sliders[name] = float(value)
        except ValueError:
            raise UserError(f"--set {text}: write NAME=NUMBER, such as --set {names[0]}=0.5") from None
        check(name, [sliders[name]], names, f"--set {text}")
    return sliders


def read_timeline(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Keys f64 [K, 2] of (seconds, value) by coefficient, from JSON {"name": [[seconds, value], ...], ...}.

    Raises UserError: no such file, not of that form, unknown names, times that do not ascend.
    """
    try:
        content = json.loads(Path(path).read_text())
        timeline = {name: np.asarray(keys, np.float64).reshape(-1, 2) for name, keys in content.items()}
        whole = timeline and all(len(keys) and np.isfinite(keys).all() for keys in timeline.values())
    except OSError as error:
        raise UserError(f"--timeline {path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f'--timeline {path}: must be JSON of the form {{"{names[0]}": [[0.0, 0.0], [1.5, 1.0]]}}')
    for name, keys in timeline.items():
        check(name, keys[:, 1], names, f"--timeline {path}")
        if (np.diff(keys[:, 0]) <= 0).any():
            raise UserError(f"--timeline {path}: the times of {name} do not ascend; sort them")
    return timeline


def check(name: str, values: Sequence[float] | np.ndarray, names: Sequence[str], where: str) -> None:
    """Refuses names that the head does not know and values far outside what it was trained on. Raises UserError."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{where}: this head has no {name}; {hint}it has {', '.join(names)}")
    if not np.abs(np.asarray(values, np.float64)).max() <= SLIDER_RANGE:
        raise UserError(f"{where}: {name} must stay between -{SLIDER_RANGE:g} and {SLIDER_RANGE:g}; 1 is strong")


def apply(
    track: np.ndarray,
    times: np.ndarray,
    names: Sequence[str],
    sliders: Mapping[str, float],
    timeline: Mapping[str, np.ndarray],
) -> np.ndarray:
    """A track f32 [L, E] at `times` in seconds with sliders and then the timeline put over it.

    Between two keys of the timeline values go straight; before the first and after the last they stay.
    """
    track = track.copy()
    for name, value in sliders.items():
        track[:, list(names).index(name)] = value
    for name, keys in timeline.items():
        track[:, list(names).index(name)] = np.interp(times, keys[:, 0], keys[:, 1])
    return track
