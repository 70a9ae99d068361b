"""The rasterizer as an op: what it promises beside equal values (test_rasterizer_grad.py): transformations of JAX,
hostile input, determinism, threads, capacity, errors. Processes of their own where threads or devices are set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rasterizer_scenes import (
    FAST,
    NAMES,
    check_that_hostile_are_absent,
    look,
    poison,
    random_cotangents,
    random_scene,
    reference,
    render,
    render_and_pull,
)

from fg3dgs_jax import native
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.rasterizer import rasterize

TESTS = Path(__file__).parent


def run_python(code: str, *, timeout: float = 300, **environment: str) -> dict:
    """Runs `code` in a fresh process and returns the JSON of its last line; NPROC sets the threads of its pool."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def one_gaussian(opacity=0.5, scale=0.1, z=2.0, offset=(0.0, 0.0)):
    """A Gaussian before an axis-aligned camera of focal length 20, centred on the pixel (10, 10) of a 21 x 21 image."""
    operands = (
        [[offset[0] * z / 20, offset[1] * z / 20, z]],
        [[1, 0, 0, 0]],
        [[scale] * 3],
        [opacity],
        [[0.2, 0.4, 0.8]],
        np.eye(4),
        [20, 20, 10.5, 10.5],
        [[0, 0]],
    )
    return tuple(np.asarray(x, np.float32) for x in operands)


def test_closed_form():
    """One isotropic Gaussian: alpha = opacity exp(-r^2 / 2 sigma^2) with sigma^2 = (f s / z)^2 + 0.3 on the axis."""
    rendered = render(one_gaussian(), 21, 21)
    y, x = np.mgrid[:21, :21] - 10
    # Off the axis the Jacobian's tilt changes the covariance by (x / f)^2 = 0: the mean is on the axis.
    alpha = 0.5 * np.exp(-(x**2 + y**2) / (2 * (1.0 + 0.3)))
    alpha[alpha < 1 / 255] = 0
    np.testing.assert_allclose(rendered.alpha, alpha, atol=1e-6)  # float32 rounding of values below 1
    np.testing.assert_allclose(rendered.color, alpha[..., None] * [0.2, 0.4, 0.8], atol=1e-6)
    np.testing.assert_allclose(rendered.depth, alpha * 2, atol=2e-6)
    assert rendered.radii.tolist() == [4]  # ceil(3 sqrt(1.3))
    # alpha >= 1/255 up to 3.55 px: pixels 7 to 13, all in the first tile.
    assert rendered.num_pairs == 1


def test_nearer_covers_farther():
    near, far = one_gaussian(0.9, z=1.0, scale=0.05), one_gaussian(0.9, z=2.0)
    gaussians = (np.concatenate(pair) for pair in zip(far[:5], near[:5], strict=True))
    both = (*gaussians, *near[5:7], np.zeros((2, 2), np.float32))
    both[4][:] = [[1, 0, 0], [0, 1, 0]]  # the far one red, the near one green
    center = np.asarray(render(both, 21, 21).color[10, 10])
    np.testing.assert_allclose(center, [0.1 * 0.9, 0.9, 0], atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 15, 1100])
def test_any_number(n):
    """Dead slots change no bit, and their gradients are zero; N = 0 is an empty image."""
    operands, cotangents = random_scene(n), random_cotangents()
    rendered, gradients = render_and_pull(operands, cotangents)
    padded = tuple(np.concatenate([x, np.ones((9, *x.shape[1:]), np.float32)]) for x in operands[:5])
    padded[3][n:] = 0
    padded = (*padded, *operands[5:7], np.zeros((n + 9, 2), np.float32))
    padded[7][:n] = operands[7]
    with_dead, dead_gradients = render_and_pull(padded, cotangents)
    for name in ("color", "alpha", "depth", "num_pairs"):
        np.testing.assert_array_equal(getattr(with_dead, name), getattr(rendered, name))
    for name, a, b in zip(NAMES, gradients, dead_gradients, strict=True):
        if name in ("viewmat", "intrinsics"):
            np.testing.assert_allclose(a, b, rtol=1e-5)  # other lanes, other order of the sum
        else:
            np.testing.assert_array_equal(a, b[:n])
            assert not np.any(b[n:])
    assert n or not (np.any(rendered.color) or np.any(rendered.alpha) or np.any(rendered.depth))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 33), (130, 19)])
