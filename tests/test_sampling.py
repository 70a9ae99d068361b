"""The frame order must not depend on anything but seed and step: resuming relies on it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fg3dgs_jax.data import sampling
from fg3dgs_jax.errors import UserError


def metric(count=200, seed=0):
    return np.random.default_rng(seed).random(count).astype(np.float32)


def lips(stop):
    """TG's static stage of the face: the inner mouth opens, in windows of 32 % of its range."""
    return sampling.Curriculum("lips", 15, 0, stop, lower=(0.0, 0.68), upper=(0.32, 1.0))


def blink(start, stop):
    """TG's motion stage of the face: from open eyes to closed ones."""
    return sampling.Curriculum("blink", 15, start, stop, lower=(-0.05, 0.85), upper=(0.4, 1.3))


def mouth(start, stop):
    """TG's mouth branch: wide open mouths only, then every 7th step, down to the 25th percentile."""
    wide = sampling.Curriculum("mouth", 1, 0, start, lower=(0.95, 0.95), upper=(1.0, 1.0), by="rank")
    return wide, sampling.Curriculum("mouth", 7, start, stop, lower=(0.95, 0.25), upper=(1.0, 1.0), by="rank")


def all_curricula():
    """One after the other, and two side by side, as in configs/talking_gaussian.py."""
    return [lips(100), *mouth(60, 900), blink(100, 1000)]


@settings(deadline=None)  # a busy machine is no failure
@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), size=st.integers(1, 50))
def test_a_frame_depends_on_seed_and_step_only(seed, step, size):
    ids = np.arange(size) * 3
    metrics = {"lips": metric(), "blink": metric(seed=1), "mouth": metric(seed=2)}
    warm = sampling.FrameSampler(ids, seed, all_curricula(), metrics)
    for other in (step + 7, 0, step // 2):
        warm.frame_id(other)
    assert warm.frame_id(step) == sampling.FrameSampler(ids, seed, all_curricula(), metrics).frame_id(step)
    assert warm.frame_id(step) in ids


@settings(deadline=None)  # a busy machine is no failure
@given(size=st.integers(1, 40), epoch=st.integers(0, 5), seed=st.integers(0, 100))
def test_every_epoch_sees_every_id_once(size, epoch, seed):
    ids = np.arange(size) + 5
    order = list(sampling.FrameSampler(ids, seed).frame_ids(epoch * size, (epoch + 1) * size))
    assert sorted(order) == ids.tolist()


def test_epochs_and_seeds_differ():
    first, second = (list(sampling.FrameSampler(range(50), 3).frame_ids(50 * k, 50 * k + 50)) for k in (0, 1))
    assert first != second
    assert first != list(sampling.FrameSampler(range(50), 4).frame_ids(0, 50))


def test_epochs_stay_whole_around_curriculum_steps():
    """Steps that a curriculum takes are left out of the count of the epoch."""
    curricula = all_curricula()
    metrics = {name: metric() for name in sampling.METRICS}
    sampler = sampling.FrameSampler(range(40), 0, curricula, metrics)
    free = [sampler.frame_id(step) for step in range(1500) if not any(c.holds(step) for c in curricula)]
    for start in range(0, len(free) - 40, 40):
        assert sorted(free[start : start + 40]) == list(range(40))


@pytest.mark.parametrize("curriculum", [lips(100), blink(100, 1000), *mouth(100, 1000)])
def test_frames_lie_in_the_sliding_window(curriculum):
    """TG Eq. 6: lower bound + k T <= metric <= upper bound + k T."""
    values = metric()
    sampler = sampling.FrameSampler(range(200), 1, [curriculum], {curriculum.metric: values})
    low, high = np.percentile(values, [1, 99])
    steps = [step for step in range(curriculum.start, curriculum.stop) if curriculum.holds(step)]
    assert len(steps) == len(range(-(-curriculum.start // curriculum.every), -(-curriculum.stop // curriculum.every)))
    for step in steps:
        value = values[sampler.frame_id(step)]
        lower, upper = curriculum.window(step)
        if curriculum.by == "value":
            position = np.clip((value - low) / (high - low), 0, 1)
        else:
            position = (values < value).sum() / (len(values) - 1)
        assert lower - 1e-6 <= position <= upper + 1e-6


def test_windows_slide_from_small_to_large_motion():
    values = metric()
    sampler = sampling.FrameSampler(range(200), 1, [lips(3000)], {"lips": values})
    seen = [values[sampler.frame_id(step)] for step in range(0, 3000, 15)]
    assert np.mean(seen[:50]) < 0.4 and np.mean(seen[-50:]) > 0.6


def test_an_empty_window_takes_the_nearest_frames():
    values = np.array([0.0] * 50 + [1.0] * 50, np.float32)
    middle = sampling.Curriculum("lips", 1, 0, 100, lower=(0.4, 0.4), upper=(0.5, 0.5))
    sampler = sampling.FrameSampler(range(100), 0, [middle], {"lips": values})
    assert {values[sampler.frame_id(step)] for step in range(100)} == {0.0}


def test_a_metric_that_never_moves_is_no_trouble():
    sampler = sampling.FrameSampler(range(10), 0, [lips(90)], {"lips": np.zeros(10, np.float32)})
    assert set(sampler.frame_ids(0, 90)) == set(range(10))


def test_curricula_side_by_side_take_turns():
    """A step that two hold is the rarer one's, so that neither starves the other."""
    rare = sampling.Curriculum("lips", 6, 0, 60, lower=(0.9, 0.9), upper=(1.0, 1.0), by="rank")
    often = sampling.Curriculum("mouth", 2, 0, 60, lower=(0.0, 0.0), upper=(0.1, 0.1), by="rank")
    values = np.arange(100, dtype=np.float32)
    sampler = sampling.FrameSampler(range(100), 0, [often, rare], {"lips": values, "mouth": values})
    frames = [sampler.frame_id(step) for step in range(60)]
    assert min(frames[::6]) >= 89 and max(frames[2::6] + frames[4::6]) <= 10
    assert len(set(frames[1::2])) == 30  # all others: one epoch, no frame twice


def test_no_ids_are_refused():
    with pytest.raises(UserError, match="no frame is left"):
        sampling.FrameSampler([], 0)
