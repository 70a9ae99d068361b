"""The native dataset folder, version 1: reading and writing.

    meta.json            the fields of `Meta`, format and version
    images/000000.jpg    RGB ground truth            labels/000000.png   u8, bits of types.Label
    torso/000000.png     RGBA, the head removed      background.png      RGB
    tracks.npz           the arrays of `Tracks`, and label_pixels i32 [T, 6]
    audio.wav            16 kHz mono                 audio_features.npz  one window per frame, self-describing

A folder is a dataset when meta.json is there: it is written last.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import legacy, speech_models
from fg3dgs_jax.errors import UserError

FORMAT, VERSION = "fg3dgs_jax.dataset", 1


class Layers(NamedTuple):
    """One frame as it is written."""

    image: np.ndarray  # u8 [H, W, 3] RGB
    labels: np.ndarray  # u8 [H, W], bits of types.Label
    torso: np.ndarray  # u8 [H, W, 4] RGBA, straight alpha


@dataclasses.dataclass(frozen=True)
class Tracks:
    """Everything of a clip that has one row per frame and is small."""

    viewmats: np.ndarray  # f32 [T, 4, 4], world to camera, OpenCV axes
    expression: np.ndarray  # f32 [T, E], normalised per person
    lips_box: np.ndarray  # i32 [T, 4], (row0, row1, col0, col1)
    eye_boxes: np.ndarray  # i32 [T, 2, 4]
    landmarks: np.ndarray  # f32 [T, L, 2], pixels
    mouth_open: np.ndarray  # f32 [T], inner lip opening / face height


@dataclasses.dataclass(frozen=True)
class Meta:
    """What meta.json says."""

    width: int
    height: int
    fps: float
    num_frames: int
    intrinsics: tuple[float, float, float, float]  # fx, fy, cx, cy in pixels
    expression_names: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    extent: float  # radius of the head, world units
    source: dict  # where the clip came from; free


def read(path: Path, audio_features: str | None = None) -> clips.Clip:
    """The folder as a Clip. `audio_features`: a front end's name or a file, see `dataset.open_dataset`."""
    meta, text = _read_meta(path / "meta.json")
    tracks, label_pixels = _read_tracks(path / "tracks.npz", meta)
    _require_files(path, meta.num_frames)
    background = clips.read_picture(path / "background.png", 3)
    name, features = _read_features(path, audio_features, meta)
    metrics = {"lips": tracks.mouth_open, "mouth": tracks.mouth_open, "blink": _blink(tracks, meta.expression_names)}
    fingerprint = hashlib.sha256(text + (path / "tracks.npz").read_bytes())
    fingerprint.update(str((path / "audio.wav").stat().st_size).encode())

    def read_torso(index: int) -> np.ndarray:
        return clips.read_picture(path / "torso" / f"{index:06d}.png", 4)

    def read_frame(index: int) -> clips.Pictures:
        image = clips.read_picture(path / "images" / f"{index:06d}.jpg", 3)
        torso = read_torso(index)
        labels = clips.read_picture(path / "labels" / f"{index:06d}.png", 1)
        for picture in (image, torso, labels, background):
            if picture.shape[:2] != (meta.height, meta.width):
                raise UserError(f"{path}: frame {index} is not {meta.width}x{meta.height}; make the dataset again")
        return clips.Pictures(image, clips.over(torso, background), labels)

    return clips.Clip(
        path=path, width=meta.width, height=meta.height, fps=meta.fps,
        intrinsics=np.array(meta.intrinsics, np.float32), expression_names=meta.expression_names,
        audio_features=features, audio_name=name, audio_path=path / "audio.wav",
        frame_ids=np.arange(meta.num_frames, dtype=np.int32),
        train_ids=np.array(meta.train, np.int32), test_ids=np.array(meta.test, np.int32), extent=meta.extent,
        metrics=metrics, label_pixels=label_pixels, read=read_frame, torso=read_torso,
        background=background, crop=clips.crop_of(meta.source), fingerprint=fingerprint.hexdigest(),
        **{field.name: getattr(tracks, field.name) for field in dataclasses.fields(Tracks)},
    )  # fmt: skip


def _read_meta(file: Path) -> tuple[Meta, bytes]:
    try:
        text = file.read_bytes()
        content = json.loads(text)
        found = content.pop("format", None), content.pop("version", None)
        if found != (FORMAT, VERSION):
            raise UserError(
                f"{file}: is format {found[0]} version {found[1]}, not {FORMAT} {VERSION}; preprocess the clip again"
            )
        meta = Meta(**content)
        for name in ("train", "test", "expression_names", "intrinsics"):
            object.__setattr__(meta, name, tuple(content[name]))
        ids = {*meta.train, *meta.test}
        if not meta.train or min(ids) < 0 or max(ids) >= meta.num_frames or len(meta.intrinsics) != 4:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file}: is not a complete {FORMAT} description; preprocess the clip again") from None
    return meta, text


def _read_tracks(file: Path, meta: Meta) -> tuple[Tracks, np.ndarray]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            tracks = Tracks(*(arrays[field.name] for field in dataclasses.fields(Tracks)))
            label_pixels = arrays["label_pixels"]
    except Exception:  # zip, zlib and numpy each have their own errors for a damaged file
        raise UserError(f"{file}: is missing, damaged or incomplete; preprocess the clip again") from None
    lengths = {name: len(getattr(tracks, name)) for name in tracks.__dataclass_fields__}
    for name, length in {**lengths, "label_pixels": len(label_pixels)}.items():
        if length != meta.num_frames:
            raise UserError(f"{file}: {name} has {length} rows for {meta.num_frames} frames; preprocess the clip again")
    if tracks.expression.shape[1] != len(meta.expression_names):
        raise UserError(f"{file}: expression does not fit the names in meta.json; preprocess the clip again")
    return tracks, label_pixels


