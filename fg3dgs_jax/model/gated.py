"""Region attention and the perceptron behind it (FG Eq. 6-8): on a CPU one native pass over the Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import native
from fg3dgs_jax.model.mlp import multiply_reference

Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of the perceptron and of the two gates


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def gated(
    x: jax.Array,
    weights: jax.Array,
    audio_weights: jax.Array,
    audio: jax.Array,
    expression_weights: jax.Array,
    expression: jax.Array,
    sizes: Sizes,
) -> jax.Array:
    """A perceptron on [x; a(x) audio; relu(e(x)) expression], x f32 [in, N] -> f32 [out, N].

    audio f32 [A], expression f32 [E] are the same for all points; a and e are perceptrons from `in` to A and to E. All
    three come as packed weights, see `mlp.pack`, and their sizes. XLA alone would write every layer to memory.
    """
    operands = (x, weights, audio_weights, audio, expression_weights, expression)
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(_native_forward, sizes=sizes),
        default=functools.partial(gated_reference, sizes=sizes),
    )


def gated_reference(x, weights, audio_weights, audio, expression_weights, expression, sizes: Sizes) -> jax.Array:
    """`gated` in plain JAX, the specification."""
    to_audio = multiply_reference(x, audio_weights, sizes[1])
    to_expression = jax.nn.relu(multiply_reference(x, expression_weights, sizes[2]))
    z = jnp.concatenate([x, to_audio * audio[:, None], to_expression * expression[:, None]])
    return multiply_reference(z, weights, sizes[0])


def _attributes(sizes: Sizes) -> dict:
    counts = np.asarray([len(one) for one in sizes], np.int32)
    return {"sizes": np.asarray([size for one in sizes for size in one], np.int32), "counts": counts}


def _native_forward(*operands: jax.Array, sizes: Sizes) -> jax.Array:
    result = jax.ShapeDtypeStruct((sizes[0][-1], operands[0].shape[1]), jnp.float32)
    return native.call("fg3dgs_gated_forward", [result], operands, **_attributes(sizes))[0]


def _native_backward(*operands: jax.Array, sizes: Sizes) -> tuple:
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands[:-1]]
    return native.call("fg3dgs_gated_backward", results, operands, **_attributes(sizes))


def _plain_backward(*operands: jax.Array, sizes: Sizes) -> tuple:
    return jax.vjp(functools.partial(gated_reference, sizes=sizes), *operands[:-1])[1](operands[-1])


def _forward(*operands):
    return gated(*operands), operands[:-1]


def _backward(sizes, saved, cotangent):
    return jax.lax.platform_dependent(
        *saved,
        cotangent,
        cpu=functools.partial(_native_backward, sizes=sizes),
        default=functools.partial(_plain_backward, sizes=sizes),
    )


gated.defvjp(_forward, _backward)
