"""Networks that turn the condition of a frame (audio, expression) into the motion of a region's Gaussians.

Five kinds, see `create`. Parameter paths, by which optimizers match (`*` stands for `kernel` and `bias`):

    every kind         grid/tables
    face, cross_audio, mouth_mlp
                       audio/conv0..3/*  audio/linear0..1/*
                       audio/attention/conv0..4/*  audio/attention/linear/*
                       audio/basis/{mean,directions} where windows come as components (`HeadSpec`)
    face               expression/layer0..1/*
                       attend_audio/layer0..1/kernel  attend_expression/layer0..1/kernel  deform/layer0..2/kernel
    cross_audio        attention/{query,key,value,output}/kernel  attention/positions
                       gate/layer0..1/kernel  ffn1/layer0..1/kernel  ffn2/layer0..1/kernel  deform/layer0/kernel
    cross_expression   as cross_audio, with expression/layer0..1/* embed/* in place of audio/...
    mouth_mlp          deform/layer0..2/kernel
    eyes_mlp           as mouth_mlp, with expression/layer0..1/* in place of audio/...

All work in float32 at fixed shapes. Motion starts near zero, so that training starts from the static head. Inside, the
Gaussians are the last axis, [features, N]: on a CPU the grid, the biggest matrix products' weight gradients and every
elementwise step run up to twice as fast that way.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fg3dgs_jax.model import deltas
from fg3dgs_jax.model.attention import attend
from fg3dgs_jax.model.gated import gated
from fg3dgs_jax.model.hashgrid import GridSpec, TriPlaneGrid, draw_uniform, encode_transposed
from fg3dgs_jax.model.listen import listen
from fg3dgs_jax.model.mlp import MLP, Linear
from fg3dgs_jax.types import Condition, Deltas

NUM_TOKENS = 8  # frames [i-4, i+4)
CURRENT = NUM_TOKENS // 2  # the token of frame i itself
MOUTH_SHARES = np.float32([0.2, 1.0, 0.2])  # TG: inside the mouth x and z move a fifth as far as y
_FEATURES = 32  # width of an audio token and of the cross-modal attention
_HEADS = 4
_POSITION_LIMIT = 0.2
_START = 1e-4  # variance of the last layer of eyes and mouth at the start, relative to a usual one's
_TINY = 1e-12  # keeps the square root of a norm differentiable at zero

KINDS = ("face", "cross_audio", "cross_expression", "mouth_mlp", "eyes_mlp")


def _init_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform of variance 1 / fan-in: for kernels [.., in, out] of `nnx.Linear` and `nnx.Conv`."""
    return draw_uniform(key, shape, math.sqrt(3 / math.prod(shape[:-1]))).astype(dtype)


def _init_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.zeros(shape, dtype))


_dense = functools.partial(nnx.Linear, kernel_init=_init_kernel, bias_init=_init_bias)
_conv = functools.partial(nnx.Conv, kernel_size=(3,), padding=1, kernel_init=_init_kernel, bias_init=_init_bias)


