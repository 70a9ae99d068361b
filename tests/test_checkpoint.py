"""A checkpoint is whole or absent and comes back bit for bit; damage is noticed, which Orbax alone does not do."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.training import checkpoint

INFO = {
    "config": {"seed": 0, "save_every": 10, "stages": {"motion": {"steps": 5, "rates": {"means": (1e-3, 1e-5)}}}},
    "dataset": "abc",
    "data": "/data/clip",
}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt: tuple
    key: jax.Array
    nothing: None = None


def make(step: int, points: int = 50) -> State:
    """A state with every kind of array that training has; NaN and -0.0 show that bits survive, not only values."""
    random = np.random.default_rng(step)
    means = random.standard_normal((points, 3)).astype(np.float32)
    means[0] = (np.nan, -0.0, np.inf)
    params = {"face": {"means": jnp.asarray(means), "rest": jnp.zeros((points, 0, 3)), "a.b": jnp.ones(2)}}
    return State(
        step=jnp.int32(step),
        params=params,
        opt=(optax.adam(1e-3).init(params), {"alive": jnp.asarray(random.random(points) > 0.5)}),
        key=jax.random.key_data(jax.random.key(step)),
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def two_steps(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, make(step), INFO)
    return tmp_path


def test_state_comes_back_bit_for_bit(tmp_path):
    checkpoint.save(tmp_path, 7, make(7), INFO)
    state, step, info = checkpoint.restore_latest(tmp_path, make(0), expect=INFO)
    assert_same_bits(state, make(7))
    assert step == 7 and info == json.loads(json.dumps(INFO))


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.restore_latest(tmp_path, make(0)) is None
    assert checkpoint.restore_latest(tmp_path / "absent", make(0)) is None


def test_saved_shapes_win(tmp_path):
    checkpoint.save(tmp_path, 7, make(7, points=80), INFO)  # the pool has grown since the start of the run
    assert_same_bits(checkpoint.restore_latest(tmp_path, make(0, points=50))[0], make(7, points=80))


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 100_000):
        checkpoint.save(tmp_path, step, make(step), INFO, keep=2)
    assert checkpoint.steps(tmp_path) == [100_000, 3]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000003", "00100000"]


def test_the_same_step_again_replaces_it(two_steps):
    checkpoint.save(two_steps, 20, make(21), INFO)
    assert_same_bits(checkpoint.restore_latest(two_steps, make(0))[0], make(21))


def test_list_is_what_sha256sum_reads(two_steps):
    """Its own grammar, read here by hand: 64 hex digits, two spaces, the path from the list's folder."""
    folder = two_steps / "checkpoints" / "00000020"
    listed = {}
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line).groups()
        listed[name] = digest
    everything = {path.relative_to(folder).as_posix(): path for path in files(folder) if path.name != "SHA256SUMS"}
    assert set(listed) == set(everything)
    for name, path in everything.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name]


