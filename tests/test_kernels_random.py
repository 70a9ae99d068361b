"""The native kernels against their plain JAX twins on scenes, grids, images and networks that hypothesis draws.

Few examples, the same at every run. Many, and others each time, take minutes to hours:
`HYPOTHESIS_PROFILE=long pytest tests/test_kernels_random.py`.
"""

import functools
import hashlib
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rasterizer_scenes import FAST, NAMES, look, random_cotangents, render, render_and_pull
from test_rasterizer import run_python

from fg3dgs_jax.losses import image
from fg3dgs_jax.model import hashgrid, hashgrid_native, mlp
from fg3dgs_jax.rasterizer import reference

settings.register_profile("ci", derandomize=True, max_examples=6)
settings.register_profile("long", max_examples=1000)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
LONG = PROFILE.max_examples > 100
# Every shape is compiled anew, on a machine that may be busy: time says nothing here.
checked = settings(PROFILE, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

MOST = 40  # Gaussians: the reference is compiled for so many, surplus slots are dead
CHANNELS = 6
SIZES = ((33, 20), (17, 37), (1, 1), (64, 16), (15, 47), (48, 33))
SEEDS = st.integers(0, 2**31)


@st.composite
def scenes(draw, most: int = MOST, sizes=SIZES):
    """(operands of `most` Gaussians, all but some dead; number alive; width, height)."""
    rng = np.random.default_rng(draw(SEEDS))
    sh = draw(st.booleans())
    # Each size of each kind is a reference to compile: seconds.
    width, height = draw(st.sampled_from(sizes)) if LONG else sizes[sh % len(sizes)]
    alive = draw(st.integers(0, most))
    spread, size, faint = draw(st.floats(0.1, 1.5)), draw(st.floats(-4.5, -2)), draw(st.floats(0, 0.99))
    opacities = rng.uniform(faint, 1, most) * (np.arange(most) < alive)
    operands = (
        rng.uniform(-spread, spread, (most, 3)),
        rng.normal(size=(most, 4)),
        np.exp(size + rng.uniform(0, 1.5, (most, 3))),
        rng.permutation(opacities),
        0.5 * rng.normal(size=(most, 16, 3)) if sh else rng.uniform(size=(most, CHANNELS)),
        look(draw(st.floats(-1, 1)), draw(st.floats(2, 6))),
        np.array([1.2 * width, 1.1 * height, width / 2 + 1.3, height / 2 - 0.7]) * draw(st.floats(0.8, 1.25)),
        0.3 * rng.normal(size=(most, 2)),
    )
    return tuple(np.asarray(x, np.float32) for x in operands), alive, width, height


@functools.cache
def _truth(width, height):
    pull = functools.partial(render_and_pull, width=width, height=height, backend="reference")
    return jax.jit(pull, compiler_options=FAST)


def truth(operands, cotangents, width, height):
    """The specification in float64: only the kernel rounds to float32."""
    with jax.enable_x64(True):
        wide = [tuple(np.asarray(x, np.float64) for x in y) for y in (operands, cotangents)]
        return jax.tree.map(np.asarray, _truth(width, height)(*wide))


@functools.cache
def _projected(width, height):
    def project(*operands):
        z, mean, covariance, det, rgb = reference._splats(*operands, width, height)
        visible = reference._visible((z, mean, covariance, det, rgb), operands[1], operands[3], 0.01, width, height)[0]
        middle = (covariance[:, 0, 0] + covariance[:, 1, 1]) / 2
        radius = 3 * jnp.sqrt(middle + jnp.sqrt(jnp.maximum(middle**2 - det, 0)))
        return z, mean, covariance, visible, reference._half_extent(operands[3], covariance), radius

    return jax.jit(project, compiler_options=FAST)


def delicate(operands, width, height):
    """Pixels [H, W] where something is so close to a cut-off that float32 may fall on its other side; and whether the
    boxes of tiles, radii or the order in depth are."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in operands]
        z, mean, covariance, visible, extent, radius = map(np.asarray, _projected(width, height)(*wide))
    det = np.linalg.det(covariance)
    edges = np.concatenate([mean - extent, mean + extent, radius[:, None] + 0.5], 1) - 0.5
    drawn = wide[3] >= 1 / 255
    rounding = (np.abs(edges - np.round(edges))[drawn] < 1e-3).any()
    order = np.argsort(z)[visible[np.argsort(z)]]
    ties = (np.diff(z[order]) < 1e-5).any()
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    close, left = np.zeros((height, width), bool), np.ones((height, width))
    for i in order:
        dx, dy = x - mean[i, 0], y - mean[i, 1]
        (a, b), (_, c) = covariance[i]
        alpha = wide[3][i] * np.exp(-0.5 * (c * dx * dx - 2 * b * dx * dy + a * dy * dy) / det[i])
        capped = np.where(alpha >= 1 / 255, np.minimum(alpha, 0.99), 0)
        after = left * (1 - capped)
        for value, limit in ((alpha, 1 / 255), (alpha, 0.99), (after, 1e-4)):
            close |= np.abs(value / limit - 1) < 1e-3
        left = np.where(after >= 1e-4, after, 0)
    return close, rounding, ties


def fewer(operands, count, sh):
    """Of 16 coefficients or six channels the first ones."""
    return (*operands[:4], np.ascontiguousarray(operands[4][:, :count]), *operands[5:])


@checked
@given(scene=scenes(), data=st.data())
def test_rasterizer_equals_reference(scene, data):
    """Values and the gradients of all operands, but for pixels that a rounding may turn over."""
    operands, _, width, height = scene
    sh = operands[4].ndim == 3
    count = data.draw(st.sampled_from((1, 4, 9, 16) if sh else tuple(range(1, CHANNELS + 1))))
    kept = np.arange(operands[4].shape[1]) < count
    operands = (*operands[:4], operands[4] * (kept[:, None] if sh else kept), *operands[5:])
    close, rounding, ties = delicate(operands, width, height)
    assume(not ties)
    clear = np.float32(~close)
    channels = 3 if sh else CHANNELS
    cotangents = random_cotangents(channels, width, height, seed=data.draw(SEEDS))
    d_color, *d_rest = (x * clear.reshape(height, width, *[1] * (x.ndim - 2)) for x in cotangents)
    d_color = d_color if sh else d_color * np.float32(kept)
    want, want_gradients = truth(operands, (d_color, *d_rest), width, height)
    seen = slice(None) if sh else slice(count)
    got, gradients = render_and_pull(fewer(operands, count, sh), (d_color[..., seen], *d_rest), width, height)
    for name, a, b in (
        ("color", got.color, want.color[..., seen]),
        ("alpha", got.alpha, want.alpha),
        ("depth", got.depth, want.depth),
    ):
        # Sums of up to 40 float32 terms below 1, and exponents of up to 6 known to 1e-6; depths are up to 8.
        limit = 4e-5 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(np.asarray(a)[~close], b[~close], rtol=0, atol=limit, err_msg=name)
    if not rounding:
        np.testing.assert_array_equal(got.radii, want.radii)
        assert got.num_pairs == want.num_pairs
    for name, a, b in zip(NAMES, gradients, fewer(want_gradients, count, sh), strict=True):
        # As in test_rasterizer_grad.py, and doubled for shapes that are thinner there.
        limit = 1e-4 * max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"gradient of {name}")


def same_bits(a, b):
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True))


@checked
@given(scene=scenes(), data=st.data())
def test_what_is_not_finite_is_as_good_as_dead(scene, data):
    """Any number of Gaussians with NaN or infinities anywhere: the bits of a scene where they have no opacity."""
    operands, _, width, height = scene
    rows = data.draw(st.lists(st.integers(0, MOST - 1), min_size=1, max_size=6, unique=True))
    poisoned, dead = [x.copy() for x in operands], [x.copy() for x in operands]
    for row in rows:
        array = poisoned[data.draw(st.sampled_from((0, 1, 2, 3, 4, 7)))].reshape(MOST, -1)
        column = data.draw(st.integers(0, array.shape[1] - 1))
        array[row, column] = data.draw(st.sampled_from((np.nan, np.inf, -np.inf)))
        dead[3][row] = 0
    cotangents = random_cotangents(3 if operands[4].ndim == 3 else CHANNELS, width, height)
    (got, gradients), (want, want_gradients) = (render_and_pull(x, cotangents, width, height) for x in (poisoned, dead))
    assert same_bits(jax.tree.leaves(got), jax.tree.leaves(want))
    assert same_bits(gradients, want_gradients)  # the camera's too: an empty slot adds zero in its lane


@checked
@given(scene=scenes(), share=st.floats(0, 1.3))
def test_capacity_is_enough_or_reported(scene, share):
    operands, _, width, height = scene
    plain = render(operands, width, height)
    capacity = int(share * int(plain.num_pairs))
    got = render(operands, width, height, max_pairs=capacity)
    assert got.num_pairs == plain.num_pairs and same_bits([got.radii], [plain.radii])
    images = [(x.color, x.alpha, x.depth) for x in (got, plain)]
    if plain.num_pairs <= capacity:
        assert same_bits(*images)
    else:
        assert all(np.isnan(x).all() for x in images[0])


@st.composite
def grids(draw):
    """(spec, tables, positions, cotangent), some positions outside or NaN. On a bound that is a power of two and at
    positions of ten bits both sides find the same cells: slopes jump from cell to cell."""
    finest = draw(st.integers(3, 64))
    spec = hashgrid.GridSpec(
        levels=draw(st.integers(1, 5)),
        min_resolution=draw(st.integers(2, finest)),
        max_resolution=finest,
        log2_table=draw(st.integers(3, 12)),
        bound=draw(st.sampled_from((0.125, 1.0, 4.0))),
    )
    rng, points = np.random.default_rng(draw(SEEDS)), draw(st.integers(0, 1100))
    tables = rng.uniform(-1, 1, (3, spec.starts[-1]))
    positions = rng.integers(-1050, 1051, (3, points)) / 1024 * spec.bound
    positions[rng.random(positions.shape) < 0.01] = draw(st.sampled_from((np.nan, np.inf, 1e30)))
    cotangent = rng.normal(size=(3, spec.levels, points))
    return spec, *(np.asarray(x, np.float32) for x in (tables, positions, cotangent))


@settings(checked, max_examples=PROFILE.max_examples // 2)  # each is a program to compile
@given(grid=grids())
def test_grid_equals_plain_jax(grid):
    spec, tables, positions, cotangent = grid
    operands = (tables, positions), (positions, cotangent), (tables, positions, cotangent)
    native = hashgrid_native.encode, hashgrid_native.backward_tables, hashgrid_native.backward_positions
    plain = hashgrid.interpolate, hashgrid.tables_gradient, hashgrid.positions_gradient
    twins = jax.jit(lambda o: [f(*x, spec) for f, x in zip(plain, o, strict=True)], compiler_options=FAST)(operands)
    for kernel, twin, x, want in zip(native, plain, operands, twins, strict=True):
        # float32 sums of up to some hundred terms, in another order
        limit = 1e-5 * max(float(jnp.abs(want).max(initial=0)), 1)
        np.testing.assert_allclose(kernel(*x, spec), want, rtol=0, atol=limit, err_msg=twin.__name__)


@checked
@given(shape=st.tuples(st.integers(1, 150), st.integers(1, 140)), contrast=st.floats(0, 1), seed=SEEDS)
def test_photo_equals_plain_jax(shape, contrast, seed):
    """From flat images, whose variances are all rounding, to noise; tiles and their borders of every size."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(0, 1 - contrast)
    color = np.float32(level + contrast * rng.random((*shape, 3)))
    picture = np.uint8(255 * (level + contrast * rng.random((*shape, 3))))
    operands = (
        color,
        rng.random(shape, np.float32),
        picture,
        rng.integers(0, 8, shape, np.uint8),
        rng.random(3, np.float32),
    )
    weights = rng.dirichlet((1, 1, 1))
    (loss, terms), slopes = jax.value_and_grad(image.photo, (0, 1), has_aux=True)(*map(jnp.asarray, operands), weights)
    twin = jax.jit(jax.value_and_grad(image.photo_reference, (0, 1), has_aux=True), compiler_options=FAST)
    with jax.enable_x64(True):
        floats = [np.asarray(x, np.float64) if x.dtype == np.float32 else x for x in (*operands, weights)]
        (want, values), twins = jax.tree.map(np.asarray, twin(*floats))
    # Means of squares below 1 are known to some 1e-7; what is left of them is divided by the variances + C2.
    noise = 1e-6 / (contrast**2 / 6 + image.SSIM_C2)
    np.testing.assert_allclose(loss, want, rtol=0, atol=noise)
    np.testing.assert_allclose(terms, values, rtol=1e-4, atol=noise)
    for slope, other in zip(slopes, twins, strict=True):
        np.testing.assert_allclose(slope, other, rtol=0, atol=10 * noise * max(np.abs(other).max(), 1 / color.size))


@checked
@given(
    sizes=st.lists(st.integers(1, 24), min_size=2, max_size=6),
    points=st.sampled_from((0, 1, 255, 256, 257, 700)),
    seed=SEEDS,
)
def test_perceptron_equals_plain_jax(sizes, points, seed):
    """On small whole numbers the values are exact, whatever the order of sums, and no ReLU is on the edge."""
    rng, sizes = np.random.default_rng(seed), tuple(sizes)
    weights = np.concatenate([rng.integers(-1, 2, a * b) for a, b in itertools.pairwise(sizes)])
    arrays = rng.integers(-2, 3, (sizes[0], points)), weights, rng.integers(-2, 3, (sizes[-1], points))
    x, weights, cotangent = (jnp.asarray(a, jnp.float32) for a in arrays)

    def both(function):
        value, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, weights)
        return value, *pull(cotangent)

    got, want = both(mlp.multiply), jax.jit(lambda: both(mlp.multiply_reference), compiler_options=FAST)()
    np.testing.assert_array_equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):  # sums over points and layers may leave the whole numbers' range
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(initial=0), 1))


