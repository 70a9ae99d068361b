"""Where the head gets its pose: the clip, one pose held still, gentle motion by itself, a file; and camera orbits."""

import json
import zipfile
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data.legacy import opencv_viewmat
from fg3dgs_jax.errors import UserError

MODES = ("clip", "still", "idle")
# Gentle motion of somebody who listens: degrees and seconds of slow waves whose periods share no multiple.
IDLE_YAW = ((1.1, 5.3), (0.6, 2.9))
IDLE_PITCH = ((0.8, 4.1), (0.3, 2.3))
IDLE_ROLL = ((0.5, 6.7),)
SAFE_MARGIN = 3.0  # degrees beyond what the clip shows that still look right
REACH = 2  # clip frames that the torso may move on per frame
TURN_COST = 0.3  # world units of camera distance that a radian of head turn counts as, when torsos are chosen


def idle(viewmat: np.ndarray, times: np.ndarray, seed: int) -> np.ndarray:
    """World-to-camera matrices f32 [L, 4, 4] of a head that moves gently around one pose [4, 4], at `times` in s."""
    random = np.random.default_rng(seed)

    def wave(parts: tuple) -> np.ndarray:
        phases = random.uniform(0, 2 * np.pi, len(parts))
        return sum(size * np.sin(2 * np.pi * times / period + phase)
                   for (size, period), phase in zip(parts, phases, strict=True))  # fmt: skip

    angles = np.stack([wave(parts) for parts in (IDLE_YAW, IDLE_PITCH, IDLE_ROLL)], -1)
    angles -= angles[:1] * np.exp(-times)[:, None]  # begins in the pose itself
    return turned(np.repeat(viewmat[None], len(times), 0), angles)


def turned(viewmats: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Matrices [L, 4, 4] with the head turned about the world's origin, which lies in it; f32 [L, 4, 4].

    angles: degrees [L, 3] of yaw (to the image's right), pitch (up), roll.
    """
    turns = np.tile(np.eye(4), (len(viewmats), 1, 1))
    turns[:, :3, :3] = Rotation.from_euler("YXZ", angles * [1, -1, 1], degrees=True).as_matrix()
    return (viewmats.astype(np.float64) @ turns).astype(np.float32)


def yaws(viewmats: np.ndarray) -> np.ndarray:
    """Degrees that the face looks to the image's right, f64 [L]."""
    facing = viewmats[:, :3, 2].astype(np.float64)
    return np.degrees(np.arctan2(facing[:, 0], -facing[:, 2]))


def safe_yaws(viewmats: np.ndarray) -> tuple[float, float]:
    """The yaws that a clip's poses [T, 4, 4] vouch for, in degrees."""
    low, high = np.percentile(yaws(viewmats), [1, 99])
    return float(low) - SAFE_MARGIN, float(high) + SAFE_MARGIN


def orbit(
    viewmats: np.ndarray, times: np.ndarray, degrees: float, seconds: float, safe: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """The camera swings around the head by up to so many degrees to each side, once in so many seconds.

    Turns that would leave the `safe` yaws are eased to a stop before them. Returns the matrices f32 [L, 4, 4] and the
    largest turn that was left, in degrees.
    """
    base = yaws(viewmats)
    wanted = degrees * np.sin(2 * np.pi * times / seconds)
    room = np.where(wanted >= 0, np.maximum(safe[1] - base, 0.0), np.maximum(base - safe[0], 0.0))
    turn = np.sign(wanted) * room * np.tanh(np.abs(wanted) / np.maximum(room, 1e-6))
    angles = np.stack([turn, np.zeros_like(turn), np.zeros_like(turn)], -1)
    return turned(viewmats, angles), float(np.abs(turn).max(initial=0.0))


def read(path: str | Path) -> np.ndarray:
    """World-to-camera matrices f32 [T, 4, 4] from a file.

    .npy: the matrices; .npz: its array `viewmats` (a dataset's tracks.npz); .json: `frames` with OpenGL camera-to-world
    `transform_matrix` (a transforms file of the field's layout). Raises UserError.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            frames = sorted(json.loads(path.read_text())["frames"], key=lambda frame: int(frame.get("img_id", 0)))
            return np.stack([opencv_viewmat(path, frame["transform_matrix"]) for frame in frames])
        with path.open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            array = content["viewmats"] if isinstance(content, np.lib.npyio.NpzFile) else content
            viewmats = np.asarray(array, np.float32)
    except OSError as error:
        raise UserError(
            f"--pose {path}: cannot be read ({error.strerror or error}); give clip, still, idle or a file of poses"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        viewmats = np.zeros(0)
    whole = viewmats.ndim == 3 and viewmats.shape[1:] == (4, 4) and np.isfinite(viewmats).all()
    rotations = viewmats[:, :3, :3] if whole else np.zeros((0, 3, 3))
    # A tolerance of 1 % lets matrices through that went through text with four digits.
    if not len(rotations) or not np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-2):
        raise UserError(f"--pose {path}: holds no world-to-camera matrices [frames, 4, 4]; give .npy, .npz or .json")
    return viewmats


def follow(poses: np.ndarray, clip: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For poses [L, 4, 4] the frames of the clip whose torso to show, i64 [L]: near in pose, without jumps in time.

    clip: the clip's poses [T, 4, 4]; ids: ascending frames that have pictures. The first is the nearest of all, the
    others are the nearest within two pictures of the one before.
    """
    have = clip[ids]
    row = int(np.argmin(_distance(poses[0], have)))
    out = np.empty(len(poses), np.int64)
    for i, pose in enumerate(poses):
        low, high = max(row - REACH, 0) if i else row, row + REACH + 1 if i else row + 1
        row = low + int(np.argmin(_distance(pose, have[low:high])))
        out[i] = ids[row]
    return out


def _distance(pose: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far poses [K, 4, 4] are from one: places in camera coordinates, and the direction of the face."""
    place = np.linalg.norm(others[:, :3, 3] - pose[:3, 3], axis=-1)
    return place + TURN_COST * np.linalg.norm(others[:, :3, 2] - pose[:3, 2], axis=-1)
