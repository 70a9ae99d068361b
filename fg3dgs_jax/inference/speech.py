"""A head's speech as a video file."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fg3dgs_jax.data.video import write_video
from fg3dgs_jax.inference.head import MARGIN, Head
from fg3dgs_jax.inference.heldout import Track, untracked


class Written(NamedTuple):
    """What became of a speech."""

    frames: int
    seconds: float  # length of the video
    seconds_per_frame: (
        float  # median render time, condition in, host pixels out; the first frame, which compiles, apart
    )


def write(
    path: str | Path,
    head: Head,
    windows: np.ndarray,
    sound: tuple[np.ndarray, int],
    *,
    start: int = 0,
    track: Track = untracked,
) -> Written:
    """Lets the head speak into an mp4, which appears under its name only when complete.

    Args:
      windows: audio windows f32 [L + 8, A, D] (`Head.listen`, `Head.own_windows`); the video has L frames.
      sound: the samples f32 [n] that are heard, and their rate in Hz; cut or filled with silence to the video's length.
      start: frame of the clip whose pose, expression and backdrop come first.
    """
    length, spent = len(windows) - 2 * MARGIN, []

    def frames() -> Iterator[np.ndarray]:
        speech = head.speak(windows, start)
        for _ in track(range(length), "speaking"):
            begin = time.perf_counter()
            frame = next(speech)
            spent.append(time.perf_counter() - begin)
            yield frame

    count = write_video(path, frames(), head.dataset.fps, sound)
    return Written(count, count / head.dataset.fps, float(np.median(spent[1:] or spent)))
