"""A head and torso that keep moving for any length of time: the clip's own motion, back and forth without jerks."""

import math

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

# A turn takes E frames and covers a = E / pi frames there and back. With E (1 - 2 / pi) = 4 the cruise back, and every
# later cruise, falls on whole frames again: recorded poses over their own backdrops, nothing interpolated.
TURN_LOSS = 4
TURN_FRAMES = TURN_LOSS / (1.0 - 2.0 / math.pi)  # 11.0, 0.44 s at 25 FPS
TURN_REACH = TURN_FRAMES / math.pi


def ping_pong(num_frames: int, length: int, start: int = 0) -> np.ndarray:
    """Positions in a clip, f64 [length] in [0, num_frames - 1], that follow it at its own speed, back and forth.

    At the turning points the velocity passes from 1 to -1 frame per frame as a cosine over 11 frames, so that it never
    jumps; in between positions are whole frames. It starts at frame `start` moving forward: audio shorter than the
    rest of the clip keeps the clip's own poses. Clips too short for that swing as a sine.
    """
    if not 0 <= start < num_frames:
        raise ValueError(f"start {start} is not a frame of a clip of {num_frames}")
    last = num_frames - 1
    time = np.arange(length, dtype=np.float64) + start
    if last < 3 * TURN_REACH:
        return 0.5 * last * (1.0 - np.cos(np.pi * time / max(last, 1)))
    cruise = last - 2.0 * TURN_REACH  # frames between the end of one turn and the beginning of the next
    top, bottom = last - TURN_REACH, TURN_REACH
    since = time - top  # the first turn begins at time `top`; before that position equals time
    phase = np.mod(since, 2.0 * (TURN_FRAMES + cruise))
    position = np.select(
        [since <= 0, phase < TURN_FRAMES, phase < TURN_FRAMES + cruise, phase < 2.0 * TURN_FRAMES + cruise],
        [
            time,
            top + TURN_REACH * np.sin(np.pi * phase / TURN_FRAMES),
            top - (phase - TURN_FRAMES),
            bottom - TURN_REACH * np.sin(np.pi * (phase - TURN_FRAMES - cruise) / TURN_FRAMES),
        ],
        bottom + (phase - 2.0 * TURN_FRAMES - cruise),
    )
    whole = np.round(position)
    return np.clip(np.where(np.abs(position - whole) < 1e-6, whole, position), 0.0, last)


def viewmats_at(viewmats: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """World-to-camera matrices f32 [L, 4, 4] at fractional positions of a track [T, 4, 4].

    Rotations go the shortest way at constant speed (slerp). Translations are interpolated as they stand: they are the
    head's place in camera coordinates, since the world's origin lies in the head.
    """
    viewmats, positions = np.asarray(viewmats, np.float64), np.asarray(positions, np.float64)
    if len(viewmats) == 1:
        return np.repeat(viewmats, len(positions), axis=0).astype(np.float32)
    result = np.tile(np.eye(4), (len(positions), 1, 1))
    rotations = Slerp(np.arange(len(viewmats)), Rotation.from_matrix(viewmats[:, :3, :3]))
    result[:, :3, :3] = rotations(positions).as_matrix()
    result[:, :3, 3] = track_at(viewmats[:, :3, 3], positions)
    return result.astype(np.float32)


def track_at(track: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A track [T, D] at fractional positions [L], linearly interpolated; [L, D] in the track's dtype."""
    below = np.floor(positions).astype(int)
    above = np.minimum(below + 1, len(track) - 1)
    share = (positions - below)[:, None]
    return ((1.0 - share) * track[below] + share * track[above]).astype(track.dtype)
