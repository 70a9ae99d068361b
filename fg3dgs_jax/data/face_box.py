"""Where the face is, for networks that were trained on the boxes of a face detector."""

import numpy as np
from scipy.ndimage import median_filter, uniform_filter1d

NOSE, BROWS, JAW = slice(27, 36), slice(17, 27), slice(0, 17)
FOREHEAD = 0.25  # what a detector's box shows above the brows, in heights from brows to chin
REACH = 50  # frames before and after whose median gives the box's size and its place around the nose
SMOOTH = 5  # frames over which the nose's place is averaged


def face_boxes(landmarks: np.ndarray) -> np.ndarray:
    """Boxes f32 [T, 4] (row0, row1, col0, col1) of 68-style landmarks [T, 68, 2] in pixels: forehead to chin.

    Departure: a detector's box follows the chin and so takes part of the jaw's motion out of the picture. Here a box of
    slowly changing size follows the nose.
    """
    points = np.asarray(landmarks, np.float64)[..., ::-1]  # (row, column)
    chin, brows = points[:, JAW, 0].max(1), points[:, BROWS, 0].min(1)
    low = np.stack([brows - FOREHEAD * (chin - brows), points[:, JAW, 1].min(1)], 1)
    high = np.stack([chin, points[:, JAW, 1].max(1)], 1)
    nose = points[:, NOSE].mean(1)
    edges = np.concatenate([low - nose, high - nose], 1)
    edges = median_filter(edges, size=(2 * REACH + 1, 1), mode="nearest")
    edges = uniform_filter1d(edges, 2 * REACH + 1, axis=0, mode="nearest")
    nose = uniform_filter1d(nose, SMOOTH, axis=0, mode="nearest")
    corners = np.concatenate([nose, nose], 1) + edges  # row0, col0, row1, col1
    return corners[:, [0, 2, 1, 3]].astype(np.float32)


def crop_boxes(boxes: np.ndarray, scale: float = 0.4) -> np.ndarray:
    """SyncNet's squares f32 [T, 4] around face boxes [T, 4]: wider by `scale` of half the face's edge on each side, and
    twice that below, as its authors cut their training clips."""
    rows, cols = boxes[:, :2].mean(1), boxes[:, 2:].mean(1)
    half = np.maximum(boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]) / 2.0
    side = half * (1.0 + scale)
    top, bottom = rows - half, rows + half * (1.0 + 2.0 * scale)
    return np.stack([top, bottom, cols - side, cols + side], 1).astype(np.float32)
