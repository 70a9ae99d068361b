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


def step(ends, progress=0.0, state=None):
    values = params()
    grads = jax.tree.map(jnp.ones_like, values)
    rates = optim.Rates(GROUPS, ends, extent=0.5, sh_rest=0.05)
    return optim.apply(values, grads, state or optim.init(values), progress, rates)


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
