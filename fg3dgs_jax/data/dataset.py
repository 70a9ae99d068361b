"""Dataset folders: the native format (version 1), one `Dataset` over every layout, and frames fetched ahead.

    meta.json            the fields of `Meta`, format and version
    images/000000.jpg    RGB ground truth            labels/000000.png   u8, bits of types.Label
    torso/000000.png     RGBA, the head removed      background.png      RGB
    tracks.npz           the arrays of `Tracks`, and label_pixels i32 [T, 6]
    audio.wav            16 kHz mono                 audio_features.npz  one window per frame, self-describing

A folder is a dataset when meta.json is there: it is written last.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import legacy
from fg3dgs_jax.errors import UserError

FORMAT, VERSION = "fg3dgs_jax.dataset", 1
CACHE_BYTES = 1 << 30


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


class Dataset:
    """A clip and its frames. Pictures are decoded when asked for; the first `cache_bytes` of them stay in memory."""

    def __init__(self, clip: clips.Clip, cache_bytes: int = CACHE_BYTES):
        self.clip = clip
        self._cache: dict[int, clips.Pictures] = {}
        self._room = cache_bytes // (7 * clip.width * clip.height)  # 3 bytes image, 3 backdrop, 1 labels a pixel
        self._label_pixels = clip.label_pixels

    def __getattr__(self, name: str):
        """The clip's own fields: width, height, fps, intrinsics, viewmats, train_ids, extent, ... (see Clip)."""
        if name == "clip":  # not yet set: while unpickling or copying
            raise AttributeError(name)
        return getattr(self.clip, name)

    def pictures(self, index: int) -> clips.Pictures:
        """Image, backdrop and labels of frame `index`, read-only arrays."""
        found = self._cache.get(index)
        if found is None:
            if not 0 <= index < self.clip.num_frames:
                raise IndexError(f"frame {index} of {self.clip.num_frames}")
            found = self.clip.read(index)
            for picture in found:
                picture.setflags(write=False)
            if len(self._cache) < self._room:
                self._cache[index] = found
        return found

    def camera(self, index: int) -> types.Camera:
        """The camera of frame `index`."""
        return types.Camera(self.clip.viewmats[index], self.clip.intrinsics, self.clip.width, self.clip.height)

    def frame(self, index: int) -> types.Frame:
        """Frame `index` as numpy: pictures u8, condition windows zero-padded at the clip's ends."""
        index = int(index)
        clip = self.clip
        image, backdrop, labels = self.pictures(index)
        return types.Frame(
            index=np.int32(index), image=image, backdrop=backdrop, labels=labels, viewmat=clip.viewmats[index],
            intrinsics=clip.intrinsics, condition=clips.condition(clip.audio_features, clip.expression, index),
            lips_box=clip.lips_box[index], eye_boxes=clip.eye_boxes[index],
        )  # fmt: skip

    def label_pixels(self, label: types.Label) -> np.ndarray:
        """How many pixels of each frame carry a label bit, i32 [T]; 0 for positions without a frame."""
        if self._label_pixels is None:
            counts = np.zeros((self.clip.num_frames, len(types.Label)), np.int32)
            for index in np.concatenate([self.clip.train_ids, self.clip.test_ids]).tolist():
                counts[index] = clips.count_labels(self.pictures(index).labels)
            self._label_pixels = counts
        return self._label_pixels[:, list(types.Label).index(label)]

    def describe(self) -> str:
        """One line for logs."""
        clip = self.clip
        window = "x".join(map(str, clip.audio_features.shape[1:]))
        return (
            f"{clip.path}: {clip.num_frames} frames {clip.width}x{clip.height} at {clip.fps:g} FPS, "
            f"{len(clip.train_ids)} train, {len(clip.test_ids)} test, audio {clip.audio_name} {window}, "
            f"expression {', '.join(clip.expression_names)}, head radius {clip.extent:.3f}"
        )


