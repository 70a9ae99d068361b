"""A baked head as two files: NAME.safetensors with every array, NAME.json with what they mean.

    write(path, head)                 # from a run's head
    spec, regions, clip, facts = read(path)

They stand alone: the clip's poses, expressions, sound features and torso layers are in them (each torso layer as a PNG
of the rows that hold something), its pictures and labels are not. The model's arrays are hashed; torso layers are read
when they are needed, and checked then.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import weights
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing
from fg3dgs_jax.inference.heldout import Track, untracked
from fg3dgs_jax.model import bake, motion, talking_gaussian
from fg3dgs_jax.model import render as rendering
from fg3dgs_jax.model.deltas import OUTPUTS
from fg3dgs_jax.model.hashgrid import GridSpec

FORMAT, VERSION = "fg3dgs_jax.baked", 1
ENDINGS = (".safetensors", ".json")
# A clip's fields as they are stored; what only training and scoring look at is left out.
TRACKS = (
    "viewmats", "expression", "audio_features", "intrinsics", "frame_ids", "train_ids", "test_ids",
    "mouth_open", "background",
)  # fmt: skip
FACTS = ("width", "height", "fps", "expression_names", "audio_name", "extent", "crop", "fingerprint")
TORSO, ENDS, ROWS = "torso", "torso_ends", "torso_rows"


class Misfit(ValueError):
    """Why files are no baked head."""


def is_baked(path: str | Path) -> bool:
    """Whether a name is that of a baked head: either of its two files."""
    return Path(path).suffix.lower() in ENDINGS


def write(path: str | Path, head: Any, *, track: Track = untracked) -> dict[str, int]:
    """Bakes a head (inference.head.Head) into both files, named by either; returns the Gaussians kept of each region.

    Raises UserError: they cannot be written, or a region shows nothing.
    """
    data, text = (Path(path).with_suffix(ending) for ending in ENDINGS)
    clip = head.dataset.clip
    try:
        regions = head.bake()
    except ValueError as error:
        raise UserError(f"{path}: cannot be baked ({error}); train the head again") from None
    arrays = {f"model/{name}": np.asarray(value) for name, value in named(regions).items() if np.size(value)}
    arrays |= {f"clip/{name}": np.ascontiguousarray(getattr(clip, name)) for name in TRACKS}
    arrays["clip/rest"] = head.rest
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "spec": dataclasses.asdict(head.spec),
        "clip": {name: getattr(clip, name) for name in FACTS},
        "config": {name: head.config.get(name) for name in ("audio_features", "action_units", "expression")},
        "run": head.run,
        "sha256": weights.digest(arrays),
    }
    with replacing(data) as partial, replacing(text) as partial_text:
        partial_text.write_text(json.dumps(facts, indent=1) + "\n")
        # safetensors' own writer raises no OSError on a full disk
        partial.write_bytes(to_bytes(arrays | torso_arrays(clip, track), {"format": FORMAT, "sha256": facts["sha256"]}))
    return {name: len(region.opacities) for name, region in regions.items()}


def read(path: str | Path) -> tuple[rendering.HeadSpec, dict[str, bake.BakedRegion], clips.Clip, dict]:
    """Both files, named by either: the head, its clip, and the facts of the .json (`config`, `run`, ...).

    Raises UserError: a file is missing, damaged, of another head, or no such file at all.
    """
    data, text = (Path(path).with_suffix(ending) for ending in ENDINGS)
    for file in (data, text):
        if not file.is_file():
            raise UserError(f"{file}: no such file; a baked head is two, {data.name} and {text.name}: copy both")
    try:
        facts = json.loads(text.read_text())
        arrays = _read_arrays(data)
        if (facts["format"], facts["version"]) != (FORMAT, VERSION):
            raise Misfit(f"it is {facts['format']} version {facts['version']}, not {FORMAT} {VERSION}")
        if facts["sha256"] != weights.digest(arrays):
            raise Misfit(f"the arrays of {data.name} are not those that {text.name} describes")
        spec = read_spec(facts["spec"])
        regions = _regions(spec, arrays)
        clip = _clip(data, arrays, facts["clip"], spec)
    except (Misfit, SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, Misfit) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: is damaged or no baked head ({' '.join(reason.split())[:200]}); bake it again with "
            "`python -m fg3dgs_jax.export --out NAME.safetensors`"
        ) from None
    facts["rest"] = arrays["clip/rest"]
    return spec, regions, clip, facts


def read_spec(stored: Mapping) -> rendering.HeadSpec:
    """A HeadSpec from `dataclasses.asdict` of one that has been through JSON."""
    regions = tuple(
        rendering.RegionSpec(
            **{**region, "grid": GridSpec(**region["grid"]), "predicts": tuple(region.get("predicts", ()))}
        )
        for region in stored["regions"]
    )
    return rendering.HeadSpec(**{**stored, "regions": regions, "audio_shape": tuple(stored["audio_shape"])})


def named(regions: Mapping[str, bake.BakedRegion]) -> dict[str, Any]:
    """The leaves by their paths, region/field/..."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(regions))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def torso_arrays(clip: clips.Clip, track: Track) -> dict[str, np.ndarray]:
    """The torso layers of all frames that have pictures, one PNG behind the other; equal ones are stored once.

    `torso_ends` i64 [F, 2]: where each frame's PNG begins and ends; `torso_rows` i32 [F]: the first row it holds.
    """
    stored: dict[str, tuple[int, int]] = {}
    parts, ends, rows, total = [], [], [], 0
    for index in track(clip.frame_ids.tolist(), "baking"):
        layer = clip.torso(index)
        used = np.flatnonzero(layer[..., 3].any(1))
        first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
        layer = np.where(layer[first:last, :, 3:] > 0, layer[first:last], 0)  # what nobody sees packs best as zeros
        key = hashlib.sha256(layer.tobytes()).hexdigest()
        if key not in stored:
            coded = cv2.imencode(".png", cv2.cvtColor(layer, cv2.COLOR_RGBA2BGRA), [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
            parts.append(coded.reshape(-1))
            stored[key] = (total, total + coded.size)
            total += coded.size
        ends.append(stored[key])
        rows.append(first)
    return {TORSO: np.concatenate(parts), ENDS: np.array(ends, np.int64), ROWS: np.array(rows, np.int32)}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array but the torso layers."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(TORSO)}  # noqa: SIM118


def _regions(spec: rendering.HeadSpec, arrays: Mapping[str, np.ndarray]) -> dict[str, bake.BakedRegion]:
    _check_spec(spec)
    counts = {region.name: len(arrays[f"model/{region.name}/opacities"]) for region in spec.regions}
    like = bake.structure(spec, counts)

    def stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "model/" + jax.tree_util.keystr(path, simple=True, separator="/")
        value = arrays[name] if np.prod(leaf.shape) else np.zeros(leaf.shape, leaf.dtype)
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise Misfit(f"{name} is {value.dtype} {value.shape}, the head needs {leaf.dtype} {leaf.shape}")
        if not np.isfinite(value).all():
            raise Misfit(f"{name} holds values that are not finite")
        return value

    return jax.tree_util.tree_map_with_path(stored, like)


def _check_spec(spec: rendering.HeadSpec) -> None:
    """Refuses what no training writes, before anything of such a size is made."""
    kinds = motion.KINDS + talking_gaussian.KINDS
    grids = [region.grid for region in spec.regions]
    sizes = (*spec.audio_shape, spec.expression_dim)
    good = (
        0 < len(grids) <= 8
        and len({region.name for region in spec.regions}) == len(grids)
        and all(region.motion in kinds and set(region.predicts) <= set(OUTPUTS) for region in spec.regions)
        and all(1 <= grid.levels <= 64 and grid.features == 1 and 0 < grid.log2_table <= 24 for grid in grids)
        and all(1 < side <= 1 << 14 for grid in grids for side in (grid.min_resolution, grid.max_resolution))
        and len(spec.audio_shape) == 2
        and all(isinstance(size, int) and 0 < size <= 1 << 14 for size in sizes)
        and spec.sh_degree in range(4)
    )
    if not good:
        raise Misfit("its description is none of a head")


def _clip(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping, spec: rendering.HeadSpec) -> clips.Clip:
    """The stored part of the head's clip. Raises Misfit where lengths do not fit each other."""
    tracks = {name: arrays[f"clip/{name}"] for name in TRACKS}
    facts = {name: tuple(value) if isinstance(value := facts[name], list) else value for name in FACTS}
    count, width, height = len(tracks["viewmats"]), facts["width"], facts["height"]
    shapes = {
        "viewmats": (count, 4, 4), "expression": (count, spec.expression_dim), "mouth_open": (count,),
        "audio_features": (count, *spec.audio_shape), "intrinsics": (4,), "background": (height, width, 3),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tracks[name].shape != shape:
            raise Misfit(f"{name} has the shape {tracks[name].shape}, not {shape}")
    if arrays["clip/rest"].shape != (clips.TOKENS, *spec.audio_shape):
        raise Misfit("its resting sound has another shape")
    ids = tracks["frame_ids"]
    if not len(ids) or len(facts["expression_names"]) != spec.expression_dim or not 0 < float(facts["fps"]) <= 1000:
        raise Misfit("its clip is not complete")
    if not all(
        0 <= index < count for index in (*ids.tolist(), *tracks["train_ids"].tolist(), *tracks["test_ids"].tolist())
    ):
        raise Misfit("its clip names frames that it does not have")
    nothing = np.zeros((count, 0), np.int32)
    return clips.Clip(
        path=path, audio_path=path, lips_box=nothing, eye_boxes=nothing,
        landmarks=nothing, metrics={}, label_pixels=None, read=_no_pictures(path),
        torso=_torso_reader(path, ids, width, height), **tracks, **facts,
    )  # fmt: skip


def _no_pictures(path: Path) -> Callable[[int], clips.Pictures]:
    def read(_index: int) -> clips.Pictures:
        raise UserError(f"{path}: a baked head holds no pictures of its clip; give the dataset with --data DIR")

    return read


def _torso_reader(path: Path, ids: np.ndarray, width: int, height: int) -> Callable[[int], np.ndarray]:
    """Frame -> torso layer u8 [H, W, 4]; reads that frame's bytes alone."""
    file = safe_open(path, framework="numpy")  # stays open: opening it anew for every frame takes longer than reading
    ends, rows, total = file.get_tensor(ENDS), file.get_tensor(ROWS), file.get_slice(TORSO).get_shape()[0]
    whole = len(ends) == len(rows) == len(ids) and (ends[:, 0] >= 0).all() and (ends[:, 0] < ends[:, 1]).all()
    if not whole or ends.max() > total:
        raise Misfit("its torso layers are not complete")
    place = {int(index): row for row, index in enumerate(ids)}

    def read(index: int) -> np.ndarray:
        row = place[int(index)]
        png = file.get_slice(TORSO)[int(ends[row, 0]) : int(ends[row, 1])].tobytes()
        part = clips.decode_picture(png, f"{path} (torso of frame {index})", 4, width)
        first, layer = int(rows[row]), np.zeros((height, width, 4), np.uint8)
        if first < 0 or first + len(part) > height or part.shape[1] != width:
            raise UserError(f"{path}: the torso of frame {index} has another size; bake the head again")
        layer[first : first + len(part)] = part
        return layer

    return read
