"""A baked region's attention and the layers behind it, on a CPU in one native pass over its Gaussians."""

import functools

import jax
import jax.numpy as jnp

from fg3dgs_jax import native


def attend(
    queries: jax.Array,
    keys: jax.Array,
    hidden: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    last: jax.Array,
) -> jax.Array:
    """Attention of every point to T tokens, then two layers: the motion of eyes and mouth (FG Eq. 10-12).

    With w = softmax over the tokens of the scores of `queries` f32 [H C, N] and `keys` f32 [T, H, C], per head, the
    result is last relu(A relu(B w + b) + D w), f32 [out, N]: `hidden` (B [M, T H], b [M]), `second` (A [L, M],
    D [L, T H]), last [out, L]; T and C at most 16 and 32 on a CPU.
    """
    operands = (queries, keys, *hidden, *second, last)
    return jax.lax.platform_dependent(*operands, cpu=_native, default=attend_reference)


def attend_reference(queries, keys, from_weights, bias, from_hidden, past_weights, last) -> jax.Array:
    """`attend` in plain JAX, the specification."""
    tokens, heads, width = keys.shape
    scores = jnp.einsum("thc,hcn->thn", keys, queries.reshape(heads, width, -1))
    weights = jnp.exp(scores - functools.reduce(jnp.maximum, scores))
    weights = (weights / weights.sum(0)).reshape(tokens * heads, -1)
    inner = jax.nn.relu(from_weights @ weights + bias[:, None])
    return last @ jax.nn.relu(from_hidden @ inner + past_weights @ weights)


def _native(*operands: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((operands[-1].shape[0], operands[0].shape[1]), jnp.float32)
    return native.call("fg3dgs_attend", [result], operands)[0]
