"""A head performs: what is heard and what is planned become frames, at any frame rate, as soon as they can."""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data.dataset import Dataset, ahead
from fg3dgs_jax.data.hearing import MARGIN, Heard
from fg3dgs_jax.inference import paths
from fg3dgs_jax.inference.control import Plan

# (condition as numpy, viewmat f32 [4, 4], backdrop u8 [H, W, C]) -> u8 [H, W, C] on the host
Draw = Callable[[types.Condition, np.ndarray, np.ndarray], np.ndarray]


class Shown(NamedTuple):
    """One frame and what lies behind it."""

    picture: np.ndarray  # u8 [H, W, C]
    backdrop: np.ndarray  # u8 [H, W, C]
    position: float  # where in the clip the backdrop comes from, in frames


class Ear(Protocol):
    """What a head hears: `hearing.Hearing`, or `Given`."""

    def __iter__(self) -> Iterator[Heard]:
        """One window per clip frame, from four frames before the first to three after the last."""
        ...

    def frames(self, fps: float) -> int:
        """Frames at `fps` that cover the sound; final once the windows have ended."""
        ...


class Given:
    """Windows f32 [L + 8, A, D] that are known already, at `fps`; `gates` f64 [L + 8] as in `hearing.gates`."""

    def __init__(self, windows: np.ndarray, fps: float, gates: np.ndarray | None = None):
        self._windows, self._fps = windows, fps
        self._gates = np.ones(len(windows)) if gates is None else gates

    def __iter__(self) -> Iterator[Heard]:
        return (Heard(window, float(gate)) for window, gate in zip(self._windows, self._gates, strict=True))

    def frames(self, fps: float) -> int:
        return math.ceil((len(self._windows) - 2 * MARGIN) / self._fps * fps - 1e-6)


# Frames of a sound that is there already are drawn side by side, as many at a time: while one listens, sorts or comes
# to the host, which one thread does, others have the rest of the machine.
WORKERS, AHEAD = 2, 4


def play(
    draw: Draw, dataset: Dataset, ear: Ear, plan: Plan, rest: np.ndarray, backdrop: Callable[[int], np.ndarray],
    fps: float, *, live: bool = False,
) -> Iterator[Shown]:  # fmt: skip
    """Frames at `fps` for as long as there is sound, each as soon as what it needs has been heard.

    live: nothing is heard before the frame that is due has been taken.

    rest: the windows f32 [8, A, D] of a closed mouth, that stand for silence. backdrop: clip frame -> what lies behind
    the head. A plan that is shorter than the sound is followed back and forth.
    """
    step, last = dataset.fps / fps, (-1, None)

    def fetch(k: int) -> tuple[int, np.ndarray]:
        """(clip frame, its backdrop) of output frame k; one that stays is not decoded again."""
        nonlocal last
        at = _reflected(k * step, len(plan.sources))
        source = int(clips.nearest(dataset.frame_ids, plan.sources[[round(at)]])[0])
        if source != last[0]:
            last = source, backdrop(source)
        return last

    def scenes() -> Iterator[tuple]:
        with ThreadPoolExecutor(1) as pool:  # the next backdrop is decoded while this frame renders
            waiting = pool.submit(fetch, 0)
            for k, audio in enumerate(tokens(ear, rest, step, fps)):
                picture = waiting.result()[1]
                waiting = pool.submit(fetch, k + 1)
                at = _reflected(k * step, len(plan.viewmats))
                viewmat = paths.viewmats_at(plan.viewmats, np.array([at]))[0] if at % 1 else plan.viewmats[int(at)]
                # The plan's expression begins four frames before its first frame.
                expression = paths.track_at(plan.expression, at + np.arange(2 * MARGIN))
                position = float(paths.track_at(plan.sources[:, None], np.array([at]))[0, 0])
                yield types.Condition(audio, expression), viewmat, picture, position

    def show(scene: tuple) -> Shown:
        condition, viewmat, picture, position = scene
        return Shown(draw(condition, viewmat, picture), picture, position)

    workers, depth = (1, 1) if live else (WORKERS, AHEAD)
    waiting = scenes()
    yield from map(show, itertools.islice(waiting, 1))  # alone: what it compiles, the others need
    yield from ahead(show, waiting, workers, depth)


def tokens(ear: Ear, rest: np.ndarray, step: float, fps: float) -> Iterator[np.ndarray]:
    """Per output frame k the windows f32 [8, A, D] around clip frame k * step, which may lie between two frames.

    In silence they are replaced by `rest`, as far as the gate is closed over those eight frames.
    """
    rows: list[Heard] = []
    first, k = -MARGIN, 0  # the clip frame of rows[0]; the next output frame
    for heard in ear:
        rows.append(heard)
        while True:
            below = math.floor(k * step + 1e-9)
            share = max(k * step - below, 0.0)
            start = below - MARGIN - first
            if start + 2 * MARGIN + (share > 1e-9) > len(rows):
                break
            if k >= ear.frames(fps):
                return
            yield _at(rows[start : start + 2 * MARGIN + 1], share, rest)
            k += 1
            done = math.floor(k * step + 1e-9) - MARGIN - first
            del rows[:done]
            first += done


def _at(rows: list[Heard], share: float, rest: np.ndarray) -> np.ndarray:
    """The first eight rows, moved by a share of a frame towards the ninth, under the gate; f32 [8, A, D]."""
    windows, gates = np.stack([row.window for row in rows]), np.array([row.open for row in rows])
    here, gate = windows[: 2 * MARGIN], gates[: 2 * MARGIN].mean()
    if share > 1e-9:
        here = (1 - share) * here + share * windows[1:]
        gate = (1 - share) * gate + share * gates[1:].mean()
    return (here if gate >= 1 else rest + gate * (here - rest)).astype(np.float32)


def _reflected(position: float, length: int) -> float:
    """A position in [0, length - 1] that runs back and forth."""
    last = length - 1
    phase = position % (2 * last) if last else 0.0
    return 2 * last - phase if phase > last else phase


def backdrops(dataset: Dataset, background: np.ndarray | None, alpha: bool) -> Callable[[int], np.ndarray]:
    """Clip frame -> torso over the clip's background u8 [H, W, 3], or over another one, or RGBA over none."""
    behind = dataset.background if background is None else background
    if alpha:
        return dataset.torso
    return lambda index: clips.over(dataset.torso(index), behind)
