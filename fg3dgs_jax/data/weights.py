"""Weights of pretrained networks as one safetensors file each: named arrays, their kind, and a hash that is checked."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing

FORMAT, VERSION = "fg3dgs_jax.weights", "1"


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, dtypes and values, in the names' order."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        total.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        total.update(value.tobytes())
    return total.hexdigest()


def save(path: str | Path, kind: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Writes arrays f32 by name; `facts` says where they come from. The file appears only when complete, its folder
    with it. Raises UserError if it cannot be written."""
    plain = {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}
    metadata = {"format": FORMAT, "version": VERSION, "kind": kind, "sha256": digest(plain), **facts}
    with replacing(path) as partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(to_bytes(plain, metadata))  # safetensors' own writer raises no OSError on a full disk


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of any safetensors file. Raises UserError: no such file, damaged, or another format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the weights")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        hint = "convert it with `python -m fg3dgs_jax.convert`" if path.suffix != ".safetensors" else "copy it again"
        raise UserError(f"{path}: is damaged or no safetensors file ({error}); {hint}") from None


def load(path: str | Path, kind: str, flag: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and facts of a file that `save` wrote. Raises UserError, naming `flag`, unless it is of that kind."""
    arrays, facts = read_safetensors(path)
    found = facts.get("format"), facts.get("version"), facts.get("kind")
    if found[0] != FORMAT:
        raise UserError(f"{flag}: {path} was not written by `python -m fg3dgs_jax.convert`; convert it first")
    if found != (FORMAT, VERSION, kind):
        raise UserError(f"{flag}: {path} holds {found[2]} weights (version {found[1]}), not {kind} of {VERSION}")
    if facts.get("sha256") != digest(arrays):
        raise UserError(f"{flag}: {path} is damaged (its SHA-256 differs); convert or copy it again")
    return arrays, facts


def build(path: str | Path, kind: str, create: Callable[[dict, dict], Any], flag: str) -> Any:
    """create(arrays, facts) of what `load` reads. Raises UserError, naming `flag`, where that raises ValueError."""
    arrays, facts = load(path, kind, flag)
    try:
        return create(arrays, facts)
    except ValueError as error:
        raise UserError(f"{flag}: {path} does not fit ({error}); convert or train it again") from None
