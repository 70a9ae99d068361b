"""Principal components of audio windows: what they are, that networks see them alone, and that they never learn."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio_basis as lib
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.model import motion
from fg3dgs_jax.training import loop
from fg3dgs_jax.training.signals import Interrupt

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
COMPONENTS = 3


def windows(count=60, shape=(4, 5), seed=0):
    rng = np.random.default_rng(seed)
    strong = rng.normal(size=(count, COMPONENTS)) * [3.0, 2.0, 1.0] @ rng.normal(size=(COMPONENTS, shape[0] * shape[1]))
    return (strong.reshape(count, *shape) + 0.01 * rng.normal(size=(count, *shape)) + 7.0).astype(np.float32)


def codes(basis, given):
    return np.tensordot(given - basis.mean, basis.directions, 2)


def test_components_are_the_directions_of_most_variance():
    given = windows()
    basis = lib.audio_basis(given, COMPONENTS)
    found = codes(basis, given)
    rows = given.reshape(len(given), -1).astype(np.float64)
    variances = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1][:COMPONENTS]
    # float32 windows of order 10: six digits
    np.testing.assert_allclose(found.var(0) / found.var(0).sum(), variances / variances.sum(), rtol=1e-4)
    assert np.sqrt(np.square(found).mean()) == pytest.approx(1.0, rel=1e-4)
    axes = basis.directions.reshape(-1, COMPONENTS)
    gram = axes.T @ axes
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(COMPONENTS), atol=1e-4 * gram[0, 0])


def test_a_long_clip_is_looked_at_here_and_there(monkeypatch):
    monkeypatch.setattr(lib, "MOST", 30)
    given = windows(300)
    few = lib.audio_basis(given[np.linspace(0, 299, 30).round().astype(int)], COMPONENTS)
    np.testing.assert_array_equal(lib.audio_basis(given, COMPONENTS).directions, few.directions)


@pytest.mark.parametrize("count, components", [(60, 21), (3, 3), (1, 1), (60, 0)])
def test_more_components_than_there_are_is_an_error(count, components):
    with pytest.raises(ValueError, match=f"do not vary in {components} directions"):
        lib.audio_basis(windows(count), components)


def test_the_encoder_sees_the_components_alone():
    given, rng = jnp.asarray(windows(8)), np.random.default_rng(1)
    basis = lib.audio_basis(windows(), COMPONENTS)
    full = motion.AudioEncoder((4, 5, COMPONENTS), rngs=nnx.Rngs(0))
    full.basis.mean[...], full.basis.directions[...] = basis.mean, basis.directions
    plain = motion.AudioEncoder((1, COMPONENTS), rngs=nnx.Rngs(0))
    # float32 sums of 20 terms of order 10 against directions of length about 0.1
    np.testing.assert_allclose(full(given)[0], plain(codes(basis, given)[:, None])[0], atol=1e-4)
    off = rng.normal(size=given.shape)
    axes = basis.directions.reshape(-1, COMPONENTS)
    off = off.reshape(8, -1) - off.reshape(8, -1) @ axes @ np.linalg.inv(axes.T @ axes) @ axes.T
    np.testing.assert_allclose(full(given + off.reshape(given.shape))[0], full(given)[0], atol=1e-4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 25, 64)
    return open_dataset(path)


def config(components):
    found = cli.load_config(str(TINY))
    found.update(schedule_scale=1.0, preview_every=10_000, save_every=10_000, audio_components=components)
    found.audio_noise.update(each=0.5, level=0.0)
    for name, count in {"static": 1, "motion": 3, "fusion": 1, "alignment": 0}.items():
        found.stages[name].steps = count
    return found


class Quiet:
    """Progress that nobody watches."""

    def update(self, step, stage, metrics):
        """Says nothing."""


def test_a_run_keeps_its_basis_and_its_head_brings_it(clip, tmp_path):
    found = config(COMPONENTS)
    found.data = str(clip.path)
    run = loop.prepare(found, clip, tmp_path)
    expected = lib.audio_basis(clip.audio_features[clip.train_ids], COMPONENTS)
    end = loop.train(run, Interrupt(), Quiet())
    for region in ("face", "mouth"):
        for name, value in end.params[region]["motion"]["audio"]["basis"].items():
            np.testing.assert_array_equal(value, getattr(expected, name))
    assert "audio" not in end.params["eyes"]["motion"]
    # 0.5 deviations along each direction
    noise = loop.plan(run, run.stages[1], None).audio_noise
    assert noise * np.linalg.norm(expected.directions[..., 1]) == pytest.approx(0.5, rel=1e-4)

    head = Head.load(tmp_path)
    frame = clip.frame(3)
    assert head.spec == run.spec and head.spec.audio_components == COMPONENTS
    assert head.render(frame.condition, frame.viewmat, frame.backdrop).shape == frame.image.shape


@pytest.mark.parametrize("components, message", [(-1, "give a number"), (1000, "is too little")])
def test_components_that_cannot_be_are_refused(clip, tmp_path, components, message):
    with pytest.raises(UserError, match=message):
        loop.prepare(config(components), clip, tmp_path)
