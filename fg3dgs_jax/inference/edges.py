"""The head's outline under a lens: halos, fringes and the seam at the neck are a pixel or two wide."""

import cv2
import numpy as np

from fg3dgs_jax.inference import pictures
from fg3dgs_jax.types import Label

BAND = 1.0 / 128.0  # of the frame's height, on either side of the outline
SHARE = 6  # a crop's edge is this share of the frame's height
ZOOM = 4


def band(labels: np.ndarray) -> np.ndarray:
    """Pixels near the head's outline, bool [H, W], of labels u8 [H, W]; the frame's own border is no outline."""
    head = ((labels & Label.HEAD) != 0).astype(np.uint8)
    reach = max(1, round(BAND * labels.shape[0]))
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return cv2.dilate(head, kernel) != cv2.erode(head, kernel)


def places(labels: np.ndarray) -> dict[str, tuple[int, int]]:
    """Row and column of places on the head's outline: "crown", "left", "right" and "neck"; {} without a head."""
    rows, cols = np.nonzero(labels & Label.HEAD)
    if not rows.size:
        return {}
    middle = int(rows.mean())
    across = cols[rows == middle] if (rows == middle).any() else cols
    lowest = int(np.argmax(rows))
    return {
        "crown": (int(rows.min()), int(cols[np.argmin(rows)])),
        "left": (middle, int(across.min())),
        "right": (middle, int(across.max())),
        "neck": (int(rows[lowest]), int(cols[rows == rows[lowest]].mean())),
    }


def lens(image: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """A square around a place of an image u8 [H, W, 3], enlarged without smoothing."""
    height, width = image.shape[:2]
    edge = min(height // SHARE, width)
    row, col = (min(max(p - edge // 2, 0), size - edge) for p, size in zip(place, (height, width), strict=True))
    part = np.ascontiguousarray(image[row : row + edge, col : col + edge])
    return cv2.resize(part, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_NEAREST)


def sheet(truth: np.ndarray, prediction: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Crops of one frame u8 [H, W, 3], ground truth over prediction, a column per place; None without a head."""
    columns = [
        np.concatenate([pictures.caption(lens(truth, place), name), lens(prediction, place)])
        for name, place in places(labels).items()
    ]
    return pictures.contact_sheet(columns, columns=len(columns)) if columns else None