class WindowAttention(nnx.Module):
    """What weighs the tokens of 8 frames: small convolutions and a linear layer over time (AD-NeRF). See `listen`."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        channels = (features, 16, 8, 4, 2, 1)
        for i in range(5):
            setattr(self, f"conv{i}", _conv(*channels[i : i + 2], rngs=rngs))
        self.linear = _dense(NUM_TOKENS, NUM_TOKENS, rngs=rngs)


class Projection(nnx.Module):
    """Windows to their components, by constants that are taken from the clip: see `data.audio_basis`."""

    def __init__(self, audio_shape: tuple[int, int], components: int):
        self.mean = nnx.Param(jnp.zeros(audio_shape))
        self.directions = nnx.Param(jnp.zeros((*audio_shape, components)))

    def __call__(self, audio: jax.Array) -> jax.Array:
        """Windows f32 [8, A, D] -> f32 [8, 1, C]."""
        return jnp.tensordot(audio - self.mean[...], self.directions[...], 2)[:, None]


class AudioEncoder(nnx.Module):
    """Audio windows to tokens of 32 features: four stride-2 convolutions over the window, two linear layers (TG).

    Departure: of an `audio_shape` (A, D, C) it sees a window's C principal components in place of the window.
    """

    def __init__(self, audio_shape: tuple[int, ...], *, rngs: nnx.Rngs):
        self.basis = Projection(audio_shape[:2], audio_shape[2]) if len(audio_shape) == 3 else None
        channels = (audio_shape[-1], 32, 32, 64, 64)
        for i in range(4):
            setattr(self, f"conv{i}", _conv(*channels[i : i + 2], strides=2, rngs=rngs))
        self.linear0 = _dense(64, 64, rngs=rngs)
        self.linear1 = _dense(64, _FEATURES, rngs=rngs)
        self.attention = WindowAttention(_FEATURES, rngs=rngs)

    def __call__(self, audio: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Windows f32 [8, A, D] -> tokens f32 [8, 32] and their pooled vector f32 [32].

        Each convolution halves the window, rounding up: 16 vectors end as one, as do 2. Longer windows end as several,
        which are averaged.
        """
        seen = audio if self.basis is None else self.basis(audio)
        own = [f"conv{i}" for i in range(4)] + ["linear0", "linear1"]
        layers = [getattr(self, name) for name in own]
        layers += [getattr(self.attention, name) for name in [*(f"conv{i}" for i in range(5)), "linear"]]
        return listen(seen, [(layer.kernel[...], layer.bias[...]) for layer in layers])


