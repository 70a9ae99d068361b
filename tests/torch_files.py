"""Writes .pth files as PyTorch lays them out, without PyTorch: for tests of the reader."""

import io
import pickle
import sys
import types
import zipfile

import numpy as np

STORAGE_NAMES = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage"}
STORAGE_NAMES |= {"i4": "IntStorage", "u1": "ByteStorage", "b1": "BoolStorage"}


def fake_torch() -> dict[str, types.ModuleType]:
    """Modules with the names that a .pth file refers to, for pickle to write them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGE_NAMES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):

        def function(*arguments):
            raise AssertionError("only written, never called")

        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    return {"torch": torch, "torch._utils": utils}


class Tensor:
    """Stands for a tensor: an array, maybe a view of a larger storage."""

    def __init__(self, values: np.ndarray, storage: np.ndarray | None = None, offset: int = 0, parameter: bool = False):
        self.values, self.offset, self.parameter = values, offset, parameter
        self.storage = np.ascontiguousarray(values).ravel() if storage is None else storage


class Writer(pickle._Pickler):  # the one in Python, whose hooks see functions of our fake modules
    def __init__(self, file, modules, legacy):
        super().__init__(file, protocol=2)
        self.modules, self.legacy, self.storages, self.alive = modules, legacy, {}, []

    def reducer_override(self, item):
        if not isinstance(item, Tensor):
            return NotImplemented
        self.alive.append(item)
        utils = self.modules["torch._utils"]
        strides = tuple(step // item.values.itemsize for step in item.values.strides)
        arguments = (Storage(item.storage), item.offset, item.values.shape, strides, False, {})
        if item.parameter:
            inner = Tensor(item.values, item.storage, item.offset)
            return utils._rebuild_parameter, (inner, True, {})
        return utils._rebuild_tensor_v2, arguments

    def persistent_id(self, item):
        if not isinstance(item, Storage):
            return None
        key = str(id(item.values))
        self.storages[key] = item.values
        code = item.values.dtype.str[1:]
        kind = getattr(self.modules["torch"], STORAGE_NAMES[code])
        identity = ("storage", kind, key, "cpu", item.values.size)
        return (*identity, None) if self.legacy else identity


class Storage:
    def __init__(self, values):
        self.values = values


def _pickled(value, legacy: bool) -> tuple[bytes, dict[str, np.ndarray]]:
    modules, file = fake_torch(), io.BytesIO()
    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        writer = Writer(file, modules, legacy)
        writer.dump(value)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return file.getvalue(), writer.storages


def zip_bytes(value, *, data_pkl: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive of PyTorch 1.6 and newer."""
    text, storages = _pickled(value, legacy=False)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", text if data_pkl is None else data_pkl)
        archive.writestr("archive/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def stream_bytes(value) -> bytes:
    """The layout before that."""
    text, storages = _pickled(value, legacy=True)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    parts = [pickle.dumps(item, protocol=2) for item in head] + [text, pickle.dumps(list(storages), protocol=2)]
    for values in storages.values():
        parts += [values.size.to_bytes(8, "little"), values.tobytes()]
    return b"".join(parts)
