"""A baked region's attention and the perceptrons behind it, in one pass over its Gaussians."""

import functools

import jax
import jax.numpy as jnp


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
    D [L, T H]), last [out, L].
    """
    tokens, heads, width = keys.shape
    scores = jnp.einsum("thc,hcn->thn", keys, queries.reshape(heads, width, -1))
    weights = jnp.exp(scores - functools.reduce(jnp.maximum, scores))
    weights = (weights / weights.sum(0)).reshape(tokens * heads, -1)
    inner = jax.nn.relu(hidden[0] @ weights + hidden[1][:, None])
    return last @ jax.nn.relu(second[0] @ inner + second[1] @ weights)
