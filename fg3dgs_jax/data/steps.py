"""Steps whose results stay on disk, so that a run that was stopped continues and a changed input starts afresh."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


class Steps:
    """Folders `folder`/<step>, each with the key it was made for. A key depends on all steps before it."""

    def __init__(self, folder: Path, key: str):
        self.folder, self._key = folder, key

    def run(self, name: str, make: Callable[[Path], None], *options: object) -> Path:
        """The folder of a step's results: as it is, if made for the same input, options and earlier steps; else made.

        make: writes into the empty folder it is given; an exception leaves nothing under the step's name.
        """
        self._key = hashlib.sha256(json.dumps([self._key, name, *map(str, options)]).encode()).hexdigest()
        path, stamp = self.folder / name, self.folder / name / "key"
        if stamp.is_file() and stamp.read_text() == self._key:
            return path
        partial = self.folder / f".{name}.partial"
        for old in (partial, path):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        (partial / "key").write_text(self._key)
        os.replace(partial, path)
        return path

    def clear(self) -> None:
        """Removes everything kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Of the file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
