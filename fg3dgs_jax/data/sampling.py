"""Which frame a training step sees: a pure function of (seed, step), so that a resumed run repeats nothing and skips
nothing. Shuffled epochs, and TalkingGaussian's incremental sampling (TG Eq. 6) as data."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from fg3dgs_jax.errors import UserError

METRICS = ("lips", "mouth", "blink")  # of every clip: `Clip.metrics`


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """In steps [start, stop), every K-th step draws its frame from a window of a motion metric (TG Eq. 6).

    `lower` and `upper` give the window at `start` and at `stop`, linear in between, in units of the metric's position
    in [0, 1]: `by` "value": 0 is the metric's 1st percentile over the frames and 1 its 99th; `by` "rank": the share of
    frames with a smaller metric. If no frame lies within, the ones nearest to the window are taken.
    """

    metric: str
    every: int
    start: int
    stop: int
    lower: tuple[float, float]
    upper: tuple[float, float]
    by: str = "value"

    def window(self, step: int) -> tuple[float, float]:
        """(lower, upper) at a step within [start, stop)."""
        part = (step - self.start) / (self.stop - self.start)
        lower, upper = (first + (last - first) * part for first, last in (self.lower, self.upper))
        return lower, upper

    def holds(self, step: int) -> bool:
        """Whether this curriculum chooses the frame of a step."""
        return self.start <= step < self.stop and step % self.every == 0


class FrameSampler:
    """`frame_id(step)` for ids [n]: each epoch of steps that no curriculum holds sees every id once, in a new order.

    `metrics`: f32 [T] by name, indexed by frame id. Curricula may run side by side; a step that several hold belongs to
    the one that holds the fewest. Raises UserError: no ids.
    """

    def __init__(self, ids: Sequence[int], seed: int, curricula: Sequence[Curriculum] = (),
                 metrics: Mapping[str, np.ndarray] = MappingProxyType({})):  # fmt: skip
        self.ids = np.asarray(ids, np.int64)
        if not len(self.ids):
            raise UserError("no frame is left to train on; check the dataset's train split and its masks")
        self.seed = seed
        self.curricula = sorted((c for c in curricula if c.stop > c.start), key=lambda c: -c.every)
        self._position = {c: _position(np.asarray(metrics[c.metric])[self.ids], c.by) for c in self.curricula}
        self._epoch, self._order = -1, self.ids

    def frame_id(self, step: int) -> int:
        """The frame of a step."""
        for curriculum in self.curricula:
            if curriculum.holds(step):
                return self._draw(curriculum, step)
        epoch, offset = divmod(step - self._held_before(step), len(self.ids))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.ids)
        return int(self._order[offset])

    def _held_before(self, step: int) -> int:
        """How many steps before `step` belong to curricula: those of each, less those that several hold, and so on."""
        total = 0
        for size in range(1, len(self.curricula) + 1):
            for group in itertools.combinations(self.curricula, size):
                every = math.lcm(*(c.every for c in group))
                start, stop = max(c.start for c in group), min(step, *(c.stop for c in group))
                both = -(-stop // every) + (-start // every) if stop > start else 0
                total += both if size % 2 else -both
        return total

    def frame_ids(self, start: int, stop: int) -> Iterator[int]:
        """The frames of the steps [start, stop), for `dataset.prefetch`."""
        return map(self.frame_id, range(start, stop))

    def _draw(self, curriculum: Curriculum, step: int) -> int:
        lower, upper = curriculum.window(step)
        position = self._position[curriculum]
        outside = np.maximum(np.maximum(lower - position, position - upper), 0.0)
        inside = np.flatnonzero(outside <= outside.min())
        return int(self.ids[np.random.default_rng([self.seed, step, 1]).choice(inside)])


def _position(metric: np.ndarray, by: str) -> np.ndarray:
    """Where each frame stands in [0, 1]."""
    if by == "rank":
        return np.argsort(np.argsort(metric, kind="stable"), kind="stable") / max(len(metric) - 1, 1)
    low, high = np.percentile(metric, [1, 99])
    return np.clip((metric - low) / max(high - low, 1e-6), 0.0, 1.0)
