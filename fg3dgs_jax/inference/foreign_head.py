"""A head trained by TalkingGaussian's own code (`chkpnt_fuse_latest.pth`) as a run of this project, for rendering."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import torch_file
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.data.steps import file_sha256
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model import render as rendering
from fg3dgs_jax.model import talking_gaussian as released
from fg3dgs_jax.training import checkpoint

LAYERS = (("face", "released_face", released.FACE_GRID), ("mouth", "released_mouth", released.MOUTH_GRID))


class Misfit(ValueError):
    """Why a file is not such a checkpoint."""


def convert(path: Path, data: Path, out: Path, audio_features: str | None = None) -> dict[str, int]:
    """Writes a run folder `out` whose head speaks with the dataset `data`; returns the Gaussians of each region.

    Raises UserError: not such a checkpoint, not its kind of dataset, features of another kind, a folder in use.
    """
    if checkpoint.steps(out):
        raise UserError(f"--out {out}: holds checkpoints already; give a new folder")
    dataset = open_dataset(data, audio_features)
    try:
        parts = split(torch_file.read(path))
        params, degree = translate(parts)
        channels = params["face"]["motion"]["audio"]["conv0"]["kernel"].shape[1]
    except (torch_file.Refused, Misfit, KeyError, IndexError, TypeError, AttributeError) as reason:
        raise UserError(
            f"{path}: is not a fused checkpoint of TalkingGaussian ({reason}); give its chkpnt_fuse_latest.pth"
        ) from None
    shape = dataset.audio_features.shape[1:]
    if shape[1] != channels:
        raise UserError(
            f"{path}: hears features of {channels} values and {data} has {shape[1]}; name others with --audio-features"
        )
    spec = rendering.HeadSpec(
        tuple(rendering.RegionSpec(*layer) for layer in LAYERS), shape, len(released.UNITS), degree
    )
    pools = {name: {"alive": np.ones(len(part["gaussians"]["means"]), bool)} for name, part in params.items()}
    info = {
        "config": {"audio_features": audio_features, "action_units": "raw"},
        "spec": dataclasses.asdict(spec),
        "dataset": dataset.fingerprint,
        "data": str(data),
        "source": {"file": path.name, "sha256": file_sha256(path)},
    }
    checkpoint.save(out, 1, {"step": np.int32(1), "params": params, "pools": pools}, info)
    return {name: len(pool["alive"]) for name, pool in pools.items()}


def split(tree: object) -> tuple[tuple, Mapping, tuple, Mapping]:
    """(Gaussians of the face, its network, those of the mouth, its network). Raises Misfit."""
    if not isinstance(tree, tuple | list) or len(tree) != 4:
        raise Misfit("it does not hold a face and a mouth")
    for part, kind in zip(tree, (tuple | list, dict, tuple | list, dict), strict=True):
        if not isinstance(part, kind):
            raise Misfit("its parts are of other kinds")
    return tuple(tree)


def translate(parts: tuple) -> tuple[dict, int]:
    """Parameters of both regions under this project's names, and the SH degree in use."""
    degrees = {int(parts[0][0]), int(parts[2][0])}
    (face, raw), (mouth, _) = (gaussians(parts[k], max(degrees)) for k in (0, 2))
    face_motion = audio(parts[1]) | {
        "tables": tables(parts[1], released.FACE_GRID),
        "expression": mlp(parts[1], "exp_encode_net", 2),
        "attend_audio": mlp(parts[1], "aud_ch_att_net", 2),
        "attend_expression": mlp(parts[1], "eye_att_net", 2),
        "deform": mlp(parts[1], "sigma_net", 3),
        "raw_scales": raw,
    }
    mouth_motion = audio(parts[3]) | {
        "tables": tables(parts[3], released.MOUTH_GRID),
        "deform": mlp(parts[3], "sigma_net", 3),
    }
    named = {"face": {"gaussians": face, "motion": face_motion}, "mouth": {"gaussians": mouth, "motion": mouth_motion}}
    return named, max(degrees)


