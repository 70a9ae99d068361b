"""Video files in, through PyAV: decoding happens in a child process under limits (`decoder.py`). Out: `writing.py`."""

import dataclasses
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fg3dgs_jax.data.writing import SYNTHETIC_MARK, write_video
from fg3dgs_jax.errors import UserError

__all__ = ["SYNTHETIC_MARK", "VideoInfo", "decode_in_child", "probe", "read_frames", "write_video"]

STALL_SECONDS = 120  # a decoder that sends nothing for so long is stopped


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says; 0 where it does not."""

    width: int  # pixels, after rotation
    height: int
    fps: float  # mean frame rate
    duration: float  # seconds
    num_frames: int
    codec: str
    has_audio: bool


def decode_in_child(path: str | Path, request: dict) -> Iterator[tuple[dict, bytearray]]:
    """Messages of `decoder.py` for one request, each with its raw bytes. Raises UserError in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "fg3dgs_jax.data.decoder", json.dumps({**request, "path": str(path.resolve())})]
    child = subprocess.Popen(
        command,
        bufsize=0,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield from _messages(child, path)
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def _messages(child: subprocess.Popen, path: Path) -> Iterator[tuple[dict, bytearray]]:
    while True:
        head = _read(child, 4)
        message = json.loads(_read(child, int.from_bytes(head, "big")) or b"{}")
        if "end" in message:
            return
        if "error" in message:
            raise UserError(f"{path} {message['error']}")
        size = int(np.prod(message["frame"])) if "frame" in message else 4 * message.get("samples", 0)
        data = _read(child, size)
        if not message or len(data) != size:
            raise UserError(f"{path} stopped the decoder (damaged, or above its limits); convert it to mp4 again")
        yield message, data


def _read(child: subprocess.Popen, size: int) -> bytearray:
    """`size` bytes from the child, fewer if it ended or sent nothing for too long."""
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size and select.select([child.stdout], [], [], STALL_SECONDS)[0]:
        count = child.stdout.readinto(view[got:])
        if not count:
            break
        got += count
    view.release()
    del data[got:]
    return data


def probe(path: str | Path) -> VideoInfo:
    """Reads the header and the first frame. UserError: no such file, not a video, no video stream, above the limits."""
    for message, _ in decode_in_child(path, {"what": "probe"}):
        if "info" in message:
            return VideoInfo(**message["info"])
    raise UserError(f"{path} is not a video; give an mp4 file")


def read_frames(
    path: str | Path,
    fps: float = 25.0,
    *,
    first: int = 0,
    every: int = 1,
    crop: tuple[int, int, int, int] | None = None,
    size: int | None = None,
    max_side: int | None = None,
    warnings: list[str] | None = None,
    times: list[float] | None = None,
) -> Iterator[np.ndarray]:
    """Frames u8 [H, W, 3] RGB at a constant rate: frame k is the source frame nearest in time to k / fps.

    first: leaves out that many frames; every: of all, takes those whose number it divides.
    crop: (x0, y0, x1, y1) in pixels of the rotated source, may leave the image (the border is replicated).
    size: edge of the square output; max_side: instead, shrinks to at most that side.
    warnings: receives sentences on damaged parts that were left out.
    times: receives when each frame was really taken, in seconds from the clip's start.
    Raises UserError if nothing can be decoded.
    """
    request = {"what": "frames", "fps": float(fps), "first": int(first), "every": int(every)}
    if crop is not None:
        request["crop"] = [int(v) for v in crop]
    if size is not None:
        request["size"] = [int(size), int(size)]
    if max_side is not None:
        request["max_side"] = int(max_side)
    for message, data in decode_in_child(path, request):
        if "warning" in message and warnings is not None:
            warnings.append(message["warning"])
        if "frame" in message:
            if times is not None:
                times.append(float(message["time"]))
            yield np.frombuffer(data, np.uint8).reshape(message["frame"])
