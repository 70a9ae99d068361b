"""The motion networks of TalkingGaussian's published checkpoints, so that a head trained there renders here.

They differ from `motion` in four points: the grid's cells per axis are fractions (16 to 38.4, 64 to 57.6), expressions
are raw action units of which the blink passes by the network, layers there have no bias, and scales are a softplus.
For rendering: the face keeps its raw scales beside its network, which pruning and growing would not move along.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fg3dgs_jax.model.deltas import MEANS_SCALE
from fg3dgs_jax.model.gated import gated
from fg3dgs_jax.model.hashgrid import PLANES, GridSpec
from fg3dgs_jax.model.mlp import MLP
from fg3dgs_jax.model.motion import CURRENT, AudioEncoder
from fg3dgs_jax.types import Condition, Deltas

KINDS = ("released_face", "released_mouth")
UNITS = ("AU01", "AU04", "AU05", "AU06", "AU07", "AU45")  # OpenFace's intensities, the blink up to 2
FACE_GRID = GridSpec(min_resolution=16.0, max_resolution=38.4)
MOUTH_GRID = GridSpec(min_resolution=64.0, max_resolution=57.6)


def resolutions(spec: GridSpec) -> np.ndarray:
    """Cells of every level, f64 [levels]: fractions."""
    return spec.min_resolution * (spec.max_resolution / spec.min_resolution) ** np.linspace(0.0, 1.0, spec.levels)


def sizes(spec: GridSpec) -> list[int]:
    """Vertices along an axis of every level."""
    return [int(np.ceil(cells - 1e-9)) + 1 for cells in resolutions(spec)]


def encode(tables: jax.Array, means: jax.Array, spec: GridSpec) -> jax.Array:
    """Positions f32 [N, 3] by tables f32 [3, entries] -> f32 [3 * levels, N], zero outside the bound.

    A level's vertices lie one behind the other, the plane's first axis slowest.
    """
    inside = jnp.all(jnp.abs(means) <= spec.bound, axis=1)
    unit = jnp.where(inside[:, None], means, 0.0) / (2 * spec.bound) + 0.5
    rows, start = [], 0
    for plane, axes in enumerate(PLANES):
        start = 0
        for cells, size in zip(resolutions(spec), sizes(spec), strict=True):
            place = unit[:, axes] * np.float32(cells - 1.0) + 0.5
            low = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, size - 2)
            u, v = (place - low).T
            corner = start + low[:, 0] * size + low[:, 1]
            c00, c01, c10, c11 = (tables[plane, corner + step] for step in (0, 1, size, size + 1))
            rows.append((1 - u) * ((1 - v) * c00 + v * c01) + u * ((1 - v) * c10 + v * c11))
            start += size * size
    return jnp.where(inside, jnp.stack(rows), 0.0)


class ReleasedFace(nnx.Module):
    """Face branch (TG Eq. 4-7)."""

    def __init__(self, grid: GridSpec, audio_shape: tuple[int, int], *, rngs: nnx.Rngs):
        width, units = len(PLANES) * grid.levels, len(UNITS)
        self.spec = grid
        self.tables = nnx.Param(jnp.zeros((len(PLANES), sum(size * size for size in sizes(grid)))))
        self.audio = AudioEncoder(audio_shape, rngs=rngs)
        self.expression = MLP((units - 1, 16, units - 1), rngs=rngs)
        self.attend_audio = MLP((width, 32, 32), rngs=rngs)
        self.attend_expression = MLP((width, 16, units), rngs=rngs)
        self.deform = MLP((width + 32 + units, 64, 64, 11), rngs=rngs)
        self.raw_scales = nnx.Param(jnp.zeros((1, 3)))  # f32 [N, 3], as many as Gaussians

    def __call__(self, means: jax.Array, condition: Condition) -> tuple[Deltas, dict[str, Any]]:
        """Means f32 [N, 3] -> deltas; those of log-scales are what the softplus of the moved raw scales makes of it."""
        _, audio = self.audio(condition.audio)
        units = condition.expression[CURRENT]
        expression = jnp.concatenate([self.expression(units[:-1]), units[-1:]])
        spatial = encode(self.tables[...], means, self.spec)
        nets = (self.deform, self.attend_audio, self.attend_expression)
        heard, seen = (nets[1].weights, audio), (nets[2].weights, expression)
        # the eighth output, an opacity, is not used there either
        out = gated(spatial, nets[0].weights, *heard, *seen, tuple(net.sizes for net in nets)).T
        raw = self.raw_scales[...]
        scales = jnp.log(jax.nn.softplus(raw + out[:, 8:])) - jnp.log(jax.nn.softplus(raw))
        return Deltas(means=MEANS_SCALE * out[:, :3], quats=out[:, 3:7], log_scales=scales), {}


class ReleasedMouth(nnx.Module):
    """Inside-mouth branch: means alone."""

    def __init__(self, grid: GridSpec, audio_shape: tuple[int, int], *, rngs: nnx.Rngs):
        self.spec = grid
        self.tables = nnx.Param(jnp.zeros((len(PLANES), sum(size * size for size in sizes(grid)))))
        self.audio = AudioEncoder(audio_shape, rngs=rngs)
        self.deform = MLP((len(PLANES) * grid.levels + 32, 32, 32, 3), rngs=rngs)

    def __call__(self, means: jax.Array, condition: Condition) -> tuple[Deltas, dict[str, Any]]:
        """Means f32 [N, 3] -> deltas of means; x and z move a fifth as far."""
        _, audio = self.audio(condition.audio)
        spatial = encode(self.tables[...], means, self.spec)
        z = jnp.concatenate([spatial, jnp.broadcast_to(audio[:, None], (len(audio), means.shape[0]))])
        return Deltas(means=self.deform(z).T * (MEANS_SCALE * jnp.asarray([0.2, 1.0, 0.2]))), {}


def create(kind: str, grid: GridSpec, audio_shape: tuple[int, int], *, rngs: nnx.Rngs) -> nnx.Module:
    """The network of a region, one of KINDS; see `motion.create`."""
    return {"released_face": ReleasedFace, "released_mouth": ReleasedMouth}[kind](grid, audio_shape, rngs=rngs)
