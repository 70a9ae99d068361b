"""The papers' tables: every score of held-out frames in one row, ours beside the ground truth's own.

A score whose weights are missing is named with the reason, never guessed; FID and the sync scores of few frames are
marked unreliable.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import face, mel, weights
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.data.face_box import face_boxes
from fg3dgs_jax.inference import heldout as heldout_frames
from fg3dgs_jax.inference import inception, lipsync, metrics
from fg3dgs_jax.losses import lpips, sync, syncnet
from fg3dgs_jax.losses.lpips import Lpips
from fg3dgs_jax.losses.sync import Sync
from fg3dgs_jax.losses.syncnet import SyncNet

ENOUGH = 1000  # frames from which FID and LSE are taken for granted
SILENCE = 0.05  # of the loud parts' RMS: quieter frames are silent
HELD_OUT = "held-out frames"  # the table that every evaluation has
TRUTH, OURS = "ground truth", "ours"
# name, for people, decimals, better
COLUMNS = (
    ("psnr", "PSNR, dB", 2, "higher"), ("ssim", "SSIM", 3, "higher"), ("lpips", "LPIPS", 4, "lower"),
    ("fid", "FID", 2, "lower"), ("lmd", "LMD, px", 3, "lower"), ("aue_lower", "AUE lower", 3, "lower"),
    ("aue_upper", "AUE upper", 3, "lower"), ("lse_c", "LSE-C", 3, "higher"), ("lse_d", "LSE-D", 3, "lower"),
    ("sync", "sync expert's cosine", 3, "higher"), ("offset_ms", "A/V offset, ms", 0, "near 0"),
    ("jitter", "jitter, px/frame²", 2, "near truth's"), ("silence_motion", "silent lips, px/frame", 3, "near truth's"),
)  # fmt: skip
SYNC_SCORES = ("lse_c", "lse_d", "sync", "offset_ms")  # of windows of five frames


@dataclasses.dataclass(frozen=True)
class Networks:
    """What judges pictures and sound; None where no weights were given."""

    lpips: Lpips | None = None
    sync: Sync | None = None
    syncnet: SyncNet | None = None
    inception: dict[str, jax.Array] | None = None


def _inception(arrays: dict, facts: dict) -> dict[str, jax.Array]:
    inception.check(arrays)
    return jax.device_put(arrays)


# field of Networks -> (kind of the file, how it is made of the file's arrays and facts)
MAKERS = {
    "lpips": ("lpips", lambda arrays, facts: jax.device_put(lpips.create(facts.get("net", ""), arrays))),
    "sync": ("sync-expert", lambda arrays, facts: sync.create(arrays)),
    "syncnet": ("syncnet", lambda arrays, facts: syncnet.create(arrays)),
    "inception": ("inception", _inception),
}


def load(paths: Mapping[str, str | Path | None]) -> Networks:
    """The networks whose files are given, by the fields of Networks. Raises UserError, naming the flag."""
    given = {name: path for name, path in paths.items() if path}
    return Networks(**{name: weights.build(path, *MAKERS[name], f"--{name}") for name, path in given.items()})


@dataclasses.dataclass(frozen=True)
class Footage:
    """Frames with what is heard around them."""

    ids: np.ndarray  # i64 [n], frame numbers, ascending
    images: np.ndarray  # u8 [n, H, W, 3]
    boxes: np.ndarray  # f32 [n, 4], faces
    sound: np.ndarray  # f32 [samples] at 16 kHz, from frame 0 on
    frames: int  # that the sound lasts
    fps: float


_distance = jax.jit(lpips.distance)


def perceptual(judge: Lpips, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LPIPS per frame, f64 [n], of whole images u8 [n, H, W, 3]."""
    pairs = ((jnp.asarray(x[None], jnp.float32) / 255.0 for x in pair) for pair in zip(prediction, truth, strict=True))
    return np.array([float(_distance(judge, a, b)[0]) for a, b in pairs])


