"""The CUDA kernels without a GPU: their own sources, run by the emulation, against the CPU kernel and the reference.

What this cannot see: two warps at work at the same time, the memory order of a GPU, the limits of a chip. Its threads
run in any order one asks for, so a missing barrier shows as a result that depends on the order; all memory is rubbish
before, another in every order; nobody may write beside an array.
"""

import ctypes
import functools
import os
import subprocess
import sys

import emulated
import jax
import numpy as np
import pytest
from rasterizer_scenes import (
    NAMES,
    check_that_hostile_are_absent,
    random_cotangents,
    random_scene,
    reference,
    render,
    render_and_pull,
)

from fg3dgs_jax.model import hashgrid

SPEC = hashgrid.GridSpec(levels=2, min_resolution=4, max_resolution=8)

# As in test_rasterizer_grad.py: float32 sums in another order. No scene here has an alpha so close to 1/255 that one
# side draws it and the other does not (another seed of the same scenes might).
IMAGE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5


def compare(got, want):
    rendered, gradients = got
    want_rendered, want_gradients = want
    for name, factor in (("color", 1), ("alpha", 1), ("depth", 4)):
        a, b = getattr(rendered, name), getattr(want_rendered, name)
        np.testing.assert_allclose(a, b, rtol=0, atol=factor * IMAGE_TOLERANCE, err_msg=name)
    np.testing.assert_array_equal(rendered.radii, want_rendered.radii)
    assert rendered.num_pairs == want_rendered.num_pairs
    for name, a, b in zip(NAMES, gradients, want_gradients, strict=True):
        limit = GRADIENT_TOLERANCE * max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"gradient of {name}")


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("channels", "sh"), [(1, 0), (3, 0), (4, 0), (9, 0), (3, 1), (3, 4), (3, 9), (3, 16)])
def test_equals_cpu_kernel(channels, sh, exact):
    """Any number of channels, in chunks; spherical harmonics; fast and deterministic sums."""
    operands, cotangents = random_scene(channels=channels, sh=sh, seed=6), random_cotangents(channels)
    compare(emulated.render_and_pull(operands, cotangents, exact=exact), render_and_pull(operands, cotangents))


@pytest.mark.parametrize("seed", [3, 4])
def test_equals_reference(seed):
    """The specification itself; the scenes of test_rasterizer_grad.py, whose compiled reference serves again."""
    operands, cotangents = random_scene(channels=8, seed=seed), random_cotangents(8)
    if seed == 3:  # an opaque pile: pixels stop, alphas are capped
        operands = (operands[0] * 0.3, *operands[1:2], operands[2] * 3, np.full_like(operands[3], 0.999), *operands[4:])
    else:  # wide ones beyond the image: the Jacobian is held at its margin
        operands = (operands[0] * np.float32([2.5, 2.5, 0.5]), operands[1], operands[2] * 4, *operands[3:])
    compare(emulated.render_and_pull(operands, cotangents), reference(operands, cotangents))


@pytest.mark.parametrize("n", [0, 1, 300])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 33), (130, 19)])
def test_odd_sizes(n, width, height):
    operands, cotangents = random_scene(n, width=width, height=height), random_cotangents(3, width, height)
    got = emulated.render_and_pull(operands, cotangents, width, height)
    compare(got, render_and_pull(operands, cotangents, width, height))


@pytest.mark.parametrize("opacity", [0.02, 0.9])
def test_crowded_tile(opacity):
    """More Gaussians than a block sorts at a time; faint ones are all visited, opaque ones end early. The far ones come
    first: whatever a block has kept makes room for the next."""
    operands = list(random_scene(3500, width=20, height=18))
    depth = operands[0] @ operands[5][2, :3]
    operands[0] = operands[0][np.argsort(-depth)] * np.float32(0.3)
    operands[3] = np.full(3500, opacity, np.float32)
    cotangents = random_cotangents(3, 20, 18)
    listed = emulated.render_and_pull(operands, cotangents, 20, 18, exact=True)
    compare(listed, render_and_pull(tuple(operands), cotangents, 20, 18))
    for order, room in ((0, 0), (7, -1)):
        again = emulated.render_and_pull(operands, cotangents, 20, 18, exact=True, room=room, order=order)
        assert_same_bits(listed, again)


