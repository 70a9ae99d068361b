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
    """One region's layer beside what it should be, cropped to the region's box."""

    color: jax.Array  # f32 [h, w, 3], the layer's, premultiplied
    opacity: jax.Array  # f32 [h, w], the layer's
    picture: jax.Array  # u8 [h, w, 3]
    inside: jax.Array  # bool [h, w]: the region's mask
    outside: jax.Array  # bool [h, w]: must stay empty; what is neither is not judged
    background: jax.Array  # f32 [3], behind the layer, and behind the picture's mask in the target
    deltas: Deltas | None  # None while the head stands still
    alive: jax.Array  # bool [N]
    judges: Mapping[str, Any]  # pretrained networks by the names in NEEDS
    gaussians: Gaussians | None = None  # as they are at rest
    lips: jax.Array | None = None  # f32 [], how far moved lips are from their landmarks, in lip widths; None: not here
    # Of the pixels that the means are taken over, the share that is here; prediction and target agree on all others.
    share: float = flax.struct.field(pytree_node=False, default=1.0)

    def photo(self, weights: Mapping[str, float]) -> tuple[jax.Array, dict[str, jax.Array], image.Photo]:
        """The weighted sum of the PHOTO_TERMS, those that `weights` names, and all that was seen on the way."""
        marks = _marks(self.inside, image.Marks.INSIDE | image.Marks.COUNTED) | _marks(
            self.outside, image.Marks.OUTSIDE
        )
        factors = [self.share, self.share, 1.0]
        given = [factor * weights.get(term, 0.0) for term, factor in zip(PHOTO_TERMS, factors, strict=True)]
        loss, seen = image.photo(self.color, self.opacity, self.picture, marks, self.background, given)
        values = [factor * value for factor, value in zip(factors, seen[:3], strict=True)]
        return loss, {term: v for term, v in zip(PHOTO_TERMS, values, strict=True) if term in weights}, seen

    def beside(self) -> tuple[jax.Array, jax.Array]:
        """The layer over the background, and its target, f32 [h, w, 3]."""
        return image.beside(self.color, self.opacity, self.picture, self.inside, self.outside, self.background)


@flax.struct.dataclass
class FrameView:
    """The finished frame beside the video's."""

    prediction: jax.Array  # f32 [H, W, 3] in [0, 1]
    picture: jax.Array  # u8 [H, W, 3]
    head: jax.Array  # bool [H, W]
    judges: Mapping[str, Any]
    key: jax.Array  # of this step's random patches

    def photo(self, weights: Mapping[str, float]) -> tuple[jax.Array, dict[str, jax.Array], image.Photo]:
        """As a region's, with the FRAME_PHOTO_TERMS: every pixel is judged, and the head's count."""
        marks = jnp.uint8(image.Marks.INSIDE) | _marks(self.head, image.Marks.COUNTED)
        given = [*(weights.get(term, 0.0) for term in FRAME_PHOTO_TERMS), 0.0]
        opaque, black = jnp.ones(self.head.shape), jnp.zeros(3)
        loss, seen = image.photo(self.prediction, opaque, self.picture, marks, black, given)
        return loss, {term: v for term, v in zip(FRAME_PHOTO_TERMS, seen[:2], strict=True) if term in weights}, seen


@flax.struct.dataclass
class SnippetView:
    """Consecutive finished frames beside their sound."""

    predictions: jax.Array  # f32 [n, H, W, 3]
    face_boxes: jax.Array  # f32 [n, 4]
    mel: jax.Array  # f32 [80, 16]
    judges: Mapping[str, Any]


def _marks(mask: jax.Array, bits: int) -> jax.Array:
    return jnp.where(mask, jnp.uint8(bits), jnp.uint8(0))


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
    target, head = view.picture.astype(jnp.float32) / 255.0, view.head.astype(jnp.float32)
    return lpips.patches(judge, view.prediction, target, head, view.key, PATCHES, PATCH_EDGE)


def _region_lpips(view: RegionView) -> jax.Array:
    prediction, target = view.beside()
    return lpips.distance(view.judges["lpips"], prediction[None], target[None])[0]


# Together an eighth of a frame at 512 x 512. FG says only "random patches"; TG's tiles are 32 to 42 pixels wide.
PATCHES, PATCH_EDGE = 8, 64

# Those of a view that come of one pass over its pixels, by its `photo`, in this order.
PHOTO_TERMS = ("l1", "dssim", "alpha")
FRAME_PHOTO_TERMS = ("frame_l1", "frame_dssim")

REGION_TERMS = {
    "delta_means": _delta("means"),
    "delta_quats": _delta("quats"),
    "delta_log_scales": _delta("log_scales"),
    "delta_opacities": _delta("opacities"),
    "delta_colors": _delta("colors"),
    "landmarks": lambda view: jnp.zeros(()) if view.lips is None else view.lips,
    "opacity": _opacity,  # mean opacity, and mean scale in world units: what nothing needs fades (3DGS as MCMC)
    "scale": _scale,
    "lpips": _region_lpips,
}

FRAME_TERMS = {
    "frame_lpips": _frame_lpips,
}

SNIPPET_TERMS = {
    "sync": lambda view: sync.loss(view.judges["sync"], view.predictions, view.face_boxes, view.mel),
}

REGION_NAMES = (*PHOTO_TERMS, *REGION_TERMS)
FRAME_NAMES = (*FRAME_PHOTO_TERMS, *FRAME_TERMS)


def of_frames(term: str) -> bool:
    """Whether a term judges finished frames, one or several, and not a region's layer."""
    return term in FRAME_NAMES or term in SNIPPET_TERMS


# Term -> the judge it asks.
NEEDS = {"lpips": "lpips", "frame_lpips": "lpips", "sync": "sync"}


def judged(view: RegionView | FrameView, weights: Mapping[str, float]) -> tuple[jax.Array, dict, image.Photo]:
    """The weighted sum of a view's terms, the terms by name, and what `image.photo` saw."""
    table = FRAME_TERMS if isinstance(view, FrameView) else REGION_TERMS
    loss, values, seen = view.photo(weights)
    loss = loss if values else jnp.zeros(())  # what nothing asks for is not computed
    for term, weight in weights.items():
        if term in table:
            values[term] = table[term](view)
            loss += weight * values[term]
    return loss, values, seen


def psnr(seen: Sequence[image.Photo]) -> jax.Array:
    """PSNR in dB over all pixels that count, for the progress line."""
    error, count = sum(s.error for s in seen), 3.0 * sum(s.count for s in seen)
    return -10.0 * jnp.log10(jnp.maximum(error / jnp.maximum(count, 1.0), 1e-10))
