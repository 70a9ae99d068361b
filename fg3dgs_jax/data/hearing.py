"""Sound to feature windows piece by piece: the same windows whether the sound is a file or still being spoken.

    for heard in Hearing(chunks, front, fps): heard.window, heard.open

A front end turns sound into 50 vectors a second. It is run on pieces with some vectors of context on each side, so that
its memory is bounded and so is how far it looks ahead. A window goes out as soon as the last sound it needs is there.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fg3dgs_jax.data import audio as audio_io

PER_SECOND = audio_io.SAMPLE_RATE / audio_io.HOP
MARGIN = 4  # frames heard before the first and after the last: conditions reach so far
GATE_CONTEXT = 8  # vectors before and after a frame's time in which any sound keeps the mouth free: 0.16 s
GATE_RAMP = 6.0  # dB from a closed gate to an open one
FAINT = -52.0  # dB below full scale: quieter than any recording of speech, whatever its loud parts
LOUD = 20.0 * math.log10(audio_io.SPEECH_LEVEL)  # dB, where a front end's gain brings loud speech
GATE = 35.0  # dB below loud speech: the usual gate
MEMORY_SECONDS = 10.0  # of live sound that its loudness is judged by


@dataclass(frozen=True)
class Pieces:
    """How sound is cut for a front end, in vectors of 20 ms: `hop` new ones at a time, so many around them."""

    left: int
    hop: int
    right: int


@dataclass(frozen=True)
class FrontEnd:
    """Something that hears. Vector j stands for the samples around (j + 0.5) * 320."""

    name: str
    context: int  # vectors in a frame's window,
    before: int  # so many of them before the frame's time
    encode: Callable[[np.ndarray], np.ndarray]  # f32 [320 m] at 16 kHz -> f32 [m, D]
    scale: Callable[[np.ndarray], float]  # what to multiply a sound f32 [n] by before encoding it
    whole: Pieces  # for sound that is there
    live: Pieces  # for sound that is still coming


LOGMEL = FrontEnd(
    "logmel",
    audio_io.CONTEXT,
    audio_io.CONTEXT // 2,
    audio_io.log_mel,
    audio_io.speech_gain,
    Pieces(1, 1024, 1),
    Pieces(1, 2, 1),
)


class Heard(NamedTuple):
    """What is heard at one frame."""

    window: np.ndarray  # f32 [A, D]
    open: float  # in [0, 1]: 0 in silence


class Hearing:
    """Windows of a sound, one per frame from -4 to L + 3, where L frames cover the sound; silence is around it.

    `samples` is the sound's length; of live sound, as far as it has been heard.
    """

    def __init__(
        self,
        sound: np.ndarray | Iterable[np.ndarray],
        front: FrontEnd,
        fps: float = 25.0,
        gate: float | None = GATE,
    ):
        """`sound`: f32 [n] at 16 kHz, or pieces of it as they come (f32 [k] each, of any lengths).

        gate: silence is what stays so many dB below loud speech; None: nothing is silence.
        """
        self.samples, self._front, self._fps, self._gate = 0, front, fps, gate
        self.live = not isinstance(sound, np.ndarray)
        self._memory: collections.deque[np.ndarray] = collections.deque()
        self._scale = self._gain = 1.0  # for the front end; to bring loud speech to SPEECH_LEVEL
        if not self.live:
            self.samples = len(sound)
            self._scale, self._gain, sound = front.scale(sound), audio_io.speech_gain(sound), [sound]
        # Vectors of silence before the sound.
        self._ahead = math.ceil(MARGIN * PER_SECOND / fps) + self._reach
        self._windows = self._make(self._padded(sound))

    def __iter__(self) -> Iterator[Heard]:
        return self._windows

    @property
    def look_ahead(self) -> float:
        """Seconds of sound that must follow a live frame's own time before it can be rendered, at most."""
        cut = self._front.live
        return (MARGIN - 1) / self._fps + (self._reach + cut.right + cut.hop) / PER_SECOND

    @property
    def _reach(self) -> int:
        """Vectors before and after a frame's time that are looked at."""
        return max(self._front.before, self._front.context - self._front.before, GATE_CONTEXT)

    def frames(self, fps: float) -> int:
        """Frames at `fps` that cover what has been heard so far."""
        return max(1, math.ceil(self.samples * fps / audio_io.SAMPLE_RATE - 1e-6))

    def _padded(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The sound between silences, long enough for every window."""
        yield np.zeros(self._ahead * audio_io.HOP, np.float32)
        for chunk in chunks:
            chunk = np.asarray(chunk, np.float32).reshape(-1)
            if self.live and len(chunk):
                self.samples += len(chunk)
                self._judge(chunk)
            yield chunk
        yield np.zeros((2 * self._ahead + 2) * audio_io.HOP, np.float32)

    def _judge(self, chunk: np.ndarray) -> None:
        """Loudness of live sound from its last seconds: nobody knows how loud it is going to be."""
        self._memory.append(chunk)
        while sum(map(len, self._memory)) - len(self._memory[0]) > MEMORY_SECONDS * audio_io.SAMPLE_RATE:
            self._memory.popleft()
        recent = np.concatenate(self._memory)
        if len(recent) >= audio_io.HOP and loudness(recent).max() >= FAINT:
            self._scale, self._gain = self._front.scale(recent), audio_io.speech_gain(recent)

    def _make(self, chunks: Iterable[np.ndarray]) -> Iterator[Heard]:
        front, fps, reach = self._front, self._fps, self._reach
        rows: collections.deque = collections.deque()
        first, frame = 0, -MARGIN  # the vector that rows[0] holds; the frame that is next
        for block in pieces(chunks, self._encode, front.live if self.live else front.whole):
            rows.extend(block)
            while True:
                centre = self._ahead + round(frame * PER_SECOND / fps)
                if centre + reach > first + len(rows) or frame >= self.frames(fps) + MARGIN:
                    break
                while first < centre - reach:
                    rows.popleft()
                    first += 1
                near = np.stack([rows[centre - first + k] for k in range(-reach, reach)])
                start = reach - front.before
                window = near[start : start + front.context, :-1]
                loud = near[reach - GATE_CONTEXT : reach + GATE_CONTEXT, -1].max()
                yield Heard(window, _ramp(loud) if self._gate is not None else 1.0)
                frame += 1

    def _encode(self, samples: np.ndarray) -> np.ndarray:
        """Vectors f32 [m, D + 1]: the front end's, and by how many dB the sound is above the gate."""
        level = loudness(samples)
        above = level - FAINT
        if self._gate is not None:
            above = np.minimum(above, level + 20.0 * math.log10(self._gain) - LOUD + self._gate)
        samples = samples * np.float32(self._scale)
        if self.live:  # always as much as an encoder will see later: another length would compile anew
            cut = self._front.live
            room = (cut.left + cut.hop + cut.right) * audio_io.HOP - len(samples)
            samples = np.pad(samples, (max(room, 0), 0))
        return np.concatenate([self._front.encode(samples)[-len(above) :], above[:, None]], axis=1)


def pieces(
    chunks: Iterable[np.ndarray], encode: Callable[[np.ndarray], np.ndarray], cut: Pieces
) -> Iterator[np.ndarray]:
    """Vectors of a sound given in chunks: blocks f32 [k, D], together one vector per 320 samples begun.

    encode: f32 [320 m] -> [m, D]. It sees `left` vectors of the past and `right` of the future, fewer at the ends.
    """
    held, first, done = np.zeros(0, np.float32), 0, 0  # samples; the vector they begin with; vectors given out
    hop = audio_io.HOP
    for chunk in chunks:
        held = np.concatenate([held, chunk])
        while first + len(held) // hop >= done + cut.hop + cut.right:
            part = encode(held[: (done + cut.hop + cut.right - first) * hop])
            yield part[done - first : done - first + cut.hop]
            done += cut.hop
            drop = max(done - cut.left, 0) - first
            held, first = held[drop * hop :], first + drop
    total = first + math.ceil(len(held) / hop)
    held = np.pad(held, (0, (total - first) * hop - len(held)))
    while done < total:
        stop, seen = min(done + cut.hop, total), min(done + cut.hop + cut.right, total)
        start = max(done - cut.left, first)
        part = encode(held[(start - first) * hop : (seen - first) * hop])
        yield part[done - start : stop - start]
        done = stop


def loudness(samples: np.ndarray) -> np.ndarray:
    """Level of every 20 ms of f32 [320 m + rest] in dB of full scale, f64 [m]; a recorder's constant offset is none."""
    whole = samples[: len(samples) // audio_io.HOP * audio_io.HOP].reshape(-1, audio_io.HOP)
    return 10.0 * np.log10(np.var(whole.astype(np.float64), axis=1) + 1e-12)


def gates(sound: np.ndarray, frames: int, fps: float = 25.0, gate: float | None = GATE) -> np.ndarray:
    """How open the gate is at frames -4 to frames + 3 of f32 [n] at 16 kHz; f64 [frames + 8] in [0, 1]."""
    cut = Pieces(0, 1024, 0)
    deaf = FrontEnd("level", 2, 1, lambda x: np.zeros((len(x) // audio_io.HOP, 1)), lambda x: 1.0, cut, cut)
    values = [heard.open for heard in Hearing(sound, deaf, fps, gate)]
    values += [0.0 if gate is not None else 1.0] * (frames + 2 * MARGIN - len(values))
    return np.array(values[: frames + 2 * MARGIN])


def windows(sound: np.ndarray, front: FrontEnd, fps: float, frames: int) -> np.ndarray:
    """The windows f32 [frames, A, D] of a clip: of a sound f32 [n] at 16 kHz, cut or filled with silence."""
    samples = math.ceil(frames * audio_io.SAMPLE_RATE / fps)
    whole = np.pad(sound[:samples], (0, max(0, samples - len(sound))))
    heard = [item.window for item in Hearing(whole, front, fps, None)]
    return np.stack(heard[MARGIN : MARGIN + frames])


def _ramp(above: float) -> float:
    return float(np.clip(0.5 + above / GATE_RAMP, 0.0, 1.0))
