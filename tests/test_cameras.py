"""Corrected cameras: their maths, and what a step learns of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data.clip import MOUTH_POINTS, Clip
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.inference import cameras as inference
from fg3dgs_jax.model import cameras
from fg3dgs_jax.training import cameras as learned

FOCAL, EXTENT = 150.0, 0.1
INTRINSICS = np.array([FOCAL, FOCAL, 32.0, 32.0], np.float32)


def pose():
    viewmat = np.eye(4, dtype=np.float32)
    viewmat[:3, :3] = Rotation.from_euler("xyz", [170, 10, 5], degrees=True).as_matrix()
    viewmat[:3, 3] = [0.01, -0.02, 0.75]
    return jnp.asarray(viewmat), jnp.asarray([FOCAL, FOCAL, 32.0, 32.0])


def project(viewmat, intrinsics, point):
    place = viewmat[:3, :3] @ point + viewmat[:3, 3]
    return np.asarray(intrinsics[:2] * place[:2] / place[2] + intrinsics[2:])


def test_rotations_are_scipys_and_differentiable_at_zero():
    vectors = np.concatenate([np.eye(3), -2.0 * np.eye(3), 1e-4 * np.eye(3)]).astype(np.float32)
    # float32 keeps seven digits
    np.testing.assert_allclose(cameras.rotation(vectors), Rotation.from_rotvec(vectors).as_matrix(), atol=1e-6)
    slopes = jax.jacobian(cameras.rotation)(jnp.zeros(3))
    for axis in range(3):
        np.testing.assert_allclose(
            np.cross(np.eye(3)[axis], np.eye(3), axisa=0, axisb=0).T, slopes[..., axis], atol=1e-6
        )


def test_a_focal_length_changes_perspective_and_not_size():
    near, far = np.array([0.0, 0.0, 0.05]), np.array([0.0, 0.0, -0.05])
    viewmat, intrinsics = pose()
    wider = cameras.corrected(viewmat, intrinsics, jnp.zeros(6), jnp.asarray(-0.3), EXTENT)
    origin = np.zeros(3)
    # pixels; positions of about a hundred in float32
    np.testing.assert_allclose(project(*wider, origin), project(viewmat, intrinsics, origin), atol=1e-4)
    before, after = (np.linalg.norm(project(*c, near) - project(*c, far)) for c in ((viewmat, intrinsics), wider))
    assert abs(after - before) > 0.1


def test_a_shift_is_in_head_radii():
    viewmat, intrinsics = pose()
    right = cameras.corrected(viewmat, intrinsics, jnp.asarray([0, 0, 0, 1.0, 0, 0]), jnp.zeros(()), EXTENT)
    moved_by = project(*right, np.zeros(3)) - project(viewmat, intrinsics, np.zeros(3))
    np.testing.assert_allclose(moved_by, [FOCAL * EXTENT / 0.75, 0.0], atol=1e-3)


def trajectory(count=40, seed=0):
    rng = np.random.default_rng(seed)
    viewmats = np.tile(np.asarray(pose()[0]), (count, 1, 1))
    turns = Rotation.from_rotvec(0.02 * rng.standard_normal((count, 3)).cumsum(0))
    viewmats[:, :3, :3] = viewmats[:, :3, :3] @ turns.as_matrix()
    viewmats[:, :3, 3] += 0.001 * rng.standard_normal((count, 3)).cumsum(0)
    return viewmats.astype(np.float32)


def test_accelerations_add_up():
    viewmats = trajectory()
    twists = 1e-3 * np.random.default_rng(1).standard_normal((len(viewmats), 6)).astype(np.float32)
    shaken, _ = cameras.corrected(viewmats, jnp.ones(4), twists, jnp.zeros(()), EXTENT)
    expected = cameras.accelerations(viewmats, EXTENT)
    expected[1:-1] += twists[2:] - 2.0 * twists[1:-1] + twists[:-2]
    # what is left is of second order: a turn of 0.03 a frame times a twist of 1e-3
    np.testing.assert_allclose(cameras.accelerations(np.asarray(shaken), EXTENT), expected, atol=3e-4)


def test_frames_without_pixels_follow_their_neighbours():
    twists = np.full((50, 6), 0.02, np.float32)
    known = np.ones(50, bool)
    known[20:30] = known[45:] = False
    twists[~known] = 0.0
    np.testing.assert_allclose(cameras.filled(twists, known), 0.02, atol=1e-6)
    twists[known] += np.random.default_rng(0).standard_normal((35, 6)).astype(np.float32)
    np.testing.assert_array_equal(cameras.filled(twists, known)[known], twists[known])
    assert not cameras.filled(np.zeros((5, 6)), np.zeros(5, bool)).any()


def test_far_from_what_was_seen_corrections_end_at_their_mean():
    """A clip whose last seen frames lean to one side: the held-out end starts that way, and forgets it soon."""
    twists = np.zeros((100, 6), np.float32)
    twists[50:60] = 0.06
    known = np.arange(100) < 60
    end = cameras.filled(twists, known)[60:, 0]
    assert end[0] > 0.025 and np.all(np.diff(end) < 0)
    assert abs(end[9] - 0.01) < 0.01 and abs(end[-1] - 0.01) < 1e-4  # 0.01 is the mean


def clip_of(measured, true, landmarks):
    """A dataset of poses and landmarks alone, and the corrections that are right."""
    turns = Rotation.from_matrix(measured[:, :3, :3].swapaxes(1, 2) @ true[:, :3, :3]).as_rotvec()
    right = np.concatenate([turns, (true[:, :3, 3] - measured[:, :3, 3]) / EXTENT], 1).astype(np.float32)
    used = {"intrinsics": INTRINSICS, "viewmats": measured, "extent": EXTENT, "landmarks": landmarks}
    rest = dict.fromkeys(field.name for field in dataclasses.fields(Clip))  # nobody asks for pictures or sound
    return Dataset(Clip(**{**rest, "width": 64, "height": 64, **used})), right


@pytest.fixture(scope="module")
def tracked():
    """A clip of 120 frames whose poses a tracker missed: dataset, the corrections that are right, frames seen.

    Its landmarks lie where the true poses see them but for noise of a tenth of a pixel.
    """
    rng = np.random.default_rng(3)
    true = trajectory(120)
    face = rng.uniform(-EXTENT, EXTENT, (68, 3))
    landmarks = cameras.project(face, true, INTRINSICS) + 0.1 * rng.standard_normal((120, 68, 2))
    wrong = (0.02 * rng.standard_normal((120, 6))).astype(np.float32)
    measured = np.asarray(cameras.corrected(true, INTRINSICS, wrong, jnp.zeros(()), EXTENT)[0])
    return *clip_of(measured, true, landmarks.astype(np.float32)), np.arange(120) < 96


def corrections(dataset, right, known):
    """The dataset as a run saw it that learned the right corrections of the frames it was shown."""
    stored = {"twists": right * known[:, None], "visits": known.astype(np.int32), "focal": np.zeros(3, np.float32)}
    return inference.corrected(dataset, stored)


def off(viewmats, dataset, right):
    """RMS distance of the head's twists from the right ones, by frame."""
    true = cameras.corrected(dataset.viewmats, dataset.intrinsics, right, jnp.zeros(()), EXTENT)[0]
    turns = Rotation.from_matrix(np.swapaxes(viewmats[:, :3, :3], 1, 2) @ true[:, :3, :3]).as_rotvec()
    shifts = (viewmats[:, :3, 3] - true[:, :3, 3]) / EXTENT
    return np.sqrt(np.square(np.concatenate([turns, shifts], 1)).mean(1))


