"""The grid encoder's native twin, for the CPU and CUDA: the functions of `hashgrid` on one feature, as XLA calls."""

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import native


def _call(name, shape, operands, spec):
    attributes = {
        "resolutions": np.asarray(spec.resolutions, np.int32),
        "log2_table": np.int64(spec.log2_table),
        "bound": np.float32(spec.bound),
    }
    return native.call(name, [jax.ShapeDtypeStruct(shape, jnp.float32)], operands, **attributes)[0]


def on_cuda() -> bool:
    """Whether these calls exist on CUDA too."""
    return native.has_cuda()


def encode(tables: jax.Array, positions: jax.Array, spec) -> jax.Array:
    """tables f32 [3, entries], positions f32 [3, N] -> f32 [3, levels, N]."""
    return _call("fg3dgs_grid_encode", (3, spec.levels, positions.shape[1]), (tables, positions), spec)


def backward_tables(positions: jax.Array, cotangent: jax.Array, spec) -> jax.Array:
    """Gradient f32 [3, entries] of the tables, from that of the encoding; summed in the order of the points on the
    CPU, in any order on CUDA."""
    return _call("fg3dgs_grid_backward_tables", (3, spec.starts[-1]), (positions, cotangent), spec)


def backward_positions(tables: jax.Array, positions: jax.Array, cotangent: jax.Array, spec) -> jax.Array:
    """Gradient f32 [3, N] of the positions. A call of its own: XLA drops it where nobody uses the result."""
    return _call("fg3dgs_grid_backward_positions", positions.shape, (tables, positions, cotangent), spec)
