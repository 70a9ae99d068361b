"""The features behind FID: Inception v3 as ported from TensorFlow (Heusel et al. 2017), and the distance itself.

Weights are arrays under torchvision's names (`Mixed_5b.branch1x1.conv.kernel`); kernel sizes are read off them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

SIDE = 299
FEATURES = 2048
EPSILON = 1e-3
BATCH = 8
# Blocks in order: name and kind. In every kind of block the branches end side by side.
BLOCKS = (
    ("Mixed_5b", "A"), ("Mixed_5c", "A"), ("Mixed_5d", "A"), ("Mixed_6a", "B"), ("Mixed_6b", "C"), ("Mixed_6c", "C"),
    ("Mixed_6d", "C"), ("Mixed_6e", "C"), ("Mixed_7a", "D"), ("Mixed_7b", "E"), ("Mixed_7c", "E"),
)  # fmt: skip
# Branches: layers one after the other; a nested tuple splits into several whose results are joined; "!": stride 2.
BRANCHES = {
    "A": (
        ("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        ("mean", "branch_pool"),
    ),
    "B": (("branch3x3!",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3!"), ("max!",)),
    "C": (
        ("branch1x1",), ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
        ("mean", "branch_pool"),
    ),
    "D": (
        ("branch3x3_1", "branch3x3_2!"), ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4!"),
        ("max!",),
    ),
    "E": (
        ("branch1x1",), ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")), ("mean", "branch_pool"),
    ),
}  # fmt: skip
STEM = (
    ("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1), ("max", 2, 0),
    ("Conv2d_3b_1x1", 1, 0), ("Conv2d_4a_3x3", 1, 0), ("max", 2, 0),
)  # fmt: skip

Arrays = Mapping[str, jax.Array]


def _conv(arrays: Arrays, name: str, x: jax.Array, stride: int, pads: tuple[int, int]) -> jax.Array:
    kernel = arrays[f"{name}.conv.kernel"]
    padding = [(p, p) for p in pads]
    x = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    scale, bias, mean, var = (arrays[f"{name}.norm.{leaf}"] for leaf in ("scale", "bias", "mean", "var"))
    return jax.nn.relu((x - mean) * scale * jax.lax.rsqrt(var + EPSILON) + bias)


def _max(x: jax.Array, stride: int, pad: int) -> jax.Array:
    padding = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean(x: jax.Array) -> jax.Array:
    """3 x 3 averages that leave out what lies beyond the border, as TensorFlow's do."""
    padding, ones = [(0, 0), (1, 1), (1, 1), (0, 0)], jnp.ones_like(x[:1, :, :, :1])

    def total(y: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), padding)

    return total(x) / total(ones)


def _branch(arrays: Arrays, block: str, layers: tuple, x: jax.Array) -> jax.Array:
    for layer in layers:
        if isinstance(layer, tuple):
            x = jnp.concatenate([_branch(arrays, block, (part,), x) for part in layer], axis=-1)
        elif layer == "mean":
            # The last block's pooling is a maximum in the network that FID is defined by.
            x = _max(x, 1, 1) if block == "Mixed_7c" else _mean(x)
        elif layer == "max!":
            x = _max(x, 2, 0)
        else:
            name = f"{block}.{layer.removesuffix('!')}"
            size = arrays[f"{name}.conv.kernel"].shape[:2]
            strided = layer.endswith("!")
            x = _conv(arrays, name, x, 2 if strided else 1, (0, 0) if strided else (size[0] // 2, size[1] // 2))
    return x


@jax.jit
def features(arrays: Arrays, images: jax.Array) -> jax.Array:
    """f32 [B, 2048] of images u8 [B, H, W, 3]: enlarged or shrunk to 299 x 299 (bilinear), from -1 to 1."""
    x = images.astype(jnp.float32) / 127.5 - 1.0
    shape = (x.shape[0], SIDE, SIDE, 3)
    x = jax.image.resize(x, shape, "linear", antialias=False)
    for name, stride, pad in STEM:
        x = _max(x, stride, pad) if name == "max" else _conv(arrays, name, x, stride, (pad, pad))
    for block, kind in BLOCKS:
        x = jnp.concatenate([_branch(arrays, block, layers, x) for layers in BRANCHES[kind]], axis=-1)
    return x.mean(axis=(1, 2))


def check(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless one image passes through to 2048 features."""
    try:
        found = jax.eval_shape(features, dict(arrays), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)).shape
    except (KeyError, TypeError) as error:
        raise ValueError(f"{error} is missing or of a wrong shape") from None
    if found != (1, FEATURES):
        raise ValueError(f"it ends in {found[-1]} features in place of {FEATURES}")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features [n, D], as Gaussians: |mean difference|² + tr(A + B - 2 (A B)^1/2).

    The trace of the root comes from the singular values of the centred sets' product, exact for n below D too.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap = a.mean(0) - b.mean(0)
    roots = [(x - x.mean(0)) / np.sqrt(max(len(x) - 1, 1)) for x in (a, b)]
    cross = scipy.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float(gap @ gap + sum(np.square(root).sum() for root in roots) - 2.0 * cross)
