"""Corrected cameras: the maths, what a step learns of them, and poses spoilt on purpose that training finds again."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_training import Silent, copy, moved

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import cameras as inference_cameras
from fg3dgs_jax.inference import heldout
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.model import cameras
from fg3dgs_jax.training import cameras as learned
from fg3dgs_jax.training import loop
from fg3dgs_jax.training.signals import Interrupt, Stopped

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
FOCAL, EXTENT = 150.0, 0.1


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


FRAMES, SIZE = 40, 64


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, FRAMES, SIZE)
    return open_dataset(path)


@pytest.fixture(scope="module")
def spoilt(truth):
    """Poses that are off by about a pixel at random, and by another that changes slowly."""
    rng = np.random.default_rng(0)
    pixel = np.array([0.05, 0.05, 0.05, 0.05, 0.05, 0.15]) * 64 / SIZE
    fast, slow = rng.standard_normal((2, FRAMES, 6))
    slow = slow.cumsum(0) - slow.cumsum(0).mean(0)
    twists = (0.8 * pixel * (fast + slow / slow.std(0))).astype(np.float32)
    viewmats, _ = cameras.corrected(truth.viewmats, jnp.ones(4), twists, jnp.zeros(()), float(truth.extent))
    return inference_cameras.with_cameras(truth, np.asarray(viewmats))


def config(refine: bool, **steps):
    """One region makes the whole head: less to compile."""
    found = cli.load_config(str(TINY))
    found.update(schedule_scale=1.0, preview_every=10**6, save_every=10**6, log_every=10**6, layers=("face",))
    for name, count in {"static": 60, "motion": 800, "fusion": 0, "alignment": 0, **steps}.items():
        found.stages[name].steps = count
        found.stages[name].densify.every = 0
    found.stages.motion.rates.means = (1.2e-4, 1.2e-5)
    found.regions.face.update(exclude=(), points=500, capacity=500)
    found.regions.face.grid.update(levels=2, min_resolution=8, max_resolution=16)
    found.pose.update(refine=refine, rate=(1.5e-2, 1e-3))  # a pixel of so small a picture is 0.05 head radii
    return found


def off_by(dataset, truth, ids):
    """RMS pixels between where both poses see points of the head, after the best rigid motion common to all frames.

    The head and all cameras may turn and shift together: no picture tells.
    """
    ours, right = (np.asarray(d.viewmats)[ids].astype(np.float64) for d in (dataset, truth))
    turn = Rotation.from_matrix(np.swapaxes(right[:, :3, :3], 1, 2) @ ours[:, :3, :3]).mean().as_matrix()
    shift = np.einsum("tji,tj->ti", right[:, :3, :3], ours[:, :3, 3] - right[:, :3, 3]).mean(0)
    points = np.random.default_rng(1).standard_normal((60, 3))
    points *= truth.extent / np.linalg.norm(points, axis=1, keepdims=True)
    errors = []
    for a, b in zip(ours, right, strict=True):
        seen = [points @ a[:3, :3].T + a[:3, 3], (points @ turn.T + shift) @ b[:3, :3].T + b[:3, 3]]
        errors.append(np.subtract(*(x[:, :2] / x[:, 2:] * truth.intrinsics[0] for x in seen)))
    return float(np.sqrt(np.square(errors).sum(-1).mean()))


def trained(dataset, workdir, refine, **steps):
    run = loop.prepare(config(refine, **steps), dataset, workdir)
    return run, loop.train(run, Interrupt(), Silent())


def kept(state):
    """The corrections as a checkpoint holds them."""
    return {name: np.asarray(getattr(state.cameras, name)) for name in ("twists", "visits", "focal")}


def head_of(run, state, dataset):
    alive = {name: pool.alive for name, pool in state.pools.items()}
    return Head(run.spec, state.params, alive, dataset)


def psnr(head, ids):
    return float(
        heldout.score_pixels(head.dataset, heldout.predict(head.dataset, head.render, ids))["psnr_head"].mean()
    )


def test_training_finds_spoilt_poses_again(truth, spoilt, tmp_path):
    run, state = trained(spoilt, tmp_path / "with", True)
    stored = kept(state)
    found = inference_cameras.corrected(spoilt, stored)
    train, test = truth.train_ids, truth.test_ids
    assert np.flatnonzero(stored["visits"]).tolist() == train.tolist()
    before, after = (off_by(d, truth, train) for d in (spoilt, found))
    print("pose error, px:", before, after)
    assert after < 0.5 * before

    plain = head_of(*trained(spoilt, tmp_path / "without", False), spoilt)
    head = head_of(run, state, found)
    print("training frames, dB:", psnr(plain, train), psnr(head, train))
    assert psnr(head, train) > psnr(plain, train) + 0.5

    fitted, twists = head.refine_poses(test)
    refined = head_of(run, state, fitted)
    print("held-out frames, dB:", psnr(plain, test), psnr(head, test), psnr(refined, test))
    assert psnr(refined, test) > psnr(head, test) + 0.5
    assert twists.shape == (len(test), 6)
    others = np.setdiff1d(np.arange(FRAMES), test)
    np.testing.assert_array_equal(fitted.viewmats[others], found.viewmats[others])

    everywhere = np.concatenate([train, test])
    assert off_by(fitted, truth, everywhere) < 0.6 * off_by(spoilt, truth, everywhere)


def test_pixels_of_the_mouth_do_not_move_a_held_out_pose(truth, tmp_path):
    run, state = trained(truth, tmp_path, False, static=60, motion=0, fusion=0)
    index = int(truth.test_ids[0])
    box = truth.lips_box[index]
    _, seen = head_of(run, state, truth).refine_poses([index])

    def painted(frame):
        found = truth.clip.read(frame)
        image = found.image.copy()
        image[box[0] : box[1], box[2] : box[3]] = 255
        return found._replace(image=image)

    other = type(truth)(dataclasses.replace(truth.clip, read=painted))
    np.testing.assert_array_equal(seen, head_of(run, state, other).refine_poses([index])[1])


def test_a_run_with_cameras_continues_bit_for_bit(truth, spoilt, tmp_path):
    steps = {"static": 3, "motion": 6, "fusion": 2}
    whole = trained(spoilt, tmp_path / "whole", True, **steps)[1]
    changing = config(True, **steps)
    changing.log_every = 1
    run = loop.prepare(changing, spoilt, tmp_path / "halves")
    interrupt = Interrupt()

    class StopAt(Silent):
        def update(self, step, stage, metrics):
            interrupt.requested = interrupt.requested or step == 6

    with pytest.raises(Stopped):
        loop.train(run, interrupt, StopAt())
    resumed = loop.train(run, Interrupt(), Silent())
    assert not moved(copy(whole), copy(resumed))
    assert int(np.asarray(whole.cameras.visits).sum()) == 6  # the motion stage's steps, and no others
    assert np.asarray(whole.cameras.twists).any() and float(whole.cameras.focal[0]) != 0.0
    loaded = Head.load(tmp_path / "halves").dataset  # of the folder, whose poses nobody spoilt
    wanted = inference_cameras.corrected(truth, kept(whole))
    np.testing.assert_array_equal(loaded.viewmats, wanted.viewmats)
    np.testing.assert_array_equal(loaded.intrinsics, wanted.intrinsics)
    assert np.any(loaded.viewmats != truth.viewmats) and np.any(loaded.intrinsics != truth.intrinsics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("moton",)}, "pose.stages: no stage 'moton'"),
        ({"rate": (0.0, 1e-3)}, "pose.rate"),
        ({"focal_rate": (1e-4, 0.0)}, "pose.focal_rate"),
        ({"smooth": -1.0}, "pose.smooth"),
    ],
)
def test_bad_fields_are_refused(truth, tmp_path, change, message):
    bad = config(True)
    bad.pose.update(change)
    with pytest.raises(UserError, match=message):
        loop.prepare(bad, truth, tmp_path / "run")
