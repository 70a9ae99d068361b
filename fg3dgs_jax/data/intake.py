"""The steps from a video to a dataset folder; each writes its results to a folder and reads those before it."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import face, layers, masks, native, portrait, pose, video
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

SEARCH_EVERY, SEARCH_SIDE = 10, 960  # frames; pixels
LEAST_SECONDS, LEAST_COVERAGE, LEAST_MOUTH, MOST_RIVALS = 2.0, 0.9, 20.0, 0.1  # s; share; source pixels; share
HEAD_RADIUS = 0.1  # world units: half the larger side of the head with its hair
HEAD_DEPTH = 0.25  # face heights from the middle of the face's surface back to the middle of the head
Track = Callable[[range, str], Iterable]  # passes its items through and shows progress


@dataclasses.dataclass(frozen=True)
class Source:
    """The clip and what is wanted of it."""

    clip: Path
    landmark_model: Path
    person_model: Path
    parts_model: Path | None  # optional: sees hair
    size: int
    fps: float
    info: video.VideoInfo

    @property
    def frames(self) -> int:
        """About how many frames there will be."""
        return max(1, math.ceil(self.info.duration * self.fps))


def check_header(clip: Path, info: video.VideoInfo) -> None:
    """Refuses what the header already shows to be unfit. Raises UserError."""
    if not info.has_audio:
        raise UserError(f"{clip}: has no audio track; give a video with the sound of the speech")
    if 0 < info.duration < LEAST_SECONDS:
        _too_short(clip, info.duration)


def search(source: Source, folder: Path, track: Track) -> None:
    """Finds the face in some frames and plans the crop: portrait.json."""
    frames = video.read_frames(source.clip, source.fps, every=SEARCH_EVERY, max_side=SEARCH_SIDE)
    count = range(math.ceil(source.frames / SEARCH_EVERY))
    shown = (image for image, _ in zip(frames, _endless(track(count, "looking for the face")), strict=False))
    boxes = face.find_boxes(shown, source.landmark_model)
    try:
        found = portrait.find_portrait(boxes, source.info.width, source.info.height)
    except UserError as error:
        raise UserError(f"{source.clip}: {error}") from None
    if found.rivals > MOST_RIVALS:
        raise UserError(
            f"{source.clip}: shows a second face in {100 * found.rivals:.0f} % of the frames; crop it to one person"
        )
    (folder / "portrait.json").write_text(json.dumps(found._asdict()))


def read_portrait(folder: Path) -> portrait.Portrait:
    """What `search` found."""
    content = json.loads((folder / "portrait.json").read_text())
    return portrait.Portrait(tuple(content.pop("crop")), **content)


def cut(source: Source, crop: tuple[int, int, int, int], folder: Path, track: Track) -> None:
    """Crops all frames: 000000.png ..., times.json with their capture times and the decoder's warnings; audio.wav."""
    times, warnings = [], []
    images = video.read_frames(source.clip, source.fps, crop=crop, size=source.size, times=times, warnings=warnings)
    for index, (image, _) in enumerate(zip(images, _endless(track(range(source.frames), "cropping")), strict=False)):
        data = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        (folder / f"{index:06d}.png").write_bytes(data.tobytes())
    if len(times) < LEAST_SECONDS * source.fps:
        _too_short(source.clip, len(times) / source.fps)
    sound = audio_io.load_audio(source.clip, warnings=warnings)
    sound = sound[: math.ceil(len(times) * audio_io.SAMPLE_RATE / source.fps)]
    np.save(folder / "audio.npy", sound)
    (folder / "times.json").write_text(json.dumps({"times": times, "warnings": warnings}))


def _too_short(clip: Path, seconds: float) -> None:
    raise UserError(f"{clip}: lasts {seconds:.1f} s; give a clip of at least {LEAST_SECONDS:.0f} s")


def _endless(items: Iterable) -> Iterator:
    """The items, then None for ever: headers tell the number of frames only roughly."""
    yield from items
    while True:
        yield None


