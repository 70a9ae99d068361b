"""MediaPipe on faces: landmarks of a mesh of 478 points, blendshapes, and the person's outline."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from fg3dgs_jax.data.models import hushed, import_mediapipe
from fg3dgs_jax.errors import UserError

NUM_LANDMARKS, NUM_BLENDSHAPES = 478, 52
ROW_FOREHEAD, ROW_CHIN = 10, 152
DETECTION_SIDE = 512  # pixels; small images are enlarged to this shorter side before detection
# The mesh points nearest to the 68 landmarks of the field: jaw, brows, nose, eyes, outer and inner lips.
POINTS_68 = np.array([
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 168, 197, 5, 4, 98, 97, 2, 326, 327,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
])  # fmt: skip
# Stand-ins for the action units 1, 2, 4, 5, 6, 7, 45 that TG takes from OpenFace. Departure: gaze is added, because
# the eyes' region moves with it and no action unit says so.
EXPRESSION_NAMES = (
    "browInnerUp", "browOuterUp", "browDown", "eyeWide", "cheekSquint", "eyeSquint", "eyeBlink", "gaze_x", "gaze_y"
)  # fmt: skip
FAST = ("eyeWide", "eyeBlink", "gaze_x", "gaze_y")  # not smoothed: blinks and saccades last two or three frames
MIN_SPREAD = 0.05  # a blendshape that varies less is noise and is not blown up to full range


class FaceTrack(NamedTuple):
    """What is known of the face in T frames; NaN rows where none was found."""

    landmarks: np.ndarray  # f32 [T, 478, 3], pixels; z in the same unit, rough, away from the camera
    blendshapes: np.ndarray  # f32 [T, 52], in [0, 1]
    names: tuple[str, ...]  # of the blendshapes


@contextlib.contextmanager
def landmarker(model: str | Path, faces: int = 1, blendshapes: bool = False) -> Iterator[Callable]:
    """A function from an image u8 [H, W, 3] to MediaPipe's result.

    Every image is detected afresh: MediaPipe's video mode filters landmarks over time, which delays lips and head by a
    good part of a frame (opening correlates 0.97 with the unfiltered one, and 0.90 with that of the next frame).
    """
    if not Path(model).is_file():
        raise UserError(f"{model}: no such face landmark model; give the folder of face_landmarker.task with --models")
    mp = import_mediapipe()
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(model)),
        running_mode=vision.RunningMode.IMAGE,
        num_faces=faces,
        output_face_blendshapes=blendshapes,
    )
    with hushed():
        made = vision.FaceLandmarker.create_from_options(options)
    with made as detector:
        yield lambda image: detector.detect(
            mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(image))
        )


def find_boxes(images: Iterable[np.ndarray], model: str | Path, most: int = 3) -> list[np.ndarray]:
    """Per image the boxes f32 [n, 4] (x0, y0, x1, y1) of up to `most` faces, largest first, as shares of the image."""
    boxes = []
    with landmarker(model, faces=most) as detect:
        for image in images:
            faces = [np.array([(p.x, p.y) for p in face]) for face in detect(image).face_landmarks]
            found = np.array([[*f.min(0), *f.max(0)] for f in faces], np.float32).reshape(-1, 4)
            boxes.append(found[np.argsort(found[:, 1] - found[:, 3])])
    return boxes


def track_face(images: Iterable[np.ndarray], model: str | Path) -> FaceTrack:
    """Landmarks with depth and blendshapes of single, unrelated images u8 [H, W, 3] that show one face each.

    Every image is detected afresh (no tracking), so that a score of one frame does not depend on the frames before it.
    Raises UserError: mediapipe is not installed, or `model`, its `face_landmarker.task`, is not there.
    """
    points, scores, names = [], [], ()
    with landmarker(model, blendshapes=True) as detect:
        for image in images:
            height, width = image.shape[:2]
            result = detect(_enlarged(image))
            if result.face_landmarks:
                points.append([(p.x * width, p.y * height, p.z * width) for p in result.face_landmarks[0]])
                scores.append([shape.score for shape in result.face_blendshapes[0]])
                names = tuple(shape.category_name for shape in result.face_blendshapes[0])
            else:
                points.append(np.full((NUM_LANDMARKS, 3), np.nan))
                scores.append(np.full(NUM_BLENDSHAPES, np.nan))
    shape = (len(points), NUM_LANDMARKS, 3)
    return FaceTrack(np.asarray(points, np.float32).reshape(shape), np.asarray(scores, np.float32), names)


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = DETECTION_SIDE / min(image.shape[:2])
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1.0 else image


def fill_gaps(track: np.ndarray) -> np.ndarray:
    """NaN rows of f32 [T, ...] by linear interpolation in time; the ends repeat the nearest row."""
    flat = track.reshape(len(track), -1).copy()
    known = np.flatnonzero(np.isfinite(flat).all(1))
    missing = np.setdiff1d(np.arange(len(flat)), known)
    if len(known) and len(missing):
        after = np.clip(np.searchsorted(known, missing), 0, len(known) - 1)
        before = np.clip(after - 1, 0, None)
        left, right = known[before], known[after]
        share = np.clip((missing - left) / np.maximum(right - left, 1), 0, 1)[:, None]
        flat[missing] = flat[left] * (1 - share) + flat[right] * share
    return flat.reshape(track.shape)


def expression(blendshapes: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """f32 [T, 9] in the order of EXPRESSION_NAMES from blendshapes [T, 52] without gaps.

    Left and right are averaged. Scores: 0 is this person's resting value, 1 their strong value, clipped to [0, 1.2].
    Gaze: 0 is their usual direction, 1 far to the image's right or up, clipped to [-1.5, 1.5].
    """
    column = {name: blendshapes[:, index] for index, name in enumerate(names)}
    out = []
    for name in EXPRESSION_NAMES:
        if name == "gaze_x":  # MediaPipe's left eye is the subject's: on the image's right
            left = column["eyeLookOutLeft"] - column["eyeLookInLeft"]
            track = centred((left + column["eyeLookInRight"] - column["eyeLookOutRight"]) / 2)
        elif name == "gaze_y":
            up, down = ((column[f"eyeLook{way}Left"] + column[f"eyeLook{way}Right"]) / 2 for way in ("Up", "Down"))
            track = centred(up - down)
        else:
            sides = [column[key] for key in (name, f"{name}Left", f"{name}Right") if key in column]
            track = normalised(np.mean(sides, axis=0), strong=99.0 if name == "eyeBlink" else 97.0)
        if name not in FAST and len(track) > 2:
            padded = np.pad(track, 1, mode="edge")
            track = 0.2 * padded[:-2] + 0.6 * track + 0.2 * padded[2:]
        out.append(track)
    return np.stack(out, -1).astype(np.float32)


def normalised(track: np.ndarray, strong: float, among: np.ndarray | None = None) -> np.ndarray:
    """A track [T] with the 10th percentile of the frames `among` (default: all) at 0 and the `strong` one at 1."""
    rest, top = np.percentile(track if among is None else among, [10.0, strong])
    return np.clip((track - rest) / max(top - rest, MIN_SPREAD), 0.0, 1.2)


def centred(track: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """A track [T] with the median of the frames `among` (default: all) at 0 and what is far from it at 1."""
    known = track if among is None else among
    middle = np.median(known)
    return np.clip((track - middle) / max(np.percentile(np.abs(known - middle), 97), 2 * MIN_SPREAD), -1.5, 1.5)
