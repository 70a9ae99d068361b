"""What inference can compute once: everything about a trained head that neither sound nor expression changes.

    baked = bake(spec, params, alive)                    # after training, on the host
    deltas = move(spec, baked, condition)                # per frame: what `motion`'s networks return
    picture = draw(spec, baked, deltas, camera, backdrop)

Gaussians that cannot be seen are left out; the others are activated and lie along a Morton curve. Positions are
canonical, so what a network makes of them alone is a constant of each Gaussian: the face's share of its first layer
(a bias per Gaussian) and the vectors that sound and expression gate; the queries of eyes and mouth. What a frame's
condition does to all Gaussians alike is folded into small matrices, and products with nothing between them into one.

All of it is exact in real numbers. In float32 a baked head's frames differ from the head's own by at most TOLERANCE
grey levels of 255, which tests hold.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fg3dgs_jax.model import deltas as delta_lib
from fg3dgs_jax.model import render as rendering
from fg3dgs_jax.model.hashgrid import encode_transposed
from fg3dgs_jax.model.mlp import multiply_onto
from fg3dgs_jax.model.motion import CURRENT, MOUTH_SHARES
from fg3dgs_jax.model.talking_gaussian import encode as encode_released
from fg3dgs_jax.types import Array, Camera, Condition, Deltas, Gaussians

# A value between two grey levels is rounded either way (1). Where rounding carries a Gaussian over one of the
# rasterizer's cut-offs, a pixel gains or loses what it adds there: 1/255, or 1 % of a pixel that is nearly opaque (3).
TOLERANCE = 3
MIN_OPACITY = 1.0 / 255.0  # the rasterizer draws nothing fainter
_MORTON_BITS = 10  # per axis
# Parameters whose work is in the rows; the others fold a frame's condition.
_SPENT = ("grid", "tables", "attend_audio", "attend_expression", "raw_scales")


@flax.struct.dataclass
class BakedRegion:
    """The N Gaussians of a region that can be seen, activated, and what its network needs of them."""

    means: Array  # f32 [N, 3], world units
    quats: Array  # f32 [N, 4], wxyz; of length 1 where motion leaves them alone
    scales: Array  # f32 [N, 3], world units
    opacities: Array  # f32 [N], at least 1/255
    sh: Array  # f32 [N, K, 3], as many coefficients as the head's degree has
    rows: dict[str, Array]  # f32 [.., N] each, what the network makes of a Gaussian alone: see the kinds below
    network: dict  # the network's parameters; those whose work is in the rows hold nothing


def bake(spec: rendering.HeadSpec, params: Mapping[str, Mapping], alive: Mapping[str, Array]) -> dict[str, BakedRegion]:
    """The baked form of a head, numpy arrays; arguments as `render.render_frame` takes them.

    Left out are Gaussians that no frame can show: dead ones, those fainter than 1/255, those with a value that is not
    finite. Raises ValueError where a region keeps none.
    """
    graphs, _ = rendering.motion_structure(spec)
    baked = {}
    for region in spec.regions:
        gaussians = jax.tree.map(np.asarray, params[region.name]["gaussians"])
        predicts = delta_lib.of(region.motion, region.predicts)
        faintest = 0.0 if "opacities" in predicts else MIN_OPACITY  # what motion may bring out is kept
        kept = _kept(gaussians, np.asarray(alive[region.name]), faintest)
        if not kept.size:
            raise ValueError(f"the region {region.name} shows no Gaussian")
        chosen = jax.tree.map(lambda x, k=kept: x[k], gaussians)
        motion = dict(params[region.name]["motion"])
        if "raw_scales" in motion:  # the one parameter with a row per Gaussian
            motion["raw_scales"] = np.asarray(motion["raw_scales"])[kept]
        kind = _KINDS[region.motion]
        shape = _activated(chosen, spec.sh_degree, "quats" in predicts)
        rows = jax.tree.map(np.asarray, kind.rows(nnx.merge(graphs[region.name], motion), chosen.means))
        network = jax.tree.map(np.asarray, _without_spent(motion, np.zeros(0, np.float32)))
        baked[region.name] = BakedRegion(**shape, rows=rows, network=network)
    return baked


def move(spec: rendering.HeadSpec, baked: Mapping[str, BakedRegion], condition: Condition) -> dict[str, Deltas]:
    """Every region's deltas for one frame, as the head's own networks give them."""
    graphs, _ = rendering.motion_structure(spec)
    deltas = {}
    for region in spec.regions:
        part = baked[region.name]
        net = nnx.merge(graphs[region.name], part.network)
        deltas[region.name] = _KINDS[region.motion].move(net, part.rows, condition)
    return deltas


def draw(
    spec: rendering.HeadSpec,
    baked: Mapping[str, BakedRegion],
    deltas: Mapping[str, Deltas],
    camera: Camera,
    backdrop: Array,
    *,
    options: rendering.RasterOptions = rendering.USUAL,
) -> jax.Array:
    """One finished frame, as `render.draw`."""
    regions = [_moved(baked[region.name], deltas[region.name]) for region in spec.regions]
    return rendering.paint(regions, camera, backdrop, options=options)


def structure(spec: rendering.HeadSpec, counts: Mapping[str, int]) -> dict[str, BakedRegion]:
    """The shapes of a baked head with so many Gaussians in each region (jax.ShapeDtypeStruct)."""
    graphs, motions = rendering.motion_structure(spec)
    coefficients = (spec.sh_degree + 1) ** 2
    out = {}
    for region in spec.regions:
        count, motion, graph = counts[region.name], motions[region.name], graphs[region.name]

        def rows(motion, means, kind=_KINDS[region.motion], graph=graph):
            return kind.rows(nnx.merge(graph, motion), means)

        one = jax.eval_shape(rows, motion, jax.ShapeDtypeStruct((1, 3), jnp.float32))
        all_rows = {name: jax.ShapeDtypeStruct((row.shape[0], count), jnp.float32) for name, row in one.items()}
        shapes = {"means": 3, "quats": 4, "scales": 3}
        sized = {name: jax.ShapeDtypeStruct((count, size), jnp.float32) for name, size in shapes.items()}
        out[region.name] = BakedRegion(
            **sized,
            opacities=jax.ShapeDtypeStruct((count,), jnp.float32),
            sh=jax.ShapeDtypeStruct((count, coefficients, 3), jnp.float32),
            rows=all_rows,
            network=_without_spent(motion, jax.ShapeDtypeStruct((0,), jnp.float32)),
        )
    return out


def raw_gaussians(part: BakedRegion) -> Gaussians:
    """A region's raw parameters, for files, as far as they were kept."""
    opacities = np.asarray(part.opacities, np.float64)
    logits = np.log(opacities) - np.log1p(-np.minimum(opacities, 1 - 1e-7))
    scales = np.log(np.asarray(part.scales))
    return Gaussians(part.means, part.quats, scales, logits.astype(np.float32), part.sh)


