"""Reads pickles without unpickling: an interpreter for the few instructions that files of weights need.

Python's own disassembler (`pickletools.genops`) splits the stream; what it names is looked up in the tables below and
in the caller's, and nothing else exists: no import, no call of anything that a file names. numpy's arrays come back as
read-only views of the file's bytes, so that a small file cannot ask for more memory than it has.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAX_STEPS = 10_000_000  # a network of 1,000 layers has some 100,000
MAX_AXES = 16
SCALARS = {"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"}  # numpy's


class Refused(Exception):
    """Why a stream is not read; becomes part of a UserError's sentence."""


class Named(NamedTuple):
    """Something a pickle refers to by name. It stays a name unless a table knows it."""

    name: str


class Vocabulary(NamedTuple):
    """What a file may say: functions it may call, other names it may mention, and who answers persistent ids."""

    builders: dict[str, Callable[..., Any]]
    names: frozenset[str]
    persistent: Callable[[tuple], Any]


class _Dtype:
    """numpy's dtype as a pickle builds it: a code, then its byte order."""

    def __init__(self, code: Any, *_rest: Any):
        if type(code) is not str or code not in SCALARS:
            raise Refused(f"it holds numpy values of type {code!r}" if type(code) is str else "a type is malformed")
        self.dtype = np.dtype(code)

    def restore(self, state: Any) -> "_Dtype":
        if state[1] not in ("<", "|"):
            raise Refused("it was written on a big-endian machine")
        return self


class _Array:
    """numpy's array between its making, empty, and the state that fills it."""

    def __init__(self, kind: Any, *_rest: Any):
        if kind != Named("numpy ndarray"):
            raise Refused("an array is malformed")
        self.values: np.ndarray | None = None

    def restore(self, state: Any) -> np.ndarray:
        _version, shape, dtype, fortran, raw = state
        self.values = _array(raw, dtype, shape, "F" if fortran is True else "C")
        return self.values


def check_counts(*numbers: Any) -> None:
    """Whole numbers that a size or a place in a file can have. Raises Refused."""
    if len(numbers) > 4 * MAX_AXES or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise Refused("a size is malformed")


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """numpy's array of bytes, as protocol 5 asks for it (`_frombuffer`)."""
    if not (isinstance(raw, bytes | bytearray) and isinstance(dtype, _Dtype) and type(shape) is tuple):
        raise Refused("an array is malformed")
    check_counts(*shape)
    if len(shape) > MAX_AXES or order not in ("C", "F") or math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise Refused("an array's size does not fit its data")
    values = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
    values.flags.writeable = False
    return values


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    """numpy.core.multiarray.scalar."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(raw) != dtype.dtype.itemsize:
        raise Refused("a number is malformed")
    return np.frombuffer(raw, dtype.dtype)[0].item()


# All that a file may call beside the caller's, by the name under which it asks for it: numpy's modules before and after
# they were renamed. `_codecs encode` is the machine's own.
BUILDERS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "__builtin__ bytes": lambda: b"",  # an empty array's, in protocol 2
    "numpy dtype": _Dtype,
}
for _core in ("core", "_core"):
    BUILDERS[f"numpy.{_core}.multiarray scalar"] = _scalar
    BUILDERS[f"numpy.{_core}.multiarray _reconstruct"] = _Array
    BUILDERS[f"numpy.{_core}.numeric _frombuffer"] = _array
CONSTANTS = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
VALUES = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
GETS, PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT"}
IGNORED = {"PROTO", "FRAME"}


class _Machine:
    """The stack on which a pickle builds its value."""

    def __init__(self, vocabulary: Vocabulary):
        self.builders = BUILDERS | vocabulary.builders | {"_codecs encode": self.latin1}
        self.names = vocabulary.names | {"numpy ndarray"}
        self.persistent, self.stack, self.marks, self.memo, self.texts = vocabulary.persistent, [], [], {}, {}

    def latin1(self, text: Any, encoding: Any) -> bytes:
        """_codecs.encode, by which bytes travel in protocol 2: each text once, however often the file asks."""
        if encoding != "latin1" or not isinstance(text, str):
            raise Refused("it encodes text")
        if text not in self.texts:
            self.texts[text] = text.encode("latin1")
        return self.texts[text]

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
            self.get(argument)
        elif op in PUTS or op == "MEMOIZE":
            self.memo[len(self.memo) if op == "MEMOIZE" else argument] = self.stack[-1]
        elif op not in IGNORED:
            handler = getattr(self, f"on_{op.lower()}", None)
            if handler is None:
                raise Refused(f"it uses the pickle instruction {op}")
            handler(argument)

    def get(self, key: int) -> None:
        item = self.memo[key]
        if isinstance(item, _Array):
            if item.values is None:
                raise Refused("an array is malformed")
            item = item.values  # it was remembered before it was filled
        self.stack.append(item)

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
            raise Refused("it is malformed, or its keys are not names")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def on_global(self, argument: str) -> None:
        self.name(argument)

    def on_stack_global(self, _argument: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("it is malformed")
        self.name(f"{module} {name}")

    def name(self, name: str) -> None:
        if name not in self.builders and name not in self.names:
            raise Refused(f"it asks for {name.replace(' ', '.')[:80]!r}, which is no plain weight")
        self.stack.append(Named(name))

    def on_reduce(self, _argument: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        known = isinstance(function, Named) and function.name in self.builders
        if not known or not isinstance(arguments, tuple):
            raise Refused("it calls something that is not a function of this reader")
        self.stack.append(self.builders[function.name](*arguments))

    def on_build(self, _argument: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype | _Array):
            self.stack[-1] = target.restore(state)
        elif type(target) is not dict:  # a dict's attributes (PyTorch's versions of modules) are left out
            raise Refused("it restores an object")

    def on_binpersid(self, _argument: None) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def run(stream: io.BytesIO, vocabulary: Vocabulary) -> Any:
    """The value of the pickle at the stream's position, which moves behind it. Raises Refused, and what damaged bytes
    raise in the disassembler, numpy or the stack (IndexError, ValueError, ...): catch Exception."""
    machine = _Machine(vocabulary)
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(stream)):
        if opcode.name == "STOP":
            return machine.stack.pop()
        if count > MAX_STEPS:
            raise Refused("it is too long")
        machine.step(opcode.name, argument)
    raise Refused("it has no end")
