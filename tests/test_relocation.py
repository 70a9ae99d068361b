"""Relocation: what is shared shows what was there, counts keep to the budget, noise leaves alone what can be seen."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model import gaussians as pool_lib
from fg3dgs_jax.model import relocation
from fg3dgs_jax.training import checks, loop
from fg3dgs_jax.training.step import make_densify, make_step

CAPACITY, ALIVE = 40, 24
ROOT = Path(__file__).parents[1]


def double_sum(opacity, count):
    """The factor as the paper prints it, in float64: usable for small counts, where binomials do not cancel."""
    each = 1.0 - (1.0 - opacity) ** (1.0 / count)
    total = sum(
        math.comb(i - 1, k) * (-1) ** k * each ** (k + 1) / math.sqrt(k + 1)
        for i in range(1, count + 1) for k in range(i)
    )  # fmt: skip
    return opacity / total


@pytest.mark.parametrize("opacity", [0.05, 0.5, 0.9])
def test_the_integral_is_the_papers_double_sum(opacity):
    counts = np.arange(1, 13)
    each, factor = relocation.shares(jnp.full(12, opacity), jnp.asarray(counts))
    # float32 sums of 96 nodes
    np.testing.assert_allclose(factor, [double_sum(opacity, int(n)) for n in counts], rtol=2e-5)
    np.testing.assert_allclose(1.0 - (1.0 - np.asarray(each, np.float64)) ** counts, opacity, rtol=2e-5)


def test_any_count_stays_finite():
    each, factor = relocation.shares(jnp.asarray([0.999, 1.0, 1e-3, 0.5]), jnp.asarray([1000, 50, 1000, 1]))
    assert np.isfinite(each).all() and np.isfinite(factor).all()
    assert np.all(np.asarray(factor) > 0) and np.all(np.asarray(factor) <= 1.0) and float(factor[3]) == 1.0


def pool_of(faint=6, seed=0):
    """A pool with some Gaussians faded, and moments that tell where they come from."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.1, 0.1, (ALIVE, 3)).astype(np.float32)
    gaussians, pool = pool_lib.from_points(points, rng.random((ALIVE, 3)).astype(np.float32), CAPACITY, 1)
    logits = np.array(gaussians.logit_opacities)
    logits[:faint] = -8.0
    logits[faint:ALIVE] = rng.uniform(0.0, 2.0, ALIVE - faint)
    return gaussians.replace(logit_opacities=jnp.asarray(logits)), pool


def relocated(gaussians, pool, growth=0.1, seed=0):
    moments = {"mu": jax.tree.map(jnp.ones_like, gaussians), "count": jnp.ones(())}
    change = jax.jit(relocation.relocate, static_argnames=("faint", "growth"))
    return change(jax.random.key(seed), gaussians, moments, pool, faint=0.005, growth=growth)


def test_faint_ones_move_and_the_count_grows_to_the_budget():
    gaussians, pool = pool_of()
    after, _, pool_after, counts = relocated(gaussians, pool)
    wanted = math.ceil(ALIVE * 1.1)
    assert {k: int(v) for k, v in counts.items()} == {"relocated": 6, "added": wanted - ALIVE, "alive": wanted}
    assert int(pool_after.alive.sum()) == wanted
    opacities = np.asarray(jax.nn.sigmoid(after.logit_opacities))[np.asarray(pool_after.alive)]
    assert opacities.min() > 0.005
    before = {tuple(row) for row in np.asarray(gaussians.means)[6:ALIVE]}
    assert {tuple(row) for row in np.asarray(after.means)[np.asarray(pool_after.alive)]} == before
    for _ in range(20):
        after, _, pool_after, counts = relocated(after, pool_after)
    assert int(pool_after.alive.sum()) == CAPACITY and int(counts["added"]) == 0


def test_what_is_shared_shows_what_was_there():
    """Along lines through a place, the opacity of all that lies there sums up to what the one showed."""
    gaussians, pool = pool_of()
    after, _, pool_after, _ = relocated(gaussians, pool, growth=0.6)
    alive = np.asarray(pool_after.alive)
    line = np.linspace(-6.0, 6.0, 2001)

    def shown(part, members, size):
        opacities = np.asarray(jax.nn.sigmoid(part.logit_opacities), np.float64)[members]
        sizes = np.exp(np.asarray(part.log_scales, np.float64))[members, 0]
        clear = np.prod(
            [1 - o * np.exp(-0.5 * (line * size / s) ** 2) for o, s in zip(opacities, sizes, strict=True)], 0
        )
        return 1.0 - clear[1000], (1.0 - clear).sum()

    several = 0
    for i in range(6, ALIVE):
        members = np.flatnonzero(alive & np.all(np.asarray(after.means) == np.asarray(gaussians.means)[i], axis=1))
        several += len(members) > 1
        size = float(np.exp(gaussians.log_scales[i, 0]))
        found, wanted = shown(after, members, size), shown(gaussians, np.array([i]), size)
        np.testing.assert_allclose(found, wanted, rtol=1e-3)  # opacities near 1 in float32
    assert several >= 3