def test_landmarks_tell_how_far_an_unseen_frames_pose_is_off(tracked):
    dataset, right, known = tracked
    before, after = (off(v, dataset, right) for v in (dataset.viewmats, corrections(*tracked).viewmats))
    assert after[known].max() < 1e-5  # as training found them
    assert before[~known].mean() > 0.015
    # Depth is told worst: by 0.02 head radii a landmark moves by 0.03 pixels. The turns that the trajectory's later
    # poses add make it less than linear.
    assert after[~known].mean() < 0.5 * before[~known].mean()


def test_motion_tells_where_a_tracker_lags():
    """Its landmarks lag as its poses do, by a frame, and tell little."""
    phases = np.arange(121)[:, None] / [4.1, 5.3, 6.7] + np.arange(3)
    true = np.tile(np.asarray(pose()[0]), (121, 1, 1))
    true[:, :3, :3] = true[:, :3, :3] @ Rotation.from_rotvec(0.05 * np.sin(phases)).as_matrix()
    true[:, :3, 3] += 0.2 * EXTENT * np.cos(phases)
    measured, true, known = true[:-1], true[1:], np.arange(120) < 96
    rng = np.random.default_rng(6)
    face = rng.uniform(-EXTENT, EXTENT, (68, 3))
    landmarks = cameras.project(face, measured, INTRINSICS) + 0.1 * rng.standard_normal((120, 68, 2))
    dataset, right = clip_of(measured, true, landmarks.astype(np.float32))
    before, after = (off(v, dataset, right) for v in (measured, corrections(dataset, right, known).viewmats))
    assert after[~known].mean() < 0.35 * before[~known].mean()  # a frame's motion but for its acceleration