def open_dataset(path: str | Path, audio_features: str | None = None, cache_bytes: int = CACHE_BYTES) -> Dataset:
    """A native folder or one in the field's layout (`legacy`). Checks lengths and the presence of every frame's files.

    `audio_features` chooses another front end than the folder's default: a name, or an .npz/.npy file of [T, A, D].
    Raises UserError in one sentence.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such dataset folder; make one with `python -m fg3dgs_jax.preprocess clip.mp4 --out DIR`"
        )
    if (path / "meta.json").exists():
        return Dataset(_read_native(path, audio_features), cache_bytes)
    if legacy.recognise(path):
        return Dataset(legacy.read(path, audio_features), cache_bytes)
    raise UserError(
        f"{path}: is not a dataset (neither meta.json nor transforms_train.json); "
        "make one with `python -m fg3dgs_jax.preprocess clip.mp4 --out DIR`"
    )


def prefetch(dataset: Dataset, ids: Iterable[int], depth: int = 4) -> Iterator[types.Frame]:
    """The frames of `ids` in order, decoded ahead by one thread; never more than `depth` frames wait."""
    return ahead(dataset.frame, ids, workers=1, depth=depth)


def ahead(function: Callable, items: Iterable, workers: int, depth: int) -> Iterator:
    """function(item) for each item, in order, computed up to `depth` items ahead in threads."""
    pool = concurrent.futures.ThreadPoolExecutor(workers, "ahead")
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= max(depth, 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_native(path: Path, audio_features: str | None) -> clips.Clip:
    meta, text = _read_meta(path / "meta.json")
    tracks, label_pixels = _read_tracks(path / "tracks.npz", meta)
    _require_files(path, meta.num_frames)
    background = clips.read_picture(path / "background.png", 3)
    name, features = _read_features(path, audio_features, meta)
    metrics = {"lips": tracks.mouth_open, "mouth": tracks.mouth_open, "blink": _blink(tracks, meta.expression_names)}
    fingerprint = hashlib.sha256(text + (path / "tracks.npz").read_bytes())
    fingerprint.update(str((path / "audio.wav").stat().st_size).encode())

    def read(index: int) -> clips.Pictures:
        image = clips.read_picture(path / "images" / f"{index:06d}.jpg", 3)
        torso = clips.read_picture(path / "torso" / f"{index:06d}.png", 4)
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
        metrics=metrics, label_pixels=label_pixels, read=read, fingerprint=fingerprint.hexdigest(),
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
        with np.load(file, allow_pickle=False) as arrays:
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
    file = path / "audio_features.npz" if choice is None else Path(choice)
    if choice is not None and not choice.endswith((".npy", ".npz")):
        file = path / f"audio_features_{choice}.npz"
        if not file.exists():
            return choice, _fit(
                audio_io.features(choice, audio_io.load_audio(path / "audio.wav"), meta.fps), file, meta
            )
    features = _fit(legacy.read_array(file), file, meta)
    return (audio_io.load_features(file).name if file.suffix == ".npz" else file.stem), features


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
        _write_picture(partial / "background.png", background, [cv2.IMWRITE_PNG_COMPRESSION, 3])
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
    for name in ("images", "labels", "torso"):
        (folder / name).mkdir()
    for index, layers in enumerate(frames):
        shapes = [layer.shape for layer in layers]
        if shapes != [(meta.height, meta.width, 3), (meta.height, meta.width), (meta.height, meta.width, 4)]:
            raise ValueError(f"frame {index} has layers of shapes {shapes}")
        _write_picture(folder / "images" / f"{index:06d}.jpg", layers.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        _write_picture(folder / "labels" / f"{index:06d}.png", layers.labels, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        _write_picture(folder / "torso" / f"{index:06d}.png", layers.torso, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        counts.append(clips.count_labels(layers.labels))
    if len(counts) != meta.num_frames:
        raise ValueError(f"{len(counts)} frames given, {meta.num_frames} announced")
    return np.array(counts, np.int32).reshape(-1, len(types.Label))


def _write_picture(file: Path, picture: np.ndarray, options: list[int]) -> None:
    flag = {2: None, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[picture.shape[2] if picture.ndim == 3 else 2]
    stored = picture if flag is None else cv2.cvtColor(np.ascontiguousarray(picture), flag)
    file.write_bytes(cv2.imencode(file.suffix, stored, options)[1].tobytes())  # write_bytes reports a full disk


def _move_in(partial: Path, path: Path) -> None:
    (path / "meta.json").unlink(missing_ok=True)
    names = [entry.name for entry in partial.iterdir() if entry.name != "meta.json"]
    for name in [*names, "meta.json"]:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        os.replace(partial / name, path / name)