@dataclasses.dataclass(frozen=True)
class Cut:
    """The results of `cut`."""

    folder: Path
    times: np.ndarray  # [T] seconds
    audio: np.ndarray  # f32 [n] at 16 kHz
    warnings: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Cut":
        content = json.loads((folder / "times.json").read_text())
        sound = np.load(folder / "audio.npy", allow_pickle=False)
        return cls(folder, np.array(content["times"]), sound, tuple(content["warnings"]))

    def image(self, index: int) -> np.ndarray:
        """Frame `index`, u8 [S, S, 3]."""
        return cv2.imread(str(self.folder / f"{index:06d}.png"))[..., ::-1]

    def spread(self, count: int) -> list[int]:
        """Up to `count` frames spread evenly over the clip."""
        return np.unique(np.linspace(0, len(self.times) - 1, count).round().astype(int)).tolist()


def look(source: Source, frames: Cut, scale: float, folder: Path, track: Track) -> None:
    """Landmarks and blendshapes (face.npz), the person's outline (000000.png ...) and maybe hair (hair000000.png ...).

    scale: source pixels per pixel of the crop. Raises UserError if the face is missing too often or is too small.
    """
    with contextlib.ExitStack() as open_models:
        maps = {"": open_models.enter_context(masks.person_segmenter(source.person_model))}
        if source.parts_model is not None:
            maps["hair"] = open_models.enter_context(masks.person_segmenter(source.parts_model, 1))

        def images() -> Iterator[np.ndarray]:
            for index in track(range(len(frames.times)), "landmarks and outline"):
                image = np.ascontiguousarray(frames.image(index))
                for name, segment in maps.items():
                    seen = np.round(255 * np.clip(segment(image), 0, 1)).astype(np.uint8)
                    data = cv2.imencode(".png", seen, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
                    (folder / f"{name}{index:06d}.png").write_bytes(data.tobytes())
                yield image

        found = face.track_face(images(), source.landmark_model)
    seen = np.isfinite(found.landmarks[:, 0, 0])
    if seen.mean() < LEAST_COVERAGE:
        raise UserError(
            f"{source.clip}: a face is found in only {100 * seen.mean():.0f} % of the {len(seen)} frames at "
            f"{source.fps:g} FPS (none in {name_ranges(~seen)}); cut the clip to the parts that show the face"
        )
    width = mouth_pixels(found.landmarks) * scale
    if width < LEAST_MOUTH:
        raise UserError(
            f"{source.clip}: the mouth is only {width:.0f} pixels wide; film closer or with more pixels "
            f"(at least {LEAST_MOUTH:.0f}, better 60)"
        )
    np.savez(folder / "face.npz", landmarks=found.landmarks, blendshapes=found.blendshapes, names=found.names)


def mouth_pixels(landmarks: np.ndarray) -> float:
    """Median width of the lips in pixels of the crop."""
    return float(np.nanmedian(np.linalg.norm(landmarks[:, 61, :2] - landmarks[:, 291, :2], axis=-1)))


def name_ranges(missing: np.ndarray, most: int = 6) -> str:
    """The true entries of bool [T] as ranges: "frames 3, 10-14 and 2 more places"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], missing.astype(int), [0]])))
    ranges = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in edges.reshape(-1, 2)]
    more = f" and {len(ranges) - most} more places" if len(ranges) > most else ""
    return "frames " + ", ".join(ranges[:most]) + more


@dataclasses.dataclass(frozen=True)
class Seen:
    """The results of `look`, gaps filled."""

    folder: Path
    found: np.ndarray  # bool [T], frames with a face
    raw: np.ndarray  # f32 [T, 478, 3], NaN where there is none
    landmarks: np.ndarray  # f32 [T, 478, 3], interpolated
    blendshapes: np.ndarray  # f32 [T, 52], interpolated
    names: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Seen":
        with np.load(folder / "face.npz", allow_pickle=False) as data:
            raw, shapes, names = data["landmarks"], data["blendshapes"], tuple(data["names"].tolist())
        found = np.isfinite(raw[:, 0, 0])
        return cls(folder, found, raw, face.fill_gaps(raw), face.fill_gaps(shapes), names)

    def person(self, index: int) -> np.ndarray:
        """The outline u8 [S, S] of frame `index`: the part that holds the face."""
        mask = cv2.imread(str(self.folder / f"{index:06d}.png"), cv2.IMREAD_GRAYSCALE)
        return masks.main_part(mask, self.landmarks[index])

    def labels(self, image: np.ndarray, index: int, hair_ratio: np.ndarray) -> np.ndarray:
        """Bits of `types.Label` of frame `index`, u8 [S, S]."""
        file = self.folder / f"hair{index:06d}.png"
        hair = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) if file.is_file() else None
        return masks.label_frame(image, self.person(index), self.landmarks[index], hair_ratio, hair)


def learn_layers(frames: Cut, seen: Seen) -> tuple[np.ndarray, np.ndarray, float]:
    """From some frames: hair's colours (`masks.learn_hair`), the background u8 [S, S, 3], the share of it ever seen."""
    few = frames.spread(12)
    hair = masks.learn_hair([frames.image(i) for i in few], [seen.person(i) for i in few], seen.landmarks[few])
    some = frames.spread(layers.BACKGROUND_FRAMES)
    background, share = layers.background_of([frames.image(i) for i in some], [seen.person(i) for i in some])
    return hair, background, share


def frame_layers(frames: Cut, seen: Seen, hair: np.ndarray, index: int) -> native.Layers:
    """Image, labels and torso of frame `index`."""
    image, person = np.ascontiguousarray(frames.image(index)), seen.person(index)
    labels = seen.labels(image, index, hair)
    return native.Layers(image, labels, layers.torso_layer(image, person, labels, seen.landmarks[index]))


def in_order(make: Callable[[int], native.Layers], indices: Iterable[int]) -> Iterator[native.Layers]:
    """make(i) for every index by two threads, in order, a few ahead of the reader."""
    with ThreadPoolExecutor(2) as pool:
        waiting = []
        for index in indices:
            waiting.append(pool.submit(make, index))
            if len(waiting) > 4:
                yield waiting.pop(0).result()
        for job in waiting:
            yield job.result()


def place_head(poses: pose.Poses, frames: Cut, seen: Seen, hair: np.ndarray) -> pose.Poses:
    """The cameras in a world with the head's centre as origin and HEAD_RADIUS as half the head's larger side."""
    radii, centres = [], []
    for index in frames.spread(24):
        labels = seen.labels(frames.image(index), index, hair)
        rows, columns = np.nonzero(labels & Label.HEAD)
        if not len(rows):
            continue
        low, high = np.percentile(np.stack([columns, rows], -1), [0.5, 99.5], axis=0)
        rotation, shift = poses.viewmats[index, :3, :3], poses.viewmats[index, :3, 3]
        unit = shift[2] / poses.intrinsics[0]  # world units per pixel at the face
        offset = ((low + high) / 2 - poses.intrinsics[2:]) * unit - shift[:2]
        centres.append(rotation.T @ np.array([*offset, 0.0]))
        radii.append((high - low).max() / 2 * unit)
    origin = np.median(centres, axis=0)
    origin[2] = -HEAD_DEPTH * pose.FACE_HEIGHT
    return pose.recentre(poses, origin, HEAD_RADIUS / float(np.percentile(radii, 75)))


def tracks(poses: pose.Poses, seen: Seen, size: int) -> native.Tracks:
    """Everything with a row per frame."""
    points = np.ascontiguousarray(seen.landmarks[:, face.POINTS_68, :2])
    lips, eyes = clips.region_boxes(points, size, size)
    expression = face.expression(seen.blendshapes, seen.names)
    return native.Tracks(poses.viewmats, expression, lips, eyes, points, clips.mouth_opening(points))


def angles(viewmats: np.ndarray) -> np.ndarray:
    """Yaw (to the image's right), pitch (up) and roll (clockwise) of the head in degrees, f32 [T, 3]."""
    out = viewmats[:, :3, 2]  # the face's direction in camera axes
    right = viewmats[:, :3, 0]
    yaw = np.arctan2(out[:, 0], -out[:, 2])
    pitch = np.arctan2(-out[:, 1], np.hypot(out[:, 0], out[:, 2]))
    return np.degrees(np.stack([yaw, pitch, np.arctan2(right[:, 1], right[:, 0])], -1)).astype(np.float32)
