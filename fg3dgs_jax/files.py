"""Files appear under their names only when complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fg3dgs_jax.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` with the same ending, renamed to `path` when the block ends well, else removed.

    Raises UserError if it cannot be written: no such folder, no permission, a full disk.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from error
    finally:
        with suppress(NotADirectoryError):  # the folder is a file
            partial.unlink(missing_ok=True)