def flip(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda path, random: os.truncate(path, random.integers(path.stat().st_size)),
    "missing": lambda path, random: path.unlink(),
    "extended": lambda path, random: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_noticed_and_the_step_before_is_used(two_steps, kind, caplog):
    folder, random = two_steps / "checkpoints" / "00000020", np.random.default_rng(0)
    backup = two_steps / "backup"
    shutil.copytree(folder, backup)
    names = [path.relative_to(folder) for path in files(folder) if path.stat().st_size]
    assert len(names) > 5  # arrays, Orbax's own metadata, info.json and the list itself
    for name in names:
        DAMAGE[kind](folder / name, random)
        caplog.clear()
        assert checkpoint._newest_good(two_steps)[0].name == "00000010", name
        assert "00000020: damaged" in caplog.text
        shutil.copyfile(backup / name, folder / name)
    assert checkpoint._newest_good(two_steps)[0].name == "00000020"  # the backup did put everything back
    DAMAGE[kind](folder / names[0], random)
    assert_same_bits(checkpoint.restore_latest(two_steps, make(0))[0], make(10))


def test_orbax_alone_does_not_notice(tmp_path):
    # Why the list exists. Should this ever fail, Orbax has learnt to check.
    noise = {"x": np.random.default_rng(0).standard_normal(10_000)}
    folder = checkpoint.save(tmp_path, 10, noise, INFO)
    largest = max(files(folder / "arrays"), key=lambda path: path.stat().st_size)
    whole, silent = largest.read_bytes(), 0
    for place in range(1, 6):
        data = bytearray(whole)
        data[place * len(data) // 6] ^= 1
        largest.write_bytes(data)
        assert not checkpoint._matches(folder)
        with contextlib.suppress(ValueError), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            silent += bool((np.asarray(reader.restore(folder / "arrays")["x"]) != noise["x"]).any())
    assert silent  # some flips break the compression, and only those are noticed


def test_all_damaged_is_refused_in_one_sentence(two_steps):
    for path in (two_steps / "checkpoints").glob("*/info.json"):
        path.unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.restore_latest(two_steps, make(0))


OTHERS = [
    ({"config": {**INFO["config"], "seed": 1}}, r"trained with --config\.seed 0, this run has 1"),
    ({"config": {**INFO["config"], "new": 1}, "spec": [1]}, r"--config\.new absent, this run has 1"),
    ({"dataset": "xyz"}, r"another dataset, /data/clip"),
    ({"spec": [1, 2]}, r"trained with spec absent"),
]


@pytest.mark.parametrize("change, words", OTHERS)
def test_checkpoint_of_another_run_is_refused(two_steps, change, words):
    with pytest.raises(UserError, match=words):
        checkpoint.restore_latest(two_steps, make(0), expect={**INFO, **change})


def test_fields_that_change_no_parameter_may_differ(two_steps):
    expect = {**INFO, "data": "/moved", "config": {**INFO["config"], "save_every": 99, "log_every": 3}}
    assert checkpoint.restore_latest(two_steps, make(0), expect=expect)[1] == 20


def test_other_model_and_other_version_are_refused(two_steps, monkeypatch):
    with pytest.raises(UserError, match=r"another model \(key differs\)"):
        checkpoint.restore_latest(two_steps, make(0).replace(key=jnp.zeros(2)))
    with pytest.raises(UserError, match=r"another model \(extra differs\)"):
        checkpoint.restore_latest(two_steps, {"extra": jnp.zeros(2)} | make(0).__dict__)
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(UserError, match=r"version 1 and this version of fg3dgs_jax reads .* version 2"):
        checkpoint.restore_latest(two_steps, make(0))


def test_load_for_inference(two_steps):
    tree, info = checkpoint.load_for_inference(two_steps)
    assert_same_bits(tree["params"]["face"]["means"], make(20).params["face"]["means"])
    assert tree["params"]["face"]["rest"].shape == (50, 0, 3) and info["dataset"] == "abc"
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_for_inference(two_steps / "absent")


@pytest.mark.parametrize("error", [ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), OSError(28, "x")])
def test_full_disk_keeps_the_old_steps(two_steps, monkeypatch, error):
    def full(folder, *rest):
        folder.mkdir()
        (folder / "half").write_text("written")
        raise error

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError) as caught:
        checkpoint.save(two_steps, 30, make(30), INFO)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(two_steps / "checkpoints")) == ["00000010", "00000020"]
    assert checkpoint.restore_latest(two_steps, make(0))[1] == 20


FULL = """
import resource, sys
import numpy as np
from fg3dgs_jax.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # no file grows beyond 1 MiB: writes really fail
try:
    checkpoint.save(sys.argv[1], 20, {"noise": np.random.default_rng(0).random(1_000_000)}, {})
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the operating system has no limit on the size of files")
def test_writes_that_really_fail_keep_the_old_steps(tmp_path):
    checkpoint.save(tmp_path, 10, make(10), INFO)
    assert subprocess.run([sys.executable, "-c", FULL, str(tmp_path)]).returncode == errno.EFBIG
    assert os.listdir(tmp_path / "checkpoints") == ["00000010"]
    assert checkpoint.restore_latest(tmp_path, make(0))[1] == 10


SAVER = """
import sys
import numpy as np
from fg3dgs_jax.training import checkpoint
for step in range(1, 10_000):
    checkpoint.save(sys.argv[1], step, {"x": np.full(300_000, step)}, {})
    print(step, flush=True)
"""


def test_killed_while_saving_leaves_whole_steps_only(tmp_path):
    random = np.random.default_rng(0)
    saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with saver:
        for _ in range(3):
            saver.stdout.readline()
        time.sleep(random.uniform(0.0, 0.2))  # a save takes about 0.1 s: the kill lands inside one
        saver.send_signal(signal.SIGKILL)
    for folder in (tmp_path / "checkpoints").iterdir():
        assert not re.fullmatch(r"\d{8}", folder.name) or checkpoint._matches(folder)
    state, step, _ = checkpoint.restore_latest(tmp_path, {"x": np.zeros(300_000, int)})
    assert step >= 3 and (state["x"] == step).all()
    checkpoint.save(tmp_path, step + 1, state, {})
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
