"""One `Dataset` over every folder layout (`native`, `legacy`), frames fetched ahead, and how to write one."""

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import legacy, mel, native
from fg3dgs_jax.data.face_box import face_boxes
from fg3dgs_jax.data.native import Layers, Meta, Tracks, write_dataset
from fg3dgs_jax.errors import UserError

__all__ = ["Dataset", "Layers", "Meta", "Tracks", "ahead", "open_dataset", "prefetch", "write_dataset"]

CACHE_BYTES = 1 << 30


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
        index, clip = int(index), self.clip
        place = np.array(index, np.int32)
        image, backdrop, labels = self.pictures(index)
        return types.Frame(
            index=place, image=image, backdrop=backdrop, labels=labels, viewmat=clip.viewmats[index],
            intrinsics=clip.intrinsics, condition=clips.condition(clip.audio_features, clip.expression, index),
            lips_box=clip.lips_box[index], eye_boxes=clip.eye_boxes[index],
            lips=clip.landmarks[index, clips.MOUTH_POINTS].astype(np.float32),
        )  # fmt: skip

    @functools.cached_property
    def face_boxes(self) -> np.ndarray:
        """f32 [T, 4], see `face_box.face_boxes`."""
        return face_boxes(self.clip.landmarks)

    @functools.cached_property
    def mel_windows(self) -> np.ndarray:
        """What a lip-sync expert hears from each frame on, f32 [T, 80, 16], see `data.mel`."""
        return mel.mel_windows(audio_io.load_audio(self.clip.audio_path), self.clip.num_frames, self.clip.fps)

    def snippet(self, index: int, length: int) -> types.Snippet:
        """The frames [index, index + length) as numpy, with their faces and their sound."""
        frames = [self.frame(i) for i in range(index, index + length)]
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *frames)
        return types.Snippet(together, self.face_boxes[index : index + length], self.mel_windows[index])

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
        return Dataset(native.read(path, audio_features), cache_bytes)
    if legacy.recognise(path):
        return Dataset(legacy.read(path, audio_features), cache_bytes)
    raise UserError(
        f"{path}: is not a dataset (neither meta.json nor transforms_train.json); "
        "make one with `python -m fg3dgs_jax.preprocess clip.mp4 --out DIR`"
    )


def prefetch(
    dataset: Dataset, ids: Iterable[int], depth: int = 4, length: int = 1
) -> Iterator[types.Frame | types.Snippet]:
    """The frames of `ids` in order, or with `length` > 1 the snippets that begin there, decoded ahead by one thread.

    Never more than `depth` of them wait.
    """
    if length == 1:
        return ahead(dataset.frame, ids, workers=1, depth=depth)
    return ahead(functools.partial(dataset.snippet, length=length), ids, workers=1, depth=depth)


def snippet_starts(ids: np.ndarray, length: int) -> np.ndarray:
    """The frames of `ids` (ascending) from which `length` consecutive ones belong to `ids`."""
    known = set(np.asarray(ids).tolist())
    return np.array([i for i in ids.tolist() if all(i + k in known for k in range(length))], np.int64)


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