@pytest.mark.parametrize("room", [0, 100, 300])
def test_lists_without_room(room):
    """Tiles whose list finds no room search all Gaussians: the same bits, whichever tiles they are."""
    operands, cotangents = random_scene(sh=4), random_cotangents()
    want = emulated.render_and_pull(operands, cotangents, exact=True)
    for order in (0, 1, 7):
        got = emulated.render_and_pull(operands, cotangents, exact=True, room=room, order=order)
        assert_same_bits(got, want)


@pytest.mark.parametrize("order", [1, 7, 8, 9])
def test_order_of_threads_changes_no_bit(order):
    """Images always, gradients with deterministic sums; fast sums differ by their rounding only."""
    operands, cotangents = random_scene(400, sh=9, seed=2), random_cotangents()
    exact = emulated.render_and_pull(operands, cotangents, exact=True)
    assert_same_bits(emulated.render_and_pull(operands, cotangents, exact=True, order=order), exact)
    fast, gradients = emulated.render_and_pull(operands, cotangents, order=order)
    assert_same_bits(fast, exact[0])
    compare((fast, gradients), exact)


def test_deterministic_sums_of_any_size():
    """Their unit follows the largest addend: tiny and huge cotangents are summed as well as plain ones."""
    operands, cotangents = random_scene(), random_cotangents()
    for scale in (1e-20, 1e20):
        scaled = [np.float32(scale) * x for x in cotangents]
        _, fast = emulated.render_and_pull(operands, scaled)
        _, exact = emulated.render_and_pull(operands, scaled, exact=True)
        for a, b in zip(fast, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(b).max())


def test_deterministic_sums_when_their_two_passes_disagree():
    """The pass that finds the largest addend is another kernel, in which what cancels may round to nothing."""
    add = emulated.load().emulated_exact_sum
    add.restype, add.argtypes = ctypes.c_float, (ctypes.c_float, ctypes.c_float, ctypes.c_int)
    assert add(1.0, 1.0, 3) == 3.0 and add(1.5, -0.75, 2**20) == -0.75 * 2**20
    assert abs(add(0.0, 1e-9, 1000)) < 1e-30 and 0 <= add(1e-9, 1e-3, 1000) < 1e-5
    assert np.isnan(add(np.inf, 1.0, 1))


