"""Held-out frames by the papers' test protocol: the frame's own pose, expression, torso layer and background."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import face
from fg3dgs_jax.data.clip import condition as condition_at
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.data.models import LANDMARKS, find_model
from fg3dgs_jax.data.video import write_video
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing
from fg3dgs_jax.inference import edges, metrics, pictures

# (condition as numpy, viewmat f32 [4, 4], backdrop u8 [H, W, 3]) -> u8 [H, W, 3] on the host
Render = Callable[[types.Condition, np.ndarray, np.ndarray], np.ndarray]
Track = Callable[[Sequence, str], Iterable]  # passes a sequence through while showing its progress under a name

FORMAT, VERSION = "fg3dgs_jax.evaluation", 1
OUTPUTS = ("evaluation.json", "heldout.npz", "heldout.mp4", "heldout.jpg")
LANDMARK_SCORES = ("lmd", "lip_opening_r", "lip_opening_range", "jitter", "aue_lower", "aue_upper")
SHEET_FRAMES, WORST_FRAMES = 6, 3


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Predictions of T frames beside their ground truth."""

    ids: np.ndarray  # i32 [T], frame numbers
    predictions: np.ndarray  # u8 [T, H, W, 3]
    truth: np.ndarray  # u8 [T, H, W, 3]
    seconds: np.ndarray  # f64 [T], render time of each frame, condition in, host pixels out


def untracked(items: Sequence, _name: str) -> Iterable:
    """A `Track` that shows nothing."""
    return items


def predict(
    dataset: Dataset,
    render: Render,
    ids: Sequence[int] | np.ndarray | None = None,
    *,
    condition: Callable[[int], types.Condition] | None = None,
    track: Track = untracked,
    name: str = "held-out frames",
) -> Heldout:
    """Renders frames `ids` (default: the held-out ones) with their own pose and backdrop.

    Args:
      condition: frame number -> what drives the motion; the frame's own audio and expression by default.
      track: shows progress.

    The first frame is rendered once before the clock starts, so that compilation is not in `seconds`.
    """
    chosen = np.asarray(dataset.test_ids if ids is None else ids, np.int32)
    if not chosen.size:
        raise UserError(f"{dataset.path}: no frames are held out; list some in the dataset's test split")
    if condition is None:

        def condition(index: int) -> types.Condition:
            return condition_at(dataset.audio_features, dataset.expression, index)

    predictions = np.empty((len(chosen), dataset.height, dataset.width, 3), np.uint8)
    truth, seconds = np.empty_like(predictions), np.empty(len(chosen))
    first = int(chosen[0])
    render(condition(first), dataset.viewmats[first], dataset.pictures(first).backdrop)
    for row in track(range(len(chosen)), name):
        index = int(chosen[row])
        frame = dataset.pictures(index)
        given = condition(index)
        start = time.perf_counter()
        predictions[row] = np.asarray(render(given, dataset.viewmats[index], frame.backdrop))
        seconds[row] = time.perf_counter() - start
        truth[row] = frame.image
    return Heldout(chosen, predictions, truth, seconds)


def find_faces(images: np.ndarray, models: str | Path | None) -> face.FaceTrack:
    """Landmarks and blendshapes of the images by MediaPipe's face_landmarker.task in the folder `models`.

    Raises UserError, the reason why there are none: no folder or no such file in it, or mediapipe is not installed.
    """
    if not models:
        raise UserError("no face landmark model was given (--models DIR with face_landmarker.task)")
    return face.track_face(images, find_model(models, LANDMARKS))


