"""Fuzzes the reader of .pth files and pickles with atheris (coverage-guided): it must refuse or read, never worse.

    pip install atheris && python tests/fuzz_torch_file.py [-runs=1000000] [-max_total_time=600] [CORPUS_DIR]
Whole small files are the first inputs; the first byte of each input chooses what is mutated: the whole file, or the
table of contents inside an intact archive.
"""

import sys

import atheris

with atheris.instrument_imports(
    include=["fg3dgs_jax.data.torch_file", "fg3dgs_jax.data.pickles", "pickletools", "zipfile"]
):
    from fg3dgs_jax.data import torch_file

import contextlib
import pickle
import tempfile
from pathlib import Path

import numpy as np
from torch_files import Tensor, stream_bytes, zip_bytes

SMALL = {"a": Tensor(np.float32([[1, 2], [3, 4]])), "n": [1, "x", None, 2.5], "s": np.float32(1)}
ARRAYS = {"Conv_0": {"kernel": np.ones((2, 3), np.float32), "turned": np.ones((2, 3), np.float16).T}, "n": np.int64(3)}
WHOLE, CONTENTS = 0, 1


def one(data: bytes) -> None:
    if not data:
        return
    content = data[1:] if data[0] % 2 == WHOLE else zip_bytes(None, data_pkl=data[1:])
    with contextlib.suppress(torch_file.Refused):
        torch_file.tensors(torch_file.parse(content))


def seeds() -> list[bytes]:
    archive = zip_bytes(SMALL)
    start = archive.index(b"\x80\x02")
    bare = [pickle.dumps(ARRAYS, protocol=protocol) for protocol in (2, 3, 4, 5)]
    seeds = [bytes([kind]) + text for text in bare for kind in (WHOLE, CONTENTS)]
    return [
        *seeds,
        b"\0" + archive,
        b"\0" + stream_bytes(SMALL),
        b"\1" + archive[start : archive.index(b".PK", start) + 1],
    ]


def main() -> None:
    """Runs until a failure, -runs or -max_total_time."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz_torch_file_"))  # libFuzzer ends the process: it stays, a few kB
    for i, seed in enumerate(seeds()):
        (folder / f"seed{i}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(folder)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
