"""Does the audio move the mouth, and the expression the lids? The same head under wrong conditions, frame by frame.

A head that ignores its audio scores the same with any audio. So the held-out frames are rendered again with audio
shifted both ways, with audio of random training frames, with a mouth that never moves, and with shuffled expressions;
the errors are compared in pairs on the same frames, with block-bootstrap intervals.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data.clip import tokens
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import metrics
from fg3dgs_jax.inference.heldout import Heldout, Render, Track, find_faces, predict, score_pixels, untracked

SHIFTS = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)  # seconds; several, because one may hit similar speech by chance
RANDOM_AUDIO, STATIC, SHUFFLED_EXPRESSION = "random audio", "static head", "shuffled expression"

ConditionAt = Callable[[int], types.Condition]


def shifted_audio(dataset: Dataset, seconds: float) -> ConditionAt:
    """Frame i hears what frame i + seconds * fps hears (the clip's ends joined) and keeps its own expression."""
    moved = np.roll(dataset.audio_features, -round(seconds * dataset.fps), axis=0)
    return lambda i: types.Condition(audio=tokens(moved, i), expression=tokens(dataset.expression, i))


def random_audio(dataset: Dataset, seed: int = 0) -> ConditionAt:
    """Every frame hears the windows of a training frame drawn at random and keeps its own expression."""
    drawn = np.random.default_rng(seed).choice(dataset.train_ids, dataset.num_frames)
    return lambda i: types.Condition(
        audio=tokens(dataset.audio_features, int(drawn[i])), expression=tokens(dataset.expression, i)
    )


def shuffled_expression(dataset: Dataset, seed: int = 0) -> ConditionAt:
    """Every frame gets the expression of a training frame drawn at random and keeps its own audio."""
    drawn = np.random.default_rng(seed).choice(dataset.train_ids, dataset.num_frames)
    return lambda i: types.Condition(
        audio=tokens(dataset.audio_features, i), expression=tokens(dataset.expression, int(drawn[i]))
    )


def wrong_audio(dataset: Dataset) -> dict[str, ConditionAt]:
    """The audio probes by name: shifts that the clip is long enough for, and random audio."""
    shifts = [s for s in SHIFTS if abs(s) * dataset.fps < dataset.num_frames]
    return {f"audio {s:+g} s": shifted_audio(dataset, s) for s in shifts} | {RANDOM_AUDIO: random_audio(dataset)}


def probe(
    dataset: Dataset,
    render: Render,
    models: str | Path | None = None,
    *,
    render_static: Render | None = None,
    track: Track = untracked,
) -> dict:
    """Errors of the held-out frames under right and wrong conditions, and what is gained by the right ones.

    Args:
      render_static: the same head with its motion frozen at the mean over training frames; left out if None.
      models: a folder with MediaPipe's face_landmarker.task; without it "lmd" and "lip_opening_r" are missing and the
        mouth is judged by the lip box's absolute error alone.

    Returns:
      "conditions": name -> means of "lmd" (px), "lip_opening_r", "mouth_error", "eye_error" (grey levels of 255),
      "psnr_head", "psnr_mouth"; "reductions": what -> metric, "difference" and "relative" as [mean, low, high],
      positive where the right condition has the lower error.
    """
    heldout = predict(dataset, render, track=track, name="right audio")
    truth, unavailable = None, {}
    try:
        truth = find_faces(heldout.truth, models).landmarks[..., :2]
    except UserError as reason:
        unavailable = {"lmd": str(reason)}

    def scores(result: Heldout) -> dict[str, np.ndarray]:
        values = score_pixels(dataset, result)
        if truth is not None:
            points = find_faces(result.predictions, models).landmarks[..., :2]
            values["lmd"] = metrics.mouth_distance(points, truth)
            values["opening"] = metrics.lip_opening(points)
        return values

    found = {"right": scores(heldout)}
    audio = wrong_audio(dataset)
    for name, condition in (audio | {SHUFFLED_EXPRESSION: shuffled_expression(dataset)}).items():
        found[name] = scores(predict(dataset, render, condition=condition, track=track, name=name))
    if render_static is not None:
        found[STATIC] = scores(predict(dataset, render_static, track=track, name=STATIC))
    opening_truth = None if truth is None else metrics.lip_opening(truth)
    return {
        "conditions": {name: _means(values, opening_truth) for name, values in found.items()},
        "reductions": _reductions(found, list(audio)),
        "unavailable": unavailable,
    }


def _means(values: dict[str, np.ndarray], opening_truth: np.ndarray | None) -> dict[str, float]:
    kept = ("lmd", "mouth_error", "eye_error", "psnr_head", "psnr_mouth")
    means = {name: metrics.block_bootstrap(values[name]).mean for name in kept if name in values}
    if opening_truth is not None:
        means["lip_opening_r"] = metrics.correlation(values["opening"], opening_truth)
    return means


def _reductions(found: dict[str, dict], audio: list[str]) -> dict[str, dict]:
    """Right against: the frame-wise mean over all wrong audio, each wrong audio, the static head, wrong expressions."""
    right = found["right"]
    metric = "lmd" if np.isfinite(right.get("lmd", np.nan)).any() else "mouth_error"
    others = {"wrong audio, mean": np.mean([found[name][metric] for name in audio], axis=0)}
    others |= {name: found[name][metric] for name in [*audio, STATIC] if name in found}
    result = {name: {"metric": metric, **metrics.paired_reduction(right[metric], v)} for name, v in others.items()}
    eyes = metrics.paired_reduction(right["eye_error"], found[SHUFFLED_EXPRESSION]["eye_error"])
    return result | {SHUFFLED_EXPRESSION: {"metric": "eye_error", **eyes}}
