"""How commands end: exit codes, one-sentence errors, and the training config from the command line."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fg3dgs_jax import cli
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.training.signals import Interrupt, Stopped

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config():
    return ConfigDict({
        "data": "", "seed": 0, "scale": 1.0, "evaluate": True, "layers": ("face", "mouth"),
        "features": config_dict.placeholder(str), "nothing": None,
        "stages": {"motion": {"steps": 10, "rates": {"means": (1e-3, 1e-5)}}},
        "table": (ConfigDict({"steps": 5}),),
    })
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("clip.mp4: no such file"), 2, "error: clip.mp4: no such file"),
        (UserError("two\nlines"), 2, "error: two lines"),
        (Stopped("saved at step 12"), 75, "stopped: saved at step 12"),
        (KeyboardInterrupt(), 75, "run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x.npz"), 2, "disk is full while writing out/x.npz"),
        (OSError(errno.EFBIG, "File too large", "out/x.npz"), 2, "disk is full while writing out/x.npz"),
    ],
)
def test_expected_failures_are_one_line(error, code, words, capsys):
    assert cli.exit_code(raising(error), []) == code
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_success_and_own_codes_pass_through():
    assert cli.exit_code(lambda argv: None, []) == 0
    assert cli.exit_code(lambda argv: len(argv), ["a", "b", "c"]) == 3


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "x")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.exit_code(raising(error), [])


def test_parser_errors_are_one_sentence():
    parser = cli.Parser(prog="synthesize")
    parser.add_argument("--audio", required=True)
    with pytest.raises(UserError, match=r"--audio.*synthesize --help"):
        parser.parse_args([])


def test_overrides_in_any_order(config_file):
    config, workdir = cli.parse_train(
        [
            "--config.data=DIR",
            "--noconfig.evaluate",
            f"--config={config_file}",
            "--workdir=w",
            "--config.stages.motion.steps=7",
            "--config.stages.motion.rates.means=(1, 0.5)",
            "--config.table[0].steps=9",
            "--config.layers=('face',)",
            "--config.features=hubert",
        ]
    )
    assert (config.data, config.evaluate, config.stages.motion.steps) == ("DIR", False, 7)
    assert config.stages.motion.rates.means == (1, 0.5) and config.table[0].steps == 9
    assert config.layers == ("face",) and config.features == "hubert"
    assert workdir == Path("w") and config.is_locked


def test_workdir_follows_the_config(config_file):
    assert cli.parse_train(["--config", str(config_file)])[1] == Path("runs/small")


BAD_FLAGS = [
    (["--config.sede=1"], r"sede.*did you mean --config\.seed\?"),
    (["--config.stages.motion.stps=1"], r"did you mean --config\.stages\.motion\.steps\?"),
    (["--config.stages.motion.steps.x=1"], r"steps\.x.*no such field"),
    (["--config.seed=1.5"], r"seed=1\.5: expected a whole number"),
    (["--config.scale=fast"], r"scale=fast: expected a number"),
    (["--config.evaluate=7"], r"evaluate=7: expected true or false"),
    (["--config.stages=3"], r"stages is a group: set one of its fields, motion"),
    (["--config.stages.motion.rates.means=(a, b)"], r"rates\.means.*expected values like"),
    (["--config.nothing=3"], r"config\.nothing.*cannot be set"),
    (["--wrkdir=x"], r"wrkdir.*workdir"),
    (["--config.seed"], r"Missing value.*seed"),
    (["stray"], r"stray: not a flag"),
]


@pytest.mark.parametrize("argv, words", BAD_FLAGS, ids=[argv[0] for argv, _ in BAD_FLAGS])
def test_bad_flags_name_the_fix(config_file, argv, words):
    with pytest.raises(UserError, match=words) as caught:
        cli.parse_train([f"--config={config_file}", *argv])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [(None, "no such file"), ("x = 1", "get_config"), ("def get_config(:", "not a config file"), ("", "get_config")],
)
def test_bad_config_files(tmp_path, text, words):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        cli.parse_train([f"--config={path}"])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_config_flag():
    with pytest.raises(UserError, match=r"--config is missing"):
        cli.parse_train(["--workdir=x"])


def test_help_teaches(config_file, capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse_train([f"--config={config_file}", "--help"], "How to train.")
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "How to train." in printed and "--config.stages.motion.steps=10" in printed


def test_interrupt_is_a_flag_first_and_an_exception_second():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_command_with_75_after_its_cleanup(tmp_path):
    script = f"""
import os, signal
from fg3dgs_jax import cli

def main(argv):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        open({str(tmp_path / "cleaned")!r}, "w").close()

cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 75 and done.stderr.count("\n") == 1
    assert (tmp_path / "cleaned").exists()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    holder = """
import sys
from pathlib import Path
from fg3dgs_jax import cli
with cli.alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    workdir = tmp_path / "new" / "run"
    command = [sys.executable, "-c", holder, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is using it"), cli.alone(workdir):
            pass
        process.kill()
    with cli.alone(workdir):  # a killed run lets go
        pass
    assert list(workdir.iterdir()) == []


def test_log_reaches_stderr():
    script = """
import logging
from fg3dgs_jax import cli
cli.run(lambda argv: logging.getLogger("fg3dgs_jax.training").info("restored step %d", 7))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "restored step 7\n")


def test_compilation_cache_follows_xdg(tmp_path, monkeypatch):
    script = """
import jax
from fg3dgs_jax import cli
cli.enable_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(str(tmp_path / "fg3dgs_jax" / "xla-"))
