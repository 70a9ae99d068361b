"""Reads the folder layout of AD-NeRF, RAD-NeRF, ER-NeRF and TalkingGaussian as a `Clip`, in all its variants.

Pictures are in gt_imgs, com_imgs or ori_imgs, as .jpg or .png; torso_imgs, teeth_mask, au.csv and features may be
missing, and are then made from the rest (`legacy_gaps`).

The time axis has one position per `img_id`; positions without a frame (no face found there) borrow the nearest frame's
pose and tracks and are in neither split. Label images have hard edges: the layout stores no soft masks.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import math
import zipfile
from pathlib import Path

import numpy as np

from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import legacy_gaps, speech_models
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

FPS = 25.0
# DeepSpeech (AD-NeRF's name for it last), the scores of Esperanto's wav2vec 2.0, HuBERT
AUDIO_FILES = {"ds": "aud_ds.npy", "eo": "aud_eo.npy", "hu": "aud_hu.npy", "aud": "aud.npy"}
PICTURES = tuple(f"{folder}/{{}}.{end}" for folder in ("gt_imgs", "com_imgs", "ori_imgs") for end in ("jpg", "png"))
ACTION_UNITS = ("AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU45")
MOST_FRAMES = 1_000_000  # 11 hours; more is no clip but a damaged file
LATE_FRAMES = 8  # extractors may stop this much before the video does
MIN_RANGE = 0.25  # of OpenFace's 0..5; an action unit that moves less is noise


def recognise(path: Path) -> bool:
    """Whether the folder looks like this layout."""
    return (path / "transforms_train.json").exists() or (path / "transforms_val.json").exists()


def read(path: Path, audio_features: str | None = None) -> clips.Clip:
    """The folder as a Clip. `audio_features`: "ds", "eo", "hu", a .npy/.npz file, or a front end computed from aud.wav.

    Splits: train and test are transforms_train.json and transforms_val.json as they stand. Raises UserError.
    """
    frames, train, test, intrinsics = _transforms(path)
    present = np.array(sorted(frames), np.int64)
    total = int(present[-1]) + 1
    nearest = clips.nearest(present, np.arange(total))
    landmarks = _landmarks(path, present)[np.searchsorted(present, nearest)]
    height, width = clips.read_picture(_image_path(path, present[0]), 3).shape[:2]
    units = _action_units(path / "au.csv", total) if (path / "au.csv").exists() else legacy_gaps.action_units(landmarks)
    names, expression = normalise_action_units(units)
    audio_name, features = _audio(path, audio_features, _audio_rows(frames, nearest))
    viewmats = np.stack([opencv_viewmat(path, frames[i]["transform_matrix"]) for i in present])
    viewmats = viewmats[np.searchsorted(present, nearest)]
    lips, eyes = clips.region_boxes(landmarks, width, height)
    mouth_open = clips.mouth_opening(landmarks)
    blink = expression[:, names.index("AU45")] if "AU45" in names else np.zeros(total, np.float32)
    background = _background(path, width, height)
    reader = functools.partial(_read, path, landmarks, background)
    return clips.Clip(
        path=path, width=width, height=height, fps=FPS, intrinsics=intrinsics, viewmats=viewmats,
        expression=expression, expression_names=names, audio_features=features, audio_name=audio_name,
        audio_path=path / "aud.wav", frame_ids=present.astype(np.int32), train_ids=train, test_ids=test,
        extent=_extent(reader, present, viewmats, intrinsics), lips_box=lips, eye_boxes=eyes, landmarks=landmarks,
        mouth_open=mouth_open, label_pixels=None, read=reader, torso=functools.partial(_torso, path, landmarks),
        background=background, crop=_crop(path), fingerprint=_fingerprint(path),
        metrics={"lips": mouth_open, "mouth": units.get("AU25", mouth_open), "blink": blink},
    )  # fmt: skip


def _transforms(path: Path) -> tuple[dict[int, dict], np.ndarray, np.ndarray, np.ndarray]:
    """Frames by img_id, the ids of both splits, and (fx, fy, cx, cy)."""
    frames: dict[int, dict] = {}
    ids, intrinsics = [], []
    for name in ("transforms_train.json", "transforms_val.json"):
        try:
            content = json.loads((path / name).read_text())
            focal = float(content.get("focal_len") or content["fl_x"])
            intrinsics.append((focal, float(content.get("fl_y", focal)), float(content["cx"]), float(content["cy"])))
            split = {int(frame["img_id"]): frame for frame in content["frames"]}
            if any(not 0 <= index < MOST_FRAMES for index in split):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path / name}: cannot be used ({_reason(error)}); it needs focal_len, cx, cy and frames with img_id"
            ) from None
        frames.update(split)
        ids.append(np.array(sorted(split), np.int32))
    if not len(ids[0]) or not len(ids[1]):
        raise UserError(f"{path}: transforms_train.json or transforms_val.json lists no frames; make the dataset again")
    return frames, ids[0], ids[1], np.array(intrinsics[0], np.float32)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "cannot be read"
    return f"{error} is missing" if isinstance(error, KeyError) else "wrong format"


def opencv_viewmat(path: Path, camera_to_world: list) -> np.ndarray:
    """OpenGL camera-to-world (y up, looks along -z) to OpenCV world-to-camera (y down, looks along z), f32 [4, 4]."""
    matrix = np.asarray(camera_to_world, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise UserError(f"{path}: a transform_matrix is not an invertible 4x4 matrix; make the transforms files again")
    return np.linalg.inv(matrix @ np.diag([1.0, -1.0, -1.0, 1.0])).astype(np.float32)


def _landmarks(path: Path, present: np.ndarray) -> np.ndarray:
    """f32 [len(present), 68, 2], pixels."""
    out = np.empty((len(present), 68, 2), np.float32)
    for row, index in enumerate(present):
        file = path / "ori_imgs" / f"{index}.lms"
        try:
            out[row] = np.array(file.read_text().split(), np.float32).reshape(68, 2)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be used ({_reason(error)}); it must hold 68 lines of x y") from None
    return out


def _action_units(file: Path, total: int) -> dict[str, np.ndarray]:
    """OpenFace intensities (0..5) by short name, f32 [total] each; row i belongs to img_id i."""
    try:
        with file.open(newline="") as stream:
            rows = list(csv.reader(stream, skipinitialspace=True))
        names = [name.strip().upper().removesuffix("_R") for name in rows[0]]
        # OpenFace also writes presence columns (AU01_c); their names keep the suffix and are passed over.
        table = np.array([[float(cell) for cell in row] for row in rows[1:] if row], np.float32)
        units = {name: table[:, column] for column, name in enumerate(names) if name in (*ACTION_UNITS, "AU25")}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{file}: cannot be used ({_reason(error)}); it must be OpenFace's table of action units"
        ) from None
    if len(table) < total:
        raise UserError(f"{file}: has {len(table)} rows for {total} frames; extract the action units of the whole clip")
    if not any(name in units for name in ACTION_UNITS):
        raise UserError(f"{file}: has none of the columns AU01_r ... AU45_r; extract the action units with OpenFace")
    return {name: np.nan_to_num(values[:total]) for name, values in units.items()}


def normalise_action_units(units: dict[str, np.ndarray]) -> tuple[tuple[str, ...], np.ndarray]:
    """Per person and robust: each unit's 5th percentile becomes 0 and its 99th becomes 1, clipped to [0, 1].

    The high end is the 99th because a blink is a rare event. A unit that stays within 0.25 of OpenFace's scale becomes
    zero: it would be noise blown up. Departure from TG, which feeds raw intensities (and AU45 clipped to [0, 2]).
    """
    names = tuple(name for name in ACTION_UNITS if name in units)
    low, high = np.percentile(np.stack([units[name] for name in names], 1), [5, 99], axis=0)
    scaled = (np.stack([units[name] for name in names], 1) - low) / np.maximum(high - low, MIN_RANGE)
    return names, np.where(high - low < MIN_RANGE, 0.0, np.clip(scaled, 0.0, 1.0)).astype(np.float32)


def as_released(clip: clips.Clip, units: tuple[str, ...]) -> clips.Clip:
    """The clip as TalkingGaussian's own code sees it: raw intensities of `units`, the blink (AU45) up to 2, and the
    principal point in the middle. Raises UserError if the folder has no such table."""
    file = clip.path / "au.csv"
    given = _action_units(file, clip.num_frames)
    missing = [name for name in units if name not in given]
    if missing:
        raise UserError(f"{file}: has no {missing[0]}_r; the head needs {', '.join(units)} as OpenFace writes them")
    track = np.stack([np.clip(given[name], 0, 2) if name == "AU45" else given[name] for name in units], 1)
    middle = np.array([*clip.intrinsics[:2], clip.width / 2, clip.height / 2], np.float32)
    return dataclasses.replace(clip, expression=track, expression_names=units, intrinsics=middle)


def _audio_rows(frames: dict[int, dict], nearest: np.ndarray) -> np.ndarray:
    """The row of the audio features for every position; missing positions keep the nearest frame's offset."""
    positions = np.arange(len(nearest))
    return positions + np.array([int(frames[i].get("aud_id", i)) - i for i in nearest.tolist()])


