"""LPIPS (Zhang et al. 2018): how different two images look, by the features of a network trained on photographs.

The three networks of the `lpips` package, version 0.1, as data. Weights are arguments: nothing here reads a file.
"""

import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

TAP = ("tap",)


def _conv(size: int, channels: int, stride: int = 1, pad: int = 0) -> tuple:
    return ("conv", size, channels, stride, pad)


def _vgg(*blocks: tuple[int, int]) -> tuple:
    layers = []
    for channels, count in blocks:
        layers += [*(_conv(3, channels, 1, 1) for _ in range(count)), TAP, ("pool", 2, 2)]
    return tuple(layers[:-1])


# Layers in order. conv: size, channels, stride, padding; a ReLU follows each. fire: squeezed and expanded channels.
NETS = {
    "alex": (
        _conv(11, 64, 4, 2), TAP, ("pool", 3, 2), _conv(5, 192, 1, 2), TAP, ("pool", 3, 2),
        _conv(3, 384, 1, 1), TAP, _conv(3, 256, 1, 1), TAP, _conv(3, 256, 1, 1), TAP,
    ),
    "vgg": _vgg((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
    "squeeze": (
        _conv(3, 64, 2), TAP, ("ceil_pool", 3, 2), ("fire", 16, 64), ("fire", 16, 64), TAP,
        ("ceil_pool", 3, 2), ("fire", 32, 128), ("fire", 32, 128), TAP, ("ceil_pool", 3, 2),
        ("fire", 48, 192), TAP, ("fire", 48, 192), TAP, ("fire", 64, 256), TAP, ("fire", 64, 256), TAP,
    ),
}  # fmt: skip
# Smallest edge in pixels that PyTorch's networks take: below it a pooling window is left without a value.
MIN_EDGE = {"alex": 31, "vgg": 16, "squeeze": 17}
SHIFT = np.float32([-0.030, -0.088, -0.188])
SCALE = np.float32([0.458, 0.448, 0.450])
TINY = 1e-10


@flax.struct.dataclass
class Lpips:
    """A network with its weights."""

    net: str = flax.struct.field(pytree_node=False)
    convs: tuple[tuple[jax.Array, jax.Array], ...]  # (kernel f32 [h, w, in, out], bias f32 [out]) in NETS' order
    linears: tuple[jax.Array, ...]  # f32 [C] per tap, how much each channel counts


def shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's arrays: `conv0.kernel`, `conv0.bias`, ..., `linear0`, ... Raises KeyError: unknown name."""
    found, channels, convs, taps = {}, 3, 0, 0

    def add(size: int, size_in: int, size_out: int) -> int:
        found[f"conv{convs}.kernel"], found[f"conv{convs}.bias"] = (size, size, size_in, size_out), (size_out,)
        return convs + 1

    for kind, *rest in NETS[net]:
        if kind == "conv":
            convs = add(rest[0], channels, rest[1])
            channels = rest[1]
        elif kind == "fire":
            convs = add(1, channels, rest[0])
            convs = add(1, rest[0], rest[1])
            convs = add(3, rest[0], rest[1])
            channels = 2 * rest[1]
        elif kind == "tap":
            found[f"linear{taps}"] = (channels,)
            taps += 1
    return found


def create(net: str, arrays: Mapping[str, np.ndarray]) -> Lpips:
    """A network from its arrays. Raises ValueError, naming the first array that is missing, extra or of wrong shape."""
    if net not in NETS:
        raise ValueError(f"{net!r} is none of {', '.join(NETS)}")
    wanted = shapes(net)
    check_shapes(wanted, arrays)
    convs = [(arrays[name], arrays[name.replace("kernel", "bias")]) for name in wanted if name.endswith("kernel")]
    return Lpips(net, tuple(convs), tuple(arrays[name] for name in wanted if name.startswith("linear")))


def check_shapes(wanted: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, naming the first array that is missing, not wanted, or of another shape."""
    for name in [*wanted, *arrays]:
        found = tuple(arrays[name].shape) if name in arrays else "nothing"
        if found != (expected := tuple(wanted.get(name, ())) or "nothing"):
            raise ValueError(f"{name} has the shape {found} where {expected} is expected")


def _convolve(x: jax.Array, weights: tuple[jax.Array, jax.Array], stride: int, pad: int) -> jax.Array:
    kernel, bias = weights
    padding = ((pad, pad), (pad, pad))
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)
    return jax.nn.relu(y + bias)


def _pool(x: jax.Array, size: int, stride: int, ceil: bool) -> jax.Array:
    """Max pooling; `ceil`: a last window may reach beyond the border, as long as it starts inside."""
    padding = [(0, 0)] * 4
    if ceil:
        for axis in (1, 2):
            steps = math.ceil(max(x.shape[axis] - size, 0) / stride)
            padding[axis] = (0, max(steps * stride + size - x.shape[axis], 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), padding)


def features(judge: Lpips, images: jax.Array) -> list[jax.Array]:
    """The network's taps [B, h, w, C], unit length over C, of images f32 [B, H, W, 3] in [0, 1]."""
    x = (2.0 * images - 1.0 - SHIFT) / SCALE
    waiting, taps = iter(judge.convs), []
    for kind, *rest in NETS[judge.net]:
        if kind == "conv":
            x = _convolve(x, next(waiting), rest[2], rest[3])
        elif kind == "fire":
            x = _convolve(x, next(waiting), 1, 0)
            x = jnp.concatenate([_convolve(x, next(waiting), 1, 0), _convolve(x, next(waiting), 1, 1)], axis=-1)
        elif kind == "tap":
            # Under the root: at a place where every channel is 0 the gradient of a plain norm is NaN.
            length = jnp.sqrt((x * x).sum(-1, keepdims=True) + TINY**2)
            taps.append(x / (length + TINY))
        else:
            x = _pool(x, *rest, ceil=kind == "ceil_pool")
    return taps


def distance(judge: Lpips, a: jax.Array, b: jax.Array) -> jax.Array:
    """LPIPS of pairs of images f32 [B, H, W, 3] in [0, 1]; f32 [B], 0 for equal images.

    Images below the network's smallest edge are padded on the right and below with their border pixels.
    """
    missing = [max(MIN_EDGE[judge.net] - size, 0) for size in a.shape[1:3]]
    if any(missing):
        padding = ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0))
        a, b = (jnp.pad(x, padding, mode="edge") for x in (a, b))
    total = jnp.zeros(a.shape[0])
    for weight, left, right in zip(judge.linears, features(judge, a), features(judge, b), strict=True):
        total += ((left - right) ** 2 @ weight).mean(axis=(1, 2))
    return total


def patches(
    judge: Lpips, prediction: jax.Array, target: jax.Array, head: jax.Array, key: jax.Array, count: int, edge: int
) -> jax.Array:
    """Mean LPIPS of `count` random patches of `edge` pixels a side (FG Eq. 15); differentiable by prediction.

    Their middles are drawn among the pixels of `head` [H, W] and moved so that patches stay inside the images
    [H, W, 3]: elsewhere the picture is the given backdrop, and there is nothing to judge.
    """
    height, width = head.shape
    edge = min(edge, height, width)
    share = jnp.maximum(head.ravel(), 1e-12)  # an empty head: anywhere
    places = jax.random.choice(key, height * width, (count,), p=share / share.sum())
    rows = jnp.clip(places // width - edge // 2, 0, height - edge)
    cols = jnp.clip(places % width - edge // 2, 0, width - edge)

    def cut(image: jax.Array) -> jax.Array:
        return jax.vmap(lambda r, c: jax.lax.dynamic_slice(image, (r, c, 0), (edge, edge, 3)))(rows, cols)

    return distance(judge, cut(prediction), jax.lax.stop_gradient(cut(target))).mean()
