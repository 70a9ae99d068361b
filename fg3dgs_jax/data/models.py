"""MediaPipe's model files: where they come from, their licence, and whether they are whole."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fg3dgs_jax.errors import UserError

STORE = "https://storage.googleapis.com/mediapipe-models"


class ModelFile(NamedTuple):
    """A model file, the version that was tested, and an address that serves it."""

    name: str
    sha256: str
    address: str
    licence: str = "Apache-2.0"


LANDMARKS = ModelFile(
    "face_landmarker.task",
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    f"{STORE}/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
)
PERSON = ModelFile(
    "selfie_segmentation.tflite",
    "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
    "https://storage.googleapis.com/mediapipe-assets/selfie_segmentation.tflite?generation=1683332563830600",
)
PARTS = ModelFile(  # optional: hair and skin
    "selfie_multiclass_256x256.tflite",
    "c6748b1253a99067ef71f7e26ca71096cd449baefa8f101900ea23016507e0e0",
    f"{STORE}/image_segmenter/selfie_multiclass_256x256/float32/1/selfie_multiclass_256x256.tflite",
)


def find_model(folder: str | Path, model: ModelFile) -> Path:
    """The path of a model in `folder`. Raises UserError if it is missing, or not the file that was tested."""
    path = Path(folder) / model.name
    source = f"download it from {model.address} ({model.licence}) into the folder given with --models"
    if not path.is_file():
        raise UserError(f"{path}: the model file is missing; {source}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != model.sha256:
        raise UserError(f"{path}: the model file is damaged or another version (its SHA-256 differs); {source}")
    return path


def import_mediapipe():
    """mediapipe, imported only when needed. Raises UserError if it is not installed."""
    try:
        import mediapipe
    except ImportError as error:
        raise UserError("mediapipe is not installed; pip install 'fg3dgs_jax[preprocess]'") from error
    return mediapipe


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Drops what is written to stderr below Python: MediaPipe's notes on loading a model, whose failures raise."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
