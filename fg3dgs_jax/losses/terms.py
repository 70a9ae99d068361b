"""The loss table: every term that a stage can weigh, by name.

A region term judges one region's layer, a frame term the finished frame. LPIPS and the lip-sync loss become rows here.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from fg3dgs_jax.losses import image
from fg3dgs_jax.types import Deltas


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
    # Of the pixels that the means are taken over, the share that is here; prediction and target agree on all others.
    share: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class FrameView:
    """The finished frame beside the video's, float32 [H, W, 3] in [0, 1]."""

    prediction: jax.Array
    target: jax.Array
    head: jax.Array  # [H, W] in {0, 1}


def _delta(name: str):
    def term(view: RegionView) -> jax.Array:
        return image.mean_abs(None if view.deltas is None else getattr(view.deltas, name), view.alive)

    return term


REGION_TERMS = {
    "l1": lambda view: view.share * image.l1(view.prediction, view.target),
    "dssim": lambda view: view.share * image.dssim(view.prediction, view.target),
    "alpha": lambda view: image.alpha(view.alpha, view.inside, view.outside),
    "delta_means": _delta("means"),
    "delta_quats": _delta("quats"),
    "delta_log_scales": _delta("log_scales"),
}

FRAME_TERMS = {
    "frame_l1": lambda view: image.l1(view.prediction, view.target),
    "frame_dssim": lambda view: image.dssim(view.prediction, view.target),
}


def psnr(views: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """PSNR in dB over all views, for the progress line.

    A view: prediction and target f32 [h, w, 3] in [0, 1], and the pixels that count, [h, w] in {0, 1}.
    """
    error, count = jnp.zeros(()), jnp.zeros(())
    for prediction, target, weight in views:
        error += (((jnp.clip(prediction, 0.0, 1.0) - target) ** 2).sum(-1) * weight).sum()
        count += 3.0 * weight.sum()
    return -10.0 * jnp.log10(jnp.maximum(error / jnp.maximum(count, 1.0), 1e-10))
