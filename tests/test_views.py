"""What a region is judged on: its mask, what it shares with the regions in front, what must stay empty."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.training import views
from fg3dgs_jax.training.stages import RegionTask, tasks
from fg3dgs_jax.types import Label, Rendered

EYES = RegionTask(include=int(Label.EYES), exclude=0, box="eyes", crop=(48, 48), grad_threshold=1.0)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 25, 64)
    return open_dataset(path).frame(0)


def view(frame, task):
    window = views.window_of(task, frame, whole=False)
    empty = jnp.zeros((window.height, window.width))
    rendered = Rendered(jnp.zeros((*empty.shape, 3)), empty, empty, jnp.zeros(0, jnp.int32), jnp.zeros((), jnp.int32))
    layer = views.Layer(rendered, None)
    found = views.region_view(layer, jnp.zeros(0, bool), frame, task, window, jnp.zeros(3), {})
    return found, np.asarray(window.crop(frame.labels))


@pytest.mark.parametrize("pixels", [1, 3])
def test_a_mask_grows_by_a_square(pixels):
    mask = np.random.default_rng(0).random((23, 17)) > 0.97
    mask[0, 16] = True  # stays inside the image
    grown = jax.jit(views._grown, static_argnums=1)(jnp.asarray(mask), pixels)
    np.testing.assert_array_equal(grown, binary_dilation(mask, np.ones((2 * pixels + 1,) * 2)))


def test_a_region_goes_on_beneath_the_one_in_front_but_not_beyond_the_head(frame):
    without, labels = view(frame, EYES)
    overlapping, _ = view(frame, dataclasses.replace(EYES, overlap=2 / 64))
    eyes, head = (labels & Label.EYES) != 0, (labels & Label.HEAD) != 0
    np.testing.assert_array_equal(without.inside, eyes)
    np.testing.assert_array_equal(overlapping.inside, binary_dilation(eyes, np.ones((5, 5))) & head)
    assert not np.any(np.asarray(overlapping.inside & overlapping.outside))
    assert np.asarray(overlapping.inside).sum() > eyes.sum()
    cut = frame.replace(labels=jnp.where(frame.labels & Label.EYES, frame.labels, 0).astype(jnp.uint8))
    np.testing.assert_array_equal(view(cut, dataclasses.replace(EYES, overlap=2 / 64))[0].inside, eyes)


def test_a_config_says_how_far_a_region_goes_on():
    config = cli.load_config(str(Path(__file__).parents[1] / "configs" / "portrait.py"))
    found = tasks(config, dict.fromkeys(("", "lips", "eyes"), (48, 48)))
    assert found["eyes"].overlap == config.regions.eyes.overlap > 0.0  # what lies behind the face's hole
    assert found["face"].overlap == 0.0  # in front: what it covered would be seen