class ExpressionEncoder(nnx.Module):
    """Expression vectors refined by an MLP E -> 16 -> E beside a pass-through.

    Departure from TG, which passes only the blink through: every coefficient keeps its measured value, and the MLP
    adds what they mean together.
    """

    def __init__(self, expression_dim: int, *, rngs: nnx.Rngs):
        self.layer0 = _dense(expression_dim, 16, rngs=rngs)
        self.layer1 = _dense(16, expression_dim, rngs=rngs)

    def __call__(self, expression: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expressions f32 [8, E] -> tokens f32 [8, E] and the current frame's token f32 [E].

        No pooling over time: lids close within two frames, and a mean would blur them.
        """
        tokens = expression + self.layer1(jax.nn.relu(self.layer0(expression)))
        return tokens, tokens[CURRENT]


class FaceMotion(nnx.Module):
    """The low-frequency face: region attention gates the conditions, an MLP deforms (FG Eq. 6-8, TG Eq. 7)."""

    def __init__(
        self, grid: GridSpec, audio_shape: tuple[int, ...], expression_dim: int, *, rngs: nnx.Rngs,
        predicts: tuple[str, ...] = deltas.DEFORMATION,
    ):  # fmt: skip
        self.predicts = predicts
        self.grid = TriPlaneGrid(grid, rngs=rngs)
        self.audio = AudioEncoder(audio_shape, rngs=rngs)
        self.expression = ExpressionEncoder(expression_dim, rngs=rngs)
        self.attend_audio = MLP((grid.output_dim, 32, _FEATURES), rngs=rngs)
        self.attend_expression = MLP((grid.output_dim, 16, expression_dim), rngs=rngs)
        self.deform = MLP((grid.output_dim + _FEATURES + expression_dim, 64, 64, deltas.width(predicts)), rngs=rngs)

    def __call__(self, means: jax.Array, condition: Condition) -> tuple[Deltas, dict[str, Any]]:
        """Canonical means f32 [N, 3] -> deltas, by default of means, quaternions and log-scales.

        aux: `audio_attention`, `expression_attention` f32 [N], the norms of each Gaussian's attention vectors.
        """
        _, audio = self.audio(condition.audio)
        _, expression = self.expression(condition.expression)
        spatial = _spatial(self, means)
        nets = (self.deform, self.attend_audio, self.attend_expression)
        heard, seen = (nets[1].weights, audio), (nets[2].weights, expression)  # Eq. 6, gated in Eq. 7
        # Eq. 8; TG's eleventh output, an opacity that is never used, is left out
        out = gated(spatial, nets[0].weights, *heard, *seen, tuple(net.sizes for net in nets))
        return deltas.split(out.T, self.predicts), {
            "audio_attention": _norm(self.attend_audio(spatial)),
            "expression_attention": _norm(jax.nn.relu(self.attend_expression(spatial))),
        }


class CrossModalAttention(nnx.Module):
    """Four-head attention from every Gaussian to the 8 tokens of the condition (`phi_cm` of FG Eq. 10).

    FG does not print its second argument: the queries are the spatial features, and learned vectors per token let the
    keys and values tell one frame of the window from the next.
    """

    def __init__(self, spatial_dim: int, token_dim: int, *, rngs: nnx.Rngs):
        self.query = Linear(spatial_dim, _FEATURES, rngs=rngs)
        self.key = Linear(token_dim, _FEATURES, rngs=rngs)
        self.value = Linear(token_dim, _FEATURES, rngs=rngs)
        self.output = Linear(_FEATURES, _FEATURES, rngs=rngs)
        self.positions = nnx.Param(draw_uniform(rngs.params(), (NUM_TOKENS, _FEATURES), _POSITION_LIMIT))

    def to_scores(self, keys: jax.Array) -> jax.Array:
        """What turns spatial features into scores, f32 [8 heads, S], the tokens slowest; keys as of `fold`.

        Keys and values are the same for all Gaussians, so they are multiplied into the query's and the output's
        kernels first: two products with N columns are left of four.
        """
        query = self.query.kernel[...].reshape(-1, *keys.shape[1:])
        scores = jnp.einsum("shc,thc->ths", query, keys) / math.sqrt(keys.shape[2])
        return scores.reshape(NUM_TOKENS * _HEADS, -1)

    def fold(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys f32 [8, heads, 32 / heads] of tokens f32 [8, C], and what turns attention weights into the output,
        f32 [32, 8 heads], the tokens slowest."""
        head = (_HEADS, _FEATURES // _HEADS)
        keys, values = (
            (projection(tokens.T).T + self.positions[...]).reshape(NUM_TOKENS, *head)
            for projection in (self.key, self.value)
        )
        to_output = jnp.einsum("thc,hco->oth", values, self.output.kernel[...].reshape(*head, _FEATURES))
        return keys, to_output.reshape(_FEATURES, -1)


class CrossModalMotion(nnx.Module):
    """A high-frequency region, eyes or mouth: gated cross-modal attention moves the means only (FG Eq. 9-12).

    modality "audio" (mouth) or "expression" (eyes) chooses the condition. FG prints no sizes: 32 wide throughout.
    """

    def __init__(
        self, modality: str, grid: GridSpec, condition_shape: Any, *, rngs: nnx.Rngs,
        predicts: tuple[str, ...] = ("means",),
    ):  # fmt: skip
        self.modality = modality
        self.predicts = predicts
        self.grid = TriPlaneGrid(grid, rngs=rngs)
        if modality == "audio":
            self.audio = AudioEncoder(condition_shape, rngs=rngs)
        else:
            self.expression = ExpressionEncoder(condition_shape, rngs=rngs)
            self.embed = _dense(condition_shape, _FEATURES, rngs=rngs)
        self.attention = CrossModalAttention(grid.output_dim, _FEATURES, rngs=rngs)
        self.gate = MLP((_FEATURES, 16, 1), rngs=rngs)
        self.ffn1 = MLP((_FEATURES, 32, _FEATURES), rngs=rngs)
        self.ffn2 = MLP((_FEATURES, 32, _FEATURES), rngs=rngs)
        self.deform = MLP((_FEATURES, deltas.width(predicts)), rngs=rngs, last_gain=_START)

    def __call__(self, means: jax.Array, condition: Condition) -> tuple[Deltas, dict[str, Any]]:
        """Canonical means f32 [N, 3] -> deltas, by default of the means. aux: `gate`, f32 [], this frame's lambda."""
        heard = self.hear(condition)
        to_scores = self.attention.to_scores(self.attention.fold(heard[0])[0])
        out, gate = self.respond(_spatial(self, means), to_scores, *heard)
        return deltas.split(out.T, self.predicts), {"gate": gate}

    def respond(self, x: jax.Array, to_scores: jax.Array, tokens: jax.Array, pooled: jax.Array) -> tuple:
        """The network behind the scores to_scores x, f32 [out, N], and its gate lambda; what was heard as of `hear`.

        What lies between two layers without a ReLU is one product, of small matrices.
        """
        gate = jax.nn.sigmoid(self.gate(pooled)[0])  # Eq. 9
        reach = gate * self.attention.fold(tokens)[1]  # z of Eq. 10 is this times the attention's weights
        (up1, down1), (up2, down2), (last,) = self.ffn1.kernels, self.ffn2.kernels, self.deform.kernels
        hidden = up1.T @ reach, up1.T @ pooled  # Eq. 11's first layer
        second = (down1 @ up2).T, up2.T @ reach  # its second and Eq. 12's first
        return attend(x, to_scores, hidden, second, (down2 @ last).T, _HEADS), gate

    def hear(self, condition: Condition) -> tuple[jax.Array, jax.Array]:
        """The condition's tokens f32 [8, 32] and the vector f32 [32] that stands for the frame."""
        if self.modality == "audio":
            return self.audio(condition.audio)
        tokens = self.embed(self.expression(condition.expression)[0])
        return tokens, tokens[CURRENT]


class PlainMotion(nnx.Module):
    """TG's inside of the mouth: audio beside the spatial features, an MLP moves the means only.

    modality "expression" is the same for eyes (FG without frequency-aware modelling); they move as far in every
    direction.
    """

    def __init__(
        self, modality: str, grid: GridSpec, condition_shape: Any, *, rngs: nnx.Rngs,
        predicts: tuple[str, ...] = ("means",),
    ):  # fmt: skip
        self.modality = modality
        self.predicts = predicts
        self.grid = TriPlaneGrid(grid, rngs=rngs)
        if modality == "audio":
            self.audio = AudioEncoder(condition_shape, rngs=rngs)
        else:
            self.expression = ExpressionEncoder(condition_shape, rngs=rngs)
        given = _FEATURES if modality == "audio" else condition_shape
        self.deform = MLP((grid.output_dim + given, 32, 32, deltas.width(predicts)), rngs=rngs, last_gain=_START)

    def __call__(self, means: jax.Array, condition: Condition) -> tuple[Deltas, dict[str, Any]]:
        """Canonical means f32 [N, 3] -> deltas, by default of the means. aux is empty.

        In the mouth x and z move a fifth as far as y.
        """
        heard = self.modality == "audio"
        given = self.audio(condition.audio)[1] if heard else self.expression(condition.expression)[1]
        spatial = _spatial(self, means)
        z = jnp.concatenate([spatial, jnp.broadcast_to(given[:, None], (len(given), means.shape[0]))])
        return deltas.split(self.deform(z).T, self.predicts, MOUTH_SHARES if heard else 1.0), {}


def create(
    kind: str, grid: GridSpec, audio_shape: tuple[int, ...], expression_dim: int, *, rngs: nnx.Rngs,
    predicts: tuple[str, ...] = (),
) -> nnx.Module:  # fmt: skip
    """The motion network of a region: "face" (FG Eq. 6-8), "cross_audio" and "cross_expression" (FG Eq. 9-12),
    "mouth_mlp" (TG) or "eyes_mlp". audio_shape is (A, D) of one window, expression_dim E: see `types.Condition`;
    (A, D, C) lets the network see C principal components of a window, once its `audio/basis` is filled in.

    predicts: names of `deltas.OUTPUTS`, none twice; empty: the face's whole deformation, elsewhere the means alone.
    Every network maps (means f32 [N, 3], Condition) to (Deltas, aux dict), and treats the means as constants.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown motion network {kind!r}; choose one of {', '.join(KINDS)}.")
    predicts = deltas.of(kind, predicts)
    if kind == "face":
        return FaceMotion(grid, audio_shape, expression_dim, rngs=rngs, predicts=predicts)
    modality, shape = ("audio", audio_shape) if kind in ("cross_audio", "mouth_mlp") else ("expression", expression_dim)
    network = CrossModalMotion if kind.startswith("cross") else PlainMotion
    return network(modality, grid, shape, rngs=rngs, predicts=predicts)


def _spatial(module: Any, means: jax.Array) -> jax.Array:
    """Spatial features f32 [S, N]; motion does not pull on the canonical positions."""
    return encode_transposed(module.grid.tables[...], jax.lax.stop_gradient(means).T, module.grid.spec)


def _norm(vectors: jax.Array) -> jax.Array:
    """Norms f32 [N] of vectors [C, N]."""
    return jnp.sqrt(jnp.ones(len(vectors)) @ (vectors * vectors) + _TINY)
