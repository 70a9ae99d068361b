"""From a procedural clip to a scored head: what is learned must come from the sound and the expression.

The bar is set by two rivals that render the same held-out frames with the right pose and backdrop: the head before any
training, and the trained head frozen at its mean motion.
"""

from pathlib import Path

import numpy as np
import pytest

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.inference import heldout
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.training import loop
from fg3dgs_jax.training.signals import Interrupt

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


class Silent:
    def update(self, step, stage, metrics):
        pass


pytestmark = pytest.mark.slow  # two to three minutes on two quiet cores


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 900 steps at 96 x 96 pixels, and the head as it was before the first of them."""
    folder = tmp_path_factory.mktemp("end_to_end")
    synthetic.make(folder / "data", 250, 96, seed=1)  # lids close in training and in held-out frames
    dataset = open_dataset(folder / "data")
    config = cli.load_config(str(TINY))
    config.update(schedule_scale=1.0, preview_every=10_000, save_every=10_000, log_every=100)
    for name, steps in {"static": 100, "motion": 700, "fusion": 100}.items():
        config.stages[name].steps = steps
        config.stages[name].densify.update(start=20, stop=300, every=40, shortest=1)
    config.stages.motion.rates.networks = (3e-3, 3e-4)  # a short schedule must move faster
    window = {"lower": (0.5, 0.5), "upper": (1.0, 1.0), "by": "value"}  # and meet closed lids more often
    config.stages.motion.curricula = {"blink": {"metric": "blink", "every": 3, "start": 0, "stop": 600, **window}}
    run = loop.prepare(config, dataset, folder / "run")
    first = loop.first_state(run)
    untrained = Head(run.spec, first.params, {name: pool.alive for name, pool in first.pools.items()}, dataset)
    loop.train(run, Interrupt(), Silent())
    return Head.load(folder / "run"), untrained


def scores(dataset, render):
    """Mean PSNR in dB over the held-out frames: of the mouth box, and of the eye boxes where lids are half closed."""
    result = heldout.predict(dataset, render)
    found = heldout.score_pixels(dataset, result)
    closed = dataset.metrics["blink"][result.ids] >= 0.5
    assert closed.sum() >= 3
    return np.array([found["psnr_mouth"].mean(), found["psnr_eyes"][closed].mean()])


def test_trained_head_beats_untrained_and_static_heads(trained):
    """The mouth must beat both rivals. The eyes beat the untrained head only: lids and gaze take longer to learn."""
    head, untrained = trained
    right, still, raw = (scores(head.dataset, r) for r in (head.render, head.frozen(), untrained.render))
    print("mouth, eyes: trained", right, "static", still, "untrained", raw)
    # Measured: mouth +0.9 dB over static and +5.0 over untrained, eyes +1.2 over untrained. About half of each.
    assert right[0] > still[0] + 0.5
    assert right[0] > raw[0] + 2.5
    assert right[1] > raw[1] + 0.5
