"""SyncNet (Chung and Zisserman 2016, version 2): the network behind LSE-C and LSE-D. Inference only."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.losses.lpips import check_shapes

FRAMES = 5
SIDE = 224  # pixels: edge of the face it sees
SHIFT = 15  # frames: the largest offset between sound and picture that is tried
EPSILON = 1e-5

# (kernel, channels, strides, padding) of a convolution with normalisation and ReLU, then (window, strides, padding) of
# max pooling or None. Lip: (time, height, width); audio: (coefficients, time).
LIP = (
    ((5, 7, 7), 96, (1, 2, 2), (0, 0, 0), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    ((1, 5, 5), 256, (1, 2, 2), (0, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    ((1, 3, 3), 256, (1, 1, 1), (0, 1, 1), None),
    ((1, 3, 3), 256, (1, 1, 1), (0, 1, 1), None),
    ((1, 3, 3), 256, (1, 1, 1), (0, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    ((1, 6, 6), 512, (1, 1, 1), (0, 0, 0), None),
)
AUDIO = (
    ((3, 3), 64, (1, 1), (1, 1), ((1, 1), (1, 1), (0, 0))),
    ((3, 3), 192, (1, 1), (1, 1), ((3, 3), (1, 2), (0, 0))),
    ((3, 3), 384, (1, 1), (1, 1), None),
    ((3, 3), 256, (1, 1), (1, 1), None),
    ((3, 3), 256, (1, 1), (1, 1), ((3, 3), (2, 2), (0, 0))),
    ((5, 4), 512, (1, 1), (0, 0), None),
)
HEAD = (512, 1024)  # linear, normalisation, ReLU, linear
BRANCHES = {"lip": (3, LIP), "audio": (1, AUDIO)}


@flax.struct.dataclass
class SyncNet:
    """Arrays by name: `lip.0.conv.kernel`, `lip.0.norm.scale`, `lip_head.1.conv.bias`, ..."""

    arrays: dict[str, jax.Array]


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays."""
    found = {}

    def add(name: str, kernel: tuple[int, ...], norm: bool) -> None:
        found[f"{name}.conv.kernel"], found[f"{name}.conv.bias"] = kernel, kernel[-1:]
        if norm:
            found.update({f"{name}.norm.{leaf}": kernel[-1:] for leaf in ("scale", "bias", "mean", "var")})

    for branch, (channels, rows) in BRANCHES.items():
        for i, (kernel, size_out, *_) in enumerate(rows):
            add(f"{branch}.{i}", (*kernel, channels, size_out), True)
            channels = size_out
        add(f"{branch}_head.0", (channels, HEAD[0]), True)
        add(f"{branch}_head.1", HEAD, False)
    return found


def create(arrays: Mapping[str, np.ndarray]) -> SyncNet:
    """The network from its arrays. Raises ValueError, naming the first that is wrong."""
    check_shapes(shapes(), arrays)
    return SyncNet({name: jnp.asarray(value) for name, value in arrays.items()})


def _normalised(net: SyncNet, name: str, x: jax.Array) -> jax.Array:
    scale, bias, mean, var = (net.arrays[f"{name}.norm.{leaf}"] for leaf in ("scale", "bias", "mean", "var"))
    return jax.nn.relu((x - mean) * scale * jax.lax.rsqrt(var + EPSILON) + bias)


def _embed(net: SyncNet, branch: str, x: jax.Array) -> jax.Array:
    rank = x.ndim - 2
    letters = "DHW"[-rank:]
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    for i, (_, _, strides, padding, pool) in enumerate(BRANCHES[branch][1]):
        name = f"{branch}.{i}"
        pads = [(p, p) for p in padding]
        kernel = net.arrays[f"{name}.conv.kernel"]
        x = jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout)
        x = _normalised(net, name, x + net.arrays[f"{name}.conv.bias"])
        if pool:
            window, steps, edges = ((one, *value, one) for value, one in zip(pool, (1, 1, 0), strict=True))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, steps, [(e, e) for e in edges])
    x = x.reshape(x.shape[0], -1)
    x = x @ net.arrays[f"{branch}_head.0.conv.kernel"] + net.arrays[f"{branch}_head.0.conv.bias"]
    x = _normalised(net, f"{branch}_head.0", x)
    return x @ net.arrays[f"{branch}_head.1.conv.kernel"] + net.arrays[f"{branch}_head.1.conv.bias"]


def see(net: SyncNet, faces: jax.Array) -> jax.Array:
    """Faces u8 or f32 [B, 5, 224, 224, 3], RGB from 0 to 255, -> [B, 1024]. The network itself sees blue first."""
    return _embed(net, "lip", faces[..., ::-1].astype(jnp.float32))


def hear(net: SyncNet, mfcc: jax.Array) -> jax.Array:
    """MFCC windows f32 [B, 13, 20] -> [B, 1024]."""
    return _embed(net, "audio", mfcc[..., None])