def test_odd_sizes(width, height):
    """Tiles cut by the image's edges, against the reference."""
    operands = random_scene(40, width=width, height=height)
    got = render(operands, width, height)
    want = jax.jit(lambda *x: render(x, width, height, backend="reference"), compiler_options=FAST)(*operands)
    for name, tolerance in (("color", 1e-5), ("alpha", 1e-5), ("depth", 4e-5)):  # as in test_rasterizer_grad.py
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=tolerance)
    assert got.num_pairs == want.num_pairs
    np.testing.assert_array_equal(got.radii, want.radii)


@pytest.mark.parametrize("sh", [0, 4])
def test_hostile_gaussians_are_not_there(sh):
    check_that_hostile_are_absent(render_and_pull, sh)


def test_hostile_gaussians_in_the_reference():
    """The same, in the specification."""
    count = poison(random_scene(channels=8))[1]
    operands, cotangents = random_scene(160 - count, channels=8), random_cotangents(8)
    poisoned, _ = poison(operands)  # 160 in all, as in test_rasterizer_grad.py: one compilation serves both
    got, gradients = reference(poisoned, cotangents)
    want = render(operands)
    np.testing.assert_allclose(got.color, want.color, atol=1e-5)
    assert not np.any(got.radii[:count])
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert np.isfinite(gradient).all(), name
        assert name in ("viewmat", "intrinsics") or not np.any(gradient[:count]), name


@pytest.mark.parametrize(
    ("index", "value"),
    [(2, 0.0), (2, 1e4), (2, 1e-30), (0, 1e5), (1, 1e-15), (1, 1e15), (3, 1e6), (7, 1e6), (4, 1e10)],
)
def test_extreme_but_valid(index, value):
    """Zero and huge scales, far means, quaternions of any length: finite images and gradients."""
    operands, cotangents = random_scene(), random_cotangents()
    array = operands[index].copy()
    array[::2] = value * (array[::2] if index in (0, 1) else 1)
    rendered, gradients = render_and_pull((*operands[:index], array, *operands[index + 1 :]), cotangents)
    for x in (rendered.color, rendered.alpha, rendered.depth, *gradients):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("index", [5, 6])
def test_broken_camera(index):
    """A camera of NaN draws nothing and harms nothing."""
    operands, cotangents = random_scene(), random_cotangents()
    broken = np.full_like(operands[index], np.nan)
    rendered, gradients = render_and_pull((*operands[:index], broken, *operands[index + 1 :]), cotangents)
    assert not np.any(rendered.alpha)
    assert not any(np.any(x) for x in gradients[:5])


def test_jit_and_scan_change_no_bit():
    operands, cotangents = random_scene(), random_cotangents()
    plain = render_and_pull(operands, cotangents)
    jitted = jax.jit(render_and_pull)(operands, cotangents)
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)
    _, twice = jax.lax.scan(lambda c, x: (c, render(x).color), None, tuple(np.stack([x, x]) for x in operands))
    np.testing.assert_array_equal(twice[1], plain[0].color)


def test_camera_batch():
    """vmap over cameras equals one call per camera; shared Gaussians receive the sum of the gradients."""
    operands, cotangents = random_scene(), random_cotangents()
    viewmats = jnp.stack([look(angle) for angle in (-0.5, 0.0, 0.4)])

    def loss(means, viewmat):
        rendered = render((means, *operands[1:5], viewmat, *operands[6:]))
        return jnp.vdot(rendered.color, cotangents[0]) + jnp.vdot(rendered.depth, cotangents[2])

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, 0)))(operands[0], viewmats)
    singles = [jax.value_and_grad(loss, (0, 1))(jnp.asarray(operands[0]), viewmat) for viewmat in viewmats]
    for i, (value, gradient) in enumerate(singles):
        np.testing.assert_allclose(values[i], value, rtol=1e-5)  # the loss's own dot product may be reordered
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-4), gradients, gradient)
    total = jax.grad(lambda means: jax.vmap(loss, (None, 0))(means, viewmats).sum())(jnp.asarray(operands[0]))
    summed = sum(gradient[0] for _, gradient in singles)
    np.testing.assert_allclose(total, summed, atol=1e-5 * float(np.abs(summed).max()))


