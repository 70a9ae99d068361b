"""Writes a clip in the layout of AD-NeRF, RAD-NeRF, ER-NeRF and TalkingGaussian, so that their code can train on it.

What the layout cannot hold is left out: gaze, soft outlines, frames in neither split. The neck is marked as torso.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

# RGB of the parsing pictures, later ones over earlier ones.
PARSING = (
    (Label.TORSO, (255, 0, 0)),
    (Label.HEAD, (0, 0, 255)),
    (Label.HAIR, (0, 0, 0)),
    (Label.INNER_MOUTH, (100, 100, 100)),
)
# The action unit that a blendshape stands for.
UNITS = {
    "browInnerUp": "AU01", "browOuterUp": "AU02", "browDown": "AU04", "eyeWide": "AU05", "cheekSquint": "AU06",
    "eyeSquint": "AU07", "eyeBlink": "AU45",
}  # fmt: skip
UNIT_SCALE = 2.0  # OpenFace's intensity of a strong movement, for a normalised 1; TG clips the blink there
FEATURES = {(16, 29): "aud_ds.npy", (16, 44): "aud_eo.npy", (2, 1024): "aud_hu.npy"}
QUALITY = 98  # JPEG
Track = Callable[[range, str], Iterable]


def write(dataset: Dataset, out: Path, track: Track = lambda items, _name: items) -> None:
    """Writes the frames of both splits, every track, background and sound into the empty or new folder `out`.

    Raises UserError if it cannot be written, or if fx and fy differ: the layout holds one focal length.
    """
    fx, fy = (float(value) for value in dataset.intrinsics[:2])
    if abs(fx / fy - 1) > 0.01:
        raise UserError(f"{dataset.path}: its focal lengths {fx:.0f} and {fy:.0f} differ and the layout holds one")
    try:
        for name in ("ori_imgs", "gt_imgs", "torso_imgs", "parsing", "teeth_mask"):
            (out / name).mkdir(parents=True)
        ids = np.sort(np.concatenate([dataset.train_ids, dataset.test_ids]))
        for row in track(range(len(ids)), "writing the field's layout"):
            _write_frame(dataset, out, int(ids[row]))
        _save(out / "bc.jpg", dataset.background)
        for split, members in (("train", dataset.train_ids), ("val", dataset.test_ids)):
            (out / f"transforms_{split}.json").write_text(json.dumps(_transforms(dataset, members)))
        _write_units(dataset, out / "au.csv")
        shutil.copyfile(dataset.audio_path, out / "aud.wav")
        name = FEATURES.get(dataset.audio_features.shape[1:])
        if name:  # log-mel windows are computed from aud.wav again
            np.save(out / name, dataset.audio_features)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); free space or choose another folder") from error


def _write_frame(dataset: Dataset, out: Path, index: int) -> None:
    image, _, labels = dataset.pictures(index)
    _save(out / "gt_imgs" / f"{index}.jpg", image)
    picture = out / "ori_imgs" / f"{index}.jpg"
    try:
        os.link(out / "gt_imgs" / f"{index}.jpg", picture)  # the same picture twice is the same file
    except OSError:
        _save(picture, image)
    points = dataset.landmarks[index]
    (out / "ori_imgs" / f"{index}.lms").write_text("".join(f"{x:.4f} {y:.4f}\n" for x, y in points))
    _save(out / "torso_imgs" / f"{index}.png", dataset.torso(index))
    _save(out / "parsing" / f"{index}.png", parsing(labels))
    np.save(out / "teeth_mask" / f"{index}.npy", (labels & Label.INNER_MOUTH) > 0)


def parsing(labels: np.ndarray) -> np.ndarray:
    """The colour code u8 [H, W, 3] RGB of a label image u8 [H, W]; white where nobody is."""
    picture = np.full((*labels.shape, 3), 255, np.uint8)
    for bit, colour in PARSING:
        picture[(labels & bit) > 0] = colour
    return picture


def _save(path: Path, picture: np.ndarray) -> None:
    flag = cv2.COLOR_RGB2BGR if picture.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]  # 4:4:4
    options = options if path.suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 3]
    path.write_bytes(cv2.imencode(path.suffix, cv2.cvtColor(picture, flag), options)[1].tobytes())


def _transforms(dataset: Dataset, ids: np.ndarray) -> dict:
    """Camera-to-world matrices in OpenGL axes (x right, y up, z backwards)."""
    fx, _, cx, cy = (float(value) for value in dataset.intrinsics)
    turn = np.diag([1.0, -1.0, -1.0, 1.0])
    frames = [
        {
            "img_id": int(index),
            "aud_id": int(index),
            "transform_matrix": (np.linalg.inv(dataset.viewmats[index].astype(np.float64)) @ turn).tolist(),
        }
        for index in ids
    ]
    return {"focal_len": fx, "cx": cx, "cy": cy, "frames": frames}


def _write_units(dataset: Dataset, path: Path) -> None:
    """OpenFace's table, with a space before each name as OpenFace has it."""
    names = [UNITS.get(name, name) for name in dataset.expression_names]
    kept = [column for column, name in enumerate(names) if name.startswith("AU")]
    columns = {names[column]: UNIT_SCALE * dataset.expression[:, column] for column in kept}
    columns["AU25"] = np.asarray(dataset.metrics["mouth"])
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["frame", *(f" {name}_r" for name in columns)])
        for index in range(dataset.num_frames):
            table.writerow([index + 1, *(f" {max(float(values[index]), 0.0):.5f}" for values in columns.values())])
