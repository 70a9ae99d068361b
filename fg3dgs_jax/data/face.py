"""MediaPipe face landmarks: 478 points of a face mesh, in pixels of the image."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from fg3dgs_jax.errors import UserError

NUM_LANDMARKS = 478
DETECTION_SIDE = 512  # pixels; small images are enlarged to this shorter side before detection


def detect_landmarks(images: Iterable[np.ndarray], model: Path) -> np.ndarray:
    """Landmarks of single, unrelated images: f32 [T, 478, 2], x right and y down in pixels; NaN where no face is found.

    Args:
      images: u8 [H, W, 3] RGB each. Every image is detected afresh (no tracking), so that a score of one frame does
        not depend on the frames before it.
      model: MediaPipe's `face_landmarker.task`.

    Raises:
      UserError: mediapipe is not installed, or `model` is not there.
    """
    if not Path(model).is_file():
        raise UserError(f"{model}: no such face landmark model; give the folder of face_landmarker.task with --models")
    try:
        import mediapipe as mp
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise UserError("mediapipe is not installed; pip install 'fg3dgs_jax[preprocess]'") from error
    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(model)), running_mode=vision.RunningMode.IMAGE, num_faces=1
    )
    points = []
    with vision.FaceLandmarker.create_from_options(options) as detector:
        for image in images:
            height, width = image.shape[:2]
            factor = max(1.0, DETECTION_SIDE / min(height, width))
            if factor > 1.0:
                image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
            picture = mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(image))
            faces = detector.detect(picture).face_landmarks
            found = [(p.x * width, p.y * height) for p in faces[0]] if faces else [(np.nan, np.nan)] * NUM_LANDMARKS
            points.append(found)
    return np.asarray(points, np.float32).reshape(-1, NUM_LANDMARKS, 2)