def test_moments_start_again_where_something_changed():
    gaussians, pool = pool_of()
    after, moments, pool_after, _ = relocated(gaussians, pool)
    mu, alive = np.asarray(moments["mu"].logit_opacities), np.asarray(pool_after.alive)
    same = np.asarray(after.logit_opacities == gaussians.logit_opacities) & np.asarray(pool.alive)
    np.testing.assert_array_equal(mu[alive], same[alive].astype(np.float32))
    assert float(moments["count"]) == 1.0
    assert not np.any(pool_after.grad_sum)


def test_a_pool_with_nothing_to_draw_from_stays_empty():
    gaussians, pool = pool_of(faint=ALIVE)
    after, _, pool_after, counts = relocated(gaussians, pool)
    assert int(counts["alive"]) == int(pool_after.alive.sum()) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_noise_has_the_shape_of_the_gaussian_and_spares_what_is_seen():
    count, reach = 20_000, 50.0
    turn = Rotation.from_euler("xyz", [20, 40, 60], degrees=True)
    quats = np.tile(turn.as_quat()[[3, 0, 1, 2]], (count, 1))
    scales = np.array([4e-3, 2e-3, 1e-3])
    logits = np.full(count, -8.0)
    logits[:10] = 2.0
    part = pool_lib.Gaussians(
        means=jnp.zeros((count, 3)), quats=jnp.asarray(2.0 * quats, jnp.float32),
        log_scales=jnp.asarray(np.tile(np.log(scales), (count, 1)), jnp.float32),
        logit_opacities=jnp.asarray(logits, jnp.float32), sh=jnp.zeros((count, 1, 3)),
    )  # fmt: skip
    alive = np.ones(count, bool)
    alive[10:20] = False
    noise = np.asarray(jax.jit(relocation.shaken)(jax.random.key(0), part, jnp.asarray(alive), reach))
    assert np.abs(noise[:10]).max() < 1e-20 and not noise[10:20].any()
    axes = turn.as_matrix()
    sigma = axes @ np.diag(scales**2) @ axes.T
    switch = 1.0 / (1.0 + np.exp(100.0 * (1.0 / (1.0 + np.exp(8.0)) - 0.005)))
    wanted = (reach * switch) ** 2 * sigma @ sigma
    # 20,000 draws know a covariance to about one per cent
    np.testing.assert_allclose(np.cov(noise[20:].T), wanted, atol=0.04 * np.abs(wanted).max())


def test_a_stage_relocates(tmp_path):
    """From the config to a round: pools reach their budgets, moments stay beside parameters, the next step is sound."""
    synthetic.make(tmp_path / "data", 25, 64)
    dataset = open_dataset(tmp_path / "data")
    config = cli.load_config(f"{ROOT}/configs/ablations.py:fg_relocation")
    config.stages.static.densify.growth = 1.0
    for region in config.regions.values():
        region.update(points=60, capacity=96)
    run = loop.prepare(config, dataset, tmp_path / "run")
    plan = loop.plan(run, run.stages[0], None)
    step, densify = make_step(plan), make_densify(plan)
    state = loop.first_state(run)
    frame = dataset.frame(int(dataset.train_ids[0]))
    state, before = step(state, frame)
    state, counts = densify(state)
    assert all(int(counts[f"{name}/alive"]) == 96 for name in ("face", "mouth", "eyes"))
    state, after = step(state, frame)
    assert int(state.trouble) == 0
    assert {"face/opacity", "face/scale"} < set(after) and float(after["face/opacity"]) < float(before["face/opacity"])
    assert float(after["loss"]) < 1.5 * float(before["loss"])


def test_an_unknown_kind_is_refused():
    config = cli.load_config(f"{ROOT}/configs/fg3dgs.py")
    config.stages.motion.densify.kind = "mcmc"
    with pytest.raises(UserError, match=r"densify\.kind: 'mcmc' is none of classic, relocation"):
        checks.check(config)
