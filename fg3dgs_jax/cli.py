"""How every command runs: exit codes, one-sentence errors, the training config, the compilation cache.

    cli.run(main)                                  # at the end of a command's file; main(argv) -> int | None
    cli.Parser(description=..., ...)               # argparse whose errors are one sentence
    cli.parse_train(argv, doc) -> (config, workdir)  # --config=FILE --config.a.b=VALUE --workdir=DIR
    cli.keep_memory()                              # before any training: fewer page faults
    with cli.alone(workdir): ...                   # one run at a time in a folder
    cli.enable_compilation_cache()                 # compiled programs are kept under the user's cache directory

Exit codes: 0 success, 2 bad input (one sentence on stderr), 75 stopped by a signal (the same command continues).
"""

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import hashlib
import logging
import os
import platform
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags, config_path

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.training.signals import EXIT_STOPPED, Stopped

EXIT_BAD_INPUT = 2
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, raised as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; run `{self.prog} --help` to see what it takes")


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a command on sys.argv and leaves the process with its exit code."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt  # so that `finally` blocks remove temporary files, as for Ctrl-C

    signal.signal(signal.SIGTERM, stop)
    logger = logging.getLogger("fg3dgs_jax")
    logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    sys.exit(exit_code(main, sys.argv[1:]))


class _Stderr(logging.Handler):
    """Prints to whatever stderr is at the moment: a progress bar puts itself in its place to keep lines apart."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def exit_code(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Runs main(argv) and returns its exit code; an expected failure becomes one line on stderr.

    Everything unexpected passes through with its traceback: that is a bug to report, not bad input.
    """
    try:
        return main(argv) or 0
    except UserError as error:
        return _say(f"error: {error}", EXIT_BAD_INPUT)
    except Stopped as stopped:
        return _say(f"stopped: {stopped}", EXIT_STOPPED)
    except KeyboardInterrupt:
        return _say("stopped: run the same command again to continue", EXIT_STOPPED)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        text = f"error: the disk is full{where}: free some space and run the same command again; finished work is kept"
        return _say(text, EXIT_BAD_INPUT)


