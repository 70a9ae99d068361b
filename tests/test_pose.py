"""Poses from landmarks: a rigid point head under known cameras must be found again, also through noise and gaps."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data import pose
from fg3dgs_jax.data.face import NUM_LANDMARKS, ROW_CHIN, ROW_FOREHEAD

SIZE, FOCAL = 512, 1200.0


def head(random) -> np.ndarray:
    """478 points on the front of an ellipsoid, [478, 3], camera axes (y down, z away), about 10 wide."""
    points = random.normal(size=(NUM_LANDMARKS, 3))
    points[:, 2] = -np.abs(points[:, 2])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points *= (4.0, 6.0, 4.0)
    points[33], points[263] = (-2.5, -1.5, -3.0), (2.5, -1.5, -3.0)  # eye corners
    points[ROW_FOREHEAD], points[ROW_CHIN] = (0, -5.5, -1.6), (0, 5.5, -1.6)
    return points


def motion(times: np.ndarray) -> tuple[Rotation, np.ndarray]:
    """A head that turns by 15 degrees and moves a little."""
    turns = np.stack([0.1 * np.sin(2 * times), 0.26 * np.sin(3 * times), 0.08 * np.cos(2 * times)], -1)
    shift = np.stack([0.6 * np.sin(2 * times), 0.4 * np.cos(3 * times), 50 + np.sin(times)], -1)
    return Rotation.from_rotvec(turns), shift


def landmarks(times: np.ndarray, noise: float, random) -> tuple[np.ndarray, Rotation]:
    """What a detector would see: [T, 478, 3] pixels and rough depth, and the true rotations."""
    points = head(random)
    rotation, shift = motion(times)
    camera = np.einsum("tij,lj->tli", rotation.as_matrix(), points) + shift[:, None]
    pixels = FOCAL * camera[..., :2] / camera[..., 2:] + SIZE / 2
    depth = (camera[..., 2] - shift[:, None, 2]) * FOCAL / 50
    out = np.concatenate([pixels, depth[..., None]], -1)
    out[..., :2] += noise * random.normal(size=pixels.shape)
    return out.astype(np.float32), rotation


def turning_error(poses: pose.Poses, rotation: Rotation) -> float:
    """RMS difference in degrees of all rotations relative to the first frame: free of the choice of axes."""
    flip = np.diag([1.0, -1.0, -1.0])
    found = Rotation.from_matrix(poses.viewmats[:, :3, :3].astype(float) @ flip)
    fixed = (rotation.inv() * found).mean()
    return float(np.degrees(np.sqrt(np.mean((rotation.inv() * found * fixed.inv()).magnitude() ** 2))))


def test_exact_landmarks_give_exact_poses():
    random, times = np.random.default_rng(0), np.arange(40) / 25
    seen, rotation = landmarks(times, 0.0, random)
    poses = pose.solve_poses(seen, SIZE, times)
    # The depth that a detector gives is exact here up to perspective, so shape and focal length stay near their priors;
    # what is left is the trade-off between focal length and distance, which rotations hardly feel.
    assert poses.raw_error < 0.05
    assert turning_error(poses, rotation) < 0.3


def test_smoothing_takes_noise_away_without_lag():
    random, times = np.random.default_rng(1), np.arange(80) / 25
    seen, rotation = landmarks(times, 1.0, random)
    smooth = pose.solve_poses(seen, SIZE, times)
    assert smooth.smoothing > 0
    assert smooth.error <= pose.MAX_RISE * smooth.raw_error
    jitter = np.linalg.norm(np.diff(smooth.viewmats[:, :3, :3], n=2, axis=0), axis=(1, 2))
    truth = np.linalg.norm(np.diff(rotation.as_matrix(), n=2, axis=0), axis=(1, 2))
    # One pixel of noise on 95 points turns a head by about 0.1 degrees, whose second difference is 0.25 degrees.
    assert np.sqrt(np.mean(jitter**2)) < np.sqrt(np.mean(truth**2)) + np.radians(0.25)
    assert turning_error(smooth, rotation) < 0.5


def test_fast_turns_survive_smoothing():
    random, times = np.random.default_rng(2), np.arange(60) / 25
    points = head(random)
    yaw = 0.3 * (times > 1.0)  # a jump, the fastest turn there is
    rotation = Rotation.from_rotvec(np.stack([0 * yaw, yaw, 0 * yaw], -1))
    camera = np.einsum("tij,lj->tli", rotation.as_matrix(), points) + np.array([0, 0, 50.0])
    pixels = FOCAL * camera[..., :2] / camera[..., 2:] + SIZE / 2 + 0.5 * random.normal(size=(60, NUM_LANDMARKS, 2))
    seen = np.concatenate([pixels, (camera[..., 2:] - 50) * FOCAL / 50], -1)
    poses = pose.solve_poses(seen.astype(np.float32), SIZE, times)
    turned = Rotation.from_matrix(poses.viewmats[26, :3, :3] @ poses.viewmats[25, :3, :3].T).magnitude()
    assert turned > 0.8 * 0.3


def test_uneven_times_are_respected():
    times = np.round(np.arange(100) / 25 * 30) / 30  # 30 FPS shown at 25: steps of one and two frames
    rows = pose._second_differences(times)
    np.testing.assert_allclose((rows * np.stack([times[:-2], times[1:-1], times[2:]], -1)).sum(1), 0, atol=1e-9)
    squares = times**2
    bend = (rows * np.stack([squares[:-2], squares[1:-1], squares[2:]], -1)).sum(1)
    np.testing.assert_allclose(bend, 2 * np.median(np.diff(times)) ** 2, rtol=1e-6)


def test_frames_without_a_face_lie_between_their_neighbours():
    random, times = np.random.default_rng(3), np.arange(30) / 25
    seen, rotation = landmarks(times, 0.2, random)
    seen[[0, 10, 11, 12]] = np.nan
    poses = pose.solve_poses(seen, SIZE, times)
    assert np.isfinite(poses.viewmats).all()
    np.testing.assert_allclose(poses.viewmats[0], poses.viewmats[1], atol=1e-6)
    assert turning_error(poses, rotation) < 1.0


def test_world_axes_and_recentring():
    random, times = np.random.default_rng(4), np.arange(20) / 25
    seen, _ = landmarks(times, 0.0, random)
    poses = pose.solve_poses(seen, SIZE, times)
    # The head stands upright (y up) and looks at the camera (z towards it), which is in front.
    up, out = poses.viewmats[:, :3, 1].mean(0), poses.viewmats[:, :3, 2].mean(0)
    assert up[1] < -0.9 and out[2] < -0.9
    moved = pose.recentre(poses, np.array([0.01, 0.02, -0.03]), 0.5)
    for before, after in ((poses, moved),):
        pixels = [p.shape @ p.viewmats[7, :3, :3].T + p.viewmats[7, :3, 3] for p in (before, after)]
        np.testing.assert_allclose(pixels[1], 0.5 * pixels[0], atol=1e-6)
    assert moved.viewmats.dtype == np.float32


@pytest.mark.parametrize("count", [3, 4])
def test_a_handful_of_frames_is_enough(count):
    times = np.arange(count) / 25
    seen, _ = landmarks(times, 0.1, np.random.default_rng(5))
    assert np.isfinite(pose.solve_poses(seen, SIZE, times).viewmats).all()