def gaussians(stored: tuple, degree: int) -> tuple[dict, np.ndarray]:
    """Fields of types.Gaussians, and the raw scales f32 [N, 3], whose softplus the scales are. Raises Misfit.

    The order: degree in use, positions, constant colours, other SH, an identity (in some versions), scales, rotations,
    opacities, and what training kept.
    """
    arrays = [np.asarray(item, np.float32) for item in stored if isinstance(item, np.ndarray)]
    quats = next((k for k, array in enumerate(arrays) if array.ndim == 2 and array.shape[1] == 4), None)
    if quats is None or quats < 4 or len(arrays) < quats + 2:
        raise Misfit("its Gaussians lack rotations")
    means, constant, rest, raw, opacity = arrays[0], arrays[1], arrays[2], arrays[quats - 1], arrays[quats + 1]
    count, used = len(means), (degree + 1) ** 2
    wanted = [(count, 3), (count, 1, 3), (count, 3), (count, 1)]
    if [array.shape for array in (means, constant, raw, opacity)] != wanted or rest.ndim != 3 or rest.shape[0] != count:
        raise Misfit("its Gaussians have other shapes")
    sh = np.concatenate([constant, rest], axis=1)[:, :used]
    if sh.shape != (count, used, 3) or not all(np.isfinite(array).all() for array in arrays[: quats + 2]):
        raise Misfit("its colours lack coefficients, or values are not finite")
    scales = np.logaddexp(raw.astype(np.float64), 0.0)  # softplus
    fields = types.Gaussians(means, arrays[quats], np.log(scales).astype(np.float32), opacity[:, 0], sh)
    return dict(vars(fields)), raw


def tables(state: Mapping, spec) -> np.ndarray:
    """The three planes' tables f32 [3, entries]. There a level's vertices have the second axis slowest, and levels are
    filled up to eighths of entries; a level that is hashed is refused. Raises Misfit."""
    sizes = released.sizes(spec)
    planes = []
    for plane in ("xy", "yz", "xz"):
        flat = np.asarray(state[f"encoder_{plane}.embeddings"], np.float32)
        if flat.shape != (sum(-(-size * size // 8) * 8 for size in sizes), 1):
            raise Misfit("its grids are not those of the published recipe")
        start, levels = 0, []
        for size in sizes:
            levels.append(flat[start : start + size * size, 0].reshape(size, size).T.ravel())
            start += -(-size * size // 8) * 8
        planes.append(np.concatenate(levels))
    return np.stack(planes)


def mlp(state: Mapping, name: str, layers: int) -> dict:
    """Layers without bias, [out, in] there and [in, out] here."""
    return {f"layer{i}": {"kernel": _matrix(state[f"{name}.net.{i}.weight"])} for i in range(layers)}


def audio(state: Mapping) -> dict:
    """The audio encoder and its attention over time."""
    encoder = {f"conv{i}": _layer(state, f"audio_net.encoder_conv.{2 * i}") for i in range(4)}
    encoder |= {f"linear{i}": _layer(state, f"audio_net.encoder_fc1.{2 * i}") for i in range(2)}
    attention = {f"conv{i}": _layer(state, f"audio_att_net.attentionConvNet.{2 * i}") for i in range(5)}
    attention["linear"] = _layer(state, "audio_att_net.attentionNet.0")
    return {"audio": {**encoder, "attention": attention}}


def _layer(state: Mapping, name: str) -> dict:
    return {"kernel": _matrix(state[f"{name}.weight"]), "bias": np.asarray(state[f"{name}.bias"], np.float32)}


def _matrix(weight: np.ndarray) -> np.ndarray:
    """[out, in] or [out, in, width] as [in, out] or [width, in, out]."""
    return np.ascontiguousarray(np.asarray(weight, np.float32).T)