def _audio(path: Path, choice: str | None, rows: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and features f32 [T, A, D]; the first file there is, unless `choice` names another."""
    if choice is None:
        choice = next((name for name, file in AUDIO_FILES.items() if (path / file).exists()), "logmel")
    if choice not in AUDIO_FILES and not choice.endswith((".npy", ".npz")):
        made = speech_models.for_clip(path, choice, path / "aud.wav", FPS, int(rows.max()) + 1)
        return made.name, made.values[rows]
    file = path / AUDIO_FILES[choice] if choice in AUDIO_FILES else Path(choice)
    features = read_array(file)
    if features.ndim != 3:
        raise UserError(
            f"{file}: has shape {features.shape} and not (frames, window, channels); extract the features again"
        )
    if rows.max() >= len(features) + LATE_FRAMES or rows.min() < 0:
        raise UserError(
            f"{file}: holds {len(features)} frames and the clip {rows.max() + 1}; extract the features again"
        )
    name = choice if choice in AUDIO_FILES else file.stem
    return name, features[np.minimum(rows, len(features) - 1)]


def read_array(file: Path) -> np.ndarray:
    """An .npy array, or `features` of an .npz, as f32; never unpickles."""
    try:
        with file.open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            array = content["features"] if isinstance(content, np.lib.npyio.NpzFile) else content
            return np.asarray(array, np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be used ({_reason(error)}); it must hold an array of audio features") from None


def _image_path(path: Path, index: int) -> Path:
    found = (path / name.format(index) for name in PICTURES)
    return next((file for file in found if file.exists()), path / PICTURES[0].format(index))


def _crop(path: Path) -> tuple[int, int, int, int] | None:
    """Where in its video the clip was cut out, in a folder that `preprocess` made."""
    try:
        return clips.crop_of(json.loads((path / "preprocess.json").read_text())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _background(path: Path, width: int, height: int) -> np.ndarray:
    file = path / ("bc.png" if (path / "bc.png").exists() and not (path / "bc.jpg").exists() else "bc.jpg")
    background = clips.read_picture(file, 3)
    if background.shape != (height, width, 3):
        raise UserError(f"{file}: is not {width}x{height} as the frames are; make the background again")
    return background


def _read(path: Path, landmarks: np.ndarray, background: np.ndarray, index: int) -> clips.Pictures:
    image = clips.read_picture(_image_path(path, index), 3)
    labels = _frame_labels(path, landmarks, index)
    torso = _torso(path, landmarks, index)
    for name, picture in (("gt_imgs", image), ("torso_imgs", torso), ("parsing", labels)):
        if picture.shape[:2] != background.shape[:2]:
            raise UserError(f"{path / name}: frame {index} differs in size from the others; make the dataset again")
    return clips.Pictures(image, clips.over(torso, background), labels)


def _frame_labels(path: Path, landmarks: np.ndarray, index: int) -> np.ndarray:
    parsing = clips.read_picture(path / "parsing" / f"{index}.png", 3)
    folder = path / "teeth_mask"
    teeth = _teeth(folder / f"{index}.npy", parsing.shape[:2]) if folder.is_dir() else None
    return _labels(parsing, teeth, landmarks[index])


def _torso(path: Path, landmarks: np.ndarray, index: int) -> np.ndarray:
    if (path / "torso_imgs").is_dir():
        return clips.read_picture(path / "torso_imgs" / f"{index}.png", 4)
    image = clips.read_picture(_image_path(path, index), 3)
    return legacy_gaps.torso(image, _frame_labels(path, landmarks, index), landmarks[index])


def _teeth(file: Path, shape: tuple[int, int]) -> np.ndarray:
    mask = read_array(file) > 0
    if mask.shape != shape:
        raise UserError(f"{file}: has shape {mask.shape} and not {shape}; extract the teeth masks again")
    return mask


def _labels(parsing: np.ndarray, teeth: np.ndarray | None, landmarks: np.ndarray) -> np.ndarray:
    """Label bits u8 [H, W] of a colour-coded parsing: skin blue, neck green, torso red, hair black, mouth grey 100."""
    height, width = parsing.shape[:2]
    red, green, blue = (parsing[..., k] > 128 for k in range(3))
    mouth = (np.abs(parsing.astype(np.int16) - 100) < 25).all(-1)
    hair = (parsing < 50).all(-1)
    if teeth is None:  # older folders name no inner mouth: take what lies between the lips
        teeth = clips.polygon_mask(landmarks[60:68], width, height) & blue & ~red
    inner = mouth | teeth
    head = (blue & ~red & ~green) | hair | inner
    outer_lips = clips.polygon_mask(landmarks[48:60], width, height)
    eyes = clips.eyes_mask(landmarks, width, height)
    bits = {
        Label.HEAD: head, Label.HAIR: hair & ~inner, Label.LIPS: outer_lips & head & ~inner, Label.INNER_MOUTH: inner,
        Label.EYES: eyes & head, Label.TORSO: (red ^ green) & ~blue & ~inner,
    }  # fmt: skip
    labels = np.zeros((height, width), np.uint8)
    for bit, mask in bits.items():
        labels[mask] |= np.uint8(bit)
    return labels


def _extent(reader, present: np.ndarray, viewmats: np.ndarray, intrinsics: np.ndarray) -> float:
    """Radius of the head in world units: 98 % of the head's pixels, put at the origin's depth, lie within it."""
    distances = []
    for index in present[np.linspace(0, len(present) - 1, min(len(present), 12)).astype(int)]:
        rows, cols = np.nonzero(reader(int(index)).labels & Label.HEAD)
        fx, fy, cx, cy = intrinsics
        x, y, z = viewmats[index, :3, 3]  # the origin in camera coordinates
        distances.append(np.hypot((cols + 0.5 - cx) * z / fx - x, (rows + 0.5 - cy) * z / fy - y))
    radius = float(np.percentile(np.concatenate(distances), 98)) if sum(map(len, distances)) else 0.0
    if not (math.isfinite(radius) and radius > 0):
        raise UserError("no head pixels in the parsing pictures, or cameras behind the head; make the dataset again")
    return radius


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for name in ("transforms_train.json", "transforms_val.json", "au.csv"):
        digest.update((path / name).read_bytes() if (path / name).exists() else b"")
    for file in sorted([*AUDIO_FILES.values(), "aud.wav", "bc.jpg"]):
        if (path / file).exists():
            digest.update(f"{file} {(path / file).stat().st_size}".encode())
    return digest.hexdigest()
