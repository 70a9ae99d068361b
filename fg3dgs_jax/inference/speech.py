"""A head's speech as a file: a video with sound, with or without transparency, pictures, or the clip's own video."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import credentials, hearing, video, writing
from fg3dgs_jax.data.credentials import Credentials
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import paste, performance
from fg3dgs_jax.inference.control import Control
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.inference.heldout import Track, untracked


@dataclass(frozen=True)
class Output:
    """The file that is wanted."""

    path: Path  # .mp4, .mov or .webm; without an ending: a folder of PNG pictures
    fps: float | None = None  # default: the clip's
    size: int | None = None  # edge of the frames in pixels; default: the clip's
    crf: int | None = None  # default: the format's usual value
    background: str | None = None  # a picture's path or a colour #rrggbb in place of the clip's background
    paste_back: Path | None = None  # the video that the clip was cropped from
    signing: Credentials | None = None  # who signs its content credentials

    @property
    def pictures(self) -> bool:
        """Whether a folder of pictures is wanted."""
        return not self.path.suffix

    @property
    def alpha(self) -> bool:
        """Whether frames keep transparency: wherever the file can, unless something opaque is asked for."""
        can = self.pictures or writing.format_of(self.path).alpha is not None
        return can and self.background is None and self.paste_back is None


class Written(NamedTuple):
    """What became of a speech."""

    frames: int
    seconds: float  # length of the video
    spent: float  # seconds that it took


def check(output: Output) -> None:
    """Refuses outputs that cannot be, before any work is done. Raises UserError."""
    path, kind = output.path, None if output.pictures else writing.format_of(output.path)
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or (path.is_dir() and not output.pictures):
        raise UserError(f"--out {path}: cannot be written there; give a file in a folder that you may write to")
    if output.pictures and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out {path}: is there already; give the name of a new folder, or one ending in .mp4")
    if output.fps is not None and not 1 <= output.fps <= 120:
        raise UserError(f"--fps {output.fps:g}: is not between 1 and 120; the clip's own rate is usual")
    if output.size is not None and (not 16 <= output.size <= 4096 or output.size % 2):
        raise UserError(f"--size {output.size}: is not an even number from 16 to 4096")
    if output.crf is not None and (kind is None or kind.crf is None):
        raise UserError(f"--crf: {path} keeps full quality and has no such number; leave it out")
    if output.crf is not None and not 0 <= output.crf <= kind.crf[1]:
        raise UserError(f"--crf {output.crf}: is not between 0 (best) and {kind.crf[1]}; {kind.crf[0]} is usual")
    if output.signing and path.suffix.lower() not in credentials.KINDS:
        raise UserError(f"--certificate: {path} cannot hold content credentials; write an .mp4 or a .mov")
    if output.paste_back and (output.size or output.background):
        raise UserError("--paste-back keeps the video's own size and background; leave out --size and --background")
    if output.paste_back:
        video.probe(output.paste_back)
        if path.exists() and path.samefile(output.paste_back):
            raise UserError(f"--out {path}: is the video of --paste-back; give another name")
    if output.background:
        read_background(output.background, 16, 16)


def read_background(text: str, width: int, height: int) -> np.ndarray:
    """A colour `#rrggbb` or a picture's middle part that covers width x height, u8 [height, width, 3]."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return np.tile(np.frombuffer(bytes.fromhex(text[1:]), np.uint8), (height, width, 1))
    if not Path(text).is_file():
        raise UserError(f"--background {text}: is neither a picture nor a colour; give a file or #rrggbb")
    picture = clips.read_picture(Path(text), 3)
    scale = max(width / picture.shape[1], height / picture.shape[0])
    size = max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """u8 [S, S, 3 or 4] at another size; colours next to transparency stay clean."""
    if size == image.shape[0]:
        return image
    how = cv2.INTER_AREA if size < image.shape[0] else cv2.INTER_LANCZOS4
    if image.shape[2] == 3:
        return cv2.resize(image, (size, size), interpolation=how)
    alpha = image[..., 3:].astype(np.float32) / 255.0
    layers = np.concatenate([image[..., :3] * alpha, alpha], axis=-1)
    layers = cv2.resize(layers, (size, size), interpolation=how)
    alpha = np.clip(layers[..., 3:], 0.0, 1.0)
    colour = layers[..., :3] / np.maximum(alpha, 0.5 / 255.0)
    return np.round(np.clip(np.concatenate([colour, 255.0 * alpha], axis=-1), 0, 255)).astype(np.uint8)


def hear(
    head: Head, sound: np.ndarray, features: Path | None = None, gate: float | None = hearing.GATE
) -> performance.Ear:
    """What the head hears of a sound f32 [n] at 16 kHz: by its own front end, or the features of a file.

    Raises UserError: the front end is not here, or the features do not fit.
    """
    if not features:
        return head.hear(sound, gate)
    fps = head.dataset.fps
    length = audio_io.num_frames(sound, fps)
    return performance.Given(head.read_windows(features, length), fps, hearing.gates(sound, length, fps, gate))


def write(
    output: Output,
    head: Head,
    ear: performance.Ear | np.ndarray,
    sound: tuple[np.ndarray, int],
    control: Control | None = None,
    *,
    track: Track = untracked,
) -> Written:
    """Lets the head speak into a file, which appears under its name only when complete.

    Args:
      ear: what `Head.hear` returned, or audio windows f32 [L + 8, A, D] (`Head.read_windows`, `Head.own_windows`).
      sound: the samples f32 [n] that are heard, and their rate in Hz; cut or filled with silence to the video's length.
    """
    check(output)
    dataset, begin = head.dataset, time.perf_counter()
    fps = output.fps or dataset.fps
    background = read_background(output.background, dataset.width, dataset.height) if output.background else None
    shown = head.perform(ear, control, fps=fps, background=background, alpha=output.alpha)

    def tracked() -> Iterator[performance.Shown]:
        count = max(1, int(np.ceil(len(sound[0]) / sound[1] * fps - 1e-6)))
        for _ in track(range(count), "speaking"):
            frame = next(shown, None)
            if frame is None:
                return
            yield frame
        yield from shown

    with contextlib.ExitStack() as stack:
        if output.paste_back:
            frames = pasted(tracked(), dataset, output.paste_back, fps, stack)
        else:
            frames = (resized(frame.picture, output.size or dataset.height) for frame in tracked())
        if output.pictures:
            count = writing.write_pictures(output.path, frames, fps, sound)
        else:
            finish = credentials.signer(output.signing) if output.signing else None
            count = writing.write_video(output.path, frames, fps, sound, crf=output.crf, finish=finish)
    return Written(count, count / fps, time.perf_counter() - begin)


def pasted(
    frames: Iterator[performance.Shown], dataset: Dataset, path: Path, fps: float, stack: contextlib.ExitStack
) -> Iterator[np.ndarray]:
    """Frames of the video at `path` u8 [H, W, 3] with the rendered head in the place of its own. Raises UserError."""
    crop = paste.find_crop(dataset, path)
    original = stack.enter_context(paste.Original(path, fps))
    for frame in frames:
        source = int(clips.nearest(dataset.frame_ids, np.array([frame.position]))[0])
        changed = np.abs(frame.picture.astype(np.int16) - frame.backdrop).max(-1)
        mask = paste.head_mask(dataset.pictures(source).labels, changed)
        yield paste.paste(frame.picture, mask, original.at(round(frame.position * fps / dataset.fps)), crop)