def test_shard_map_on_two_devices():
    """Cameras split over two host devices, Gaussians replicated, vma checks on: gradients equal one device's."""
    result = run_python(
        """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from rasterizer_scenes import look, random_scene, render
operands = tuple(map(jnp.asarray, random_scene()))
viewmats = jnp.stack([look(-0.3), look(0.4)])
def loss(gaussians, viewmats):
    images = jax.vmap(lambda v: render((*gaussians, v, *operands[6:])).color)(viewmats)
    return (images ** 2).sum()
def step(gaussians, viewmats):
    value, (d_gaussians, d_viewmats) = jax.value_and_grad(loss, (0, 1))(gaussians, viewmats)
    return jax.lax.psum(value, "cameras"), d_gaussians, d_viewmats
mesh = jax.make_mesh((2,), ("cameras",), axis_types=(jax.sharding.AxisType.Auto,))
specs = dict(mesh=mesh, in_specs=(P(), P("cameras")), out_specs=(P(), P(), P("cameras")))
split = jax.jit(jax.shard_map(step, **specs))(operands[:5], viewmats)
value, whole = jax.value_and_grad(loss, (0, 1))(operands[:5], viewmats)
errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), split, (value, *whole))
print(json.dumps({"devices": jax.device_count(), "error": max(jax.tree.leaves(errors))}))
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert result["devices"] == 2
    assert result["error"] < 1e-5  # two partial sums instead of one


DIGEST = """
import hashlib, json, numpy as np, jax
from rasterizer_scenes import random_cotangents, random_scene, render_and_pull
size = dict(width=200, height=150)
digests = []
for sh in (0, 9):
    operands = random_scene(3000, sh=sh, **size)
    for _ in range(3):
        out = render_and_pull(operands, random_cotangents(3, **size), **size)
        digests.append([hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in jax.tree.leaves(out)])
assert digests[0] == digests[1] == digests[2] and digests[3] == digests[4] == digests[5]
print(json.dumps(digests))
"""


def test_bits_do_not_depend_on_threads():
    """Images and gradients, on one thread, two and five: the order of every sum is fixed."""
    one, *more = (run_python(DIGEST, NPROC=threads) for threads in ("1", "2", "5"))
    assert more == [one, one]


LEAVES = """
import json, numpy as np, jax
from rasterizer_scenes import random_cotangents, random_scene, render_and_pull
out = [render_and_pull(random_scene(channels=c, sh=sh), random_cotangents(c)) for c, sh in ((5, 0), (3, 16))]
print(json.dumps([np.asarray(x).ravel().tolist() for x in jax.tree.leaves(out)]))
"""


@pytest.fixture(scope="module")
def widest_leaves():
    return run_python(LEAVES)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa, widest_leaves):
    """The narrower kernels, in a process of their own, against the widest that this machine has."""
    for a, b in zip(run_python(LEAVES, FG3DGS_ISA=isa), widest_leaves, strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)  # fused or separate products, sums in another order


def test_many_calls_at_once():
    """24 independent calls in one graph, and eight Python threads: more calls than pool threads must not block."""
    result = run_python(
        """
import json, threading, jax, jax.numpy as jnp, numpy as np
from rasterizer_scenes import random_cotangents, random_scene, render, render_and_pull
operands, cotangents = tuple(map(jnp.asarray, random_scene(600))), random_cotangents()
shifts = jnp.linspace(-0.2, 0.2, 24)
def one(shift):
    _, gradients = render_and_pull((operands[0] + shift, *operands[1:]), cotangents)
    return gradients[0]
alone = [np.asarray(jax.jit(one)(s)) for s in shifts]
together = jax.jit(lambda shifts: [one(s) for s in shifts])
good = []
def work():
    for _ in range(5):
        good.append(all(np.array_equal(a, b) for a, b in zip(alone, together(shifts))))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps({"runs": len(good), "equal": all(good)}))
