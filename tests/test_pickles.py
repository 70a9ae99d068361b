"""Pickles of numpy arrays: what numpy writes in any protocol comes back, everything else is refused, in bounds."""

import contextlib
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import Tensor, zip_bytes

from fg3dgs_jax.data import pickles, torch_file
from fg3dgs_jax.errors import UserError

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((3, 5, 2, 4)).astype(np.float32)


def parameters() -> dict:
    """A network's parameters as Flax keeps them, and numpy's other corners."""
    shared = np.arange(3, dtype=np.float32)
    return {
        "Net_0": {"Conv_0": {"kernel": KERNEL, "bias": shared}, "turned": np.asfortranarray(KERNEL)},
        "again": [shared, shared],
        "point": np.array(7, np.int64), "empty": np.zeros((0, 3), np.float64), "mask": np.array([True, False]),
        "half": np.float16([0.5, 2]), "bytes": np.uint8([0, 128, 255]), "view": np.arange(12.0)[::2],
        "number": np.float32(1.5), "names": ("a", None, 3),
    }  # fmt: skip


def leaves(tree, path=""):
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_numpy_writes_comes_back(protocol):
    written = parameters()
    found = torch_file.parse(pickle.dumps(written, protocol=protocol))
    for (path, expected), (same, value) in zip(leaves(written), leaves(found), strict=True):
        assert path == same
        if isinstance(expected, np.ndarray):
            assert value.dtype == expected.dtype and value.shape == expected.shape and not value.flags.writeable
        assert np.array_equal(value, expected), path
    assert found["again"][0] is found["again"][1] is found["Net_0"]["Conv_0"]["bias"]
    assert "Net_0/Conv_0/kernel" in torch_file.tensors(found)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])  # before and since numpy 2
@pytest.mark.parametrize("protocol", [2, 3])
def test_both_names_of_numpys_module_are_known(core, protocol):
    text = pickle.dumps({"a": KERNEL, "b": np.float32(2)}, protocol=protocol)
    assert re.search(rb"numpy\._?core", text)
    found = torch_file.parse(re.sub(rb"numpy\._?core", core, text))
    assert np.array_equal(found["a"], KERNEL) and found["b"] == 2


def test_arrays_among_pytorchs_tensors_are_read():
    found = torch_file.parse(zip_bytes({"a": Tensor(KERNEL), "b": KERNEL}))
    assert np.array_equal(found["a"], found["b"])


class Matrix(np.ndarray):
    """A class of one's own, as masked and record arrays are."""


def array(state: bytes, kind: bytes = b"cnumpy\nndarray\n") -> bytes:
    """Instructions that make an array of six zeros, with another state or class."""
    make = b"cnumpy._core.multiarray\n_reconstruct\n" + kind + b"K\x00\x85C\x01b\x87R"
    return b"\x80\x03}X\x01\x00\x00\x00a" + make + state + b"s."


def state(shape=b"K\x02K\x03\x86", order=b"<", raw=24) -> bytes:
    """The instructions of a state: version, shape, type, Fortran order, bytes."""
    options = b"(K\x03X\x01\x00\x00\x00" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    kind = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R" + options
    return b"(K\x01" + shape + kind + b"\x89C" + bytes([raw]) + bytes(raw) + b"tb"


