"""The .pth reader: what PyTorch writes comes back, and what it never writes is refused by name, quickly, in bounds."""

import collections
import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch_files import Tensor, stream_bytes, zip_bytes

from fg3dgs_jax.data import torch_file
from fg3dgs_jax.errors import UserError

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((4, 3, 5, 5)).astype(np.float32)
STORAGE = np.arange(24, dtype=np.float32)


def checkpoint():
    """Everything that published weights and 3DGS-style checkpoints hold."""
    state = collections.OrderedDict()
    state["conv.weight"] = Tensor(KERNEL)
    state["turned"] = Tensor(STORAGE[4:16].reshape(3, 4).T, STORAGE, 4)
    state["parameter"] = Tensor(np.float32([1, 2]), parameter=True)
    state["count"] = Tensor(np.array(7, np.int64))
    state["empty"] = Tensor(np.zeros((0, 3), np.float32))
    state["half"], state["mask"] = Tensor(np.float16([0.5, 2])), Tensor(np.array([True, False]))
    optimizer = {"state": {0: {"step": 3, "exp_avg": Tensor(np.float64([1e-9]))}}, "param_groups": [{"lr": 1e-3}]}
    return {"state_dict": state, "extent": np.float32(1.5), "optimizer": optimizer, "names": ("a", None, True, 2**70)}


@pytest.mark.parametrize("write", [zip_bytes, stream_bytes])
def test_what_pytorch_writes_comes_back(write):
    found = torch_file.parse(write(checkpoint()))
    state = found["state_dict"]
    np.testing.assert_array_equal(state["conv.weight"], KERNEL)
    np.testing.assert_array_equal(state["turned"], STORAGE[4:16].reshape(3, 4).T)
    np.testing.assert_array_equal(state["parameter"], [1, 2])
    assert state["count"].shape == () and state["count"].dtype == np.int64 and int(state["count"]) == 7
    assert state["empty"].shape == (0, 3)
    np.testing.assert_array_equal(state["half"], np.float16([0.5, 2]))
    np.testing.assert_array_equal(state["mask"], [True, False])
    assert found["extent"] == 1.5 and found["names"] == ("a", None, True, 2**70)
    assert found["optimizer"]["state"][0]["exp_avg"][0] == 1e-9
    assert not state["conv.weight"].flags.writeable
    names = torch_file.tensors(found)
    assert set(names) >= {"state_dict/conv.weight", "optimizer/state/0/exp_avg"}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_the_real_pytorch_writes_comes_back(zipped, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (CONTRIBUTING.md, parity tests)")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    whole = {
        "state_dict": model.state_dict(),
        "parameter": model[0].weight,
        "view": torch.arange(12.0)[2:8].view(2, 3).T,
    }
    whole["bfloat"] = torch.tensor([1.5], dtype=torch.bfloat16)
    torch.save(whole, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = torch_file.read(tmp_path / "x.pth")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(found["state_dict"][name], value.numpy())
    np.testing.assert_array_equal(found["parameter"], model[0].weight.detach().numpy())
    np.testing.assert_array_equal(found["view"], whole["view"].numpy())
    assert float(found["bfloat"][0]) == 1.5


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/fg3dgs_jax_was_here",)


def laughs(levels=60):
    """A pickle of a few hundred bytes whose value has 2^60 leaves."""
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


def hashed_laughs(levels=60):
    """A tuple that takes forever to hash, as the key of a dictionary: opcodes written by hand."""
    body = b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(levels))
    return b"\x80\x02}" + body[2:] + b"K\x01s."


HUGE = 1 << 40
HOSTILE = {
    "a call of os.system": (pickle.dumps(Evil(), protocol=2), "asks for '(posix|nt|os).system'"),
    "the same in protocol 4": (pickle.dumps(Evil(), protocol=4), "asks for '(posix|nt|os).system'"),
    "an instance": (pickle.dumps(zipfile.ZipInfo(), protocol=2), "asks for"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "asks for '__builtin__.getattr'"),
    "a module under torch": (b"\x80\x02ctorch.serialization\nload\n.", "asks for 'torch.serialization.load'"),
    "an attribute of torch": (b"\x80\x02ctorch\nload\n.", "asks for 'torch.load'"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a call of a string": (b"\x80\x02X\x02\x00\x00\x00os)R.", "calls something"),
    "a dictionary with tuples as keys": (hashed_laughs(), "keys are not names"),
    "no end": (b"\x80\x02]", "no end|damaged"),
    "nothing on the stack": (b"\x80\x02s.", "damaged"),
    "nothing": (b"", "damaged|no end"),
    "a whole module": (b"\x80\x02(X\x06\x00\x00\x00moduleNNNNtQ.", "whole module"),
    "an enormous string": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_pytorch_never_writes_is_refused(name):
    text, reason = HOSTILE[name]
    with pytest.raises(torch_file.Refused, match=reason):
        torch_file.parse(zip_bytes(None, data_pkl=text))
    assert not os.path.exists("/tmp/fg3dgs_jax_was_here")  # noqa: S108


def lying_tensor(offset, size, stride):
    def integer(n):
        return pickle.dumps(n, protocol=2)[2:-1]

    def numbers(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + integer(offset)
        + numbers(size)
        + numbers(stride)
        + b"\x89}tR."
    )


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (HUGE,), (0,)), (0, (HUGE, HUGE), (1, 1)),
     (0, (5,), (0,)), (0, (2,), (-1,)), (0, (2,), (1, 1)), (HUGE, (1,), (1,))],
)  # fmt: skip
def test_a_tensor_never_reaches_beyond_its_data(offset, size, stride, tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", lying_tensor(offset, size, stride))
        archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(UserError, match=r"x\.pth: is refused because (a tensor|a size|it is damaged)"):
        torch_file.read(path)


def test_the_honest_tensor_of_that_file_is_read(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", lying_tensor(1, (3,), (1,)))
        archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(torch_file.read(path), [1, 2, 3])


def test_a_small_file_cannot_grow():
    with pytest.raises(torch_file.Refused, match="nested too deeply"):
        torch_file.tensors(torch_file.parse(zip_bytes(laughs())))
    with pytest.raises(torch_file.Refused, match="compressed"):
        torch_file.parse(zip_bytes({"a": Tensor(KERNEL)}, compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "damaged"), (b"not weights", "damaged|not a PyTorch"), (b"\0" * 257 + b"ustar" + b"\0" * 250, "tar archive"),
     (b"PK\x03\x04" + b"\0" * 50, "damaged")],
)  # fmt: skip
def test_other_files_are_named(content, reason, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"weights\.pth: is refused because .*({reason})"):
        torch_file.read(path)
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        torch_file.read(tmp_path / "none.pth")


WHOLE = [zip_bytes(checkpoint()), stream_bytes(checkpoint())]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read_never_worse(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    with contextlib.suppress(torch_file.Refused):
        torch_file.tensors(torch_file.parse(bytes(whole)))


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=300))
@example(hashed_laughs())
def test_random_pickles_are_refused_or_read_never_worse(text):
    with contextlib.suppress(torch_file.Refused):
        torch_file.parse(zip_bytes(None, data_pkl=b"\x80\x02" + text))