def morton_order(points: np.ndarray) -> np.ndarray:
    """The order i64 [N] in which points [N, 3] lie along a Morton curve through their box."""
    low, high = points.min(0), points.max(0)
    cells = ((points - low) / np.maximum(high - low, 1e-12) * (2**_MORTON_BITS - 1)).astype(np.int64)
    codes = np.zeros(len(points), np.int64)
    for bit in range(_MORTON_BITS):
        for axis in range(3):
            codes |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return np.argsort(codes, kind="stable")


def _kept(gaussians: Gaussians, alive: np.ndarray, faintest: float) -> np.ndarray:
    """Slots of the Gaussians that can be seen, at least `faintest` opaque, along a Morton curve."""
    opacity = 1.0 / (1.0 + np.exp(-gaussians.logit_opacities.astype(np.float64)))
    finite = [np.isfinite(x).reshape(len(x), -1).all(1) for x in jax.tree.leaves(gaussians)]
    slots = np.flatnonzero(alive & functools.reduce(np.logical_and, finite) & (opacity >= faintest))
    return slots[morton_order(gaussians.means[slots])] if slots.size else slots


def _without_spent(motion: Mapping, nothing: Any) -> dict:
    """A network's parameters, with `nothing` in place of those whose work is in the rows."""
    return {name: jax.tree.map(lambda _: nothing, part) if name in _SPENT else part for name, part in motion.items()}


def _activated(gaussians: Gaussians, degree: int, turning: bool) -> dict[str, np.ndarray]:
    """Fields of `BakedRegion`. Quaternions that frames add to keep their length, which weighs what is added."""
    quats = gaussians.quats
    if not turning:
        quats = quats / np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), 1e-12)
    return {
        "means": gaussians.means,
        "quats": quats,
        "scales": np.exp(gaussians.log_scales),
        "opacities": np.asarray(jax.nn.sigmoid(gaussians.logit_opacities)),
        "sh": gaussians.sh[:, : (degree + 1) ** 2],
    }


def _moved(part: BakedRegion, deltas: Deltas) -> tuple[jax.Array, ...]:
    """One region's Gaussians as `rasterize` takes them."""
    return (
        part.means + deltas.means,
        part.quats if deltas.quats is None else part.quats + deltas.quats,
        part.scales if deltas.log_scales is None else part.scales * jnp.exp(deltas.log_scales),
        part.opacities if deltas.opacities is None else _more_opaque(part.opacities, deltas.opacities),
        part.sh if deltas.colors is None else part.sh.at[:, 0].add(deltas.colors),
    )


def _more_opaque(opacities: jax.Array, change: jax.Array) -> jax.Array:
    """Opacities [N] whose logits are moved by `change`: their odds are multiplied."""
    odds = opacities * jnp.exp(change)
    return odds / (odds + 1.0 - opacities)


