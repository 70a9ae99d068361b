"""The encoders of wav2vec 2.0 and HuBERT in JAX (Baevski et al. 2020, Hsu et al. 2021), without PyTorch.

Weights keep the names and shapes under which they are published ([out, in, ...]); one description, config.json's
fields, covers the base models (group norm in the first convolution, norms after each block) and the large ones (layer
norms, before each block), and Chinese HuBERT, which is a base model.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STRIDE = 320  # samples between vectors, of every published model
EPSILON = 1e-5  # of norms inside the convolutions


class Shape(NamedTuple):
    """What config.json says and arrays alone do not."""

    kind: str  # wav2vec2 or hubert
    kernels: tuple[int, ...]  # of the convolutions over samples
    strides: tuple[int, ...]
    group_norm: bool  # in the first convolution alone; else a layer norm in each
    layers: int
    heads: int
    groups: int  # of the convolution that tells positions
    norm_first: bool  # "stable": norms before attention and feed-forward
    project_norm: bool
    epsilon: float

    @property
    def reach(self) -> int:
        """Samples that one vector sees."""
        seen, step = 1, 1
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            seen, step = seen + (kernel - 1) * step, step * stride
        return seen


def shape(config: Mapping) -> Shape:
    """The description in a config.json. Raises ValueError or KeyError for variants that nobody published weights of."""
    kind, kernels = config["model_type"], tuple(config["conv_kernel"])
    strides = tuple(config["conv_stride"])
    if kind not in ("wav2vec2", "hubert"):
        raise ValueError(f"model_type {kind!r} is neither wav2vec2 nor hubert")
    if np.prod(strides) != STRIDE:
        raise ValueError(f"one vector per {np.prod(strides)} samples and not per {STRIDE}")
    for field in ("feat_extract_activation", "hidden_act"):
        if config.get(field, "gelu") != "gelu":
            raise ValueError(f"{field} is not gelu")
    if config.get("conv_pos_batch_norm") or config.get("adapter_attn_dim") or config.get("position_embeddings_type"):
        raise ValueError("it has parts that the published models lack")
    return Shape(
        kind, kernels, strides, config["feat_extract_norm"] == "group", int(config["num_hidden_layers"]),
        int(config["num_attention_heads"]), int(config["num_conv_pos_embedding_groups"]),
        bool(config.get("do_stable_layer_norm", False)), bool(config.get("feat_proj_layer_norm", True)),
        float(config.get("layer_norm_eps", 1e-5)),
    )  # fmt: skip


def take(arrays: Mapping[str, np.ndarray], spec: Shape) -> dict[str, np.ndarray]:
    """The encoder's arrays f32 under names without the model's prefix, the positional weight norm multiplied out.

    Raises KeyError naming an array that is missing.
    """
    prefix = f"{spec.kind}."
    plain = {name.removeprefix(prefix): np.asarray(value, np.float32) for name, value in arrays.items()}
    pos = "encoder.pos_conv_embed.conv."
    for scale, direction in ((f"{pos}parametrizations.weight.original0", f"{pos}parametrizations.weight.original1"),
                             (f"{pos}weight_g", f"{pos}weight_v")):  # fmt: skip
        if scale in plain:
            vector = plain[direction]
            norm = np.sqrt((vector.astype(np.float64) ** 2).sum((0, 1), keepdims=True))
            plain[f"{pos}weight"] = (plain[scale] * vector / norm).astype(np.float32)
    wanted = {name: plain[name] for name in names(spec, plain)}
    return wanted | {name: plain[name] for name in ("lm_head.weight", "lm_head.bias") if name in plain}


def names(spec: Shape, plain: Mapping[str, np.ndarray]) -> list[str]:
    """Every array that the encoder needs; biases of convolutions where they are there."""
    both = lambda name: [f"{name}.weight", f"{name}.bias"]  # noqa: E731
    found = []
    for i in range(len(spec.kernels)):
        layer = f"feature_extractor.conv_layers.{i}"
        found.append(f"{layer}.conv.weight")
        found += [f"{layer}.conv.bias"] if f"{layer}.conv.bias" in plain else []
        found += both(f"{layer}.layer_norm") if i == 0 or not spec.group_norm else []
    found += both("feature_projection.layer_norm") if spec.project_norm else []
    found += both("feature_projection.projection") + both("encoder.pos_conv_embed.conv") + both("encoder.layer_norm")
    for i in range(spec.layers):
        parts = [f"attention.{part}_proj" for part in ("q", "k", "v", "out")]
        parts += ["layer_norm", "feed_forward.intermediate_dense", "feed_forward.output_dense", "final_layer_norm"]
        found += [name for part in parts for name in both(f"encoder.layers.{i}.{part}")]
    return found


@functools.partial(jax.jit, static_argnames=("spec", "logits"))
def encode(weights: Mapping[str, jax.Array], samples: jax.Array, spec: Shape, logits: bool = False) -> jax.Array:
    """Samples f32 [n] at 16 kHz, about unit variance -> last hidden states f32 [m, C], or the logits of the head.

    m = (n - reach) // 320 + 1.
    """
    x = samples[None, :]  # [channels, time]
    for i, stride in enumerate(spec.strides):
        x = _hearing_layer(weights, f"feature_extractor.conv_layers.{i}", x, stride, spec, i == 0)
    x = x.T
    if spec.project_norm:
        x = _norm(weights, "feature_projection.layer_norm", x, spec.epsilon)
    x = _linear(weights, "feature_projection.projection", x)
    x = x + _positions(weights, x, spec)
    if not spec.norm_first:
        x = _norm(weights, "encoder.layer_norm", x, spec.epsilon)
    for i in range(spec.layers):
        x = _block(weights, f"encoder.layers.{i}", x, spec)
    if spec.norm_first:
        x = _norm(weights, "encoder.layer_norm", x, spec.epsilon)
    return _linear(weights, "lm_head", x) if logits else x


def _hearing_layer(weights: Mapping, name: str, x: jax.Array, stride: int, spec: Shape, first: bool) -> jax.Array:
    """A convolution over time, its norm and GELU: [in, T] -> [out, T']."""
    x = jax.lax.conv_general_dilated(x[None], weights[f"{name}.conv.weight"], (stride,), "VALID")[0]
    if f"{name}.conv.bias" in weights:
        x = x + weights[f"{name}.conv.bias"][:, None]
    if not spec.group_norm:
        x = _norm(weights, f"{name}.layer_norm", x.T, EPSILON).T
    elif first:  # one group a channel: over time
        x = (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + EPSILON)
        x = x * weights[f"{name}.layer_norm.weight"][:, None] + weights[f"{name}.layer_norm.bias"][:, None]
    return jax.nn.gelu(x, approximate=False)


def _positions(weights: Mapping, x: jax.Array, spec: Shape) -> jax.Array:
    """What a wide grouped convolution tells of the places in time: [T, C] -> [T, C]."""
    kernel = weights["encoder.pos_conv_embed.conv.weight"]
    half = kernel.shape[-1] // 2
    out = jax.lax.conv_general_dilated(x.T[None], kernel, (1,), [(half, half)], feature_group_count=spec.groups)[0]
    out = out[:, : x.shape[0]].T + weights["encoder.pos_conv_embed.conv.bias"]  # an even kernel gives one too many
    return jax.nn.gelu(out, approximate=False)


def _block(weights: Mapping, name: str, x: jax.Array, spec: Shape) -> jax.Array:
    def feed(y: jax.Array) -> jax.Array:
        inner = _linear(weights, f"{name}.feed_forward.intermediate_dense", y)
        return _linear(weights, f"{name}.feed_forward.output_dense", jax.nn.gelu(inner, approximate=False))

    attend = functools.partial(_attention, weights, f"{name}.attention", heads=spec.heads)
    norm = [functools.partial(_norm, weights, f"{name}.{part}", epsilon=spec.epsilon)
            for part in ("layer_norm", "final_layer_norm")]  # fmt: skip
    if spec.norm_first:
        x = x + attend(norm[0](x))
        return x + feed(norm[1](x))
    x = norm[0](x + attend(x))
    return norm[1](x + feed(x))


def _attention(weights: Mapping, name: str, x: jax.Array, heads: int) -> jax.Array:
    split = lambda part: _linear(weights, f"{name}.{part}_proj", x).reshape(len(x), heads, -1)  # noqa: E731
    query, key, value = split("q"), split("k"), split("v")
    scores = jnp.einsum("qhd,khd->hqk", query * query.shape[-1] ** -0.5, key)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), value)
    return _linear(weights, f"{name}.out_proj", mixed.reshape(len(x), -1))


def _linear(weights: Mapping, name: str, x: jax.Array) -> jax.Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Mapping, name: str, x: jax.Array, epsilon: float) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]
