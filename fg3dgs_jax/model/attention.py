"""Attention of many points to a few tokens and the layers behind it (FG Eq. 10-12): on a CPU one native pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import native


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    x: jax.Array,
    to_scores: jax.Array,
    hidden: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    last: jax.Array,
    heads: int,
) -> jax.Array:
    """Attention of every point to T tokens, then two layers: the motion of eyes and mouth.

    With w = softmax over the tokens, per head, of the scores to_scores x, where x f32 [S, N] and to_scores
    f32 [T heads, S], the tokens slowest, the result is last relu(A relu(B w + b) + D w), f32 [out, N]: `hidden`
    (B [M, T heads], b [M]), `second` (A [L, M], D [L, T heads]), last [out, L]; T at most 16 on a CPU.
    """
    return _forward(x, to_scores, hidden, second, last, heads)[0]


def attend_reference(x, to_scores, from_weights, bias, from_hidden, past_weights, last, *, heads: int) -> jax.Array:
    """`attend` in plain JAX, the specification."""
    scores = (to_scores @ x).reshape(len(to_scores) // heads, heads, x.shape[1])
    weights = jax.nn.softmax(scores, axis=0).reshape(len(to_scores), -1)
    inner = jax.nn.relu(from_weights @ weights + bias[:, None])
    return last @ jax.nn.relu(from_hidden @ inner + past_weights @ weights)


def _native_forward(*operands: jax.Array, heads: int) -> jax.Array:
    result = jax.ShapeDtypeStruct((operands[-1].shape[0], operands[0].shape[1]), jnp.float32)
    return native.call("fg3dgs_attend_forward", [result], operands, heads=np.int64(heads))[0]


def _native_backward(*operands: jax.Array, heads: int) -> tuple:
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands[:-1]]
    return native.call("fg3dgs_attend_backward", results, operands, heads=np.int64(heads))


def _plain_backward(*operands: jax.Array, heads: int) -> tuple:
    return jax.vjp(functools.partial(attend_reference, heads=heads), *operands[:-1])[1](operands[-1])


def _forward(x, to_scores, hidden, second, last, heads):
    operands = (x, to_scores, *hidden, *second, last)
    out = jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(_native_forward, heads=heads),
        default=functools.partial(attend_reference, heads=heads),
    )
    return out, operands


def _backward(heads, operands, cotangent):
    x, to_scores, *hidden, from_hidden, past_weights, last = jax.lax.platform_dependent(
        *operands,
        cotangent,
        cpu=functools.partial(_native_backward, heads=heads),
        default=functools.partial(_plain_backward, heads=heads),
    )
    return x, to_scores, tuple(hidden), (from_hidden, past_weights), last


attend.defvjp(_forward, _backward)
