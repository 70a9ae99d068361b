"""The Gaussian pool: nothing is lost or doubled when slots are freed and filled, and dead slots are silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fg3dgs_jax.model import gaussians as pools
from fg3dgs_jax.model.gaussians import Pool
from fg3dgs_jax.types import Deltas, Gaussians

N = 48
RULE = {  # large is a scale above 0.1
    "grad_threshold": 1.0,
    "percent_dense": 0.1,
    "extent": 1.0,
    "min_opacity": 0.05,
    "max_radius": 0.0,
    "max_scale": 0.0,
}
jitted = jax.jit(pools.densify_and_prune)


def densify(*args, **rule):
    """`densify_and_prune`, jitted, its results as numpy arrays."""
    return jax.device_get(jitted(*args, **rule))


def tagged(alive, *, scale=None, opacity=None, gradient=None, radius=None, seed=0):
    """Gaussians that carry their slot number in sh[:, 0, 0], and moments that carry it too (plus one, in `means`)."""
    rng = np.random.default_rng(seed)
    n = len(alive)
    tag = np.arange(n, dtype=np.float32)
    quats = rng.normal(size=(n, 4)).astype(np.float32)
    opacity = np.full(n, 0.5) if opacity is None else np.asarray(opacity)
    sh = rng.normal(size=(n, 4, 3)).astype(np.float32)
    sh[:, 0, 0] = tag
    gaussians = Gaussians(
        means=jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
        quats=jnp.asarray(quats),
        log_scales=jnp.log(jnp.asarray(np.full(n, 0.05) if scale is None else scale, jnp.float32))[:, None]
        + jnp.asarray([0.0, -1.0, -2.0]),
        logit_opacities=jnp.log(jnp.asarray(opacity / (1 - opacity), jnp.float32)),
        sh=jnp.asarray(sh),
    )
    moments = (
        jax.tree.map(lambda x: jnp.broadcast_to(tag.reshape(-1, *[1] * (x.ndim - 1)) + 1, x.shape), gaussians),
        {"count": jnp.asarray(7, jnp.int32)},
    )
    zeros = np.zeros(n, np.float32)
    pool = Pool(
        alive=jnp.asarray(alive),
        grad_sum=jnp.asarray(zeros if gradient is None else 3 * np.asarray(gradient, np.float32)),
        grad_count=jnp.full(n, 3.0),
        max_radii=jnp.asarray(zeros if radius is None else radius, jnp.float32),
    )
    return gaussians, moments, pool


def test_init_is_grey_uniform_and_as_large_as_its_spacing():
    gaussians, pool = pools.init(jax.random.key(0), 64, 40, 0.1, 2)
    points = np.asarray(gaussians.means)[:40]
    assert int(pool.alive.sum()) == 40 and gaussians.sh.shape == (64, 9, 3)
    assert np.abs(points).max() <= 0.1 and np.all(points.std(0) > 0.03)
    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=-1), axis=1)[:, 1:4].mean(1)
    means, quats, scales, opacities, sh = pools.activate(gaussians, pool.alive, None)
    np.testing.assert_allclose(scales[:40], np.repeat(distances[:, None], 3, 1), rtol=1e-5)  # float32 log and exp
    np.testing.assert_allclose(opacities, np.where(np.arange(64) < 40, 0.1, 0.0), rtol=1e-6)
    assert not np.any(sh)  # grey: the rasterizer adds 0.5
    np.testing.assert_array_equal(quats, np.tile([1, 0, 0, 0], (64, 1)))
    assert np.all(np.isfinite(means))


def test_from_points_keeps_colours_and_refuses_what_does_not_fit():
    colors = np.array([[0, 0.5, 1], [1, 0, 0.25]], np.float32)
    gaussians, pool = pools.from_points(np.float32([[0, 0, 0], [0, 0, 0]]), colors, 4, 1)
    np.testing.assert_allclose(0.5 + pools.SH_C0 * gaussians.sh[:2, 0], colors, atol=1e-6)
    assert np.all(np.isfinite(gaussians.log_scales))  # coincident points
    assert int(pool.alive.sum()) == 2
    alone, _ = pools.from_points(np.zeros((1, 3), np.float32), colors[:1], 1, 0)
    assert np.all(np.isfinite(alone.log_scales))
    with pytest.raises(ValueError, match="capacity 1"):
        pools.from_points(np.zeros((2, 3)), colors, 1, 0)


def test_activate_adds_deltas_to_raw_values():
    alive = np.arange(N) % 3 > 0
    gaussians, _, pool = tagged(alive)
    rng = np.random.default_rng(1)
    deltas = Deltas(*(jnp.asarray(rng.normal(size=(N, k)), jnp.float32) for k in (3, 4, 3)))
    activate = jax.jit(pools.activate)
    means, quats, scales, opacities, sh = activate(gaussians, pool.alive, deltas)
    np.testing.assert_allclose(means, gaussians.means + deltas.means, rtol=1e-6)
    np.testing.assert_allclose(quats, gaussians.quats + deltas.quats, rtol=1e-6)
    np.testing.assert_allclose(scales, np.exp(gaussians.log_scales + deltas.log_scales), rtol=1e-5)
    np.testing.assert_allclose(opacities, np.where(alive, 0.5, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(sh, gaussians.sh)
    only_means = activate(gaussians, pool.alive, Deltas(deltas.means))
    np.testing.assert_array_equal(only_means[1], gaussians.quats)


def test_dead_slots_get_finite_gradients_whatever_they_hold():
    gaussians, _, pool = tagged(np.arange(N) % 2 == 0)
    dead = ~pool.alive
    hostile = jax.tree.map(lambda x: jnp.where(dead.reshape(-1, *[1] * (x.ndim - 1)), 3e4, x), gaussians)
    hostile = hostile.replace(log_scales=gaussians.log_scales)

    def loss(g):
        _, _, scales, opacities, sh = pools.activate(g, pool.alive, None)
        return jnp.sum(opacities * (scales.sum(-1) + sh[:, 0].sum(-1)))

    for leaf in jax.tree.leaves(jax.grad(loss)(hostile)):
        assert np.all(np.isfinite(leaf))
        assert not np.any(np.asarray(leaf)[np.asarray(dead)])


def test_accumulate_counts_only_frames_that_show_the_gaussian():
    _, pool = pools.init(jax.random.key(0), 3, 3, 1.0, 0)
    gradient = jnp.asarray([[3.0, 0.0], [0.0, 4.0], [5.0, 5.0]])
    pool = pools.accumulate(pool, gradient, jnp.asarray([2, 7, 0]), width=20, height=10)
    pool = pools.accumulate(pool, gradient, jnp.asarray([9, 0, 0]), width=20, height=10)
    np.testing.assert_allclose(pool.grad_sum, [60.0, 20.0, 0.0])  # 3 * 20/2, twice; 4 * 10/2, once
    np.testing.assert_allclose(pool.grad_count, [2, 1, 0])
    np.testing.assert_allclose(pool.max_radii, [9, 7, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), density=st.floats(0, 1), pulled=st.floats(0, 1), faint=st.floats(0, 0.5))
def test_densify_neither_loses_nor_doubles_a_gaussian(seed, density, pulled, faint):
    rng = np.random.default_rng(seed)
    alive = rng.random(N) < density
    scale = np.where(rng.random(N) < 0.5, 0.05, 0.4)
    opacity = np.where(rng.random(N) < faint, 0.01, 0.5)
    gradient = np.where(rng.random(N) < pulled, 1 + rng.random(N), 0.1)
    before, moments, pool = tagged(alive, scale=scale, opacity=opacity, gradient=gradient, seed=seed % 100)
    after, (moved, other), fresh, metrics = densify(jax.random.key(seed), before, moments, pool, **RULE)
    before, counts = jax.device_get(before), {name: int(value) for name, value in metrics.items()}
    kept = alive & (opacity > 0.05)
    wanted = kept & (gradient >= 1)
    alive_after = np.asarray(fresh.alive)
    tags = np.asarray(after.sh[:, 0, 0]).astype(int)

    assert counts["pruned"] == (alive & ~kept).sum()
    assert counts["cloned"] + counts["split"] + counts["dropped_no_slot"] == wanted.sum()
    assert counts["cloned"] + counts["split"] == min(wanted.sum(), N - kept.sum())
    assert counts["alive"] == alive_after.sum() == alive.sum() - counts["pruned"] + counts["cloned"] + counts["split"]
    copies = np.bincount(tags[alive_after], minlength=N)
    assert np.all(copies[~kept] == 0) and np.all(copies[kept] >= 1)
    assert np.all(copies <= 1 + wanted) and (copies == 2).sum() == counts["cloned"] + counts["split"]
    np.testing.assert_array_equal(tags[kept], np.flatnonzero(kept))  # survivors stay where they are

    was_split = (copies == 2) & (scale > 0.1)
    child = alive_after & was_split[tags]
    assert was_split.sum() == counts["split"]
    for name in ("quats", "logit_opacities", "sh"):
        np.testing.assert_array_equal(getattr(after, name)[alive_after], getattr(before, name)[tags[alive_after]])
    whole = alive_after & ~child
    np.testing.assert_array_equal(after.means[whole], before.means[tags[whole]])
    np.testing.assert_array_equal(after.log_scales[whole], before.log_scales[tags[whole]])
    shrunk = np.exp(after.log_scales - before.log_scales[tags])[child]
    np.testing.assert_allclose(shrunk, 1 / 1.6, rtol=1e-5)  # float32 log and exp
    assert np.all(np.any(np.asarray(after.means != before.means[tags])[child], axis=-1))

    new = child | (alive_after & ~kept)
    for leaf in jax.tree.leaves(moved):
        leaf = np.asarray(leaf).reshape(N, -1)
        assert not np.any(leaf[new])
        np.testing.assert_array_equal(leaf[kept & ~new], np.broadcast_to(tags[:, None] + 1, leaf.shape)[kept & ~new])
    assert int(other["count"]) == 7
    assert not np.any(fresh.grad_sum) and not np.any(fresh.grad_count) and not np.any(fresh.max_radii)


def test_short_slots_go_to_the_hardest_pulled_and_the_rest_is_counted():
    gradient = np.linspace(1.0, 2.0, N)
    alive = np.arange(N) < N - 3
    before, moments, pool = tagged(alive, gradient=gradient)
    after, _, fresh, metrics = densify(jax.random.key(0), before, moments, pool, **RULE)
    assert int(metrics["cloned"]) == 3 and int(metrics["dropped_no_slot"]) == N - 6 and bool(fresh.alive.all())
    assert sorted(np.asarray(after.sh[N - 3 :, 0, 0]).astype(int)) == [N - 6, N - 5, N - 4]


def test_slots_freed_by_pruning_are_filled_in_the_same_call():
    opacity = np.where(np.arange(N) < 5, 0.01, 0.5)
    gradient = np.where(np.arange(N) >= N - 4, 2.0, 0.0)
    before, moments, pool = tagged(np.ones(N, bool), opacity=opacity, gradient=gradient)
    _, _, fresh, metrics = densify(jax.random.key(0), before, moments, pool, **RULE)
    assert [int(metrics[k]) for k in ("pruned", "cloned", "dropped_no_slot", "alive")] == [5, 4, 0, N - 1]
    assert int((~fresh.alive).sum()) == 1


def test_maxima_prune_and_a_split_escapes_by_its_children():
    scale = np.full(N, 0.05)
    radius = np.zeros(N)
    gradient = np.zeros(N)
    radius[0] = 30  # too wide
    scale[1] = 0.6  # too long
    scale[2], gradient[2] = 0.6, 2.0  # split, the children are of 0.375: short enough
    scale[3], gradient[3] = 0.9, 2.0  # split, the children would be of 0.5625: still too long
    radius[4], scale[4], gradient[4] = 30, 0.2, 2.0  # wide, but split
    before, moments, pool = tagged(np.arange(N) < 5, scale=scale, radius=radius, gradient=gradient)
    maxima = {"max_radius": 20.0, "max_scale": 0.5}
    after, _, fresh, metrics = densify(jax.random.key(0), before, moments, pool, **RULE | maxima)
    assert int(metrics["pruned"]) == 3 and int(metrics["split"]) == 2
    assert sorted(np.asarray(after.sh[:, 0, 0])[np.asarray(fresh.alive)].astype(int)) == [2, 2, 4, 4]
    _, _, off, _ = densify(jax.random.key(0), before, moments, pool, **RULE)  # without maxima nothing is pruned
    assert bool(off.alive[:5].all())


def test_children_are_drawn_from_their_parent():
    gaussians, moments, pool = tagged(np.arange(N) < N // 2, scale=np.full(N, 0.5))
    one = jax.tree.map(lambda x: jnp.broadcast_to(x[3], x.shape), gaussians)
    pool = pool.replace(grad_sum=jnp.full(N, 9.0))
    draws = [densify(jax.random.key(i), one, moments, pool, **RULE) for i in range(100)]
    assert all(fresh.alive.all() for _, _, fresh, _ in draws)
    w, x, y, z = (np.asarray(one.quats[0], np.float64) / np.linalg.norm(one.quats[0])).tolist()
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    covariance = rotation @ np.diag(np.exp(2 * np.asarray(one.log_scales[0], np.float64))) @ rotation.T
    offsets = np.concatenate([np.float64(children.means) for children, *_ in draws]) - np.float64(one.means[0])
    # 4800 samples of standard deviation 0.5: five standard errors of the mean, and of the variance.
    np.testing.assert_allclose(offsets.mean(0), 0, atol=5 * 0.5 / np.sqrt(4800))
    np.testing.assert_allclose(np.cov(offsets.T), covariance, atol=5 * 0.25 * np.sqrt(2 / 4800))


def test_reset_opacity_lowers_and_forgets():
    opacity = np.where(np.arange(N) % 2 == 0, 0.9, 0.004)
    gaussians, moments, _ = tagged(np.ones(N, bool), opacity=opacity)
    reset, (moved, other) = pools.reset_opacity(gaussians, moments, 0.01)
    np.testing.assert_allclose(jax.nn.sigmoid(reset.logit_opacities), np.minimum(opacity, 0.01), rtol=1e-5)
    assert not np.any(moved.logit_opacities)
    np.testing.assert_array_equal(moved.means, moments[0].means)
    assert int(other["count"]) == 7


def test_grow_appends_dead_slots_that_densify_can_fill():
    gaussians, moments, pool = tagged(np.ones(N, bool), gradient=np.full(N, 2.0))
    _, _, _, full = densify(jax.random.key(0), gaussians, moments, pool, **RULE)
    assert int(full["dropped_no_slot"]) == N
    grown, (moved, other), wide = pools.grow(gaussians, moments, pool, 2 * N)
    assert all(leaf.shape[0] == 2 * N for leaf in jax.tree.leaves((grown, moved, wide)))
    assert int(other["count"]) == 7 and int(wide.alive.sum()) == N
    for old, new in zip(jax.tree.leaves(gaussians), jax.tree.leaves(grown), strict=True):
        np.testing.assert_array_equal(old, new[:N])
    assert np.all(np.linalg.norm(grown.quats, axis=-1) > 0)  # a rasterizer may normalise dead slots
    _, _, _, metrics = densify(jax.random.key(0), grown, (moved, other), wide, **RULE)
    assert int(metrics["cloned"]) == N and int(metrics["alive"]) == 2 * N
    with pytest.raises(ValueError, match="cannot shrink"):
        pools.grow(grown, moments, wide, N)
