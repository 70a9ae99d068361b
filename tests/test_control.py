"""What the head does besides speaking: poses, orbits, expressions, and the plan that they make."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import control, expression, poses
from fg3dgs_jax.inference.control import Control

T = 60


def facing(yaw: np.ndarray) -> np.ndarray:
    """World-to-camera matrices of heads at (0, 0, 1) that look to the image's right by so many degrees."""
    viewmats = np.tile(np.diag([1.0, -1.0, -1.0, 1.0]), (len(yaw), 1, 1))  # the head's z axis meets the camera
    viewmats[:, :3, :3] = viewmats[:, :3, :3] @ Rotation.from_euler("Y", yaw[:, None], degrees=True).as_matrix()
    viewmats[:, 2, 3] = 1.0
    return viewmats.astype(np.float32)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        num_frames=T, fps=25.0, viewmats=facing(10 * np.sin(np.arange(T) / 8)),
        expression=rng.random((T, 3), np.float32), frame_ids=np.arange(T),
        expression_names=("browInnerUp", "eyeBlink", "gaze_x"),
    )  # fmt: skip


def test_yaw_is_to_the_images_right():
    np.testing.assert_allclose(
        poses.yaws(facing(np.array([0.0, 12.0, -30.0]))), [0, 12, -30], atol=1e-4
    )  # f32 matrices
    turned = poses.turned(facing(np.zeros(1)), np.array([[5.0, 3.0, 2.0]]))
    assert poses.yaws(turned)[0] == pytest.approx(5.0, abs=1e-3)
    assert turned[0, 1, 2] < 0  # pitch up: the face's direction points up in the image, -y
    np.testing.assert_allclose(turned[0, :3, 3], [0, 0, 1])  # the head stays in its place


def test_the_clips_pose_is_followed_as_before(dataset):
    made = control.plan(dataset, Control(start=5), 20)
    np.testing.assert_allclose(made.viewmats, dataset.viewmats[5:25], atol=1e-6)  # through quaternions, f64
    np.testing.assert_array_equal(made.sources, np.arange(5, 25))
    np.testing.assert_array_equal(made.expression[4:24], dataset.expression[5:25])
    assert made.expression.shape == (28, 3)


def test_still_and_idle_stay_at_one_frame(dataset):
    still = control.plan(dataset, Control("still", start=7), 50)
    assert (still.viewmats == dataset.viewmats[7]).all() and (still.sources == 7).all()
    idle = control.plan(dataset, Control("idle", start=7), 1500)
    np.testing.assert_allclose(idle.viewmats[0], dataset.viewmats[7], atol=1e-6)
    first = Rotation.from_matrix(dataset.viewmats[7, :3, :3])
    turns = (Rotation.from_matrix(idle.viewmats[:, :3, :3]) * first.inv()).magnitude() * 180 / np.pi
    assert 1.0 < turns.max() < 3.5  # degrees; gentle, and never far
    assert np.abs(np.diff(poses.yaws(idle.viewmats))).max() < 0.15  # degrees a frame
    assert (control.plan(dataset, Control("idle", seed=1), 90).viewmats != idle.viewmats[:90]).any()


def test_an_orbit_keeps_to_the_angles_that_the_clip_shows(dataset):
    safe = poses.safe_yaws(dataset.viewmats)
    assert safe == pytest.approx((-13, 13), abs=0.2)
    small = control.plan(dataset, Control("still", orbit=4.0), 150)
    assert poses.yaws(small.viewmats).max() == pytest.approx(4.0, abs=0.2) and not small.notes
    large = control.plan(dataset, Control("clip", orbit=40.0), 150)
    assert safe[0] <= poses.yaws(large.viewmats).min() and poses.yaws(large.viewmats).max() <= safe[1]
    assert "the orbit is held to" in large.notes[0]


