"""Reads PyTorch's .pth files without PyTorch and without unpickling (`pickles`).

Both layouts are read: the zip archive (PyTorch 1.6 and newer) and the stream before it, which many published weights
still have; and a bare pickle of dictionaries of numpy arrays, as JAX projects publish theirs. Files from before 2017
(a tar archive) are refused. Tensors come back as read-only numpy views of the file's bytes.
"""

import functools
import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fg3dgs_jax.data import pickles
from fg3dgs_jax.data.pickles import Named, Refused
from fg3dgs_jax.errors import UserError

MAX_BYTES = 4 << 30
MAX_PICKLE = 64 << 20  # without tensors: names, sizes, numbers
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGES = {
    "DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
Load = Callable[[np.dtype, str, Any], np.ndarray]


class Storage(NamedTuple):
    """The flat array behind one or more tensors."""

    values: np.ndarray


def read(path: str | Path) -> Any:
    """What a .pth file or a pickle of arrays holds: dicts, lists, tuples, numbers, strings, None, and tensors and
    arrays as read-only numpy arrays.

    Ordered dictionaries become dicts, parameters their tensors. Raises UserError in one sentence: no such file, neither
    of the two, damaged, or it holds something else than the types above.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the weights")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 30} GiB; give the file of weights alone")
    try:
        return parse(path.read_bytes())
    except Refused as reason:
        raise UserError(f"{path}: is refused because {reason}; give a file of plain weights") from None


def parse(data: bytes) -> Any:
    """`read` for a file's bytes. Raises Refused."""
    try:
        if data[:4] == b"PK\x03\x04":
            return _parse_zip(data)
        if data[257:262] == b"ustar":
            raise Refused("it is a tar archive of a PyTorch from before 2017, which is not read")
        return _parse_stream(data)
    except Refused:
        raise
    except Exception as error:  # zip, numpy and the disassembler each have their own errors for damaged bytes
        text = str(error) or type(error).__name__
        raise Refused(f"it is damaged or no file of weights ({text.splitlines()[0][:80]})") from None


def _parse_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise Refused("it is a compressed archive, which PyTorch does not write")
        if sum(entry.file_size for entry in entries.values()) > len(data):
            raise Refused("its parts overlap")
        main = next((name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1), None)
        if main is None:
            raise Refused("it holds no data.pkl")
        root = main.removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise Refused("it was written on a big-endian machine")
        if entries[main].file_size > MAX_PICKLE:
            raise Refused("its table of contents is too large")
        storages: dict[str, np.ndarray] = {}

        def load(dtype: np.dtype, key: str, numel: Any) -> np.ndarray:
            if key not in storages:
                storages[key] = np.frombuffer(archive.read(f"{root}data/{key}"), np.uint8)
            return _flat(storages[key], dtype, numel)

        return _run(io.BytesIO(archive.read(main)), load)


def _parse_stream(data: bytes) -> Any:
    """A bare pickle, or the layout before the archive, which starts with a number."""
    stream = io.BytesIO(data)
    first = _run(stream, _no_storage)
    if type(first) is dict and stream.tell() == len(data):
        return first
    if type(first) is not int or first != LEGACY_MAGIC or _run(stream, _no_storage) != LEGACY_PROTOCOL:
        raise Refused("it is neither a PyTorch file nor a pickle of named arrays")
    return _parse_legacy(data, stream)


def _no_storage(dtype: np.dtype, key: str, numel: Any) -> np.ndarray:
    raise Refused("it refers to tensors that it does not hold")


def _parse_legacy(data: bytes, stream: io.BytesIO) -> Any:
    """After magic and protocol: system, object and storage keys as pickles, then each storage's length and bytes."""

    def nothing(dtype: np.dtype, key: str, numel: Any) -> np.ndarray:
        sizes[key] = dtype.itemsize
        # As many zeros as the file could hold, without memory: sizes are checked in the second pass.
        return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), (len(data),), (0,), writeable=False)

    def load(dtype: np.dtype, key: str, numel: Any) -> np.ndarray:
        return _flat(storages[key], dtype, numel)

    sizes: dict[str, int] = {}
    _run(stream, nothing)  # the machine's word sizes
    start = stream.tell()
    _run(stream, nothing)
    keys, storages = _run(stream, nothing), {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        begin = stream.tell()
        end = begin + count * sizes[key]
        if end > len(data):
            raise Refused("it is cut off")
        storages[key] = np.frombuffer(data, np.uint8, end - begin, begin)
        stream.seek(end)
    return _run(io.BytesIO(data[start:]), load)


def _flat(raw: np.ndarray, dtype: np.dtype, numel: Any) -> np.ndarray:
    """The first `numel` values of a storage's bytes u8 [n]."""
    if type(numel) is not int or not 0 <= numel * dtype.itemsize <= len(raw):
        raise Refused("a tensor's size does not fit its data")
    return raw[: numel * dtype.itemsize].view(dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> np.ndarray:
    """torch._utils._rebuild_tensor and its second version."""
    pickles.check_counts(offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > pickles.MAX_AXES:
        raise Refused("a tensor is malformed")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset
    if count > len(storage.values) or (count and last >= len(storage.values)):
        raise Refused("a tensor reaches beyond its data")
    values = storage.values[offset:] if count else storage.values[:0]
    steps = [step * values.dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values, size, steps, writeable=False)


def _storage(load: Load, identity: Any) -> Storage:
    """What a persistent id means: a storage, by its type, key and number of values."""
    kind, storage, key, _place, numel, *_view = identity
    if kind != "storage" or not isinstance(storage, Named) or type(key) is not str:
        raise Refused("it holds a whole module in place of its weights")
    if _view and _view[0] is not None:
        raise Refused("it holds views of storages")
    return Storage(load(STORAGES[storage.name.removeprefix("torch ")], key, numel))


# All that a file may call of PyTorch, by the name under which it asks for it.
BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_rest: tensor,
    "torch Size": lambda sizes: tuple(sizes),
}
NAMES = frozenset(f"torch {name}" for name in STORAGES)


def _run(stream: io.BytesIO, load: Load) -> Any:
    """The value of the pickle at the stream's position; `load(dtype, key, numel)` finds a storage's values."""
    return pickles.run(stream, pickles.Vocabulary(BUILDERS, NAMES, functools.partial(_storage, load)))


def tensors(tree: Any, most: int = 100_000) -> dict[str, np.ndarray]:
    """The arrays of what `read` returned by their path: `state_dict/face.0.weight`, `0/1/means`. Raises Refused."""
    found: dict[str, np.ndarray] = {}
    waiting, seen = [("", tree, 0)], 0
    while waiting:
        path, node, depth = waiting.pop()
        seen += 1
        if seen > most or depth > 32:
            raise Refused("it is nested too deeply")
        if isinstance(node, np.ndarray):
            found[path] = node
        elif isinstance(node, dict | list | tuple) and not isinstance(node, Named | Storage):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            waiting.extend((f"{path}/{key}" if path else str(key), value, depth + 1) for key, value in items)
    return found
