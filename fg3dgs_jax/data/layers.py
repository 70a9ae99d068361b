"""What lies behind the head: the torso of each frame, continued under the head, and the background of the clip."""

from collections.abc import Sequence

import cv2
import numpy as np

from fg3dgs_jax.data.masks import FaceAxes, face_axes
from fg3dgs_jax.types import Label

NECK_UP, NECK_WIDTH, REST_UP = 0.3, 0.35, 0.04  # face heights that neck, its half width, and the rest go on
BACKGROUND_FRAMES = 64
# Background is what lies outside the person's outline widened by half of such a share of the frame's edge: wisps of
# hair and motion blur leave it. What is never so far away is looked at nearer.
CLEARANCES, ENOUGH_FRAMES = (0.05, 0.035, 0.025), 5


def push_pull(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """f32 [H, W, C]: the image where weight is 1, a smooth continuation of it where weight f32 [H, W] is 0."""
    if min(weight.shape) <= 2 or weight.min() > 0.999:
        mean = (image * weight[..., None]).sum((0, 1)) / max(float(weight.sum()), 1e-6)
        return image * weight[..., None] + mean * (1 - weight[..., None])
    coarse_weight = cv2.pyrDown(weight)
    coarse = cv2.pyrDown(image * weight[..., None]) / np.maximum(coarse_weight, 1e-6)[..., None]
    filled = push_pull(coarse, np.minimum(coarse_weight * 4, 1.0))
    below = cv2.resize(filled, weight.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return image * weight[..., None] + below * (1 - weight[..., None])


def torso_layer(image: np.ndarray, person: np.ndarray, labels: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """RGBA u8 [H, W, 4], straight alpha: neck, shoulders and clothes, continued behind chin, jaw and hair.

    image u8 [H, W, 3]; person u8 [H, W]; labels u8 [H, W]; landmarks [478, >=2] in pixels of this frame.
    """
    height, width = labels.shape
    axes = face_axes(landmarks, width, height)
    head, torso = (labels & Label.HEAD) > 0, (labels & Label.TORSO) > 0
    edge = max(3, round(0.02 * axes.height) | 1)
    near_head = cv2.dilate(head.astype(np.uint8), np.ones((edge, edge), np.uint8)) > 0
    known = torso & ~near_head & (person > 220)
    behind = head & _continued(labels, axes, edge)
    fringe = cv2.dilate(torso.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    alpha = np.where(behind, 255, np.where(fringe & ~head, person, 0)).astype(np.uint8)
    if not known.any():
        return np.concatenate([image, alpha[..., None]], -1)
    fill = push_pull(image.astype(np.float32), known.astype(np.float32))
    colour = np.where((behind | near_head)[..., None], np.clip(np.round(fill), 0, 255).astype(np.uint8), image)
    colour[alpha == 0] = 0  # compresses well
    return np.concatenate([colour, alpha[..., None]], -1)


def _continued(labels: np.ndarray, axes: FaceAxes, edge: int) -> np.ndarray:
    """Where neck and shoulders go on upwards, bool [H, W], without spikes thinner than `edge` pixels.

    Only what ends at the face itself is neck, and goes on far: collars and shoulders end at hair that hangs beside it.
    """
    torso, face = (labels & Label.TORSO) > 0, (labels & (Label.HEAD | Label.HAIR)) == Label.HEAD
    below_face = cv2.dilate(face.astype(np.uint8), np.ones((edge, edge), np.uint8)) > 0
    neck = torso & below_face & (np.abs(axes.across) < NECK_WIDTH)
    whole = torso | _raised(neck, NECK_UP * axes.height) | _raised(torso, REST_UP * axes.height)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (edge, edge))
    return cv2.morphologyEx(whole.astype(np.uint8), cv2.MORPH_OPEN, disc) > 0


def _raised(mask: np.ndarray, length: float) -> np.ndarray:
    """The mask continued upwards (and a little sideways) by so many pixels."""
    rows = max(2, round(length))
    return cv2.dilate(mask.astype(np.uint8), np.ones((rows, 5), np.uint8), anchor=(2, 0)) > 0


def _free(persons: Sequence[np.ndarray]) -> np.ndarray:
    """In which frames a pixel shows the background, bool [T, H, W]: with the widest clearance that some frames have."""
    free = np.zeros((len(persons), *persons[0].shape), bool)
    for share in CLEARANCES:
        margin = np.ones((max(5, round(share * persons[0].shape[0]) | 1),) * 2, np.uint8)
        clear = np.stack([cv2.dilate(person, margin) < 25 for person in persons])
        enough = clear.sum(0) >= min(ENOUGH_FRAMES, len(persons))
        free |= clear & enough & ~free.any(0)
    return free


def background_of(images: Sequence[np.ndarray], persons: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """The clip's background u8 [H, W, 3] and the share of it that was ever seen.

    Each pixel is the median over the frames (u8 [H, W, 3]) in which the person (u8 [H, W]) is elsewhere, as far away
    as it ever is; what is never seen continues smoothly from around.
    """
    free = _free(persons)
    result = np.zeros(images[0].shape, np.float32)
    for row in range(0, result.shape[0], 32):  # in strips: the stack of a whole clip is large
        strip = np.stack([image[row : row + 32] for image in images]).astype(np.float32)
        strip[~free[:, row : row + 32]] = np.inf  # sorts last
        strip.sort(axis=0)
        count = free[:, row : row + 32].sum(0)
        middle = np.maximum(count - 1, 0)[None, ..., None] // 2
        result[row : row + 32] = np.take_along_axis(strip, np.broadcast_to(middle, (1, *strip.shape[1:])), 0)[0]
    seen = free.any(0)
    result[~seen] = 0
    filled = push_pull(result, seen.astype(np.float32)) if seen.any() else np.full_like(result, 127)
    return np.clip(np.round(filled), 0, 255).astype(np.uint8), float(seen.mean())
