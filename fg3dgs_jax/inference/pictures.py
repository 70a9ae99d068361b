"""Pictures for people: ground truth beside prediction and error, contact sheets, captions."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from fg3dgs_jax.files import replacing

HEAT_FULL_SCALE = 64  # grey levels of mean absolute error that get the hottest colour
PAPER = 24  # grey level behind captions and between tiles


def error_heat(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute error over channels as a colour map, u8 [H, W, 3]: black none, yellow 64 grey levels or more."""
    error = np.abs(prediction.astype(np.int16) - truth.astype(np.int16)).mean(axis=-1)
    level = np.clip(error * (255.0 / HEAT_FULL_SCALE), 0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def caption(image: np.ndarray, text: str) -> np.ndarray:
    """The image with one line of ASCII text under it; u8 [H, W, 3] -> [H + strip, W, 3]. Long text is made smaller."""
    width = image.shape[1]
    scale = max(width, 192) / 640.0
    thickness = max(1, round(1.5 * scale))
    (text_width, text_height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    margin = max(2, text_height // 2)
    strip = np.full((text_height + below + 2 * margin, width, 3), PAPER, np.uint8)
    scale *= min(1.0, (width - 2 * margin) / max(text_width, 1))
    origin = (margin, margin + text_height)
    cv2.putText(strip, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (235, 235, 235), thickness, cv2.LINE_AA)
    return np.concatenate([image, strip])


def side_by_side(truth: np.ndarray, prediction: np.ndarray, text: str = "") -> np.ndarray:
    """Ground truth | prediction | error, u8 [H + strip, 3 W, 3], with `text` after the prediction's name."""
    tiles = [
        caption(truth, "ground truth"),
        caption(prediction, f"prediction  {text}".rstrip()),
        caption(error_heat(prediction, truth), f"error, 0 to {HEAT_FULL_SCALE} of 255"),
    ]
    height = max(tile.shape[0] for tile in tiles)
    return np.concatenate([_padded(tile, height, tile.shape[1]) for tile in tiles], axis=1)


def contact_sheet(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tiles u8 [h, w, 3] of any sizes in rows of `columns`, on dark paper with a gap of 4 pixels; u8 [H, W, 3]."""
    if not tiles:
        raise ValueError("a contact sheet needs at least one tile")
    height, width = (max(tile.shape[axis] for tile in tiles) + 4 for axis in (0, 1))
    columns = min(columns, len(tiles))
    cells = [_padded(tile, height, width) for tile in tiles]
    blank = np.full((height, width, 3), PAPER, np.uint8)
    cells += [blank] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices spread evenly over range(count), both ends included."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def save(path: str | Path, image: np.ndarray, quality: int = 92) -> None:
    """Writes u8 [H, W, 3] RGB as JPEG or PNG by the name's ending; the file appears only when complete."""
    data = cv2.imencode(Path(path).suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    with replacing(path) as partial:
        partial.write_bytes(data[1].tobytes())


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = np.full((height, width, 3), PAPER, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas
