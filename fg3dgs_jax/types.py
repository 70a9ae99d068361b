"""Frozen pytrees that cross the borders between rooms: a shape and a unit for every field."""

import enum

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


class Label(enum.IntFlag):
    """Bits of a label image, uint8 [H, W]. A pixel may carry several."""

    HEAD = 1  # everything the model draws: face skin, ears, hair, mouth, eyes
    HAIR = 2
    LIPS = 4  # both lips, without what lies between them
    INNER_MOUTH = 8  # between the lips: teeth, tongue, cavity
    EYES = 16  # eye contours dilated so that they hold the lids
    TORSO = 32  # neck, shoulders, clothes


@flax.struct.dataclass
class Camera:
    """A pinhole camera in OpenCV axes (x right, y down, z forward), pixel centres at +0.5."""

    viewmat: Array  # f32 [4, 4], world to camera
    intrinsics: Array  # f32 [4], (fx, fy, cx, cy) in pixels
    width: int = flax.struct.field(pytree_node=False)
    height: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Condition:
    """What drives the motion of one frame i: the tokens of frames [i-4, i+4), zero-padded at the ends."""

    audio: Array  # f32 [8, A, D]: per token a window of A feature vectors of D dimensions
    expression: Array  # f32 [8, E], normalised per person


@flax.struct.dataclass
class Frame:
    """One video frame with everything that training or scoring needs of it."""

    index: Array  # i32 [], position in the clip
    image: Array  # u8 [H, W, 3], RGB ground truth
    backdrop: Array  # u8 [H, W, 3], RGB: the frame's torso layer over the background, the head removed
    labels: Array  # u8 [H, W], bits of `Label`
    viewmat: Array  # f32 [4, 4], world to camera
    intrinsics: Array  # f32 [4]
    condition: Condition
    lips_box: Array  # i32 [4], square (row0, row1, col0, col1), half-open, inside the image
    eye_boxes: Array  # i32 [2, 4], likewise for the eye on the image's left and on its right
    lips: Array | None = None  # f32 [20, 2], (x, y) of the lips' landmarks in pixels, outer contour first


@flax.struct.dataclass
class Snippet:
    """Consecutive frames with what is heard while they are seen: what a lip-sync expert judges."""

    frames: Frame  # every field with a leading axis
    face_boxes: Array  # f32 [n, 4] (row0, row1, col0, col1) in pixels, may leave the image
    mel: Array  # f32 [80, 16], see data.mel


@flax.struct.dataclass
class Gaussians:
    """Raw parameters of N Gaussians; the rasterizer takes their activated values."""

    means: Array  # f32 [N, 3], world units
    quats: Array  # f32 [N, 4], wxyz, normalised on use
    log_scales: Array  # f32 [N, 3], scale = exp
    logit_opacities: Array  # f32 [N], opacity = sigmoid
    sh: Array  # f32 [N, K, 3], K in {1, 4, 9, 16}; colour = 0.5 + SH, clamped at 0


@flax.struct.dataclass
class Deltas:
    """Motion of N Gaussians in one frame (FG Eq. 8, 12), added to the raw parameters."""

    means: Array  # f32 [N, 3], world units
    quats: Array | None = None  # f32 [N, 4]; None: no rotation
    log_scales: Array | None = None  # f32 [N, 3]; None: no scaling
    opacities: Array | None = None  # f32 [N], added to the logits; None: opacity persists (TG Eq. 4)
    colors: Array | None = None  # f32 [N, 3], added to the constant SH coefficient; None: colour persists


@flax.struct.dataclass
class Rendered:
    """What the rasterizer returns."""

    color: Array  # f32 [H, W, C], premultiplied by alpha
    alpha: Array  # f32 [H, W], in [0, 1)
    depth: Array  # f32 [H, W], sum of alpha-weighted camera z, premultiplied
    radii: Array  # i32 [N], pixels; 0 where culled
    num_pairs: Array  # i32 [], tile-Gaussian pairs needed; more than max_pairs means overflow: the images are NaN
