"""Scenes shared by the rasterizer's tests and by the processes that they start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.rasterizer import rasterize

NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmat", "intrinsics", "means2d")


def look(angle: float = 0.3, distance: float = 3.0) -> np.ndarray:
    """A camera turned about the vertical axis, `distance` before the origin."""
    viewmat = np.eye(4, dtype=np.float32)
    viewmat[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    viewmat[:3, 3] = [0.1, -0.1, distance]
    return viewmat


def random_scene(n: int = 160, channels: int = 3, sh: int = 0, width: int = 70, height: int = 50, seed: int = 0):
    """The eight operands as numpy arrays: Gaussians of 1 to 20 pixels, many overlapping, some outside the image."""
    rng = np.random.default_rng(seed)
    colors = rng.normal(size=(n, sh, 3)) * 0.5 if sh else rng.uniform(size=(n, channels))
    operands = (
        rng.uniform(-1.2, 1.2, (n, 3)),
        rng.normal(size=(n, 4)),
        np.exp(rng.uniform(-4, -1.5, (n, 3))),
        rng.uniform(0.05, 1, n),
        colors,
        look(),
        np.array([1.2 * width, 1.1 * width, width / 2 + 1.3, height / 2 - 0.7]),
        0.3 * rng.normal(size=(n, 2)),
    )
    return tuple(np.asarray(x, np.float32) for x in operands)


def random_cotangents(channels: int = 3, width: int = 70, height: int = 50, seed: int = 1):
    """Cotangents of color, alpha and depth: every output of the op takes part in every gradient test."""
    rng = np.random.default_rng(seed)
    shapes = ((height, width, channels), (height, width), (height, width))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def poison(operands):
    """The scene with hostile Gaussians in front, and their number: none of them may be drawn."""
    cases = []
    for index, size in ((0, 3), (1, 4), (2, 3), (3, 1), (4, 3), (7, 2)):
        for value in (np.nan, np.inf, -np.inf):
            cases += [(index, k, value) for k in range(size)]
    cases += [(1, slice(None), 0.0), (2, 0, 3e38), (0, 2, 3e38), (0, slice(None), -1e30), (3, 0, -1.0), (3, 0, 0.0)]
    camera_axis, center = operands[5][2, :3], -operands[5][:3, :3].T @ operands[5][:3, 3]
    cases += [(0, slice(None), center + z * camera_axis) for z in (0.0099, 0.0, -1.0, -1e20)]  # before the near plane
    bad = [np.repeat(x[:1], len(cases), 0) for x in (*operands[:5], operands[7])]
    for row, (index, column, value) in enumerate(cases):
        array = bad[5 if index == 7 else index]
        array.reshape(len(cases), -1)[row, column] = value
    joined = [np.concatenate([b, x]) for b, x in zip(bad, (*operands[:5], operands[7]), strict=True)]
    return (*joined[:5], *operands[5:7], joined[5]), len(cases)


def render(operands, width: int = 70, height: int = 50, **options):
    """`rasterize` on the eight operands."""
    return rasterize(*operands[:7], width, height, means2d=operands[7], **options)


def render_and_pull(operands, cotangents, width: int = 70, height: int = 50, **options):
    """The rendering and the cotangents of the eight operands."""

    def images(operands):
        rendered = render(operands, width, height, **options)
        return (rendered.color, rendered.alpha, rendered.depth), rendered

    _, pull, rendered = jax.vjp(images, tuple(map(jnp.asarray, operands)), has_aux=True)
    return rendered, pull(tuple(map(jnp.asarray, cotangents)))[0]


def check_that_hostile_are_absent(pull, sh: int):
    """NaN, Inf, zero quaternions, overflow, behind the camera: same image as without them, zero gradient.

    `pull(operands, cotangents)` renders and returns gradients as `render_and_pull` does, in a fixed order of sums.
    """
    operands, cotangents = random_scene(sh=sh), random_cotangents()
    poisoned, count = poison(operands)
    (want, want_gradients), (got, gradients) = pull(operands, cotangents), pull(poisoned, cotangents)
    assert not np.any(got.radii[:count])
    for name in ("color", "alpha", "depth", "num_pairs"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for name, a, b in zip(NAMES, gradients, want_gradients, strict=True):
        if name in ("viewmat", "intrinsics"):
            np.testing.assert_allclose(a, b, rtol=1e-4)  # other lanes, other order of a sum that cancels
        else:
            assert not np.any(a[:count]), name
            np.testing.assert_array_equal(a[count:], b, err_msg=name)


# The reference's program is large and the scenes are small: compile it fast, without LLVM's optimizer, and share it.
FAST = {"xla_backend_optimization_level": 0}
reference = jax.jit(functools.partial(render_and_pull, backend="reference"), compiler_options=FAST)


def cuda_targets() -> set[str]:
    """Names of the native calls that exist on CUDA, whether or not this build has them."""
    grid = {"fg3dgs_grid_encode", "fg3dgs_grid_backward_tables", "fg3dgs_grid_backward_positions"}
    return grid | {"fg3dgs_rasterize_forward", "fg3dgs_rasterize_backward"}