HUGE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
# Remembers under 0 a tuple of 2^60 leaves, which takes forever to hash or to print.
LAUGHS = b"\x80\x04)q\x000" + b"h\x00h\x00\x86q\x000" * 60
HOSTILE = {
    "objects": (pickle.dumps({"a": np.array([1, "x", None], object)}), "numpy values of type 'O8'"),
    "texts": (pickle.dumps({"a": np.array(["x"])}), "numpy values of type 'U1'"),
    "records": (pickle.dumps({"a": np.zeros(2, [("x", "f4")])}, protocol=4), "numpy values of type 'V4'"),
    "big-endian values": (pickle.dumps({"a": np.arange(3, dtype=">f4")}), "big-endian"),
    "the same by hand": (array(state(order=b">")), "big-endian"),
    "a class of arrays": (pickle.dumps({"a": np.zeros(2).view(np.matrix)}, protocol=4), "asks for 'numpy.*matrix'"),
    "masked values": (pickle.dumps({"a": np.ma.zeros(2)}, protocol=4), "asks for 'numpy.ma"),
    "one's own class": (pickle.dumps({"a": np.zeros(2).view(Matrix)}, protocol=4), "asks for 'test_pickles.Matrix'"),
    "another class for the array": (array(state(), b"cnumpy\ndtype\n"), "an array is malformed"),
    "too few bytes": (array(state(raw=20)), "does not fit its data"),
    "too many bytes": (array(state(raw=28)), "does not fit its data"),
    "a negative edge": (array(state(b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff\x86")), "size is malformed"),
    "a huge product": (array(state(b"(" + HUGE * 16 + b"t")), "does not fit its data"),
    "many axes": (array(state(b"(" + b"K\x01" * 63 + b"K\x06t")), "does not fit its data"),
    "a list in place of bytes": (array(state().replace(b"C\x18" + bytes(24), b"]")), "an array is malformed"),
    "a text of laughs": (LAUGHS + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R.", "encodes text"),
    "an array without its state": (array(b"q\x05h\x05b"), "an array is malformed"),
    "ndarray called": (b"\x80\x03cnumpy\nndarray\nK\x06\x85R.", "calls something"),
    "a type of laughs": (LAUGHS + b"cnumpy\ndtype\nh\x00\x85R.", "a type is malformed"),
    "a name of laughs": (LAUGHS + b"h\x00h\x00\x93.", "malformed"),
    "a tensor of PyTorch": (
        b"\x80\x03}X\x01\x00\x00\x00a(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"K\x04tQs.", "does not hold",
    ),
    "a list": (pickle.dumps([KERNEL]), "neither a PyTorch file nor"),
    "an array alone": (pickle.dumps(KERNEL), "neither a PyTorch file nor"),
    "something behind it": (pickle.dumps({"a": KERNEL}) + b"x", "neither a PyTorch file nor"),
    "cut off": (pickle.dumps({"a": KERNEL})[:-9], "damaged|no end"),
    "another project's class": (b"\x80\x03cflax.core.frozen_dict\nFrozenDict\n}\x85R.", "asks for 'flax.core"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plain_array_is_refused_in_a_sentence(name, tmp_path):
    text, reason = HOSTILE[name]
    path = tmp_path / "x.ckpt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=rf"x\.ckpt: is refused because .*({reason}).*; give a file of plain weights$"):
        torch_file.read(path)


def test_the_honest_array_of_those_files_is_read():
    np.testing.assert_array_equal(torch_file.parse(array(state()))["a"], np.zeros((2, 3), np.float32))


# Protocol 2 asks `_codecs.encode` for an array's bytes, protocol 5 `_frombuffer`: the same call again, from the memo.
AGAIN = {2: b"h\x05h\x13h\x07\x86R", 5: b"h\x04h\x10R"}


@pytest.mark.parametrize("protocol", AGAIN)
def test_what_is_asked_for_often_is_held_once(protocol):
    """Else a small file could ask for any amount of memory."""
    values = np.full(70_000, 65, np.uint8)
    text = pickle.dumps({"a": values}, protocol=protocol)
    assert text.endswith(b"s.")
    entries = b"".join(b"X\x03\x00\x00\x00%03d%bs" % (i, AGAIN[protocol]) for i in range(100))
    found = torch_file.parse(text[:-1] + entries + b".")
    raw = [np.frombuffer(found[f"{i:03d}"], np.uint8) for i in range(100)]
    assert np.array_equal(raw[0], values) and all(np.shares_memory(raw[0], other) for other in raw)


def test_a_file_of_endless_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    with pytest.raises(pickles.Refused, match="too long"):
        torch_file.parse(b"\x80\x03" + b"]" * 2000 + b".")


WHOLE = [pickle.dumps(parameters(), protocol=protocol) for protocol in (2, 3, 4, 5)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read_never_worse(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(pickles.Refused):
        torch_file.tensors(torch_file.parse(bytes(whole)))
