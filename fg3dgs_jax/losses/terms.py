"""The loss table: every term that a stage can weigh, by name.

A region term judges one region's layer, a frame term the finished frame, a snippet term five consecutive frames. Some
ask a pretrained network (NEEDS); without its weights a stage does without them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fg3dgs_jax.losses import image, lpips, sync
from fg3dgs_jax.types import Deltas, Gaussians


@flax.struct.dataclass
class RegionView:
    """One region's layer beside what it should be, cropped to the region's box. All float32."""

    prediction: jax.Array  # [h, w, 3], the layer over a background
    target: jax.Array  # [h, w, 3], the image inside the region's mask over the same background
    alpha: jax.Array  # [h, w], the layer's
    inside: jax.Array  # [h, w] in {0, 1}: the region's mask
    outside: jax.Array  # [h, w] in {0, 1}: must stay empty; what is neither is not judged
    deltas: Deltas | None  # None while the head stands still
    alive: jax.Array  # bool [N]
    judges: Mapping[str, Any]  # pretrained networks by the names in NEEDS
    gaussians: Gaussians | None = None  # as they are at rest
    # Of the pixels that the means are taken over, the share that is here; prediction and target agree on all others.
    share: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class FrameView:
    """The finished frame beside the video's, float32 [H, W, 3] in [0, 1]."""

    prediction: jax.Array
    target: jax.Array
    head: jax.Array  # [H, W] in {0, 1}
    judges: Mapping[str, Any]
    key: jax.Array  # of this step's random patches


@flax.struct.dataclass
class SnippetView:
    """Consecutive finished frames beside their sound."""

    predictions: jax.Array  # f32 [n, H, W, 3]
    face_boxes: jax.Array  # f32 [n, 4]
    mel: jax.Array  # f32 [80, 16]
    judges: Mapping[str, Any]


def _delta(name: str):
    def term(view: RegionView) -> jax.Array:
        values = None if view.deltas is None else getattr(view.deltas, name)
        return image.mean_abs(values if values is None or values.ndim > 1 else values[:, None], view.alive)

    return term


def _opacity(view: RegionView) -> jax.Array:
    return image.mean_abs(jax.nn.sigmoid(view.gaussians.logit_opacities)[:, None], view.alive)


def _scale(view: RegionView) -> jax.Array:
    return image.mean_abs(jnp.exp(view.gaussians.log_scales), view.alive)


def _frame_lpips(view: FrameView) -> jax.Array:
    judge = view.judges["lpips"]
    return lpips.patches(judge, view.prediction, view.target, view.head, view.key, PATCHES, PATCH_EDGE)


def _region_lpips(view: RegionView) -> jax.Array:
    return lpips.distance(view.judges["lpips"], view.prediction[None], view.target[None])[0]


# Together an eighth of a frame at 512 x 512. FG says only "random patches"; TG's tiles are 32 to 42 pixels wide.
PATCHES, PATCH_EDGE = 8, 64

REGION_TERMS = {
    "l1": lambda view: view.share * image.l1(view.prediction, view.target),
    "dssim": lambda view: view.share * image.dssim(view.prediction, view.target),
    "alpha": lambda view: image.alpha(view.alpha, view.inside, view.outside),
    "delta_means": _delta("means"),
    "delta_quats": _delta("quats"),
    "delta_log_scales": _delta("log_scales"),
    "delta_opacities": _delta("opacities"),
    "delta_colors": _delta("colors"),
    "opacity": _opacity,  # mean opacity, and mean scale in world units: what nothing needs fades (3DGS as MCMC)
    "scale": _scale,
    "lpips": _region_lpips,
}

FRAME_TERMS = {
    "frame_l1": lambda view: image.l1(view.prediction, view.target),
    "frame_dssim": lambda view: image.dssim(view.prediction, view.target),
    "frame_lpips": _frame_lpips,
}

SNIPPET_TERMS = {
    "sync": lambda view: sync.loss(view.judges["sync"], view.predictions, view.face_boxes, view.mel),
}

# Term -> the judge it asks.
NEEDS = {"lpips": "lpips", "frame_lpips": "lpips", "sync": "sync"}


def psnr(views: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """PSNR in dB over all views, for the progress line.

    A view: prediction and target f32 [h, w, 3] in [0, 1], and the pixels that count, [h, w] in {0, 1}.
    """
    error, count = jnp.zeros(()), jnp.zeros(())
    for prediction, target, weight in views:
        error += (((jnp.clip(prediction, 0.0, 1.0) - target) ** 2).sum(-1) * weight).sum()
        count += 3.0 * weight.sum()
    return -10.0 * jnp.log10(jnp.maximum(error / jnp.maximum(count, 1.0), 1e-10))
