"""How well sound and lips belong together: a lip-sync expert's cosines, SyncNet's distances (LSE-C, LSE-D)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.inference import metrics
from fg3dgs_jax.losses import sync, syncnet

BATCH = 64  # windows embedded at a time
BLOCK = 25  # windows per block of the bootstrap: a second, over which neighbours resemble each other


class Embedded(NamedTuple):
    """Vectors of windows: row i of `face` is seen in frames [i, i + 5), row i of `voice` is heard meanwhile."""

    face: np.ndarray  # f32 [T, D]
    voice: np.ndarray  # f32 [T, D]


def in_batches(function: Callable, rows: Callable[[np.ndarray], np.ndarray], count: int, batch: int) -> np.ndarray:
    """function(rows(indices)) for `count` rows, `batch` at a time at one shape, so that it compiles once."""
    found = []
    for first in range(0, count, batch):
        indices = np.minimum(np.arange(first, first + batch), count - 1)
        found.append(np.asarray(function(rows(indices)))[: count - first])
    return np.concatenate(found)


_see = jax.jit(lambda expert, crops: expert.see(crops.astype(jnp.float32) / 255.0))
_hear = jax.jit(lambda expert, mel: expert.hear(mel))


def embed(expert: sync.Sync, crops: np.ndarray, mel: np.ndarray) -> Embedded:
    """Lower faces u8 [T, 48, 96, 3] of consecutive frames and their mel windows f32 [T, 80, 16]: T - 4 rows."""
    count = len(crops) - sync.FRAMES + 1
    windows = np.arange(sync.FRAMES)
    face = in_batches(lambda x: _see(expert, x), lambda i: crops[i[:, None] + windows], count, BATCH)
    return Embedded(face, in_batches(lambda x: _hear(expert, x), lambda i: mel[i], count, BATCH))


def shifted(embedded: Embedded, rows: np.ndarray, shift: int) -> np.ndarray:
    """Cosine of the picture of each row with the sound `shift` frames later; NaN where there is none."""
    later = rows + shift
    inside = (later >= 0) & (later < len(embedded.voice))
    cosine = (embedded.face[rows] * embedded.voice[np.clip(later, 0, len(embedded.voice) - 1)]).sum(-1)
    return np.where(inside, cosine, np.nan)


def threshold(embedded: Embedded, rows: np.ndarray, shift: int) -> float:
    """The cosine that best parts right from shifted windows of `rows`."""
    right = shifted(embedded, rows, 0)
    wrong = np.concatenate([shifted(embedded, rows, s) for s in (-shift, shift)])
    wrong = wrong[np.isfinite(wrong)]
    levels = np.quantile(np.concatenate([right, wrong]), np.linspace(0, 1, 201))
    balanced = [(right > level).mean() + (wrong <= level).mean() for level in levels]
    return float(levels[int(np.argmax(balanced))])


def accuracy(embedded: Embedded, rows: np.ndarray, shift: int, level: float) -> dict[str, metrics.Interval]:
    """Telling windows in sync from ones whose sound is `shift` frames early or late, with 95 % intervals.

    "pairs": the share of windows whose own sound fits better than the shifted one (both ways averaged; ties count
    half). "single": each window judged alone against the cosine `level`, right and shifted ones weighing the same.
    """
    right = shifted(embedded, rows, 0)
    pairs, single = [], [(right > level).astype(float)]
    for offset in (-shift, shift):
        wrong = shifted(embedded, rows, offset)
        known = np.isfinite(wrong)
        pairs.append(np.where(known, (right > wrong) + 0.5 * (right == wrong), np.nan))
        single.append(np.where(known, wrong <= level, np.nan))
    wrong_alone = np.nanmean(single[1:], axis=0)
    return {
        "pairs": metrics.block_bootstrap(np.nanmean(pairs, axis=0), BLOCK),
        "single": metrics.block_bootstrap(0.5 * (single[0] + wrong_alone), BLOCK),
    }


def offset_curve(embedded: Embedded, rows: np.ndarray, most: int = syncnet.SHIFT) -> np.ndarray:
    """Mean cosine f64 [2 most + 1] with the sound -most to +most frames later."""
    return np.array([np.nanmean(shifted(embedded, rows, s)) for s in range(-most, most + 1)])


def distance_curve(face: np.ndarray, voice: np.ndarray, rows: np.ndarray, most: int = syncnet.SHIFT) -> np.ndarray:
    """Mean Euclidean distance f64 [2 most + 1] of SyncNet's vectors, the sound -most to +most frames later."""
    means = []
    for shift in range(-most, most + 1):
        known = rows[(rows + shift >= 0) & (rows + shift < len(voice))]
        gaps = np.linalg.norm(face[known] - voice[known + shift] + 1e-6, axis=-1)
        means.append(gaps.mean() if len(known) else np.nan)
    return np.array(means)


def lse(curve: np.ndarray) -> dict[str, float]:
    """LSE-D: the smallest mean distance of a curve over offsets; LSE-C: how far the median lies above it."""
    least = float(np.nanmin(curve))
    return {"lse_d": least, "lse_c": float(np.nanmedian(curve)) - least}


def offset_ms(curve: np.ndarray, fps: float, lowest: bool) -> float:
    """Milliseconds that the sound comes late (positive) or early, by the best entry of a curve over offsets."""
    best = int(np.nanargmin(curve) if lowest else np.nanargmax(curve))
    return 1000.0 * (best - len(curve) // 2) / fps


def runs(ids: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Ascending frame numbers cut where they do not follow each other."""
    ids = np.asarray(ids)
    return np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
