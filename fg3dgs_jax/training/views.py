"""What the loss terms look at: a region's layer in its window, or the finished frame."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fg3dgs_jax.losses import terms as loss_terms
from fg3dgs_jax.model.render import composite
from fg3dgs_jax.training.stages import RegionTask
from fg3dgs_jax.types import Camera, Deltas, Frame, Gaussians, Label, Rendered


class Layer(NamedTuple):
    """One region's contribution to a frame."""

    rendered: Rendered
    deltas: Deltas | None
    gaussians: Gaussians | None = None  # unmoved
    lips: jax.Array | None = None  # see `terms.RegionView`


def _has(labels: jax.Array, bits: int) -> jax.Array:
    return (labels & jnp.uint8(bits)) != 0


def _in_boxes(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """bool [H, W]: inside any of the half-open boxes i32 [B, 4] (row0, row1, col0, col1)."""
    rows, cols = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = [(rows >= b[0]) & (rows < b[1]) & (cols >= b[2]) & (cols < b[3]) for b in boxes]
    return jnp.any(jnp.stack(inside), axis=0)


def _boxes(frame: Frame, kind: str) -> jax.Array:
    return frame.lips_box[None] if kind == "lips" else frame.eye_boxes


def _grown(mask: jax.Array, pixels: int) -> jax.Array:
    """A mask bool [H, W] with all that is at most `pixels` rows and columns away from it."""
    for axis in (0, 1):
        ends = [(0, 0), (0, 0)]
        ends[axis] = pixels, pixels
        padded, size = jnp.pad(mask, ends), mask.shape[axis]
        shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * pixels + 1)]
        mask = functools.reduce(jnp.logical_or, shifted)
    return mask


class Window(NamedTuple):
    """A rectangle of the frame: where it starts (traced) and how large it is."""

    row: jax.Array | int
    col: jax.Array | int
    height: int
    width: int

    def crop(self, image: jax.Array) -> jax.Array:
        """The rectangle of an image [H, W, ...] of the frame's size."""
        start = (self.row, self.col, *(0,) * (image.ndim - 2))
        return jax.lax.dynamic_slice(image, start, (self.height, self.width, *image.shape[2:]))

    def camera(self, frame: Frame) -> Camera:
        """The frame's camera, seeing the rectangle only."""
        origin = jnp.stack([jnp.zeros(()), jnp.zeros(()), 1.0 * self.col, 1.0 * self.row])
        return Camera(frame.viewmat, frame.intrinsics - origin, self.width, self.height)


def _bounds(mask: jax.Array) -> jax.Array:
    """The box i32 [1, 4] (row0, row1, col0, col1) of a mask bool [H, W]; the whole image if nothing is set."""
    ends = []
    for axis in (1, 0):
        there = jnp.any(mask, axis=axis)
        ends += [jnp.argmax(there), there.shape[0] - jnp.argmax(there[::-1])]
    return jnp.stack(ends).astype(jnp.int32)[None]


def window_of(task: RegionTask, frame: Frame, whole: bool) -> Window:
    """What a region's terms look at: `task.crop` pixels around its boxes' common middle.

    A region without boxes is looked at `whole`, or in the window that holds its mask.
    """
    height, width = frame.labels.shape
    if not task.box and whole:
        return Window(0, 0, height, width)
    boxes = _boxes(frame, task.box) if task.box else _bounds(_has(frame.labels, task.include))
    edges = min(task.crop[0], height), min(task.crop[1], width)
    middle = [(boxes[:, a].min() + boxes[:, a + 1].max()) // 2 for a in (0, 2)]
    row, col = (
        jnp.clip(m - edge // 2, 0, size - edge) for m, edge, size in zip(middle, edges, (height, width), strict=True)
    )
    return Window(row, col, *edges)


def region_view(
    layer: Layer,
    alive: jax.Array,
    frame: Frame,
    task: RegionTask,
    window: Window,
    background: jax.Array,
    judges: Mapping,
) -> loss_terms.RegionView:
    """A region's layer beside its target, in the region's window.

    Departure: outside the mask the target is a colour drawn anew each step, not a fixed green, so that the layer's
    alpha is learned at its edge and no sentinel colour can leak into it.
    """
    color, alpha = layer.rendered.color, layer.rendered.alpha
    if alpha.shape != (window.height, window.width):
        color, alpha = window.crop(color), window.crop(alpha)
    labels = window.crop(frame.labels)
    inside = _has(labels, task.include) & ~_has(labels, task.exclude)
    if pixels := round(task.overlap * frame.labels.shape[0]):
        inside |= _grown(inside, pixels) & _has(labels, Label.HEAD)
    outside = ~inside
    if task.box:
        boxes = _boxes(frame, task.box) - jnp.stack([window.row, window.row, window.col, window.col])
        outside &= ~_in_boxes(boxes, window.height, window.width)
    return loss_terms.RegionView(
        color=color,
        opacity=alpha,
        picture=window.crop(frame.image),
        inside=inside,
        outside=outside,
        background=background,
        deltas=layer.deltas,
        gaussians=layer.gaussians,
        lips=layer.lips,
        alive=alive,
        judges=judges,
        # The window of boxes is all that is judged; the head's only leaves out what is empty anyway.
        share=1.0 if task.box else window.height * window.width / frame.labels.size,
    )


def frame_view(layers: list[Layer], frame: Frame, judges: Mapping, key: jax.Array) -> loss_terms.FrameView:
    """The composite over the frame's own backdrop beside the frame."""
    backdrop = frame.backdrop.astype(jnp.float32) / 255.0
    return loss_terms.FrameView(
        prediction=composite([layer.rendered for layer in layers], backdrop),
        picture=frame.image,
        head=_has(frame.labels, Label.HEAD),
        judges=judges,
        key=key,
    )