def _say(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def alone(folder: Path, flag: str = "--workdir") -> Iterator[None]:
    """Makes a folder, which `flag` names, and holds it for one process: two runs would write over each other.

    Raises UserError if it is held, or cannot be made.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another {flag}") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
        except BlockingIOError as error:
            raise UserError(f"{folder}: another run is using it; wait for it, or give another {flag}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def enable_compilation_cache() -> None:
    """Keeps compiled programs under $XDG_CACHE_HOME/fg3dgs_jax, so that only the first run pays for compilation.

    JAX_COMPILATION_CACHE_DIR, where set, wins. One folder per kind of processor: programs compiled for another
    one's vector instructions would crash on this one when a home directory is shared.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "fg3dgs_jax" / f"xla-{_processor()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home costs compilation time, nothing else
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_memory() -> None:
    """Tells glibc to keep freed memory: XLA allocates and frees the same large buffers at every step.

    Returning them to the system cost a quarter of a training step in page faults (14,000 a step at 256x256). Every
    thread keeps an arena of its own: in a common one, the compiler's leavings made a step a quarter longer, for the
    many small buffers of XLA's threads were looked for among them. The padding keeps those arenas whole.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, top_pad, trim_threshold = -3, -2, -1  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(top_pad, 64 << 20)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]


def parse_train(argv: list[str], doc: str = "") -> tuple[ConfigDict, Path]:
    """Reads `--config=FILE [--config.field=VALUE ...] [--workdir=DIR]`.

    Args:
      argv: the arguments, without the program's name.
      doc: what --help prints; with --config it also lists every field and its value.

    Returns:
      The locked config with its overrides applied, and the working directory (default: runs/<name of the config>).

    Raises:
      UserError: no or unreadable config, an unknown field or flag (names the nearest), a value of the wrong type.
      SystemExit: 0 after --help.
    """
    config, workdir, rest = parse_config(argv, doc)
    if rest:
        raise UserError(f"{rest[0]}: not a flag; write --config=FILE, --config.field=VALUE or --workdir=DIR")
    return config, workdir


def parse_config(argv: list[str], doc: str = "") -> tuple[ConfigDict, Path, list[str]]:
    """As `parse_train`, and returns what is left: the arguments without a flag."""
    path, rest = _split(argv)
    help_wanted = [argument for argument in rest if re.fullmatch(r"-h|--?help", argument)]
    if help_wanted:
        _print_help(doc, path)
    if path is None:
        raise UserError("--config is missing: give a config file, for example --config=configs/demo.py")
    values, rest = _parse_flags(rest, path)
    _check_tuples(load_config(path), values.config)
    workdir = values.workdir or os.path.join("runs", Path(path.split(":")[0]).stem)
    return values.config, Path(workdir), rest


def load_config(path: str) -> ConfigDict:
    """The config of a file `FILE.py` or `FILE.py:argument`, without overrides. Runs the file, as Python does."""
    name = path.split(":", 1)[0]
    if not os.path.isfile(name):
        raise UserError(f"--config={path}: no such file; configs/ holds ready ones, such as configs/demo.py")
    try:
        config = runpy.run_path(name)["get_config"](*path.split(":", 1)[1:])
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"--config={path}: not a config file ({reason}); it must define get_config()") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() must return an ml_collections.ConfigDict")
    return config


def field_names(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field that can be set, as it is written after `--config.`."""
    if isinstance(config, ConfigDict):
        for name, value in config.items():
            yield from field_names(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(config, tuple) and any(isinstance(value, ConfigDict) for value in config):
        for index, value in enumerate(config):
            yield from field_names(value, f"{prefix}[{index}]")
    else:
        yield prefix, config


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--config=FILE` or `--config FILE` out of the arguments."""
    path, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        if match := re.match(r"--?config=(.*)", argument):
            path = match[1]
        elif re.fullmatch(r"--?config", argument):
            path = next(arguments, None)
        else:
            rest.append(argument)
    return path, rest


def _parse_flags(argv: list[str], path: str) -> tuple[flags.FlagValues, list[str]]:
    config = load_config(path)
    _check_fields(argv, config, path)
    values = flags.FlagValues()
    argv = ["train", *argv]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
        flags.DEFINE_string("workdir", None, "where checkpoints, logs and previews go", flag_values=values)
        rest = values(argv)
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_type(str(error), load_config(path))) from error
    except config_flags.UnsupportedOperationError as error:
        name = re.search(r"field (\S+)", str(error))
        raise UserError(f"--{name[1] if name else 'config'}: cannot be set here; edit {path}") from error
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0].rstrip('. ?')}; run with --help to see the flags") from error
    return values, rest[1:]


def _check_fields(argv: list[str], config: ConfigDict, path: str) -> None:
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if not match:
            continue
        try:
            config_path.get_value(match[1], config)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            names = [name for name, _ in field_names(config)]
            near = difflib.get_close_matches(match[1], names, n=1, cutoff=0.4)
            hint = f"did you mean --config.{near[0]}?" if near else f"add --help to list the fields of {path}"
            raise UserError(f"--config.{match[1]}: {path} has no such field; {hint}") from error


def _wrong_type(message: str, config: ConfigDict) -> str:
    match = re.match(r"flag --(?:no)?config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message.splitlines()[0]
    value = config_path.get_value(match[1], config)
    if isinstance(value, ConfigDict):
        return f"--config.{match[1]} is a group: set one of its fields, {', '.join(value)}"
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(type(value), type(value).__name__)
    return f"--config.{match[1]}={match[2]}: expected {kind}, such as its default {value!r}"


def _check_tuples(defaults: ConfigDict, config: ConfigDict) -> None:
    # config_flags reads a tuple's elements as literals of any type.
    values = dict(field_names(config))
    for name, default in field_names(defaults):
        value = values.get(name)
        if not isinstance(default, tuple) or not default or not isinstance(value, tuple):
            continue
        kinds = (int, float) if isinstance(default[0], float) else type(default[0])
        if not all(isinstance(item, kinds) for item in value):
            raise UserError(f"--config.{name}={value!r}: expected values like its default {default!r}")


def _print_help(doc: str, path: str | None) -> NoReturn:
    print(doc.strip())
    if path is not None:
        print(f"\nFields of {path}, set with --config.NAME=VALUE:")
        for name, value in field_names(load_config(path)):
            print(f"  --config.{name}={value!r}")
    sys.exit(0)
