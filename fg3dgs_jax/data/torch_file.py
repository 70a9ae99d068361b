"""Reads PyTorch's .pth files without PyTorch and without unpickling: an interpreter for the few opcodes they need.

Python's own disassembler (`pickletools.genops`) splits the stream; what it names is looked up in the tables below and
nothing else exists: no import, no call of anything that a file names. Tensors come back as read-only numpy views of the
file's bytes, so that a small file cannot ask for more memory than it has.

Both layouts are read: the zip archive (PyTorch 1.6 and newer) and the stream before it, which many published weights
still have. Files from before 2017 (a tar archive) are refused.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
SCALARS = {"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"}  # numpy's, beside tensors


class Refused(Exception):
    """Why a stream is not read; becomes part of a UserError's sentence."""


class Named(NamedTuple):
    """Something a pickle refers to by name. It stays a name unless BUILDERS knows it."""

    name: str


class Storage(NamedTuple):
    """The flat array behind one or more tensors."""

    values: np.ndarray


class _Dtype:
    """numpy's dtype as a pickle builds it: a code, then its byte order."""

    def __init__(self, code: Any):
        if code not in SCALARS:
            raise Refused(f"it holds numpy values of type {code!r}")
        self.dtype = np.dtype(code)


def read(path: str | Path) -> Any:
    """What a .pth file holds: dicts, lists, tuples, numbers, strings, None, and tensors as read-only numpy arrays.

    Ordered dictionaries become dicts, parameters their tensors. Raises UserError in one sentence: no such file, not a
    PyTorch file, damaged, or it holds something else than the types above.
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
        raise Refused(f"it is damaged or not a PyTorch file ({text.splitlines()[0][:80]})") from None


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

        def load(dtype: np.dtype, key: str, numel: int) -> np.ndarray:
            if key not in storages:
                storages[key] = np.frombuffer(archive.read(f"{root}data/{key}"), np.uint8)
            return _flat(storages[key], dtype, numel)

        return _run(io.BytesIO(archive.read(main)), load)


def _parse_stream(data: bytes) -> Any:
    """Five pickles (magic, protocol, system, object, storage keys), then each storage's length and bytes."""

    def nothing(dtype: np.dtype, key: str, numel: int) -> np.ndarray:
        sizes[key] = dtype.itemsize
        # As many zeros as the file could hold, without memory: sizes are checked in the second pass.
        return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), (len(data),), (0,), writeable=False)

    def load(dtype: np.dtype, key: str, numel: int) -> np.ndarray:
        return _flat(storages[key], dtype, numel)

    sizes: dict[str, int] = {}
    stream = io.BytesIO(data)
    if _run(stream, nothing) != LEGACY_MAGIC or _run(stream, nothing) != LEGACY_PROTOCOL:
        raise Refused("it is not a PyTorch file")
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
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor is malformed")
    if len(size) != len(stride) or len(size) > 16:
        raise Refused("a tensor is malformed")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset
    if count > len(storage.values) or (count and last >= len(storage.values)):
        raise Refused("a tensor reaches beyond its data")
    values = storage.values[offset:] if count else storage.values[:0]
    steps = [step * values.dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values, size, steps, writeable=False)


