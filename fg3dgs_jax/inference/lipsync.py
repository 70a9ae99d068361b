"""How well sound and lips belong together: a lip-sync expert's cosines, SyncNet's distances (LSE-C, LSE-D)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.data.face_box import crop_boxes
from fg3dgs_jax.inference import metrics
from fg3dgs_jax.losses import sync, syncnet

BATCH = 64  # windows embedded at a time
BLOCK = 25  # windows per block of the bootstrap: a second, over which neighbours resemble each other


class Embedded(NamedTuple):
    """Vectors of windows of five frames, and of all that is heard."""

    face: np.ndarray  # f32 [n, D]
    at: np.ndarray  # i64 [n], the first frame of each window
    voice: np.ndarray  # f32 [T, D], heard from frame t on


def in_batches(function: Callable, rows: Callable[[np.ndarray], np.ndarray], count: int, batch: int) -> np.ndarray:
    """function(rows(indices)) for `count` rows, `batch` at a time at one shape, so that it compiles once."""
    found = []
    for first in range(0, count, batch):
        indices = np.minimum(np.arange(first, first + batch), count - 1)
        found.append(np.asarray(function(rows(indices)))[: count - first])
    return np.concatenate(found)


_see = jax.jit(lambda expert, crops: expert.see(crops.astype(jnp.float32) / 255.0))
_hear = jax.jit(lambda expert, mel: expert.hear(mel))


def firsts(ids: np.ndarray, length: int = sync.FRAMES) -> np.ndarray:
    """Positions p in ascending frame numbers `ids` [n] at which `length` consecutive frames begin."""
    ids = np.asarray(ids)
    places = np.arange(max(len(ids) - length + 1, 0))
    return places[ids[places + length - 1] - ids[places] == length - 1]


def embed(expert: sync.Sync, crops: np.ndarray, mel: np.ndarray, ids: np.ndarray | None = None) -> Embedded:
    """Lower faces u8 [n, 48, 96, 3] of frames `ids` [n] (default: 0 to n - 1), mel windows f32 [T, 80, 16] of all."""
    ids = np.arange(len(crops)) if ids is None else np.asarray(ids)
    places, windows = firsts(ids), np.arange(sync.FRAMES)
    face = in_batches(lambda x: _see(expert, x), lambda i: crops[places[i][:, None] + windows], len(places), BATCH)
    voice = in_batches(lambda x: _hear(expert, x), lambda i: mel[i], len(mel), BATCH)
    return Embedded(face, ids[places], voice)


def shifted(embedded: Embedded, rows: np.ndarray, shift: int) -> np.ndarray:
    """Cosine of the windows `rows` with the sound `shift` frames later; NaN where there is none."""
    later = embedded.at[rows] + shift
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
    """Mean cosine f64 [2 most + 1] with the sound -most to +most frames later; NaN where there is no such sound."""
    cosines = [shifted(embedded, rows, s) for s in range(-most, most + 1)]
    return np.array([np.nanmean(row) if np.isfinite(row).any() else np.nan for row in cosines])


def distance_curve(embedded: Embedded, most: int = syncnet.SHIFT) -> np.ndarray:
    """Mean Euclidean distance f64 [2 most + 1] of SyncNet's vectors, the sound -most to +most frames later."""
    means = []
    for shift in range(-most, most + 1):
        later = embedded.at + shift
        known = (later >= 0) & (later < len(embedded.voice))
        gaps = np.linalg.norm(embedded.face[known] - embedded.voice[later[known]] + 1e-6, axis=-1)
        means.append(gaps.mean() if known.any() else np.nan)
    return np.array(means)


@functools.partial(jax.jit, static_argnames="side")
def _square(image: jax.Array, box: jax.Array, side: int) -> jax.Array:
    scale = side / jnp.stack([box[1] - box[0], box[3] - box[2]])
    shift = -scale * jnp.stack([box[0], box[2]])
    cut = jax.image.scale_and_translate(image.astype(jnp.float32), (side, side, 3), (0, 1), scale, shift, "linear")
    return jnp.clip(jnp.round(cut), 0, 255).astype(jnp.uint8)


_watch = jax.jit(syncnet.see)
_listen = jax.jit(syncnet.hear)


def embed_syncnet(
    net: syncnet.SyncNet, images: np.ndarray, boxes: np.ndarray, mfcc: np.ndarray, ids: np.ndarray
) -> Embedded:
    """Images u8 [n, H, W, 3] of frames `ids` [n], face boxes f32 [n, 4], MFCC windows f32 [T, 13, 20] of all frames."""
    squares = [_square(image, box, syncnet.SIDE) for image, box in zip(images, crop_boxes(boxes), strict=True)]
    faces = np.stack([np.asarray(square) for square in squares])
    places, windows = firsts(ids), np.arange(syncnet.FRAMES)
    face = in_batches(lambda x: _watch(net, x), lambda i: faces[places[i][:, None] + windows], len(places), 4)
    voice = in_batches(lambda x: _listen(net, x), lambda i: mfcc[i], len(mfcc), BATCH)
    return Embedded(face, np.asarray(ids)[places], voice)


def lse(curve: np.ndarray) -> dict[str, float]:
    """LSE-D: the smallest mean distance of a curve over offsets; LSE-C: how far the median lies above it."""
    least = float(np.nanmin(curve))
    return {"lse_d": least, "lse_c": float(np.nanmedian(curve)) - least}


def offset_ms(curve: np.ndarray, fps: float, lowest: bool) -> float:
    """Milliseconds that the sound comes late (positive) or early, by the best entry of a curve over offsets."""
    best = int(np.nanargmin(curve) if lowest else np.nanargmax(curve))
    return 1000.0 * (best - len(curve) // 2) / fps