def digests() -> list[str]:
    """Of everything that the kernels return, for scenes and networks large enough to keep several threads busy."""
    found = []

    def add(*arrays):
        found.append(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest())

    @settings(checked, max_examples=3)
    @given(scene=scenes(most=1300, sizes=((150, 90),)), grid=grids(), seed=SEEDS)
    def draw(scene, grid, seed):
        operands, _, width, height = scene
        out = render_and_pull(
            operands, random_cotangents(3 if operands[4].ndim == 3 else CHANNELS, width, height), width, height
        )
        add(*jax.tree.leaves(out))
        spec, tables, positions, cotangent = grid
        add(hashgrid_native.encode(tables, positions, spec))
        add(hashgrid_native.backward_tables(positions, cotangent, spec))
        add(hashgrid_native.backward_positions(tables, positions, cotangent, spec))
        rng = np.random.default_rng(seed)
        color, opacity = (jnp.asarray(rng.random(shape), jnp.float32) for shape in ((140, 300, 3), (140, 300)))
        picture, marks = (jnp.asarray(rng.integers(0, 256, x.shape), jnp.uint8) for x in (color, opacity))
        pull = jax.value_and_grad(image.photo, (0, 1), has_aux=True)
        add(*jax.tree.leaves(pull(color, opacity, picture, marks, jnp.ones(3), (1.0, 0.2, 0.1))))
        x, weights = (
            jnp.asarray(rng.normal(size=(9, 2000)), jnp.float32),
            jnp.asarray(rng.normal(size=9 * 5), jnp.float32),
        )
        add(*jax.value_and_grad(lambda x, w: (mlp.multiply(x, w, (9, 5)) ** 2).sum(), (0, 1))(x, weights)[1])

    draw()
    return found


def test_bits_do_not_depend_on_threads():
    """Forward and backward of every kernel, in processes of one and of two threads."""
    program = "import json, test_kernels_random; print(json.dumps(test_kernels_random.digests()))"
    one, two = (run_python(program, NPROC=threads, HYPOTHESIS_PROFILE="ci") for threads in ("1", "2"))
    assert len(one) >= 18 and two == one
