"""What some folders of the field's layout lack, made from what they have: torso pictures and action units."""

import cv2
import numpy as np

from fg3dgs_jax.data.layers import push_pull
from fg3dgs_jax.types import Label

# Face heights that the torso goes on behind the head, where it would otherwise end at the chin.
NECK_UP, NECK_WIDTH = 0.25, 0.35
UNITS_PER_SHARE = 10.0  # brings shares of a face to about OpenFace's scale of 0 to 5


def torso(image: np.ndarray, labels: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """RGBA u8 [H, W, 4], straight alpha: the torso of a frame, its neck continued behind the chin.

    image u8 [H, W, 3]; labels u8 [H, W], bits of types.Label; landmarks f32 [68, 2] in pixels.
    """
    person, head = (labels & Label.TORSO) > 0, (labels & Label.HEAD) > 0
    height = float(np.linalg.norm(landmarks[8] - landmarks[27])) * 1.6  # nose bridge to chin is five eighths
    edge = max(3, round(0.02 * height) | 1)
    near_head = cv2.dilate(head.astype(np.uint8), np.ones((edge, edge), np.uint8)) > 0
    rows = max(2, round(NECK_UP * height))
    raised = cv2.dilate(person.astype(np.uint8), np.ones((rows, 5), np.uint8), anchor=(2, 0)) > 0
    neck = np.abs(np.arange(labels.shape[1]) + 0.5 - landmarks[8, 0]) < NECK_WIDTH * height
    behind = (head | near_head) & raised & neck
    known = person & ~near_head
    alpha = np.where(person | behind, 255, 0).astype(np.uint8)
    if not known.any():
        return np.concatenate([image, alpha[..., None]], -1)
    fill = np.clip(np.round(push_pull(image.astype(np.float32), known.astype(np.float32))), 0, 255).astype(np.uint8)
    colour = np.where((behind | near_head)[..., None], fill, image)
    colour[alpha == 0] = 0
    return np.concatenate([colour, alpha[..., None]], -1)


def action_units(landmarks: np.ndarray) -> dict[str, np.ndarray]:
    """Stand-ins for OpenFace's intensities from landmarks f32 [T, 68, 2]: brows raised (AU02), lids closed (AU45).

    f32 [T] each; they are normalised per person afterwards, so only their course matters.
    """
    closed, raised = [], []
    for start, brow in ((36, slice(17, 22)), (42, slice(22, 27))):
        eye = landmarks[:, start : start + 6]
        width = np.maximum(np.linalg.norm(eye[:, 3] - eye[:, 0], axis=-1), 1e-3)
        opening = np.linalg.norm(eye[:, [1, 2]] - eye[:, [5, 4]], axis=-1).mean(-1)
        closed.append(-opening / width)
        raised.append((eye[..., 1].mean(1) - landmarks[:, brow, 1].mean(1)) / width)
    return {"AU02": _units(raised), "AU45": _units(closed)}


def _units(sides: list[np.ndarray]) -> np.ndarray:
    return (UNITS_PER_SHARE * np.mean(sides, axis=0)).astype(np.float32)