def test_poses_from_files(dataset, tmp_path):
    wanted = facing(np.linspace(-9, 9, 40))
    np.save(tmp_path / "a.npy", wanted)
    np.savez(tmp_path / "a.npz", viewmats=wanted)
    opengl = [np.linalg.inv(matrix) @ np.diag([1, -1, -1, 1]) for matrix in wanted.astype(np.float64)]
    frames = [{"img_id": i, "transform_matrix": matrix.tolist()} for i, matrix in enumerate(opengl)]
    (tmp_path / "a.json").write_text(json.dumps({"frames": frames[::-1]}))
    for name in ("a.npy", "a.npz", "a.json"):
        made = control.plan(dataset, Control(tmp_path / name), 30)
        np.testing.assert_allclose(made.viewmats, wanted[:30], atol=1e-5)
        # The torso comes from where the clip's head looked alike, and never jumps.
        sources = made.sources.astype(int)
        assert np.abs(np.diff(sources)).max() <= poses.REACH
        assert np.abs(poses.yaws(dataset.viewmats)[sources] - poses.yaws(wanted[:30])).max() < 1.5
    np.save(tmp_path / "far.npy", facing(np.full(5, 40.0)))
    assert "27 degrees further" in control.plan(dataset, Control(tmp_path / "far.npy"), 5).notes[0]
    np.save(tmp_path / "bad.npy", np.ones((5, 4, 4), np.float32))
    lost = facing(np.zeros(5))
    lost[3, 0, 3] = np.nan
    np.save(tmp_path / "nan.npy", lost)
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "rows.json").write_text('{"frames": [[1, 2]]}')
    for name in ("bad.npy", "nan.npy", "bad.json", "rows.json", "none.npy"):
        with pytest.raises(UserError, match=name):
            control.plan(dataset, Control(tmp_path / name), 5)


def test_blinks_come_as_often_and_last_as_long_as_peoples():
    times = np.arange(0, 300, 0.04)
    lids = expression.blinks(times, 0)
    starts = np.flatnonzero((lids[1:] > 0.05) & (lids[:-1] <= 0.05))
    assert 10 <= len(starts) / 5 <= 25  # a minute
    assert lids.max() > 0.99 and lids.min() == 0
    assert 3 <= (lids > 0.05).sum() / len(starts) <= 8  # frames of 40 ms
    assert np.diff(starts).min() >= 0.8 / 0.04  # never twice at once
    np.testing.assert_array_equal(lids, expression.blinks(times, 0))


def test_expressions_sliders_and_timelines(dataset, tmp_path):
    rest = np.median(dataset.expression, axis=0)
    still = control.plan(dataset, Control(expression="still"), 100).expression
    np.testing.assert_allclose(still, np.tile(rest, (108, 1)))
    blinking = control.plan(dataset, Control(expression="blinks"), 200).expression
    assert blinking[:, 1].max() > 0.95 and (blinking[:, [0, 2]] == rest[[0, 2]]).all()
    path = tmp_path / "t.json"
    path.write_text('{"browInnerUp": [[0.0, 0.0], [1.0, 1.0]], "gaze_x": [[0, -0.5]]}')
    timeline = expression.read_timeline(path, dataset.expression_names)
    sliders = expression.read_sliders(["eyeBlink=0.25", "gaze_x=1"], dataset.expression_names)
    made = control.plan(dataset, Control(sliders=sliders, timeline=timeline), 50).expression
    np.testing.assert_allclose(made[4:34:5, 0], [0, 0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-6)
    assert (made[:, 1] == 0.25).all() and (made[:, 2] == -0.5).all()  # the timeline lies over the sliders


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Control(start=60), "frames 0 to 59"),
        (Control(sliders={"eyeBlnk": 0.5}), "did you mean eyeBlink"),
        (Control(sliders={"eyeBlink": 7.0}), "between -2 and 2"),
        (Control(timeline={"smile": np.zeros((1, 2))}), "no smile"),
        (Control(gain=3.0), "between 0 and 2"),
        (Control(gate=200.0), "between 6 and 80"),
        (Control(orbit=90.0), "between 0 and 45"),
        (Control(orbit=5.0, orbit_seconds=0.0), "--orbit-seconds 0"),
        (Control(seed=-1), "--seed -1"),
        (Control(expression="angry"), "none of clip, still, blinks"),
        (Control(pose="nowhere.npy"), "nowhere.npy"),
    ],
)
def test_what_cannot_be_done_is_refused(dataset, wrong, said):
    with pytest.raises(UserError, match=said):
        control.plan(dataset, wrong, 10)
    dataset.expression_names = ("a", "b", "c")
    with pytest.raises(UserError, match="knows no blink"):
        control.plan(dataset, Control(expression="blinks"), 10)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"eyeBlink": []}', '{"eyeBlink": [[0, "x"]]}', '{"eyeBlink": 3}',
                                  '{"eyeBlink": [[1, 0], [0, 1]]}', '{"eyeBlink": [[0, NaN]]}'])  # fmt: skip
def test_broken_timelines_and_sliders_are_refused(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json"):
        expression.read_timeline(tmp_path / "t.json", ("eyeBlink",))
    with pytest.raises(UserError, match="NAME=NUMBER"):
        expression.read_sliders(["eyeBlink"], ("eyeBlink",))
