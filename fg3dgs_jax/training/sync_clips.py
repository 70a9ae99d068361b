"""Talking clips as a lip-sync expert sees and hears them, from dataset folders or from videos."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import face, mel, models, video
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.data.face_box import face_boxes
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.losses import sync

FPS = 25.0
MARGIN = 4  # pixels around the crops, from which training takes random parts
MAX_SIDE = 960  # pixels: larger videos are shrunk
SILENT = 1e-3  # RMS of a sound in which nobody speaks
SHORTEST = 50  # frames
SEEN = 0.9  # share of the frames in which a face must be found


class SyncClip(NamedTuple):
    """A clip of T frames."""

    name: str
    crops: np.ndarray  # u8 [T, 48 + 2 MARGIN, 96 + 2 MARGIN, 3], RGB lower faces
    mel: np.ndarray  # f32 [T, 80, 16], what is heard from each frame on
    train: np.ndarray | None = None  # bool [T], what its dataset's heads learn from; None: a video
    test: np.ndarray | None = None  # bool [T], what its dataset holds out

    @property
    def starts(self) -> np.ndarray:
        """The frames from which five are there."""
        return np.arange(len(self.crops) - sync.FRAMES + 1)


def starts_within(frames: np.ndarray) -> np.ndarray:
    """The first frames i64 of windows that lie within chosen frames, bool [T]."""
    return np.flatnonzero(sliding_window_view(frames, sync.FRAMES).all(axis=1))


@functools.partial(jax.jit, static_argnames="margin")
def _crop(image: jax.Array, box: jax.Array, margin: int) -> jax.Array:
    faces = sync.lower_faces(image[None].astype("float32"), box[None], margin)[0]
    return jax.numpy.clip(jax.numpy.round(faces), 0, 255).astype("uint8")


def crop_faces(images: Iterable[np.ndarray], boxes: np.ndarray, margin: int = 0) -> np.ndarray:
    """Lower faces u8 [T, 48 + 2 margin, 96 + 2 margin, 3] of images u8 [H, W, 3], one at a time."""
    return np.stack([np.asarray(_crop(image, box, margin)) for image, box in zip(images, boxes, strict=False)])


def open_clip(path: str | Path, models_folder: str | Path | None = None) -> SyncClip:
    """A dataset folder, or a video (which needs face_landmarker.task in `models_folder`).

    Raises UserError: too short, silent, no face, not 25 frames a second (folders only; videos are resampled).
    """
    path = Path(path)
    clip = _from_folder(path) if path.is_dir() else _from_video(path, models_folder)
    if len(clip.crops) < SHORTEST:
        raise UserError(f"{path}: has only {len(clip.crops)} frames; give a clip of at least {SHORTEST / FPS:g} s")
    return clip


def _sound(path: Path, name: Path) -> np.ndarray:
    sound = audio_io.load_audio(path)
    if not len(sound) or float(np.sqrt(np.mean(np.square(sound)))) < SILENT:
        raise UserError(f"{name}: its sound is silent; give a clip in which somebody speaks")
    return sound


def _from_folder(path: Path) -> SyncClip:
    dataset = open_dataset(path)
    if abs(dataset.fps - FPS) > 0.1:
        raise UserError(f"{path}: has {dataset.fps:g} frames a second, not 25; run preprocess with --fps 25")
    ids = dataset.frame_ids
    if len(ids) != dataset.num_frames:  # gaps: the longest stretch without one
        cuts = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
        ids = max(cuts, key=len)
    images = (dataset.pictures(int(i)).image for i in ids)
    crops = crop_faces(images, dataset.face_boxes[ids], MARGIN)
    windows = mel.mel_windows(_sound(dataset.audio_path, path), dataset.num_frames)
    return SyncClip(path.name, crops, windows[ids], *(np.isin(ids, s) for s in (dataset.train_ids, dataset.test_ids)))


def _from_video(path: Path, models_folder: str | Path | None) -> SyncClip:
    sound = _sound(path, path)
    if models_folder is None:
        raise UserError(f"{path}: is a video; give the folder of {models.LANDMARKS.name} with --config.models")
    model = models.find_model(models_folder, models.LANDMARKS)
    track = face.track_face(video.read_frames(path, FPS, max_side=MAX_SIDE), model)
    seen = np.isfinite(track.landmarks[:, 0, 0])
    share = seen.mean() if len(seen) else 0.0
    if share < SEEN:
        raise UserError(f"{path}: a face is in only {100 * share:.0f} % of its frames; cut the others off")
    points = face.fill_gaps(track.landmarks)[:, face.POINTS_68, :2]
    crops = crop_faces(video.read_frames(path, FPS, max_side=MAX_SIDE), face_boxes(points), MARGIN)
    return SyncClip(path.stem, crops, mel.mel_windows(sound, len(crops)))
