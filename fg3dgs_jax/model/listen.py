"""The encoder of sound (TG's, with AD-NeRF's attention over time): on a CPU one native pass.

XLA runs its hundreds of small operations as fast, but a motion step's program then takes a quarter longer to compile,
and 250 MB more.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fg3dgs_jax import native

LEAK = 0.02
STRIDED = 4  # convolutions over a window
OF_TOKENS = STRIDED + 2  # layers that make a token of a window; the others weigh tokens

Layer = tuple[jax.Array, jax.Array]  # kernel f32 [3, in, out] of a convolution or [in, out], bias f32 [out]


def listen(windows: jax.Array, layers: Sequence[Layer]) -> tuple[jax.Array, jax.Array]:
    """Tokens f32 [B, F] of audio windows f32 [B, T, C], and their pooled vector f32 [F], a convex combination of them.

    layers, twelve: four convolutions that halve the window, rounding up, the mean of what is left, two linear layers:
    a token of each window; five convolutions along the tokens, the last to one channel, a linear layer [B, B] and
    softmax: the tokens' shares. Leaky ReLU behind all but the two results.
    """
    return _listen(windows, *(array for layer in layers for array in layer))


@jax.custom_vjp
def _listen(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(*operands)[0]


def listen_reference(windows: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`listen` in plain JAX, the specification; the arrays are kernel and bias of each layer in turn."""
    layers = list(zip(arrays[::2], arrays[1::2], strict=True))
    x = windows
    for layer in layers[:STRIDED]:
        x = jax.nn.leaky_relu(_convolve(layer, x, stride=2), LEAK)
    (first, first_bias), (second, second_bias) = layers[STRIDED:OF_TOKENS]
    x = jax.nn.leaky_relu(x.mean(1) @ first + first_bias, LEAK)
    tokens = x @ second + second_bias
    y = tokens[None]
    for layer in layers[OF_TOKENS:-1]:
        y = jax.nn.leaky_relu(_convolve(layer, y), LEAK)
    kernel, bias = layers[-1]
    return tokens, jax.nn.softmax(y[0, :, 0] @ kernel + bias) @ tokens


def _convolve(layer: Layer, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution of three taps over x f32 [B, T, C] as a product: XLA's own takes a third longer on a CPU."""
    kernel, bias = layer
    last = stride * (-(-x.shape[1] // stride) - 1)
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = jnp.concatenate([padded[:, k : k + last + 1 : stride] for k in range(3)], axis=-1)
    return taps @ kernel.reshape(-1, kernel.shape[-1]) + bias


def _native_forward(*operands: jax.Array) -> tuple:
    windows, features = operands[0], operands[2 * OF_TOKENS].shape[0]
    shapes = (windows.shape[0], features), (features,)
    return native.call("fg3dgs_listen_forward", [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], operands)


def _native_backward(*operands: jax.Array) -> tuple:
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands[2:]]
    return native.call("fg3dgs_listen_backward", results, operands)


def _plain_backward(d_tokens: jax.Array, d_pooled: jax.Array, *operands: jax.Array) -> tuple:
    return jax.vjp(listen_reference, *operands)[1]((d_tokens, d_pooled))


def _forward(*operands):
    return jax.lax.platform_dependent(*operands, cpu=_native_forward, default=listen_reference), operands


def _backward(operands, cotangents):
    return jax.lax.platform_dependent(*cotangents, *operands, cpu=_native_backward, default=_plain_backward)


_listen.defvjp(_forward, _backward)
