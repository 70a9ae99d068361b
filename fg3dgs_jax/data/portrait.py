"""Where the head is in a clip: one square crop for the whole clip, from face boxes in a few of its frames."""

from typing import NamedTuple

import numpy as np

from fg3dgs_jax.errors import UserError

SIDE, ABOVE = 2.25, 0.62  # of the face's height (hairline to chin): the crop's edge; room for hair above
RIVAL = 0.35  # a second face of this share of the first one's height is another person, smaller ones are pictures


class Portrait(NamedTuple):
    """The crop, and what the search for it saw."""

    crop: tuple[int, int, int, int]  # x0, y0, x1, y1 in source pixels; square, may leave the image
    face: float  # median height of the face, hairline to chin, source pixels
    seen: float  # share of the searched frames with a face
    rivals: float  # share with a second person


def find_portrait(boxes: list[np.ndarray], width: int, height: int) -> Portrait:
    """A square that holds head, hair and shoulders in all frames, from `face.find_boxes` of frames over the clip.

    The crop does not move: a moving one would turn the head's motion into the background's.
    Raises UserError if there is no face.
    """
    scale = np.array([width, height, width, height], np.float32)
    found = [frame * scale for frame in boxes if len(frame)]
    if not found:
        raise UserError("no face found in the video; use a clip in which one face looks into the camera")
    heights = [frame[:, 3] - frame[:, 1] for frame in found]
    rivals = [len(h) > 1 and h[1] > RIVAL * h[0] for h in heights]
    middle = np.median([frame[0, :2] + frame[0, 2:] for frame in found], axis=0) / 2
    # With several people, the same one in every frame: the nearest to the clip's usual place.
    main = np.array([_nearest(frame, middle) for frame in found])
    face = float(np.median(main[:, 3] - main[:, 1]))
    low, high = np.percentile(main, 2, axis=0), np.percentile(main, 98, axis=0)
    travel = max(high[2] - low[0] - face * 0.8, high[3] - low[1] - face, 0.0)
    side = 2 * round((SIDE * face + travel) / 2)
    x0 = round(float(low[0] + high[2]) / 2 - side / 2)
    y0 = round(float(low[1]) - ABOVE * face)
    return Portrait((x0, y0, x0 + side, y0 + side), face, len(found) / len(boxes), float(np.mean(rivals)))


def _nearest(boxes: np.ndarray, place: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - place, axis=1)
    return boxes[np.argmin(distance / (boxes[:, 3] - boxes[:, 1]))]
