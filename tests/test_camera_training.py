"""Corrected cameras in training: poses spoilt on purpose are found again, a run continues with them bit for bit."""

import dataclasses
from pathlib import Path

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
from fg3dgs_jax.training import loop
from fg3dgs_jax.training.signals import Interrupt, Stopped
from fg3dgs_jax.types import Label

pytestmark = pytest.mark.slow  # heads are trained: most of a minute on two cores
TINY = Path(__file__).parents[1] / "configs" / "tiny.py"

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
    found.update(schedule_scale=1.0, preview_every=10**6, save_every=10**6, log_every=10**6)
    for name, count in {"static": 60, "motion": 800, "fusion": 0, **steps}.items():
        found.stages[name].steps = count
        found.stages[name].densify.every = 0
    found.stages.motion.rates.means = (1.2e-4, 1.2e-5)
    found.update(layers=("face",), schedule=("static", "motion", "fusion"))
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
    assert after < 0.7 * before

    plain = head_of(*trained(spoilt, tmp_path / "without", False), spoilt)
    head = head_of(run, state, found)
    print("training frames, dB:", psnr(plain, train), psnr(head, train))
    assert psnr(head, train) > psnr(plain, train) + 0.3

    fitted, twists = head.refine_poses(test)
    refined = head_of(run, state, fitted)
    print("held-out frames, dB:", psnr(plain, test), psnr(head, test), psnr(refined, test))
    assert psnr(refined, test) > psnr(head, test) + 0.5
    assert twists.shape == (len(test), 6)
    others = np.setdiff1d(np.arange(FRAMES), test)
    np.testing.assert_array_equal(fitted.viewmats[others], found.viewmats[others])

    everywhere = np.concatenate([train, test])
    assert off_by(fitted, truth, everywhere) < 0.75 * off_by(spoilt, truth, everywhere)


def test_pixels_of_mouth_and_hanging_hair_do_not_move_a_held_out_pose(truth, tmp_path):
    run, state = trained(truth, tmp_path, False, static=60, motion=0, fusion=0)
    index = int(truth.test_ids[0])
    row0, row1, col0, col1 = truth.lips_box[index]
    below_eyes = int(truth.clip.eye_boxes[index][:, 1].max())

    def twists(lips, low, high):
        """With these greys painted over lips, over hair that hangs from below the eyes, and over hair above them."""

        def painted(frame):
            found = truth.clip.read(frame)
            image, labels = found.image.copy(), found.labels.copy()
            labels[:, col1 + 12 : col1 + 18] |= np.uint8(Label.HAIR)
            for grey, rows, cols in (
                (lips, slice(row0, row1), slice(col0, col1)),
                (low, slice(below_eyes, None), slice(col1 + 12, col1 + 18)),
                (high, slice(below_eyes), slice(col1 + 12, col1 + 18)),
            ):
                if grey is not None:
                    image[rows, cols] = grey
            return found._replace(image=image, labels=labels)

        other = type(truth)(dataclasses.replace(truth.clip, read=painted))
        return head_of(run, state, other).refine_poses([index])[1]

    seen = twists(None, None, None)
    np.testing.assert_array_equal(seen, twists(255, 0, None))
    assert np.any(seen != twists(None, None, 0))


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
