"""Checkpoints that are whole or absent: written aside, hashed, renamed into place; verified when they are read.

    WORKDIR/checkpoints/00012000/
        arrays/      every array of the state under its path, by Orbax
        info.json    format, version, step, and what the trainer says about the run
        SHA256SUMS   the hash of every other file; `sha256sum -c SHA256SUMS` checks it by hand

Orbax does not notice a flipped bit by itself, hence the list. The newest step whose files match their list wins.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fg3dgs_jax.errors import UserError

FORMAT, VERSION = "fg3dgs_jax.checkpoint", 1
SUMS = "SHA256SUMS"
# What may differ between two runs of a command that continue each other: nothing here changes a parameter beyond
# rounding. The data may have moved; its fingerprint decides.
FREE = {"data", "config.data", "config.models", "config.evaluate"} | {
    f"config.{name}"
    for name in (
        "rasterizer.max_pairs",
        "rasterizer.deterministic",
        "log_every",
        "preview_every",
        "save_every",
        "keep",
    )
}

log = logging.getLogger(__name__)


def save(workdir: str | Path, step: int, state: Any, info: dict, *, keep: int = 2) -> Path:
    """Writes one step and drops all but the `keep` newest. Returns its folder, complete and on the disk.

    Args:
      state: a pytree of arrays (any dtype that numpy has; random keys as their key data).
      info: JSON-able facts about the run, returned on restore; `restore_latest` compares them with its `expect`.

    Raises:
      OSError: nothing is left of the new step and the older ones are untouched; ENOSPC when the disk is full,
        EDQUOT or EFBIG when this user or this file may have no more of it.
    """
    root = Path(workdir) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    final, partial = root / f"{step:08d}", root / f".partial-{step:08d}"
    try:
        _write(partial, step, _named(jax.device_get(state)), info)
        if final.exists():  # the same step again: after a signal, or in place of a damaged one
            final.rename(root / f".partial-old-{step:08d}")
        partial.rename(final)
        _sync(root)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code).lower() in str(error).lower() and not isinstance(error, OSError):  # from TensorStore
                raise OSError(code, os.strerror(code), str(final)) from error
        raise
    for old in steps(workdir)[keep:] if keep else []:
        (root / f"{old:08d}").rename(root / f".partial-old-{old:08d}")
    _sweep(root)
    return final


def steps(workdir: str | Path) -> list[int]:
    """The steps on the disk, newest first, good or not."""
    root = Path(workdir) / "checkpoints"
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(name) for name in names if re.fullmatch(r"\d{8}", name)), reverse=True)


def restore_latest(workdir: str | Path, like: Any, *, expect: dict | None = None) -> tuple[Any, int, dict] | None:
    """The newest good checkpoint, or None where there is none.

    Args:
      like: a pytree of the same structure and dtypes. Its shapes do not matter: pools grow while a run goes on.
      expect: the `info` of the run that wants to continue; FREE fields may differ.

    Returns:
      (state of numpy arrays in the structure of `like`, step, info).

    Raises:
      UserError: the checkpoint is of another config, dataset or format, or every one is damaged.
    """
    found = _newest_good(workdir)
    if found is None:
        return None
    folder, record = found
    _refuse_others(workdir, record["info"], expect)
    arrays = _read(folder, record)
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [_name(path) for path, _ in paths]
    strange = sorted(set(names) ^ set(arrays)) or [
        name for name, (_, leaf) in zip(names, paths, strict=True) if not _alike(arrays[name], leaf)
    ]
    if strange:
        raise UserError(
            f"{folder}: was written for another model ({strange[0]} differs); "
            "use the version and config that wrote it, or give another --workdir"
        )
    log.info("restored step %d from %s", record["step"], folder)
    return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in names]), record["step"], record["info"]


def load_for_inference(workdir: str | Path) -> tuple[dict, dict]:
    """The newest good checkpoint as nested dictionaries of numpy arrays, named as in the trainer's state, and its info.

    Raises UserError: no checkpoint, every one damaged, or one of another format.
    """
    found = _newest_good(workdir)
    if found is None:
        raise UserError(f"{workdir}: holds no checkpoint; give the --workdir of a run of `python -m fg3dgs_jax.train`")
    tree: dict = {}
    for name, value in _read(*found).items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree, found[1]["info"]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(state: Any) -> dict[str, np.ndarray]:
    return {_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _alike(array: np.ndarray, leaf: Any) -> bool:
    return array.dtype == leaf.dtype and array.ndim == np.ndim(leaf)


def _write(folder: Path, step: int, arrays: dict[str, np.ndarray], info: dict) -> None:
    # Orbax refuses arrays without elements; their shape and dtype are all there is to them.
    empty = {name: [list(value.shape), value.dtype.name] for name, value in arrays.items() if not value.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        folder.mkdir()
        full = {name: value for name, value in arrays.items() if value.size}
        checkpointer.save((folder / "arrays").absolute(), args=ocp.args.PyTreeSave(full))
    record = {"format": FORMAT, "version": VERSION, "step": step, "info": info, "empty": empty}
    (folder / "info.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / SUMS).write_bytes(_sums(folder))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _read(folder: Path, record: dict) -> dict[str, np.ndarray]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = (folder / "arrays").absolute()
        names = checkpointer.metadata(path).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        arrays = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return arrays | {name: np.zeros(shape, dtype) for name, (shape, dtype) in record["empty"].items()}


def _newest_good(workdir: str | Path) -> tuple[Path, dict] | None:
    """(folder, record of info.json) of the newest step that matches its list; says which ones do not."""
    damaged = []
    for step in steps(workdir):
        folder = Path(workdir) / "checkpoints" / f"{step:08d}"
        if not _matches(folder):
            log.warning("%s: damaged (its files do not match %s); trying the step before it", folder, SUMS)
            damaged.append(folder)
            continue
        record = json.loads((folder / "info.json").read_text())
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{folder}: holds {record['format']} version {record['version']} and this version of fg3dgs_jax reads "
                f"{FORMAT} version {VERSION}; use the version that wrote it, or give another --workdir"
            )
        return folder, record
    if damaged:
        raise UserError(
            f"{damaged[0].parent}: every checkpoint is damaged; restore one from a backup, or remove this folder to "
            "train from the start"
        )
    return None


def _matches(folder: Path) -> bool:
    try:
        return (folder / SUMS).read_bytes() == _sums(folder)
    except OSError:  # a file that is missing or that the disk cannot read any more
        return False


def _sums(folder: Path) -> bytes:
    """The whole list, so that one comparison finds a changed, missing or extra file and a changed list alike."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Removes what a killed save, or a killed removal of an old step, left behind."""
    for path in root.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _refuse_others(workdir: str | Path, saved: dict, expect: dict | None) -> None:
    if expect is None:
        return
    old, new = dict(_leaves(saved)), dict(_leaves(json.loads(json.dumps(expect))))
    missing = object()
    names = [name for name in [*old, *new] if name not in FREE and old.get(name, missing) != new.get(name, missing)]
    # A changed config explains a changed model: name the cause, not what follows from it.
    names.sort(key=lambda name: (not name.startswith("config."), name != "dataset"))
    if not names:
        return
    name, instead = names[0], "or give another --workdir"
    if name == "dataset":
        raise UserError(
            f"{workdir}: its checkpoints were trained on another dataset, {saved.get('data', 'unnamed')}; "
            f"point --config.data at that one, {instead}"
        )
    was, now = (repr(side[name]) if name in side else "absent" for side in (old, new))
    flag = f"--{name}" if name.startswith("config.") else name
    raise UserError(
        f"{workdir}: its checkpoints were trained with {flag} {was}, this run has {now}; set it back, {instead}"
    )
