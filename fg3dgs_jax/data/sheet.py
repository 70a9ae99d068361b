"""The contact sheet: one page that shows what preprocessing saw, for a person to judge in a glance."""

from collections.abc import Sequence

import cv2
import numpy as np

from fg3dgs_jax.types import Label

CELL = 384  # pixels, edge of a frame on the sheet
TINTS = (
    (Label.TORSO, (255, 60, 60)), (Label.HEAD, (60, 220, 60)), (Label.HAIR, (60, 80, 255)), (Label.LIPS, (255, 0, 220)),
    (Label.INNER_MOUTH, (255, 230, 0)), (Label.EYES, (0, 230, 255)),
)  # fmt: skip
STATUS = {"pass": (90, 200, 90), "warn": (255, 190, 40), "fail": (255, 70, 70)}
INK, PAPER = (225, 225, 225), (24, 24, 28)


def tinted(image: np.ndarray, labels: np.ndarray, strength: float = 0.35) -> np.ndarray:
    """The image u8 [H, W, 3] with every label's colour over it."""
    out = image.astype(np.float32)
    for label, colour in TINTS:
        mask = (labels & label) > 0
        out[mask] = (1 - strength) * out[mask] + strength * np.array(colour, np.float32)
    return out.astype(np.uint8)


def draw_landmarks(image: np.ndarray, landmarks: np.ndarray, scale: float) -> None:
    """Points [L, 2] in source pixels onto a picture scaled by `scale`, in place."""
    for x, y in landmarks * scale:
        cv2.circle(image, (round(float(x)), round(float(y))), 1, (255, 255, 255), -1, cv2.LINE_AA)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, scale: float) -> None:
    """Boxes [n, 4] (row0, row1, col0, col1), in place."""
    for row0, row1, col0, col1 in (np.asarray(boxes) * scale).round().astype(int).tolist():
        cv2.rectangle(image, (col0, row0), (col1, row1), (255, 255, 0), 1)


def draw_axes(image: np.ndarray, viewmat: np.ndarray, intrinsics: np.ndarray, scale: float, length: float) -> None:
    """The world's axes at the head's centre: x red, y green, z (out of the face) blue, in place."""
    ends = np.concatenate([np.zeros((1, 3)), np.eye(3) * length]) @ viewmat[:3, :3].T + viewmat[:3, 3]
    pixels = (ends[:, :2] / ends[:, 2:] * intrinsics[:2] + intrinsics[2:]) * scale
    start, *tips = [tuple(p) for p in pixels.round().astype(int).tolist()]
    for tip, colour in zip(tips, ((255, 60, 60), (60, 255, 60), (90, 120, 255)), strict=True):
        cv2.line(image, start, tip, colour, 2, cv2.LINE_AA)


def curves(
    tracks: Sequence[tuple[str, np.ndarray, tuple[int, int, int]]], width: int, height: int, title: str, ticks: str
) -> np.ndarray:
    """Curves over one axis, each scaled to its own range: (name, values [n], colour); u8 [height, width, 3]."""
    picture = np.full((height, width, 3), PAPER, np.uint8)
    write(picture, title, (10, 20))
    write(picture, ticks, (10, height - 8), 0.4)
    for index, (name, values, colour) in enumerate(tracks):
        low, high = float(np.min(values)), float(np.max(values))
        share = (np.asarray(values, np.float64) - low) / max(high - low, 1e-9)
        x = np.linspace(10, width - 10, len(share))
        y = height - 26 - share * (height - 60)
        points = np.stack([x, y], -1).round().astype(np.int32)
        cv2.polylines(picture, [points], False, colour, 1, cv2.LINE_AA)
        write(picture, f"{name} {low:.3g} to {high:.3g}", (10 + 300 * index, 38), 0.42, colour)
    return picture


def write(picture: np.ndarray, text: str, place: tuple[int, int], size: float = 0.5, colour=INK) -> None:
    """Text with its lower left corner at `place` (x, y), in place."""
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def table(rows: Sequence[tuple[str, str, str, str]], width: int) -> np.ndarray:
    """The report's lines (name, status, value, fix)."""
    picture = np.full((24 * len(rows) + 16, width, 3), PAPER, np.uint8)
    for index, (name, status, value, fix) in enumerate(rows):
        y = 24 + 24 * index
        write(picture, status, (10, y), 0.45, STATUS[status])
        write(picture, name, (60, y), 0.45)
        write(picture, value + (f"  ->  {fix}" if fix else ""), (185, y), 0.42)
    return picture


def page(cells: Sequence[np.ndarray], columns: int, below: Sequence[np.ndarray]) -> np.ndarray:
    """Square pictures u8 [CELL, CELL, 3] in rows, and strips of the same total width under them."""
    blank = np.full((CELL, CELL, 3), PAPER, np.uint8)
    padded = [*cells, *[blank] * (-len(cells) % columns)]
    rows = [np.hstack(padded[start : start + columns]) for start in range(0, len(padded), columns)]
    return np.vstack([*rows, *below])


def cell(image: np.ndarray) -> np.ndarray:
    """A frame scaled to a cell."""
    shrink = image.shape[0] > CELL
    return cv2.resize(image, (CELL, CELL), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC)