def test_broken_cotangents_stay_visible():
    """A NaN in a cotangent is never lost, however the sums are added up, and stays with its pixel's Gaussians."""
    operands, cotangents = random_scene(), random_cotangents()
    cotangents[0][20, 30, 1] = np.nan
    _, fast = emulated.render_and_pull(operands, cotangents)
    _, exact = emulated.render_and_pull(operands, cotangents, exact=True)
    for a, b in zip(fast, exact, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert np.isnan(exact[4][:, 1]).any() and not np.isnan(exact[4][:, 1]).all()
    assert not np.isnan(exact[4][:, [0, 2]]).any()


@pytest.mark.parametrize("sh", [0, 4])
def test_hostile_gaussians_are_not_there(sh):
    check_that_hostile_are_absent(functools.partial(emulated.render_and_pull, exact=True), sh)


@pytest.mark.parametrize("index", [5, 6])
def test_broken_camera(index):
    """A camera of NaN draws nothing and harms nothing."""
    operands, cotangents = random_scene(), random_cotangents()
    broken = np.full_like(operands[index], np.nan)
    operands = (*operands[:index], broken, *operands[index + 1 :])
    rendered, gradients = emulated.render_and_pull(operands, cotangents)
    assert not np.any(rendered.alpha)
    assert not any(np.any(x) for x in gradients[:5])


def test_overflow_is_reported_never_silent():
    operands, cotangents = random_scene(), random_cotangents()
    plain = emulated.render_and_pull(operands, cotangents, exact=True)
    needed = int(plain[0].num_pairs)
    assert needed == render(operands).num_pairs
    assert_same_bits(emulated.render_and_pull(operands, cotangents, exact=True, max_pairs=needed), plain)
    for exact in (False, True):
        short, gradients = emulated.render_and_pull(operands, cotangents, exact=exact, max_pairs=needed - 1)
        assert short.num_pairs == needed
        np.testing.assert_array_equal(short.radii, plain[0].radii)
        assert all(np.isnan(x).all() for x in (short.color, short.alpha, short.depth, *gradients))


@pytest.mark.parametrize(("channels", "sh"), [(3, 0), (5, 0), (3, 16)])
def test_fused_products_change_little(channels, sh):
    """Compiled as nvcc does, with products fused into sums: the same layers, cut and capped at the same Gaussians."""
    operands, cotangents = random_scene(channels=channels, sh=sh, seed=6), random_cotangents(channels)
    got = emulated.render_and_pull(operands, cotangents, fused=True)
    compare(got, emulated.render_and_pull(operands, cotangents))
    searched = emulated.render_and_pull(operands, cotangents, fused=True, room=0, exact=True)
    assert_same_bits(searched, emulated.render_and_pull(operands, cotangents, fused=True, exact=True))


def test_a_call_that_fails_says_so_and_harms_no_later_one():
    """Whichever launch or memset fails: its message, nothing started after it, nothing left for the next call."""
    operands, cotangents = random_scene(20), random_cotangents(width=20, height=18)
    pull = functools.partial(emulated.render_and_pull, operands, cotangents, 20, 18, exact=True)
    grid = functools.partial(
        emulated.grid, 1, np.zeros((3, SPEC.starts[-1])), np.zeros((3, 9)), np.ones((3, 2, 9)), SPEC
    )
    want = pull()
    for call, count in ((pull, 5 + 8), (grid, 2)):  # clear, project, reserve, scatter, blend; those, blend again, ...
        for failing in range(count):
            emulated.load().emulated_failure(failing)
            with pytest.raises(RuntimeError, match="told to fail"):
                call()
            assert_same_bits(pull(), want)
        emulated.load().emulated_failure(count)
        call()
        emulated.load().emulated_failure(-1)


def test_a_launch_has_limits():
    launch = emulated.load().emulated_launch
    assert launch(ctypes.c_int64(0)) is None and launch(ctypes.c_int64(3)) is None  # none is started for no work
    assert b"more work" in launch(ctypes.c_int64(2**31))


SANITIZERS = (
    "-g",
    "-O1",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-DFG_SANITIZED",
)


def test_sanitizers_find_nothing():
    """What compute-sanitizer runs on a GPU, under the compiler's own: the bounds of every array, shared ones too,
    alignment, overflows, conversions. Stacks are left out: fibers bring their own."""
    stacks = ("-fsanitize-address-use-after-return=never",) if "clang" in os.environ.get("CXX", "") else ()
    flags = (*SANITIZERS, *(stacks or ("--param", "asan-stack=0")), *emulated.PLAIN)
    smoke = emulated.compiled(*flags, "-x", "c++", str(emulated.ROOT / "benchmarks" / "gpu_smoke.cu"), "-ldl")
    done = subprocess.run(
        [smoke], capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}, timeout=120
    )
    assert done.returncode == 0 and "smoke: ok" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kind", "words"), [(0, "deadlock"), (1, "deadlock"), (2, "different barriers"), (3, "another stream")]
)
def test_the_emulation_notices_mistakes(kind, words):
    emulated.load()
    code = f"import emulated; emulated.load().emulated_mistake({kind})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=emulated.environment(), timeout=120
    )
    assert done.returncode != 0
    assert words in done.stderr
