"""Linear layers without biases over many points, the points on the last axis: the bulk of the motion networks' work."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fg3dgs_jax import native
from fg3dgs_jax.model.hashgrid import draw_uniform


class Linear(nnx.Module):
    """A product with a kernel f32 [in, out], without bias: x [in] or [in, N] -> [out] or [out, N]."""

    def __init__(self, size_in: int, size_out: int, *, rngs: nnx.Rngs, gain: float = 1.0):
        self.kernel = nnx.Param(draw_uniform(rngs.params(), (size_in, size_out), math.sqrt(3 * gain / size_in)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.kernel[...].T @ x


class MLP(nnx.Module):
    """Linear layers `layer0..` of sizes (in, hidden.., out), ReLU between them and none after the last."""

    def __init__(self, sizes: tuple[int, ...], *, rngs: nnx.Rngs, last_gain: float = 1.0):
        self.sizes = tuple(sizes)
        for i in range(len(sizes) - 1):
            gain = last_gain if i == len(sizes) - 2 else 2.0
            setattr(self, f"layer{i}", Linear(*sizes[i : i + 2], gain=gain, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x f32 [in] or [in, N] -> f32 [out] or [out, N]."""
        if x.ndim == 1:
            return multiply_reference(x[:, None], self.weights, self.sizes)[:, 0]
        return multiply(x, self.weights, self.sizes)

    @property
    def kernels(self) -> list[jax.Array]:
        """Of every layer, f32 [in, out]."""
        return [getattr(self, f"layer{i}").kernel[...] for i in range(len(self.sizes) - 1)]

    @property
    def weights(self) -> jax.Array:
        """All kernels, packed."""
        return pack(self.kernels)


def pack(kernels: list[jax.Array]) -> jax.Array:
    """Kernels f32 [in, out] one behind the other, as one vector."""
    return jnp.concatenate([kernel.ravel() for kernel in kernels])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x: jax.Array, weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """The perceptron of packed `weights` on x f32 [in, N] -> f32 [out, N]; on a CPU in one native pass.

    XLA runs the products one by one there, with every layer's [size, N] written to memory between them.
    """
    return jax.lax.platform_dependent(
        x,
        weights,
        cpu=functools.partial(_native_forward, sizes=sizes),
        default=functools.partial(multiply_reference, sizes=sizes),
    )


def multiply_reference(x: jax.Array, weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """`multiply` in plain JAX, the specification."""
    start = 0
    for i, (size_in, size_out) in enumerate(itertools.pairwise(sizes)):
        kernel = weights[start : start + size_in * size_out].reshape(size_in, size_out)
        x = kernel.T @ (jax.nn.relu(x) if i else x)
        start += size_in * size_out
    return x


def multiply_onto(start: jax.Array, x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
    """A perceptron whose first layer is there in part: last ... relu(start + kernels[0]^T x), f32 [out, N].

    start f32 [hidden, N], x f32 [in, N], kernels f32 [in, hidden], .. [.., out], at least two. For inference: the
    native pass has no gradient.
    """
    sizes = (len(kernels[0]), *(kernel.shape[1] for kernel in kernels))
    return jax.lax.platform_dependent(
        start,
        x,
        pack(kernels),
        cpu=functools.partial(_native_onto, sizes=sizes),
        default=functools.partial(multiply_onto_reference, sizes=sizes),
    )


def multiply_onto_reference(start: jax.Array, x: jax.Array, weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """`multiply_onto` in plain JAX, the specification."""
    split = sizes[0] * sizes[1]
    hidden = start + multiply_reference(x, weights[:split], sizes[:2])
    return multiply_reference(jax.nn.relu(hidden), weights[split:], sizes[1:])


def _native_onto(start: jax.Array, x: jax.Array, weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    result = jax.ShapeDtypeStruct((sizes[-1], x.shape[1]), jnp.float32)
    return native.call("fg3dgs_mlp_onto", [result], (start, x, weights), sizes=np.asarray(sizes, np.int32))[0]


def _native_forward(x: jax.Array, weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    result = jax.ShapeDtypeStruct((sizes[-1], x.shape[1]), jnp.float32)
    return native.call("fg3dgs_mlp_forward", [result], (x, weights), sizes=np.asarray(sizes, np.int32))[0]


def _native_backward(x: jax.Array, weights: jax.Array, cotangent: jax.Array, sizes: tuple[int, ...]) -> tuple:
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (x, weights)]
    return native.call("fg3dgs_mlp_backward", results, (x, weights, cotangent), sizes=np.asarray(sizes, np.int32))


def _plain_backward(x: jax.Array, weights: jax.Array, cotangent: jax.Array, sizes: tuple[int, ...]) -> tuple:
    return jax.vjp(functools.partial(multiply_reference, sizes=sizes), x, weights)[1](cotangent)


def _forward(x, weights, sizes):
    return multiply(x, weights, sizes), (x, weights)


def _backward(sizes, saved, cotangent):
    return jax.lax.platform_dependent(
        *saved,
        cotangent,
        cpu=functools.partial(_native_backward, sizes=sizes),
        default=functools.partial(_plain_backward, sizes=sizes),
    )


multiply.defvjp(_forward, _backward)