def _require_files(path: Path, num_frames: int) -> None:
    for folder, suffix in (("images", "jpg"), ("labels", "png"), ("torso", "png")):
        there = set(os.listdir(path / folder)) if (path / folder).is_dir() else set()
        missing = next((i for i in range(num_frames) if f"{i:06d}.{suffix}" not in there), None)
        if missing is not None:
            raise UserError(f"{path / folder}: frame {missing:06d}.{suffix} is missing; preprocess the clip again")
    for name in ("audio.wav", "background.png"):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: is missing; preprocess the clip again")


def _read_features(path: Path, choice: str | None, meta: Meta) -> tuple[str, np.ndarray]:
    """Name and windows f32 [T, A, D]: the folder's own, a file's, or those of a front end run on audio.wav."""
    own = path / "audio_features.npz"
    if choice is None:
        file = own
    elif choice.endswith((".npy", ".npz")):
        file = Path(choice)
    elif audio_io.load_features(own).name == choice:
        file = own
    else:
        made = speech_models.for_clip(path, choice, path / "audio.wav", meta.fps, meta.num_frames)
        return made.name, _fit(made.values, path, meta)
    if file.suffix == ".npy":
        return file.stem, _fit(legacy.read_array(file), file, meta)
    features = audio_io.load_features(file)
    return features.name, _fit(features.values, file, meta)


def _fit(features: np.ndarray, file: Path, meta: Meta) -> np.ndarray:
    """Features are counted from the sound and frames from the video: allow a short tail, repeat the last window."""
    if features.ndim != 3 or len(features) + legacy.LATE_FRAMES <= meta.num_frames:
        raise UserError(f"{file}: {features.shape} does not fit {meta.num_frames} frames; extract the features again")
    return features[np.minimum(np.arange(meta.num_frames), len(features) - 1)]


def _blink(tracks: Tracks, names: tuple[str, ...]) -> np.ndarray:
    for name in ("eyeBlink", "AU45"):
        if name in names:
            return tracks.expression[:, names.index(name)]
    return np.zeros(len(tracks.viewmats), np.float32)


def write_dataset(
    path: str | Path, meta: Meta, tracks: Tracks, frames: Iterable[Layers], background: np.ndarray,
    audio: np.ndarray, features: audio_io.AudioFeatures,
) -> None:  # fmt: skip
    """Writes a native folder; `background` u8 [H, W, 3], `audio` f32 [n] at 16 kHz in [-1, 1], `frames` may be lazy.

    Everything goes to a hidden folder inside `path` first and is moved when complete; other files in `path` stay.
    Raises UserError if the disk is full or the counts disagree.
    """
    path = Path(path)
    partial = path / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        label_pixels = _write_frames(partial, frames, meta)
        np.savez(partial / "tracks.npz", label_pixels=label_pixels, **vars(tracks))
        _read_tracks(partial / "tracks.npz", meta)
        (partial / "background.png").write_bytes(_encode(".png", background, [cv2.IMWRITE_PNG_COMPRESSION, 3]))
        audio_io.save_wav(partial / "audio.wav", audio)
        audio_io.save_features(partial / "audio_features.npz", features)
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(meta)}
        (partial / "meta.json").write_text(json.dumps(content, indent=1))
        _move_in(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the dataset ({error.strerror}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_frames(folder: Path, frames: Iterable[Layers], meta: Meta) -> np.ndarray:
    counts = []
    torso, torso_bytes = None, b""
    for name in ("images", "labels", "torso"):
        (folder / name).mkdir()
    for index, layers in enumerate(frames):
        shapes = [layer.shape for layer in layers]
        if shapes != [(meta.height, meta.width, 3), (meta.height, meta.width), (meta.height, meta.width, 4)]:
            raise ValueError(f"frame {index} has layers of shapes {shapes}")
        if layers.torso is not torso:  # a clip may use one torso throughout
            torso, torso_bytes = layers.torso, _encode(".png", layers.torso, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        image = _encode(".jpg", layers.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        labels = _encode(".png", layers.labels, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        (folder / "images" / f"{index:06d}.jpg").write_bytes(image)
        (folder / "labels" / f"{index:06d}.png").write_bytes(labels)
        (folder / "torso" / f"{index:06d}.png").write_bytes(torso_bytes)
        counts.append(clips.count_labels(layers.labels))
    if len(counts) != meta.num_frames:
        raise ValueError(f"{len(counts)} frames given, {meta.num_frames} announced")
    return np.array(counts, np.int32).reshape(-1, len(types.Label))


def _encode(suffix: str, picture: np.ndarray, options: list[int]) -> bytes:
    flag = {2: None, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[picture.shape[2] if picture.ndim == 3 else 2]
    stored = picture if flag is None else cv2.cvtColor(np.ascontiguousarray(picture), flag)
    return cv2.imencode(suffix, stored, options)[1].tobytes()


def _move_in(partial: Path, path: Path) -> None:
    (path / "meta.json").unlink(missing_ok=True)
    names = [entry.name for entry in partial.iterdir() if entry.name != "meta.json"]
    for name in [*names, "meta.json"]:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        os.replace(partial / name, path / name)