def test_velocities_are_of_poses_a_frame():
    twist, viewmats = np.array([0.01, -0.02, 0.015, 0.1, 0.05, -0.2]), np.tile(np.asarray(pose()[0]), (12, 1, 1))
    counts = np.arange(12)[:, None]
    viewmats[:, :3, :3] = viewmats[:, :3, :3] @ Rotation.from_rotvec(counts * twist[:3]).as_matrix()
    viewmats[:, :3, 3] += counts * EXTENT * twist[3:]
    # float32 poses: 1e-7 of a shift of 0.75 is 1e-6 head radii
    np.testing.assert_allclose(cameras.velocities(viewmats, EXTENT), np.tile(twist, (12, 1)), atol=3e-6)
    np.testing.assert_allclose(cameras.accelerations(viewmats, EXTENT), 0.0, atol=6e-6)
    viewmats[6:] = viewmats[6]  # stands still from here on
    np.testing.assert_allclose(cameras.velocities(viewmats, EXTENT)[[5, 6, 7]], np.outer([1, 0.5, 0], twist), atol=3e-6)


def test_an_unseen_frames_pose_is_told_by_landmarks_outside_the_mouth(tracked):
    dataset, right, known = tracked
    seen = corrections(*tracked).viewmats
    for points, same in ((MOUTH_POINTS, True), (slice(0, MOUTH_POINTS.start), False)):
        landmarks = dataset.landmarks.copy()
        landmarks[~known, points] += np.random.default_rng(4).standard_normal(landmarks[~known, points].shape)
        other = Dataset(dataclasses.replace(dataset.clip, landmarks=landmarks))
        assert np.array_equal(corrections(other, right, known).viewmats, seen) == same


def test_a_frame_whose_face_was_lost_stays_near_its_measured_pose(tracked):
    dataset, right, known = tracked
    landmarks = dataset.landmarks.copy()
    landmarks[110] = 0.0  # all in the picture's corner
    other = Dataset(dataclasses.replace(dataset.clip, landmarks=landmarks))
    seen = corrections(other, right, known).viewmats
    assert off(seen, other, np.zeros_like(right))[110] < 0.1  # the right corrections are 0.02


def test_landmarks_that_tell_nothing_leave_the_mean():
    rng = np.random.default_rng(5)
    known = np.arange(150) < 120
    twists = 0.01 + 0.02 * rng.standard_normal((150, 6))
    told = cameras.foretold(twists, known, rng.standard_normal((150, 96)))
    # By chance some ridge may seem to help one of six numbers; what it then adds is small beside the twists' 0.02.
    assert np.sqrt(np.square(told - twists[known].mean(0)).mean()) < 0.003
    few = np.arange(150) < 20  # no blocks to choose by
    told = cameras.foretold(twists, few, rng.standard_normal((150, 96)))
    np.testing.assert_allclose(told, np.tile(twists[few].mean(0), (150, 1)))
    told = cameras.foretold(twists, known, np.concatenate([twists, np.ones((150, 3))], 1))  # they tell all
    assert np.sqrt(np.square(told - twists).mean()) < 0.1 * 0.02


def rule(**fields):
    measured = cameras.accelerations(trajectory(), EXTENT)
    return learned.CameraRule(**{"rate": (1e-2, 1e-3), "focal_rate": (0.0, 0.0), "smooth": 5.0, "near": 0.5,
                                 "accelerations": measured, **fields})  # fmt: skip


@pytest.mark.parametrize("index", [0, 1, 20, 38, 39])
def test_the_prior_is_the_slope_of_what_it_says(index):
    twists = 1e-2 * jnp.asarray(np.random.default_rng(2).standard_normal((40, 6)), jnp.float32)
    given = rule()

    def energy(x):
        bends = given.accelerations[1:-1] + x[2:] - 2.0 * x[1:-1] + x[:-2]
        return 0.5 * (given.smooth * (bends**2).sum() + given.near * (x**2).sum())

    # sums of forty rows in float32
    np.testing.assert_allclose(
        learned.prior(twists, jnp.asarray(index), given), jax.grad(energy)(twists)[index], atol=1e-5
    )


def test_a_frame_learns_only_when_it_is_seen():
    state, slope = learned.init(40), jnp.asarray([1.0, -1.0, 2.0, 0.5, -3.0, 1.0, 1.0])
    for index in (7, 7, 9):
        state = learned.learn(state, jnp.asarray(index), slope, jnp.zeros(()), rule(smooth=0.0, near=0.0))
    assert np.flatnonzero(np.any(state.twists, axis=1)).tolist() == [7, 9]
    assert np.asarray(state.visits)[[6, 7, 8, 9]].tolist() == [0, 2, 0, 1]
    np.testing.assert_allclose(state.twists[9], -1e-2 * np.sign(slope[:6]), rtol=1e-4)  # Adam's first step: its rate
    assert float(state.focal[0]) == 0.0
    state = learned.learn(state, jnp.asarray(3), slope, jnp.zeros(()), rule(focal_rate=(1e-4, 1e-5)))
    assert float(state.focal[0]) < 0.0
