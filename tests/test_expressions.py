"""Expressions at load time: ranges of the training frames, smoothing, and nothing learned of held-out frames."""

import dataclasses

import numpy as np
import pytest

from fg3dgs_jax import train
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import expressions, synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.training import defaults

NAMES = ("browDown", "eyeBlink", "gaze_x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 40, 64)
    return path


@pytest.fixture
def clip(folder):
    rng = np.random.default_rng(0)
    tracks = np.stack([0.2 + 0.5 * rng.random(40), 0.1 + 0.3 * rng.random(40), 0.2 + 0.1 * rng.normal(size=40)], 1)
    known = open_dataset(folder).clip
    return dataclasses.replace(known, expression=tracks.astype(np.float32), expression_names=NAMES)


def changed_where_held_out(clip, value):
    track = clip.expression.copy()
    track[clip.test_ids] = value
    return dataclasses.replace(clip, expression=track)


@pytest.mark.parametrize("fields", [{"normalise": True}, {"smooth": 1.5}, {"normalise": True, "smooth": 1.0}])
def test_held_out_frames_tell_nothing(clip, fields):
    """Whatever the held-out frames show, the others get the same."""
    others = np.setdiff1d(np.arange(clip.num_frames), clip.test_ids)
    plain, strange = (expressions.prepared(c, **fields).expression for c in (clip, changed_where_held_out(clip, 9.0)))
    np.testing.assert_array_equal(plain[others], strange[others])
    assert np.any(plain[others] != clip.expression[others])
    # and what the others show does not blur into them
    if "normalise" not in fields:
        still = clip.expression.copy()
        still[others] = 5.0
        moved = expressions.prepared(dataclasses.replace(clip, expression=still), **fields).expression
        np.testing.assert_array_equal(moved[clip.test_ids], plain[clip.test_ids])


def test_ranges_are_this_persons(clip):
    track = expressions.prepared(clip, normalise=True).expression[clip.train_ids]
    for column, high in ((0, 97), (1, 99)):
        assert np.percentile(track[:, column], 10, method="lower") == 0.0  # the frame below the percentile is cut at 0
        assert np.percentile(track[:, column], high) == pytest.approx(1.0, abs=1e-5)
    assert track[:, 0].min() >= 0.0 and track[:, 0].max() <= 1.2
    assert abs(np.median(track[:, 2])) < 1e-6 and track[:, 2].min() < -0.5  # gaze keeps its sign


def test_what_hardly_varies_is_not_blown_up(clip):
    track = clip.expression.copy()
    track[:, 0] = 0.3 + 1e-3 * np.random.default_rng(1).random(len(track))
    found = expressions.prepared(dataclasses.replace(clip, expression=track), normalise=True).expression
    assert found[:, 0].max() < 0.05


def test_lids_and_gaze_stay_sharp(clip):
    found = expressions.prepared(clip, smooth=2.0).expression
    np.testing.assert_array_equal(found[:, 1:], clip.expression[:, 1:])
    assert found[clip.train_ids, 0].std() < 0.6 * clip.expression[clip.train_ids, 0].std()
    flat = dataclasses.replace(clip, expression=np.full_like(clip.expression, 0.7))
    np.testing.assert_allclose(expressions.prepared(flat, smooth=2.0).expression, 0.7, rtol=1e-6)


def test_nothing_asked_nothing_changed(clip):
    assert expressions.prepared(clip) is clip
    with pytest.raises(UserError, match=r"expression\.smooth=-1"):
        expressions.prepared(clip, smooth=-1.0)


def test_the_trainer_asks_for_it(folder, tmp_path):
    config = defaults.base()
    config.data = str(folder)
    plain = train.find_dataset(config, tmp_path)
    config.expression.smooth = 2.0
    smooth = train.find_dataset(config, tmp_path)
    assert np.any(smooth.expression != plain.expression) and smooth.fingerprint == plain.fingerprint
    condition = smooth.frame(int(plain.train_ids[5])).condition.expression
    np.testing.assert_array_equal(condition[clips.TOKENS // 2], smooth.expression[plain.train_ids[5]])