def _latin1(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, by which Python 2's byte strings travel."""
    if encoding != "latin1" or not isinstance(text, str) or len(text) > 64:
        raise Refused("it encodes text")
    return text.encode("latin1")


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    """numpy.core.multiarray.scalar."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(raw) != dtype.dtype.itemsize:
        raise Refused("a number is malformed")
    return np.frombuffer(raw, dtype.dtype)[0].item()


# All that a file may call, by the name under which it asks for it.
BUILDERS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_rest: tensor,
    "torch Size": lambda sizes: tuple(sizes),
    "numpy dtype": lambda code, *_rest: _Dtype(code),
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "_codecs encode": _latin1,
}
CONSTANTS = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
VALUES = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
GETS, PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT"}
IGNORED = {"PROTO", "FRAME"}


class _Machine:
    """The stack on which a pickle builds its value; `load(dtype, key, numel)` finds a storage's values."""

    def __init__(self, load: Callable[[np.dtype, str, int], np.ndarray]):
        self.load, self.stack, self.marks, self.memo = load, [], [], {}

    def marked(self) -> list:
        """What was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, op: str, argument: Any) -> None:
        """One opcode."""
        if op in VALUES:
            self.stack.append(argument)
        elif op in CONSTANTS:
            self.stack.append(CONSTANTS[op]())
        elif op in TUPLES:
            items = [self.stack.pop() for _ in range(TUPLES[op])]
            self.stack.append(tuple(reversed(items)))
        elif op in GETS:
            self.stack.append(self.memo[argument])
        elif op in PUTS or op == "MEMOIZE":
            self.memo[len(self.memo) if op == "MEMOIZE" else argument] = self.stack[-1]
        elif op not in IGNORED:
            handler = getattr(self, f"on_{op.lower()}", None)
            if handler is None:
                raise Refused(f"it uses the pickle instruction {op}")
            handler(argument)

    def on_mark(self, _argument: None) -> None:
        self.marks.append(len(self.stack))

    def on_pop(self, _argument: None) -> None:
        self.stack.pop()

    def on_tuple(self, _argument: None) -> None:
        self.stack.append(tuple(self.marked()))

    def on_list(self, _argument: None) -> None:
        self.stack.append(self.marked())

    def on_dict(self, _argument: None) -> None:
        items = self.marked()
        self.stack.append({})
        self.fill(items)

    def on_append(self, _argument: None) -> None:
        item = self.stack.pop()
        self.extend([item])

    def on_appends(self, _argument: None) -> None:
        self.extend(self.marked())

    def extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("it is malformed")
        self.stack[-1].extend(items)

    def on_setitem(self, _argument: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def on_setitems(self, _argument: None) -> None:
        self.fill(self.marked())

    def fill(self, items: list) -> None:
        # Plain keys only: hashing a tuple that holds itself many times over would never end.
        if type(self.stack[-1]) is not dict or len(items) % 2 or any(type(k) not in (str, int) for k in items[::2]):
            raise Refused("it holds a dictionary whose keys are not names")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def on_global(self, argument: str) -> None:
        self.name(argument)

    def on_stack_global(self, _argument: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {name}")

    def name(self, name: str) -> None:
        module, _, last = name.partition(" ")
        if name not in BUILDERS and (module != "torch" or last not in STORAGES):
            raise Refused(f"it asks for {name.replace(' ', '.')!r}, which is no plain weight")
        self.stack.append(Named(name))

    def on_reduce(self, _argument: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Named) or function.name not in BUILDERS or not isinstance(arguments, tuple):
            raise Refused("it calls something that is not a function of this reader")
        self.stack.append(BUILDERS[function.name](*arguments))

    def on_build(self, _argument: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            if state[1] not in ("<", "|"):
                raise Refused("it was written on a big-endian machine")
        elif type(target) is not dict:  # a dict's attributes (PyTorch's versions of modules) are left out
            raise Refused("it restores an object")

    def on_binpersid(self, _argument: None) -> None:
        kind, storage, key, _place, numel, *_view = self.stack.pop()
        if kind != "storage" or not isinstance(storage, Named) or type(key) is not str:
            raise Refused("it holds a whole module in place of its weights")
        if _view and _view[0] is not None:
            raise Refused("it holds views of storages")
        self.stack.append(Storage(self.load(STORAGES[storage.name.removeprefix("torch ")], key, numel)))


def _run(stream: io.BytesIO, load: Callable[[np.dtype, str, int], np.ndarray]) -> Any:
    """The value of the pickle at the stream's position, which moves behind it."""
    machine = _Machine(load)
    for opcode, argument, _position in pickletools.genops(stream):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise Refused("it has no end")


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
