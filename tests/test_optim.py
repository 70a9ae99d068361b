"""Learning rates and freezing are data: a stage that leaves a group out must not move it, nor its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.training import optim
from fg3dgs_jax.types import Gaussians

GROUPS = {
    "means": optim.Group(r".*/gaussians/means", per_extent=True),
    "sh": optim.Group(r".*/gaussians/sh"),
    "others": optim.Group(r".*/gaussians/(quats|log_scales|logit_opacities)"),
    "networks": optim.Group(r".*/motion/.*", decay=0.1),
}


def params():
    n = 4
    gaussians = Gaussians(
        means=jnp.ones((n, 3)), quats=jnp.ones((n, 4)), log_scales=jnp.ones((n, 3)),
        logit_opacities=jnp.ones(n), sh=jnp.ones((n, 4, 3)),
    )  # fmt: skip
    return {"face": {"gaussians": gaussians, "motion": {"layer0": {"kernel": jnp.ones((2, 2))}}}}


def step(ends, progress=0.0, state=None, **also):
    values = params()
    grads = jax.tree.map(jnp.ones_like, values)
    rates = optim.Rates(GROUPS, ends, extent=0.5, sh_rest=0.05)
    return optim.apply(values, grads, state or optim.init(values), progress, rates, **also)


def test_a_group_without_a_rate_is_frozen():
    new, opt = step({"means": (1e-2, 1e-2)})
    moved, still = new["face"]["gaussians"], params()["face"]["gaussians"]
    np.testing.assert_allclose(moved.means, 1 - 0.5 * 1e-2, rtol=1e-6)  # Adam's first step is the rate, x extent
    np.testing.assert_array_equal(moved.quats, still.quats)
    np.testing.assert_array_equal(opt["gaussians"].mu["face"].quats, 0.0)
    np.testing.assert_array_equal(new["face"]["motion"]["layer0"]["kernel"], 1.0)
    assert int(opt["gaussians"].count) == 1 and int(opt["motion"].count) == 0


def test_rates_fall_log_linearly():
    for progress, expected in ((0.0, 1e-2), (0.5, 1e-3), (1.0, 1e-4), (2.0, 1e-4)):
        assert float(optim.rate((1e-2, 1e-4), jnp.asarray(progress))) == pytest.approx(expected, rel=1e-5)


def test_higher_harmonics_learn_slower():
    moved = step({"sh": (1e-2, 1e-2)})[0]["face"]["gaussians"].sh
    np.testing.assert_allclose(1 - np.asarray(moved[:, 0]), 1e-2, rtol=1e-5)
    np.testing.assert_allclose(1 - np.asarray(moved[:, 1:]), 5e-4, rtol=1e-4)  # 0.05 of it; 1 - x in float32


def test_harmonics_above_the_degree_in_use_wait():
    new, opt = step({"sh": (1e-2, 1e-2)}, sh_degree=jnp.asarray(0))
    moved = np.asarray(new["face"]["gaussians"].sh)
    assert np.all(moved[:, 0] < 1)
    np.testing.assert_array_equal(moved[:, 1:], 1.0)
    again, _ = optim.apply(
        new, jax.tree.map(jnp.ones_like, new), opt, 0.0, optim.Rates(GROUPS, {"sh": (1e-2, 1e-2)}, 0.5, 0.05),
        sh_degree=jnp.asarray(1),
    )  # fmt: skip
    assert np.all(np.asarray(again["face"]["gaussians"].sh) < moved)


def test_motion_follows_adamw():
    """Two steps against optax.adamw, whose decay is the same: rate x decay x value."""
    new, opt = step({"networks": (1e-2, 1e-2)})
    values = new | {}
    grads = jax.tree.map(jnp.ones_like, values)
    rates = optim.Rates(GROUPS, {"networks": (1e-2, 1e-2)}, extent=1.0, sh_rest=1.0)
    new, _ = optim.apply(values, grads, opt, 0.0, rates)
    reference = optax.adamw(1e-2, b1=0.9, b2=0.99, eps=1e-15, weight_decay=0.1)
    kernel = jnp.ones((2, 2))
    state = reference.init(kernel)
    for _ in range(2):
        update, state = reference.update(jnp.ones((2, 2)), state, kernel)
        kernel = optax.apply_updates(kernel, update)
    np.testing.assert_allclose(new["face"]["motion"]["layer0"]["kernel"], kernel, rtol=1e-6)


def test_every_parameter_belongs_to_exactly_one_group():
    with pytest.raises(UserError, match="no group"):
        optim.group_of("face/gaussians/colour", GROUPS)
    with pytest.raises(UserError, match="not to one"):
        optim.group_of("face/motion/x", {**GROUPS, "again": optim.Group(r"face/.*")})
    assert "face/gaussians/means" in optim.paths(params())


def leaves(seed, decays=(0.0, 0.1, 0.0, 0.0)):
    """Arrays of several sizes in the middle of a run, one with rates along an axis, one empty."""
    rng = np.random.default_rng(seed)
    shapes = (2000, 9, 3), (50_001,), (3, 700), (0, 3)
    rates = jnp.float32([1.0, *[0.05] * 8])[None, :, None], jnp.float32(1e-2), jnp.float32(3.0), jnp.float32(1.0)

    def draw(shape):
        value, slope, mean = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 1, shape) for _ in range(3))
        return (jnp.asarray(x, jnp.float32) for x in (slope, value, mean, mean**2 * rng.uniform(1, 3, shape)))

    return [optim.Leaf(r, *draw(s), d) for r, s, d in zip(rates, shapes, decays, strict=True)]


@pytest.mark.parametrize("count", [1, 700])
def test_native_step_equals_optax(count):
    """Some ten roundings of float32 each, beside moments that may cancel."""
    given, adam = leaves(count), optim.ADAMS["gaussians"]
    steps = jnp.int32(count), jnp.asarray(True)
    got = jax.jit(lambda: optim.descend(adam, given, *steps))()
    arrays, decays = [leaf[:-1] for leaf in given], [leaf.decay for leaf in given]
    want = jax.jit(lambda: optim.descend_reference(adam, decays, arrays, *steps))()
    for leaf, new, twin in zip(given, got, want, strict=True):
        for k, name in enumerate(("value", "mean", "square")):
            parts = leaf.rates if k == 0 else leaf.gradient**k  # what the new one is a sum of, but for the old one
            limits = 3e-6 * (np.abs(leaf[k + 2]) + np.abs(parts)) + 1e-30
            assert np.all(np.abs(np.asarray(new[k]) - twin[k]) <= limits), (leaf.value.shape, name)


def test_what_rests_only_decays():
    """Zero slopes and moments, of either sign, around single values that learn; lengths that no block divides."""
    rng = np.random.default_rng(5)
    size, alive = 5003, np.array([0, 63, 64, 700, 1500, 1501, 5002])
    slope, mean, square = (np.where(rng.uniform(size=size) < 0.5, np.float32(-0.0), 0) for _ in range(3))
    slope[alive[:3]], mean[alive[3:5]], square[alive[5:]] = 1e-20, -2.0, 1e-30
    value = rng.normal(size=size).astype(np.float32)
    arrays = [jnp.asarray(a, jnp.float32) for a in (slope, value, mean, square)]
    given = [optim.Leaf(jnp.float32(1e-2), *arrays, decay) for decay in (0.0, 0.1)]
    steps = jnp.int32(7), jnp.asarray(True)
    got = jax.jit(lambda: optim.descend(optim.ADAMS["motion"], given, *steps))()
    want = jax.jit(
        lambda: optim.descend_reference(optim.ADAMS["motion"], [0.0, 0.1], [leaf[:-1] for leaf in given], *steps)
    )()
    rests = np.setdiff1d(np.arange(size), alive)
    for new, twin, decay in zip(got, want, (0.0, 0.1), strict=True):
        np.testing.assert_allclose(new[0], twin[0], rtol=3e-6)  # a few roundings
        np.testing.assert_array_equal(np.asarray(new[0])[rests] == value[rests], decay == 0.0)
        for after, expected in zip(new[1:], twin[1:], strict=True):
            assert not np.any(np.asarray(after)[rests])
            np.testing.assert_allclose(after, expected, rtol=1e-6, atol=2e-38)  # two roundings; subnormals may go


def test_a_step_that_is_not_good_changes_nothing():
    given = leaves(0)
    for new, leaf in zip(
        optim.descend(optim.ADAMS["motion"], given, jnp.int32(3), jnp.asarray(False)), given, strict=True
    ):
        for after, before in zip(new, leaf[2:5], strict=True):
            np.testing.assert_array_equal(after, before)
    values = params()
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), values)
    rates = optim.Rates(GROUPS, {"means": (1e-2, 1e-2)}, extent=0.5, sh_rest=1.0)
    new, opt = optim.apply(values, bad, optim.init(values), 0.0, rates, False)
    jax.tree.map(np.testing.assert_array_equal, new, values)
    assert int(opt["gaussians"].count) == 0


def test_the_step_changes_donated_arrays_in_place():
    """No copy of what a step owns: its results are where its operands were."""
    given = leaves(0)[:2]

    def step(owned, lent):
        both = [optim.Leaf(*read, *own, 0.0) for read, own in zip(lent, owned, strict=True)]
        return optim.descend(optim.ADAMS["motion"], both, jnp.int32(3), jnp.asarray(True))

    owned, lent = [leaf[2:5] for leaf in given], [leaf[:2] for leaf in given]
    compiled = jax.jit(step, donate_argnums=0).lower(owned, lent).compile()
    assert " copy(" not in compiled.as_text()


def test_descend_lowers_for_cuda():
    given = leaves(0)
    step = jax.jit(lambda: optim.descend(optim.ADAMS["motion"], given, jnp.int32(3), jnp.asarray(True)))
    assert "fg3dgs_adam" not in step.trace().lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("value, good", [(1e18, True), (-1e20, False), (np.inf, False), (np.nan, False)])
@pytest.mark.parametrize("where", [0, 16_384, 39_999])
def test_steps_are_taken_where_all_squares_are_finite(value, good, where):
    """The kernel looks at 16,384 values at a time."""
    leaves = [np.ones((3, 5), np.float32), np.zeros(0, np.float32), np.ones(40_000, np.float32)]
    assert jax.jit(optim.can_step)({"a": leaves})
    leaves[2][where] = value
    assert bool(jax.jit(optim.can_step)({"a": leaves})) == bool(optim.can_step_reference(*leaves)) == good
