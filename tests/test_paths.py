"""The endless path through a clip: no jumps in velocity, whole frames in between, poses on the shortest way."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.inference import paths


@pytest.mark.parametrize("num_frames", [13, 25, 200, 501])
def test_the_path_moves_smoothly_and_stays_inside(num_frames):
    positions = paths.ping_pong(num_frames, 7 * num_frames)
    assert positions.min() >= 0.0 and positions.max() <= num_frames - 1
    assert positions.max() > num_frames - 1.5 and positions[num_frames:].min() < 0.5  # both ends are reached
    velocity = np.diff(positions)
    assert np.abs(velocity).max() < 1.0 + 1e-9
    # The cosine from 1 to -1 over E frames is steepest in its middle: pi / E of velocity per frame.
    assert np.abs(np.diff(velocity)).max() <= np.pi / paths.TURN_FRAMES + 1e-9


def test_cruising_falls_on_whole_frames_even_after_many_turns():
    positions = paths.ping_pong(100, 5000)
    whole = positions == np.round(positions)
    assert whole.mean() > 0.85  # 11 of about 104 frames belong to a turn
    assert whole[4000:].mean() > 0.85
    np.testing.assert_array_equal(positions[:90], np.arange(90))


def test_a_start_in_the_middle_and_tiny_clips():
    np.testing.assert_array_equal(paths.ping_pong(100, 5, start=40), [40, 41, 42, 43, 44])
    np.testing.assert_array_equal(paths.ping_pong(1, 4), np.zeros(4))
    short = paths.ping_pong(5, 40)
    assert short.min() >= 0 and short.max() <= 4 and np.ptp(short) > 3.9
    assert paths.ping_pong(50, 0).shape == (0,)
    with pytest.raises(ValueError, match="start 50"):
        paths.ping_pong(50, 3, start=50)


def test_viewmats_between_frames():
    viewmats = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    viewmats[1, :3, :3] = Rotation.from_euler("y", 20, degrees=True).as_matrix()
    viewmats[1, :3, 3] = [0.2, 0.0, 1.0]
    between = paths.viewmats_at(viewmats, np.array([0.0, 0.25, 1.0]))
    assert between.dtype == np.float32
    np.testing.assert_allclose(between[[0, 2]], viewmats[:2], atol=1e-6)  # f32 rounding
    expected = Rotation.from_euler("y", 5, degrees=True).as_matrix()
    np.testing.assert_allclose(between[1, :3, :3], expected, atol=1e-6)
    np.testing.assert_allclose(between[1, :3, 3], [0.05, 0.0, 0.25], atol=1e-6)
    assert paths.viewmats_at(viewmats[:1], np.zeros(4)).shape == (4, 4, 4)


def test_tracks_and_nearest_frames():
    track = np.array([[0.0, 1.0], [2.0, 1.0]], np.float32)
    np.testing.assert_allclose(paths.track_at(track, np.array([0.0, 0.5, 1.0])), [[0, 1], [1, 1], [2, 1]])
    found = clips.nearest(np.array([0, 1, 2, 7, 8]), np.array([0.0, 0.4, 0.5, 4.4, 4.6, 9.0]))
    np.testing.assert_array_equal(found, [0, 0, 0, 2, 7, 8])
    np.testing.assert_array_equal(clips.nearest(np.array([3]), np.array([0.0, 9.0])), [3, 3])