def fid(arrays: dict[str, jax.Array], a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet Inception distance of two sets of images u8 [n, H, W, 3]."""

    def seen(images: np.ndarray) -> np.ndarray:
        compute = lambda x: inception.features(arrays, x)  # noqa: E731
        return lipsync.in_batches(compute, lambda i: images[i], len(images), inception.BATCH)

    return inception.frechet(seen(a), seen(b))


def sync_scores(footage: Footage, networks: Networks) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Scores of the windows of five frames, of which there must be one, and the curves that they come from, over the
    offset of the sound."""
    scores, curves = {}, {}
    if networks.sync is not None:
        heard = mel.mel_windows(footage.sound, footage.frames, footage.fps)
        crops = _lower_faces(footage)
        embedded = lipsync.embed(networks.sync, crops, heard, footage.ids)
        curve = lipsync.offset_curve(embedded, np.arange(len(embedded.at)))
        curves["sync"] = curve.tolist()
        scores |= {"sync": float(curve[len(curve) // 2]), "offset_ms": lipsync.offset_ms(curve, footage.fps, False)}
    if networks.syncnet is not None:
        heard = mel.mfcc_windows(footage.sound, footage.frames, footage.fps)
        found = lipsync.embed_syncnet(networks.syncnet, footage.images, footage.boxes, heard, footage.ids)
        curve = lipsync.distance_curve(found)
        curves["syncnet"] = curve.tolist()
        scores |= lipsync.lse(curve) | {"offset_ms": lipsync.offset_ms(curve, footage.fps, True)}
    return scores, curves


_lower = jax.jit(lambda image, box: sync.lower_faces(image[None].astype(jnp.float32), box[None])[0])


def _lower_faces(footage: Footage) -> np.ndarray:
    crops = [np.asarray(_lower(image, box)) for image, box in zip(footage.images, footage.boxes, strict=True)]
    return np.clip(np.round(np.stack(crops)), 0, 255).astype(np.uint8)


def silent_frames(sound: np.ndarray, frames: int, fps: float) -> np.ndarray:
    """bool [frames]: quieter than a twentieth of the loud parts (95th percentile of the frames' RMS)."""
    edges = np.round(np.arange(frames + 1) * audio_io.SAMPLE_RATE / fps).astype(int)
    padded = np.pad(sound, (0, max(0, edges[-1] - len(sound))))
    power = np.add.reduceat(np.square(padded[: edges[-1]], dtype=np.float64), edges[:-1]) / np.diff(edges)
    rms = np.sqrt(power)
    return rms < max(SILENCE * float(np.percentile(rms, 95)), 1e-6)


def silence_motion(opening: np.ndarray, ids: np.ndarray, silent: np.ndarray) -> float:
    """Mean change of the lip opening f64 [n], pixels a frame, between neighbours that are both silent; NaN if none."""
    ids = np.asarray(ids)
    both = (np.diff(ids) == 1) & silent[ids[1:]] & silent[ids[:-1]]
    change = np.abs(np.diff(opening))[both]
    return float(np.nanmean(change)) if np.isfinite(change).any() else float("nan")


def missing(networks: Networks, models_folder: str | Path | None) -> dict[str, str]:
    """Score -> why it is not there."""
    reasons = {}
    for field, flag, what, names in (
        ("lpips", "--lpips", "LPIPS", ("lpips",)),
        ("inception", "--inception", "Inception", ("fid",)),
        ("syncnet", "--syncnet", "SyncNet", ("lse_c", "lse_d")),
        ("sync", "--sync", "lip-sync expert", ("sync",)),
    ):
        if getattr(networks, field) is None:
            reasons |= dict.fromkeys(names, f"no {what} weights ({flag} FILE)")
    if networks.sync is None and networks.syncnet is None:
        reasons["offset_ms"] = "no lip-sync weights (--sync FILE or --syncnet FILE)"
    if not models_folder:
        reason = "no face landmark model (--models DIR)"
        reasons |= dict.fromkeys(("lmd", "aue_lower", "aue_upper", "jitter", "silence_motion"), reason)
    return reasons


def table(
    dataset: Dataset, heldout: heldout_frames.Heldout, report: Mapping, networks: Networks,
    models_folder: str | Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Rows "ground truth" and "ours" of held-out frames beside their report (`heldout.score`).

    Returns "rows", "unavailable" (score -> reason), "unreliable" (score -> reason), "curves" (row -> curves), "frames".
    """
    count, summary = len(heldout.ids), report["summary"]
    sound = heldout_frames.clip_sound(dataset)
    unavailable = unheard(sound, heldout.ids) | missing(networks, models_folder)
    truth: dict[str, float] = {"lpips": 0.0, "fid": 0.0, "lmd": 0.0, "aue_lower": 0.0, "aue_upper": 0.0, "ssim": 1.0}
    ours = {name: summary[name] for name, *_ in COLUMNS if name in summary}
    truth |= {"jitter": summary["jitter_truth"]} if "jitter_truth" in summary else {}
    if networks.lpips is not None:
        ours["lpips"] = float(perceptual(networks.lpips, heldout.predictions, heldout.truth).mean())
    if networks.inception is not None:
        ours["fid"] = fid(networks.inception, heldout.predictions, heldout.truth)
    curves = {}
    if not unheard(sound, heldout.ids):
        for row, scores, images in ((TRUTH, truth, heldout.truth), (OURS, ours, heldout.predictions)):
            boxes = dataset.face_boxes[heldout.ids]
            shown = Footage(heldout.ids, images, boxes, sound, dataset.num_frames, dataset.fps)
            found, curves[row] = sync_scores(shown, networks)
            scores |= found
    if models_folder and sound is not None:
        moved = _silent_lips(dataset, report, sound)
        truth["silence_motion"], ours["silence_motion"] = moved[TRUTH], moved[OURS]
    rows = {
        row: {k: v for k, v in scores.items() if k not in unavailable} for row, scores in ((TRUTH, truth), (OURS, ours))
    }
    return {
        "rows": rows, "unavailable": unavailable, "unreliable": unreliable(count), "curves": curves, "frames": count
    }  # fmt: skip


def unheard(sound: np.ndarray | None, ids: np.ndarray) -> dict[str, str]:
    """Score -> why a clip with this sound (None: none can be read) cannot have it on frames `ids` [n]."""
    if sound is None:
        return dict.fromkeys((*SYNC_SCORES, "silence_motion"), "the clip's sound cannot be read")
    alone = "nowhere are five of the frames in a row"
    return {} if len(lipsync.firsts(ids)) else dict.fromkeys(SYNC_SCORES, alone)


def unreliable(count: int) -> dict[str, str]:
    """Scores that so few frames do not carry."""
    names = ("fid", *SYNC_SCORES)
    return dict.fromkeys(names, f"{count} frames, fewer than {ENOUGH}") if count < ENOUGH else {}


def _silent_lips(dataset: Dataset, report: Mapping, sound: np.ndarray) -> dict[str, float]:
    """Row -> the lips' motion in silence."""
    silent, frames = silent_frames(sound, dataset.num_frames, dataset.fps), report["frames"]
    ids = np.array([frame["id"] for frame in frames])
    openings = {
        row: np.array([frame.get(name, np.nan) for frame in frames], np.float64)
        for row, name in ((OURS, "lip_opening"), (TRUTH, "lip_opening_truth"))
    }
    return {row: silence_motion(opening, ids, silent) for row, opening in openings.items()}


def driven(
    images: np.ndarray, boxes: np.ndarray | None, sound: np.ndarray, fps: float, networks: Networks,
    models_folder: str | Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Table II's scores of a head that says another sound: there is no truth, so only sync and motion count.

    images u8 [n, H, W, 3]; boxes f32 [n, 4] of the faces, or None: found in the images (needs the landmark model).
    """
    count, unavailable = len(images), missing(networks, models_folder)
    ids, scores = np.arange(count), {}
    if models_folder:
        points = heldout_frames.find_faces(images, models_folder).landmarks[..., :2]
        silent = silent_frames(sound, count, fps)
        scores["silence_motion"] = silence_motion(metrics.lip_opening(points), ids, silent)
        scores["jitter"] = metrics.jitter(points, ids)
        if boxes is None:
            boxes = face_boxes(face.fill_gaps(points)[:, face.POINTS_68])
    found, curves = sync_scores(Footage(ids, images, boxes, sound, count, fps), networks)
    names = (*SYNC_SCORES, "jitter", "silence_motion")
    return {
        "rows": {OURS: scores | found},
        "unavailable": {name: reason for name, reason in unavailable.items() if name in names},
        "unreliable": unreliable(count),
        "curves": {OURS: curves},
        "frames": count,
    }