def _spatial(net: Any, means: np.ndarray) -> jax.Array:
    """Spatial features f32 [S, N]."""
    if hasattr(net, "grid"):
        return encode_transposed(net.grid.tables[...], jnp.asarray(means).T, net.grid.spec)
    return encode_released(net.tables[...], jnp.asarray(means), net.spec)


# The face: sound and expression gate vectors of each Gaussian, a perceptron deforms (FG Eq. 6-8). Rows: the first
# layer's share of the position, the vectors, and in the released kind the raw scales.


def _face_rows(net: Any, means: np.ndarray) -> dict[str, jax.Array]:
    spatial = _spatial(net, means)
    vectors = [net.attend_audio(spatial), jax.nn.relu(net.attend_expression(spatial))]
    share = net.deform.kernels[0][: len(spatial)].T @ spatial
    rows = {"share": share, "vectors": jnp.concatenate(vectors)}
    return rows | ({"raw_scales": net.raw_scales[...].T} if _is_released(net) else {})


def _face_move(net: Any, rows: Mapping[str, jax.Array], condition: Condition) -> Deltas:
    gates = _gates(net, condition)
    first, *others = net.deform.kernels
    out = multiply_onto(rows["share"], rows["vectors"], [gates[:, None] * first[-len(gates) :], *others]).T
    if not _is_released(net):
        return delta_lib.split(out, net.predicts)
    # the eighth output, an opacity, is not used there either
    deltas = delta_lib.split(jnp.delete(out, 7, axis=1, assume_unique_indices=True), delta_lib.DEFORMATION)
    raw = rows["raw_scales"].T
    scales = jnp.log(jax.nn.softplus(raw + deltas.log_scales)) - jnp.log(jax.nn.softplus(raw))
    return deltas.replace(log_scales=scales)


def _is_released(net: Any) -> bool:
    return hasattr(net, "raw_scales")


def _gates(net: Any, condition: Condition) -> jax.Array:
    """What sound and expression multiply every Gaussian's vectors with, f32 [32 + E]."""
    audio = net.audio(condition.audio)[1]
    if not _is_released(net):
        return jnp.concatenate([audio, net.expression(condition.expression)[1]])
    units = condition.expression[CURRENT]
    return jnp.concatenate([audio, net.expression(units[:-1]), units[-1:]])


# TG's inside of the mouth: sound beside the position, a perceptron moves the means; eyes likewise by expression. Rows:
# the first layer's share of the position.


def _added_rows(net: Any, means: np.ndarray) -> dict[str, jax.Array]:
    spatial = _spatial(net, means)
    return {"share": net.deform.kernels[0][: len(spatial)].T @ spatial}


def _added_move(net: Any, rows: Mapping[str, jax.Array], condition: Condition) -> Deltas:
    by_sound = hasattr(net, "audio")
    given = net.audio(condition.audio)[1] if by_sound else net.expression(condition.expression)[1]
    first, *others = net.deform.kernels
    heard = given @ first[-len(given) :]  # the same for all Gaussians
    share = rows["share"]
    out = multiply_onto(share, jnp.ones((1, share.shape[1])), [heard[None], *others])
    return delta_lib.split(out.T, getattr(net, "predicts", ("means",)), MOUTH_SHARES if by_sound else 1.0)


# Eyes and mouth: gated cross-modal attention moves the means (FG Eq. 9-12). Rows: the queries.


def _attending_rows(net: Any, means: np.ndarray) -> dict[str, jax.Array]:
    return {"queries": net.attention.query(_spatial(net, means))}


def _attending_move(net: Any, rows: Mapping[str, jax.Array], condition: Condition) -> Deltas:
    heard = net.hear(condition)
    keys, _ = net.attention.fold(heard[0])
    tokens, heads, width = keys.shape
    own = np.eye(heads, dtype=np.float32)[:, :, None]  # a head's scores are of its queries alone
    to_scores = (keys / math.sqrt(width))[:, :, None] * own
    out, _ = net.respond(rows["queries"], to_scores.reshape(tokens * heads, heads * width), *heard)
    return delta_lib.split(out.T, net.predicts)


class _Kind(NamedTuple):
    rows: Callable[[Any, np.ndarray], dict[str, jax.Array]]  # (network, means [N, 3]) -> [.., N] each
    move: Callable[[Any, Mapping[str, jax.Array], Condition], Deltas]  # (network, rows, condition)


_FACE, _ADDED = _Kind(_face_rows, _face_move), _Kind(_added_rows, _added_move)
_ATTENDING = _Kind(_attending_rows, _attending_move)
_KINDS = {
    "face": _FACE, "released_face": _FACE, "mouth_mlp": _ADDED, "eyes_mlp": _ADDED, "released_mouth": _ADDED,
    "cross_audio": _ATTENDING, "cross_expression": _ATTENDING,
}  # fmt: skip