""",
        timeout=300,  # seconds for a machine that does much else; a deadlock would last for ever
    )
    assert result == {"runs": 40, "equal": True}


def test_overflow_is_reported_never_silent():
    operands, cotangents = random_scene(), random_cotangents()
    plain, plain_gradients = render_and_pull(operands, cotangents)
    needed = int(plain.num_pairs)
    enough = render_and_pull(operands, cotangents, max_pairs=needed)
    jax.tree.map(np.testing.assert_array_equal, enough, (plain, plain_gradients))
    short, gradients = render_and_pull(operands, cotangents, max_pairs=needed - 1)
    assert short.num_pairs == needed  # tells the caller how far to grow
    np.testing.assert_array_equal(short.radii, plain.radii)
    assert all(np.isnan(x).all() for x in (short.color, short.alpha, short.depth, *gradients))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": (5, 2)}, "means"),
        ({"quats": (5, 3)}, "quats"),
        ({"scales": (4, 3)}, "scales"),
        ({"opacities": (5, 1)}, "opacities"),
        ({"colors": (4, 3)}, "colors"),
        ({"colors": (5, 5, 3)}, "K in 1, 4, 9, 16"),
        ({"viewmat": (3, 4)}, "viewmat"),
        ({"intrinsics": (3, 3)}, "intrinsics"),
        ({"means2d": (5, 3)}, "means2d"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    operands = dict(zip(NAMES, random_scene(5), strict=True))
    for name, shape in change.items():
        operands[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        render(tuple(operands.values()))


def test_wrong_options_are_named():
    operands = random_scene(5)
    for options, message in (
        ({"width": 0}, "width"),
        ({"height": 70000}, "height"),
        ({"near": 0.0}, "near"),
        ({"max_pairs": -1}, "max_pairs"),
        ({"backend": "cuda12"}, "backend"),
    ):
        with pytest.raises(ValueError, match=message):
            rasterize(*operands[:7], **{"width": 8, "height": 8, **options})
    with pytest.raises(TypeError, match="opacities"):
        rasterize(*operands[:3], np.ones(5, np.int32), *operands[4:7], 8, 8)


TOO_LARGE = """
import json, resource, jax, jax.numpy as jnp
from rasterizer_scenes import random_scene, render
size = dict(width=1024, height=1024)
means, quats, scales, *rest = map(jnp.asarray, random_scene(3000, **size))
grad = jax.jit(jax.grad(lambda scales: render((means, quats, scales, *rest), **size).color.sum()))
grad(scales).block_until_ready()
used = 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
try:
    grad(100 * scales).block_until_ready()  # every Gaussian on all 4096 tiles: 786 MB of pairs' gradients
    said = "nothing"
except (ValueError, jax.errors.JaxRuntimeError) as error:
    said = str(error)
print(json.dumps([said, bool(jnp.isfinite(grad(scales)).all())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process within an address space")
def test_a_scene_that_memory_cannot_hold_is_an_error_and_harms_no_later_call():
    said, well = run_python(TOO_LARGE)
    assert "do not fit into memory" in said and well


@pytest.fixture
def unloaded():
    """The binary is looked for again, in this test and after it."""
    native.binary.cache_clear()
    yield
    native.binary.cache_clear()


def test_absent_binary_is_one_sentence(unloaded, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(native.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install -e"):
        render(random_scene(5))


def test_a_gpu_without_cuda_kernels_is_one_sentence(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(native, "has_cuda", lambda: False)
    with pytest.raises(UserError, match="FG3DGS_CUDA=1"):
        render(random_scene(5))
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    native.check_platform()


@pytest.mark.skipif(shutil.which("nvcc") is None or os.environ.get("FG3DGS_CUDA") == "0", reason="built without CUDA")
def test_cuda_is_built_where_nvcc_is():
    """And the module is loaded here, where there may be neither GPU nor driver."""
    assert native.has_cuda()


def test_an_old_binary_is_one_sentence(unloaded, monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", 999)
    with pytest.raises(UserError, match="build them again"):
        render(random_scene(5))


def test_import_loads_no_binary():
    code = "import json, sys, fg3dgs_jax.rasterizer; print(json.dumps('fg3dgs_jax._native' in sys.modules))"
    assert run_python(code) is False


@pytest.mark.parametrize("deterministic", [False, True])
def test_lowers_for_cuda_without_a_device(deterministic):
    """Forward and backward, batched and not; the workspace is a result that nobody reads."""
    operands = tuple(map(jnp.asarray, random_scene(5)))

    def loss(operands, viewmat):
        return render((*operands[:5], viewmat, *operands[6:]), deterministic=deterministic).color.sum()

    batched = jax.vmap(jax.grad(loss), (None, 0))
    for function, viewmat in ((jax.grad(loss), operands[5]), (batched, jnp.stack([operands[5]] * 2))):
        text = jax.jit(function).trace(operands, viewmat).lower(lowering_platforms=("cuda",)).as_text()
        assert "@fg3dgs_rasterize_forward" in text and "@fg3dgs_rasterize_backward" in text
        assert f"deterministic = {str(deterministic).lower()}" in text and "xui8>" in text