def score_pixels(dataset: Dataset, heldout: Heldout) -> dict[str, np.ndarray]:
    """Per-frame pixel scores, f64 [T] each: PSNR in dB, box errors in grey levels of 255."""
    rows = []
    for index, prediction, truth in zip(heldout.ids.tolist(), heldout.predictions, heldout.truth, strict=True):
        labels = dataset.pictures(index).labels
        head = (labels & types.Label.HEAD) > 0
        lips, eyes = dataset.lips_box[index], dataset.eye_boxes[index]
        rows.append(
            {
                "psnr": metrics.psnr(prediction, truth),
                "psnr_head": metrics.psnr(prediction, truth, head),
                "psnr_mouth": metrics.psnr_boxes(prediction, truth, lips),
                "psnr_eyes": metrics.psnr_boxes(prediction, truth, eyes),
                "mouth_error": metrics.box_error(prediction, truth, lips),
                "eye_error": metrics.box_error(prediction, truth, eyes),
                "edge_error": metrics.mask_error(prediction, truth, edges.band(labels)),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def score_similarity(dataset: Dataset, heldout: Heldout) -> dict[str, np.ndarray]:
    """Per-frame SSIM of the whole frame and its mean over the head's pixels, f64 [T] each."""
    rows = [
        metrics.ssim(prediction, truth, (dataset.pictures(index).labels & types.Label.HEAD) > 0)
        for index, prediction, truth in zip(heldout.ids.tolist(), heldout.predictions, heldout.truth, strict=True)
    ]
    return dict(zip(("ssim", "ssim_head"), np.array(rows).T, strict=True))


def score_faces(ids: np.ndarray, prediction: face.FaceTrack, truth: face.FaceTrack) -> tuple[dict, dict]:
    """Per-frame scores f64 [T] and whole-clip scores (floats) of the faces in T frames."""
    points, true_points = (track.landmarks[..., :2] for track in (prediction, truth))
    per_frame = {
        "lmd": metrics.mouth_distance(points, true_points),
        "lip_opening": metrics.lip_opening(points),
        "lip_opening_truth": metrics.lip_opening(true_points),
    }
    openings = per_frame["lip_opening"], per_frame["lip_opening_truth"]
    overall = {
        "lip_opening_r": metrics.correlation(*openings),
        "lip_opening_range": metrics.range_ratio(*openings),
        "jitter": metrics.jitter(points, ids),
        "jitter_truth": metrics.jitter(true_points, ids),
        "aue_lower": metrics.action_unit_error(prediction, truth, metrics.LOWER_UNITS),
        "aue_upper": metrics.action_unit_error(prediction, truth, metrics.UPPER_UNITS),
        "frames_without_face": int(np.isnan(points[:, 0, 0]).sum()),
    }
    return per_frame, overall


def score(dataset: Dataset, heldout: Heldout, models: str | Path | None = None) -> dict:
    """Everything measured: "summary", "intervals" (95 %, 6-frame blocks), "unavailable" (reasons) and "frames".

    `models` is a folder with MediaPipe's face_landmarker.task; without it landmark scores are named in "unavailable".
    """
    per_frame = score_pixels(dataset, heldout) | score_similarity(dataset, heldout)
    overall = {"seconds_per_frame": float(np.median(heldout.seconds))}
    unavailable = {}
    try:
        truth, found = (find_faces(images, models) for images in (heldout.truth, heldout.predictions))
        face_scores, face_overall = score_faces(heldout.ids, found, truth)
        per_frame |= face_scores
        overall |= face_overall
        if overall["frames_without_face"] == len(heldout.ids):
            unavailable = dict.fromkeys(LANDMARK_SCORES, "no face was found in any prediction")
    except UserError as reason:
        unavailable = dict.fromkeys(LANDMARK_SCORES, str(reason))
    intervals = {name: metrics.block_bootstrap(values) for name, values in per_frame.items()}
    return {
        "summary": {name: interval.mean for name, interval in intervals.items()} | overall,
        "intervals": {name: [interval.low, interval.high] for name, interval in intervals.items()},
        "unavailable": unavailable,
        "frames": [
            {"id": int(index)} | {name: float(values[row]) for name, values in per_frame.items()}
            for row, index in enumerate(heldout.ids)
        ],
    }


def evaluate(
    dataset: Dataset,
    render: Render,
    out: str | Path,
    *,
    models: str | Path | None = None,
    info: dict | None = None,
    track: Track = untracked,
) -> dict:
    """Predicts and scores the held-out frames and writes what others need to check the scores.

    Into `out` (made if missing): heldout.npz (ids, pred, gt, u8), evaluation.json, heldout.mp4 (truth | prediction |
    error, with the clip's sound), heldout.jpg (frames spread over the clip and the worst ones). Returns what
    evaluation.json holds; `info` is kept there under "run".
    """
    make_folder(Path(out))
    heldout = predict(dataset, render, track=track)
    report = full_report(dataset, heldout, models, info)
    save(Path(out), dataset, heldout, report)
    return report


def full_report(dataset: Dataset, heldout: Heldout, models: str | Path | None, info: dict | None = None) -> dict:
    """What evaluation.json holds: the scores, with `info` under "run"."""
    return {"format": FORMAT, "version": VERSION, "run": info or {}, **score(dataset, heldout, models)}


def save(out: Path, dataset: Dataset, heldout: Heldout, report: dict) -> None:
    """Writes OUTPUTS into the folder `out`."""
    with replacing(out / "heldout.npz") as partial:
        np.savez(partial, ids=heldout.ids, pred=heldout.predictions, gt=heldout.truth)
    write_side_by_side(out / "heldout.mp4", dataset, heldout, report["frames"])
    pictures.save(out / "heldout.jpg", sheet(heldout, report["frames"]))
    write_json(out / "evaluation.json", report)


def make_folder(path: Path) -> None:
    """Creates an output folder; UserError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder ({error.strerror}); choose another") from error


def write_json(path: Path, content: dict) -> None:
    """Writes JSON that any reader accepts: NaN and infinity become null."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        return int(value) if isinstance(value, np.integer) else value

    with replacing(path) as partial:
        partial.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def clip_sound(dataset: Dataset) -> np.ndarray | None:
    """The clip's sound f32 [n] at 16 kHz; None if it cannot be read: some folders of the field hold features alone."""
    try:
        return audio_io.load_audio(dataset.audio_path)
    except UserError:
        return None


def sound_of(dataset: Dataset, ids: np.ndarray) -> np.ndarray | None:
    """The clip's sound under frames `ids`, one after the other, f32 [n] at 16 kHz; None if it cannot be read."""
    audio = clip_sound(dataset)
    if audio is None:
        return None
    edges = np.round(np.arange(int(ids.max()) + 2) * audio_io.SAMPLE_RATE / dataset.fps).astype(int)
    padded = np.pad(audio, (0, max(0, edges[-1] - len(audio))))
    return np.concatenate([padded[edges[i] : edges[i + 1]] for i in ids.tolist()])


def _caption(row: dict) -> str:
    distance = f"  LMD {row['lmd']:.2f}" if "lmd" in row else ""
    return f"{row['id']}  head {row['psnr_head']:.1f}  mouth {row['psnr_mouth']:.1f} dB{distance}"


def write_side_by_side(path: Path, dataset: Dataset, heldout: Heldout, rows: Sequence[dict]) -> None:
    """Truth | prediction | error of every held-out frame as an mp4, with the clip's own sound."""
    frames = (
        pictures.side_by_side(truth, prediction, _caption(row))
        for truth, prediction, row in zip(heldout.truth, heldout.predictions, rows, strict=True)
    )
    write_video(path, frames, dataset.fps, sound_of(dataset, heldout.ids))


def sheet(heldout: Heldout, rows: Sequence[dict]) -> np.ndarray:
    """Contact sheet u8 [H, W, 3]: frames spread over the held-out ones, then the worst by the head's PSNR."""
    head = np.array([row["psnr_head"] for row in rows])
    worst = [int(i) for i in np.argsort(head)[:WORST_FRAMES]]  # NaN sorts last
    chosen = [(int(i), "") for i in pictures.spread(len(rows), SHEET_FRAMES)] + [(i, "worst ") for i in worst]
    tiles = [
        pictures.side_by_side(heldout.truth[i], heldout.predictions[i], mark + _caption(rows[i])) for i, mark in chosen
    ]
    return pictures.contact_sheet(tiles, columns=1 if heldout.truth.shape[2] > 600 else 3)
