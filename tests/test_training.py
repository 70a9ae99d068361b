"""The trainer on a small procedural clip: stages freeze what they say, trouble stops them, resuming changes nothing."""

import dataclasses
import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model import cameras
from fg3dgs_jax.training import loop, seeds
from fg3dgs_jax.training.signals import Interrupt, Stopped
from fg3dgs_jax.training.step import make_densify, make_step, make_steps, see_frame

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


class Silent:
    """Keeps what the trainer tells."""

    def __init__(self):
        self.metrics = {}

    def update(self, step, stage, metrics):
        self.metrics[step] = (stage, metrics)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 25, 64)
    return open_dataset(path)


def config(**steps):
    found = cli.load_config(str(TINY))
    found.update(schedule_scale=1.0, preview_every=10_000, save_every=10_000, log_every=1)
    for name, count in {"static": 4, "motion": 6, "fusion": 3, "alignment": 0, **steps}.items():
        found.stages[name].steps = count
        found.stages[name].densify.update(start=1, stop=5, every=2, shortest=1)
    return found


def copy(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def run_steps(run, step, state, count, seed=0):
    ids = np.random.default_rng(seed).permutation(run.dataset.train_ids)
    for i in range(count):
        state, metrics = step(state, run.dataset.frame(int(ids[i % len(ids)])))
    return state, metrics


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    return loop.prepare(config(), dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def steps(run):
    """The jitted steps of the run's stages, each traced once."""
    return functools.cache(lambda stage: make_step(loop.plan(run, run.stages[stage], None)))


class _Hashed:
    """A plan as a static argument of jit."""

    def __init__(self, plan):
        self.plan = plan


def _loss(hashed, state, frame):
    def loss(params):
        offsets = {name: jnp.zeros((pool.alive.shape[0], 2)) for name, pool in state.pools.items()}
        loss, seen, _ = see_frame(hashed.plan, params, offsets, state, frame, {})
        return loss, seen.terms

    return jax.value_and_grad(loss, has_aux=True)(state.params)


def moved(before, after):
    """Names of the leaves that differ."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(before)[0]]
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {name for name, (a, b) in zip(names, pairs, strict=True) if not np.array_equal(a, b)}


def test_a_stage_moves_what_it_says_and_nothing_else(run, steps):
    state = loop.first_state(run)
    start = copy(state.params)
    state, _ = run_steps(run, steps(0), state, 2)
    static = copy(state.params)
    changed = moved(start, static)
    assert changed and not any("motion" in name for name in changed)
    assert all(any(f"['{r}']" in name for name in changed) for r in ("face", "mouth", "eyes"))
    state, _ = run_steps(run, steps(1), state.replace(step=jnp.asarray(4, jnp.int32)), 3)
    motion = copy(state.params)
    changed = moved(static, motion)
    for region in ("face", "mouth", "eyes"):
        assert any(f"['{region}']['motion']['grid']" in name for name in changed)
        assert any(f"['{region}']['gaussians'].means" in name for name in changed)
    state, _ = run_steps(run, steps(2), state.replace(step=jnp.asarray(10, jnp.int32)), 2)
    changed = {name.split(".")[-1] for name in moved(motion, copy(state.params))}
    assert changed == {"sh", "logit_opacities"}


def test_harmonics_come_in_one_degree_at_a_time(run, steps):
    for degree, last in ((0, 1), (1, 4), (2, 9)):  # of 9 coefficients
        state = loop.first_state(run).replace(step=jnp.asarray(degree * run.stages[0].sh_every, jnp.int32))
        state, _ = run_steps(run, steps(0), state, 1)
        sh = np.asarray(state.params["face"]["gaussians"].sh)
        assert np.any(sh[:, last - 1]) and not np.any(sh[:, last:])


def test_a_region_is_judged_in_its_window_as_in_the_whole_frame(run):
    """A frame term of weight zero makes the stage render whole layers; the region terms must not notice.

    Gaussians are small, as they are once the head moves: none reaches beyond the head's window.
    """
    state = loop.first_state(run)
    for region in state.params.values():
        region["gaussians"] = region["gaussians"].replace(log_scales=region["gaussians"].log_scales - 3.0)
    stage = dataclasses.replace(run.stages[1], weights={"l1": 1.0, "dssim": 0.2})
    frame = run.dataset.frame(int(run.dataset.train_ids[3]))
    window = jax.jit(lambda plan, s: _loss(plan, s, frame), static_argnums=0)
    both = dataclasses.replace(stage, weights={**stage.weights, "frame_l1": 0.0})
    (_, some), some_grads = window(_Hashed(loop.plan(run, stage, None)), state)
    (_, whole), whole_grads = window(_Hashed(loop.plan(run, both, None)), state)
    for term in loop.plan(run, stage, None).term_names[:-1]:
        # float32 sums over the same pixels, with pixel coordinates rounded differently; SSIM at the window's border
        np.testing.assert_allclose(some[term], whole[term], rtol=1e-3, atol=1e-7, err_msg=term)
    for region in ("face", "mouth", "eyes"):
        a, b = (np.asarray(g[region]["gaussians"].sh) for g in (some_grads, whole_grads))
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * np.abs(b).max(), err_msg=region)


def test_training_brings_the_head_closer(run, steps):
    step, state = steps(0), loop.first_state(run)
    frame, losses = run.dataset.frame(int(run.dataset.train_ids[0])), []
    for _ in range(60):
        state, metrics = step(state, frame)
        losses.append(float(metrics["loss"]))
    # Backgrounds change from step to step, hence the means.
    print("losses", losses[:5], losses[-10:])
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5]), losses


def test_a_loss_that_is_not_finite_changes_nothing_and_is_named(run, steps):
    state = loop.first_state(run)
    good = run.dataset.frame(int(run.dataset.train_ids[0]))
    broken = good.replace(viewmat=np.full((4, 4), np.nan, np.float32))
    plan = loop.plan(run, run.stages[1], None)
    bad_motion = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params["face"]["motion"])
    params = {**state.params, "face": {**state.params["face"], "motion": bad_motion}}
    state = state.replace(params=params)
    before = copy((state.params["mouth"], state.opt["gaussians"].mu, state.step))
    state, _ = steps(1)(state, good)
    assert plan.term_names[int(state.trouble) - 1].startswith("face/delta")
    state, _ = steps(1)(state, broken)  # and stays as it is
    assert not moved(before, copy((state.params["mouth"], state.opt["gaussians"].mu, state.step)))


def test_training_stops_at_a_loss_that_is_not_finite(dataset, tmp_path):
    broken = config()
    broken.stages.static.rates.log_scales = (1e30, 1e30)
    with pytest.raises(UserError, match=r"step \d+: the term .* is not finite"):
        loop.train(loop.prepare(broken, dataset, tmp_path), Interrupt(), Silent())


def test_too_few_pairs_are_reported_and_recovered_from(dataset, tmp_path, caplog):
    tight = config(static=3, motion=0, fusion=0)
    tight.rasterizer.max_pairs = 64
    with caplog.at_level(logging.WARNING):
        state = loop.train(loop.prepare(tight, dataset, tmp_path / "tight"), Interrupt(), Silent())
    assert "needs" in caplog.text and "64" in caplog.text
    free = loop.train(
        loop.prepare(config(static=3, motion=0, fusion=0), dataset, tmp_path / "free"), Interrupt(), Silent()
    )
    assert not moved(copy(free.params), copy(state.params))  # the step that overflowed ran again, with the same frame


def test_densify_keeps_moments_beside_parameters(run, steps):
    state, _ = run_steps(run, steps(0), loop.first_state(run), 3)
    before = {name: int(pool.alive.sum()) for name, pool in state.pools.items()}
    state, counts = make_densify(loop.plan(run, run.stages[0], None))(state)
    for name, pool in state.pools.items():
        added = int(counts[f"{name}/cloned"]) + int(counts[f"{name}/split"]) - int(counts[f"{name}/pruned"])
        assert int(pool.alive.sum()) == before[name] + added == int(counts[f"{name}/alive"])
        assert not np.asarray(pool.grad_sum).any()
    _, metrics = run_steps(run, steps(0), state, 1)
    assert np.isfinite(float(metrics["loss"]))


def test_opacities_are_lowered_at_the_first_round_of_every_period(run, steps):
    """Rounds come every 2 steps, the lowering every 4: at 4 and 8, not at 6; no sooner than that, and dead moments."""
    stage = run.stages[0]
    rule = dataclasses.replace(stage.densify, start=0, stop=100, every=2, reset_every=4, min_opacity=(0.0, 0.0))
    densify = make_densify(loop.plan(run, dataclasses.replace(stage, densify=rule), None))
    begun, _ = run_steps(run, steps(0), loop.first_state(run), 2)
    for at, lowers in ((4, True), (6, False), (8, True)):
        state, _ = densify(jax.tree.map(jnp.copy, begun.replace(step=jnp.int32(stage.start + at))))
        for name, pool in state.pools.items():
            opacities = jax.nn.sigmoid(state.params[name]["gaussians"].logit_opacities)[pool.alive]
            assert (float(opacities.max()) <= 0.0101) == lowers
            assert bool(jnp.any(state.opt["gaussians"].mu[name].logit_opacities != 0)) != lowers


def test_an_interrupted_run_ends_like_an_uninterrupted_one(dataset, tmp_path):
    short = config(motion=4, fusion=0)  # a border of stages and a round of densification before the interruption
    whole = loop.train(loop.prepare(short, dataset, tmp_path / "whole"), Interrupt(), Silent())

    class StopAt(Silent):
        def update(self, step, stage, metrics):
            interrupt.requested = interrupt.requested or step == 6

    interrupt = Interrupt()
    halves = loop.prepare(short, dataset, tmp_path / "halves")
    with pytest.raises(Stopped, match="step 6"):
        loop.train(halves, interrupt, StopAt())
    resumed = loop.train(halves, Interrupt(), Silent())
    assert int(resumed.step) == 8
    assert not moved(copy(whole), copy(resumed))  # bit for bit


CONFIGS = ("fg3dgs.py", "talking_gaussian.py", "talking_gaussian.py:released", "portrait.py")


@pytest.mark.parametrize("name", [*CONFIGS, "ablations.py:fg_lips_in_mouth"])
def test_every_stage_of_a_config_traces(name, dataset, tmp_path):
    """Shapes, terms, groups and curricula of the configs fit together; nothing is compiled."""
    found = cli.load_config(str(TINY.with_name(name)))
    for region in found.regions.values():
        region.update(points=100, capacity=256)
    run = loop.prepare(found, dataset, tmp_path)
    state, frame = jax.eval_shape(lambda: loop.first_state(run)), dataset.frame(0)
    assert run.total_steps == (12_000 if name == "portrait.py" else 60_000)
    for stage in run.stages:
        plan = loop.plan(run, stage, None)
        assert (plan.lips is not None) == (stage.name == "motion")  # landmarks lead the lips while they learn to move
        after, metrics = jax.eval_shape(make_step(plan), state, frame)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert {"loss", "psnr"} < set(metrics)


def test_seeds_lie_inside_the_masks(run):
    for task in run.tasks.values():
        points, colors = seeds.seed_points(run.dataset, task, 300, 0)
        assert len(points) > 50 and points.dtype == np.float32
        assert colors.min() >= 0.0 and colors.max() <= 1.0

        def belongs(index, task=task):
            labels = run.dataset.pictures(int(index)).labels
            return ((labels & task.include) != 0) & ((labels & task.exclude) == 0)

        index = int(max(run.dataset.train_ids, key=lambda i: belongs(i).sum()))  # a mouth wide open has an inside
        pixels = cameras.project(points, run.dataset.viewmats[index], run.dataset.intrinsics).astype(int)
        inside = belongs(index)[pixels[:, 1].clip(0, 63), pixels[:, 0].clip(0, 63)]
        assert inside.mean() > 0.5  # each view alone may disagree with the vote of 24


def test_triangulation_finds_a_point():
    rng = np.random.default_rng(0)
    point, intrinsics = np.array([0.02, -0.03, 0.05]), np.array([300.0, 310.0, 128.0, 120.0])
    viewmats = np.tile(np.eye(4), (5, 1, 1))
    viewmats[:, :3, 3] = [0, 0, 0.7] + 0.1 * rng.standard_normal((5, 3))
    pixels = np.stack([cameras.project(point[None], view, intrinsics)[0] for view in viewmats])
    np.testing.assert_allclose(cameras.triangulate(pixels, viewmats, intrinsics), point, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schedule=("statc",)), "statc"),
        (lambda c: c.update(schedule=()), "at least one"),
        (lambda c: c.stages.static.weights.update(ssim=1.0), "no such loss term"),
        (lambda c: c.stages.static.rates.update(colour=(1.0, 1.0)), "no such group"),
        (lambda c: c.regions.face.update(include=("hed",)), "no label"),
        (lambda c: c.regions.face.update(box="nose"), "nose"),
        (lambda c: c.regions.face.update(motion="fast"), "fast"),
        (lambda c: c.groups.means.update(pattern="x"), "no group"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_it_starts(dataset, tmp_path, change, message):
    bad = config()
    with bad.unlocked():
        change(bad)
    with pytest.raises(UserError, match=message):
        loop.prepare(bad, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_steps_in_one_call_are_the_steps_one_by_one(run, steps, dataset):
    """However they are divided among calls: the same bits. A program of its own rounds apart."""
    frames = [dataset.frame(int(i)) for i in dataset.train_ids[:5]]
    several = make_steps(loop.plan(run, run.stages[1], None))
    begin = copy(loop.first_state(run).replace(step=jnp.asarray(4, jnp.int32)))

    def taken(*counts):
        state, left, metrics = jax.tree.map(jnp.array, begin), list(frames), None
        for count in counts:
            given, left = left[:count], left[count:]
            state, metrics = several(state, loop.stacked(given), count)
        return copy((state, metrics))

    whole, parts = taken(5), taken(2, 3)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    state = jax.tree.map(jnp.array, begin)
    for frame in frames:
        state, metrics = steps(1)(state, frame)
    assert int(whole[0].step) == int(state.step) == 9
    # Adam turns a rounded gradient near zero into a step of up to the rate: 5 steps of at most 1e-2
    apart = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max(initial=0)), whole[0].params, state.params)
    assert max(jax.tree.leaves(apart)) < 5e-3
    assert whole[1]["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-3)
