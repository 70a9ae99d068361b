"""What inference calls natively, against its twins in plain JAX: the painted frame, the layer added onto, attention.

A painted frame is whole: layers of Gaussians, each sorted and stopped by itself, over a backdrop, in grey levels.
"""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rasterizer_scenes import look, poison, random_scene

from fg3dgs_jax.model import render
from fg3dgs_jax.model.mlp import multiply_onto, multiply_onto_reference, pack
from fg3dgs_jax.types import Camera


def layers_of(counts=(160, 90, 40), sh=4, spoil=False):
    """What `paint` takes first: Gaussians that overlap within their layers and across them."""
    layers = []
    for seed, count in enumerate(counts):
        scene = random_scene(count, sh=sh, seed=seed)
        if spoil:
            scene, _ = poison(scene)
        known = np.isfinite(scene[7]).all(1)  # the offsets on the screen are not painted with
        layers.append(tuple(array[known] for array in scene[:5]))
    return layers


def camera(width=70, height=50):
    return Camera(jnp.asarray(look()), jnp.asarray([84.0, 55.0, width / 2 + 1.3, height / 2 - 0.7]), width, height)


def backdrop(width=70, height=50, channels=3):
    return np.random.default_rng(5).integers(0, 256, (height, width, channels), np.uint8)


def check(layers, shot, behind):
    """One grey level, and in few values: the sums are the same in another order."""
    want = np.asarray(jax.jit(render.paint_reference)(layers, shot, behind))
    got = np.asarray(jax.jit(render.paint)(layers, shot, behind))
    assert got.dtype == np.uint8 and got.shape == behind.shape
    difference = np.abs(got.astype(int) - want)
    if behind.shape[2] == 4:  # colours where there is next to nothing are next to arbitrary
        assert difference[..., 3].max() <= 1
        difference = difference[want[..., 3] > 25]
    assert difference.max(initial=0) <= 1 and (difference > 0).mean() < 2e-3
    return got


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("sh", [0, 9])
def test_a_painted_frame_is_that_of_the_layers(channels, sh):
    behind = backdrop(channels=channels)
    got = check(layers_of(sh=sh), camera(), behind)
    assert (got != behind).mean() > 0.3


@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 16), (17, 33), (130, 7)])
def test_any_size(width, height):
    check(layers_of((60, 30)), camera(width, height), backdrop(width, height))


@pytest.mark.parametrize("counts", [(1,), (0, 5), (700, 3, 1, 600), (3,) * 16], ids=str)
def test_any_number_of_layers_and_gaussians(counts):
    check(layers_of(counts), camera(), backdrop())


def test_where_nothing_is_the_backdrop_stays_bit_for_bit():
    layers = [(*layer[:3], layer[3] * 0.0, layer[4]) for layer in layers_of()]
    for channels in (3, 4):
        behind = backdrop(channels=channels)
        np.testing.assert_array_equal(render.paint(layers, camera(), behind), behind)


def test_a_layer_lies_over_the_next_whatever_their_depths():
    """One opaque Gaussian each; the second layer's is nearer, and is hidden all the same."""
    shape = np.float32([[1, 0, 0, 0]]), np.full((1, 3), 0.9, np.float32), np.float32([0.99])
    made = ((0.0, (1, 0, 0)), (-1.0, (0, 1, 0)))
    layers = [(np.float32([[0, 0, z]]), *shape, np.float32([colour])) for z, colour in made]
    shot = camera(16, 16)
    red, green = (render.paint(order, shot, np.zeros((16, 16, 3), np.uint8))[8, 8] for order in (layers, layers[::-1]))
    assert red[0] > 200 and red[1] < 30 and green[1] > 200 and green[0] < 30


def test_hostile_gaussians_are_not_there():
    np.testing.assert_array_equal(
        render.paint(layers_of(spoil=True), camera(), backdrop()), render.paint(layers_of(), camera(), backdrop())
    )


def test_broken_cameras_show_the_backdrop():
    for value in (np.nan, np.inf):
        shot = camera()
        np.testing.assert_array_equal(
            render.paint(layers_of(), shot.replace(viewmat=shot.viewmat * value), backdrop()), backdrop()
        )


def test_wrong_operands_are_errors():
    layers = layers_of((5,))
    for wrong in (layers * 17, [(*layers[0][:4], np.zeros((5, 4), np.float32))]):
        with pytest.raises(jax.errors.JaxRuntimeError, match="paint"):
            jax.block_until_ready(render.paint(wrong, camera(), backdrop()))


@pytest.mark.parametrize("points", [1, 300, 5000])
def test_a_layer_is_added_onto(points):
    rng = np.random.default_rng(points)
    sizes = (41, 64, 64, 10)
    kernels = [jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for shape in itertools.pairwise(sizes)]
    start, x = (jnp.asarray(rng.normal(size=(size, points)), jnp.float32) for size in (64, 41))
    got = multiply_onto(start, x, kernels)
    want = multiply_onto_reference(start, x, pack(kernels), sizes)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))  # float32 sums of 64 terms


def digest() -> str:
    """Of a frame with many tiles and layers: two threads share sorting, scattering and painting."""
    picture = render.paint(layers_of((9000, 5000, 3000)), camera(256, 256), backdrop(256, 256))
    return hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()


def run_python(program, **environment):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment, "PYTHONPATH": paths}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bits_do_not_depend_on_threads():
    one, two = (run_python("import test_paint as t\nprint(t.digest())", NPROC=count) for count in ("1", "2"))
    assert one == two and len(one) == 64


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa):
    """The narrower kernels, in a process of their own: the choice is made once."""
    calls = (
        "test_a_painted_frame_is_that_of_the_layers(3, 9)", "test_a_painted_frame_is_that_of_the_layers(4, 0)",
        "test_any_size(17, 33)", "test_a_layer_is_added_onto(300)",
    )  # fmt: skip
    run_python("\n".join(["import test_paint as t", *(f"t.{call}" for call in calls)]), FG3DGS_ISA=isa)


def test_pulling_on_layers_equals_plain_autodiff():
    """`over` has its own gradient: against autodiff of the formula, random cotangents; rounding of three terms."""
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = (7, 5, 3), (7, 5), (7, 5, 3), (7, 5, 3)
    *given, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    pulls = (jax.vjp(f, *given)[1] for f in (render.over, lambda c, a, b: c + (1.0 - a)[..., None] * b))
    for got, want in zip(*(pull(cotangent) for pull in pulls), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
