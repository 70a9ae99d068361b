"""Lips led by their landmarks: where they rest, who moves them, and what the term teaches."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model.render import move
from fg3dgs_jax.training import lips, loop, stages
from fg3dgs_jax.training.step import make_step, move_region, see_frame

CONFIGS = Path(__file__).parents[1] / "configs"
RNG = np.random.default_rng(0)
MOUTH = RNG.normal(size=(20, 2)) * [20.0, 5.0] + 100.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 25, 64)
    return open_dataset(path)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    config = cli.load_config(str(CONFIGS / "tiny.py"))
    config.schedule_scale, config.expression.smooth = 1.0, 0.0
    config.stages.motion.weights = {"landmarks": 1.0}
    config.stages.motion.steps = 150
    config.stages.motion.rates = {"grids": (5e-2, 5e-2), "audio": (1e-2, 1e-2), "networks": (1e-2, 1e-2)}
    return loop.prepare(config, dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def plan(run):
    return loop.plan(run, next(stage for stage in run.stages if stage.name == "motion"), None)


@pytest.mark.parametrize(
    "name, owner",
    [("fg3dgs.py", "face"), ("talking_gaussian.py", "face"), ("ablations.py:fg_lips_in_mouth", "mouth")],
)
def test_the_region_whose_mask_holds_lips_moves_them(dataset, name, owner):
    config = cli.load_config(str(CONFIGS / name))
    assert lips.find(dataset, stages.tasks(config, loop._crops(dataset))).region == owner
    for groups in (stage.only for stage in config.stages.values() if "sync" in stage.weights):
        assert groups and all(owner in regions for regions in groups.values())  # what the expert judges can move


def test_a_head_without_lips_is_refused(dataset):
    config = cli.load_config(str(CONFIGS / "fg3dgs.py"))
    config.layers = ("mouth", "eyes")
    with pytest.raises(UserError, match="no region's mask holds any"):
        lips.find(dataset, stages.tasks(config, loop._crops(dataset)))


def test_resting_lips_are_seen_where_lips_are(dataset, run):
    assert run.lips.points.shape == (20, 3) and np.isfinite(run.lips.points).all()
    for index in dataset.train_ids[::5]:
        frame = dataset.frame(int(index))
        apart = np.asarray(lips.seen(jnp.asarray(run.lips.points), frame)) - frame.lips
        # half a mouth's width: they rest while the filmed lips speak
        assert np.linalg.norm(apart, axis=-1).max() < 0.5 * run.lips.width


def test_the_distance_is_that_of_shapes():
    still = lips.distance(jnp.asarray(MOUTH + np.array([7.0, -3.0])), jnp.asarray(MOUTH), 40.0)
    assert float(still) == pytest.approx(1e-3, rel=0.05)  # what keeps the gradient finite, and rounding at 100 pixels
    lower = np.where(np.arange(20)[:, None] < 10, 2.0, -2.0) * [0.0, 1.0]
    assert float(lips.distance(jnp.asarray(MOUTH + lower), jnp.asarray(MOUTH), 40.0)) == pytest.approx(0.05, rel=1e-3)
    gradient = jax.grad(lips.distance)(jnp.asarray(MOUTH), jnp.asarray(MOUTH), 40.0)
    assert np.isfinite(gradient).all()


def test_finite_differences():
    with jax.enable_x64(True):
        points, along, step = MOUTH + RNG.normal(size=MOUTH.shape), RNG.normal(size=MOUTH.shape), 1e-6
        slope = (
            lips.distance(points + step * along, MOUTH, 40.0) - lips.distance(points - step * along, MOUTH, 40.0)
        ) / (2 * step)
        found = (jax.grad(lips.distance)(jnp.asarray(points), MOUTH, 40.0) * along).sum()
    assert float(found) == pytest.approx(float(slope), rel=1e-6)


def test_only_the_motion_of_the_lips_region_is_taught(run, plan):
    state = jax.tree.map(jnp.asarray, loop.first_state(run))
    frame = run.dataset.frame(int(run.dataset.train_ids[5]))
    offsets = {name: jnp.zeros((len(pool.alive), 2)) for name, pool in state.pools.items()}
    taught = jax.jit(jax.grad(lambda params: see_frame(plan, params, offsets, state, frame, {})[0]))(state.params)
    for region, part in taught.items():
        sizes = {name: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree)) for name, tree in part.items()}
        assert sizes["gaussians"] == 0.0
        assert (sizes["motion"] > 0.0) == (region == run.lips.region)


@pytest.mark.parametrize("region", ["face", "mouth", "eyes"])
def test_the_pass_that_takes_lips_along_moves_gaussians_as_without_them(run, plan, region):
    state, frame = loop.first_state(run), run.dataset.frame(int(run.dataset.train_ids[5]))
    motion = jax.tree.map(lambda x: x + 0.1 * RNG.normal(size=x.shape).astype(x.dtype), state.params[region]["motion"])
    means = state.params[region]["gaussians"].means
    deltas, led = move_region(plan, region, motion, means, frame)
    alone, _ = move(plan.graphs[region], motion, means, frame.condition)
    # 3e-5: other points share a pass of the native kernels, whose sums round apart
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6), deltas, alone)
    assert np.abs(deltas.means).max() > 1e-3
    if region != run.lips.region:
        assert led is None
        return
    points = jnp.asarray(run.lips.points)
    shifted = points + move(plan.graphs[region], motion, points, frame.condition)[0].means
    expected = lips.distance(lips.seen(shifted, frame), frame.lips, run.lips.width)
    np.testing.assert_allclose(led, expected, rtol=3e-5)


def test_lips_come_closer(run, plan):
    state, step, first = jax.tree.map(jnp.asarray, loop.first_state(run)), make_step(plan), []
    name = f"{run.lips.region}/landmarks"
    for i in range(120):
        state, metrics = step(state, run.dataset.frame(int(run.dataset.train_ids[i % 8])))
        first.append(float(metrics[name]))
    # a fifth, of the same eight frames: with the term turned off it stays
    assert np.mean(first[-8:]) < 0.8 * np.mean(first[:8])
