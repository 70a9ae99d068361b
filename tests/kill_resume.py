"""Kills training at random moments and shows that nothing is lost: the result equals an undisturbed run's, bit for bit.

    python tests/kill_resume.py                   20 kills of configs/tiny.py, some minutes
    python tests/kill_resume.py --kills 100 --config configs/demo.py

Each round starts the same command and sends SIGKILL: one in four at a random moment of its start, the others a moment
after a random number of steps, so that a slow machine is killed in training and in saving too. A run that finishes
before its kill is compared and a new one begun. Then runs are sent SIGTERM and SIGINT: they must save, exit with 75 and
continue to the same result.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fg3dgs_jax.training import checkpoint

ROOT = Path(__file__).parent.parent


def start(config: str, workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "fg3dgs_jax.train", f"--config={config}", f"--workdir={workdir}"]
    # Often, so that kills land in saves too; the pictures and scores after training do not concern this test.
    command += ["--config.save_every=7", "--config.log_every=1", "--config.evaluate=False"]
    log = (workdir.parent / "train.log").open("a")
    with log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(config: str, workdir: Path) -> float:
    begun = time.monotonic()
    code = start(config, workdir).wait()
    if code:
        tail = (workdir.parent / "train.log").read_text()[-3000:]
        raise SystemExit(f"training ended with exit code {code}:\n{tail}")
    return time.monotonic() - begun


def final_bits(workdir: Path) -> dict[str, bytes]:
    """Every array of the final state, parameters, moments, statistics and keys alike, as bytes."""
    tree, _ = checkpoint.load_for_inference(workdir)
    found, pending = {}, [("", tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, dict):
            pending += [(f"{name}/{key}", value) for key, value in node.items()]
        else:
            found[name] = f"{node.dtype} {node.shape}".encode() + node.tobytes()
    return found


def compare(workdir: Path, expected: dict[str, bytes], what: str) -> None:
    found = final_bits(workdir)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        raise SystemExit(f"{what}: {len(different)} of {len(expected)} arrays differ, first {different[0]}")
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if steps != sorted(set(steps)):
        raise SystemExit(f"{what}: metrics.jsonl has steps twice or out of order")
    print(f"{what}: all {len(expected)} arrays equal", flush=True)


def steps_logged(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_a_moment(process: subprocess.Popen, workdir: Path, startup: float) -> None:
    """Returns at a random moment of the run, or when it ends."""
    if random.random() < 0.25:
        pause = random.uniform(0.0, startup)
    else:
        target = steps_logged(workdir) + random.randint(1, 25)
        while process.poll() is None and steps_logged(workdir) < target:
            time.sleep(0.01)
        pause = random.uniform(0.0, 0.3)  # into the next steps, or into a save
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(pause)


def kill_rounds(config: str, workdir: Path, expected: dict[str, bytes], kills: int, startup: float) -> None:
    done, finished = 0, 0
    while done < kills:
        process = start(config, workdir)
        wait_for_a_moment(process, workdir, startup)
        if process.poll() is None:
            process.kill()
            process.wait()
            done += 1
            saved, logged = checkpoint.steps(workdir)[:1], steps_logged(workdir)
            print(f"kill {done} of {kills}: {logged} steps logged, newest checkpoint {saved}", flush=True)
        elif process.returncode:
            raise SystemExit(f"training ended with exit code {process.returncode}; see {workdir.parent}/train.log")
        else:
            finished += 1
            compare(workdir, expected, f"finished run {finished} after {done} kills")
            shutil.rmtree(workdir)
    finish(config, workdir)
    compare(workdir, expected, f"after {kills} kills")


def stop_and_continue(config: str, workdir: Path, expected: dict[str, bytes], signum: signal.Signals) -> None:
    process = start(config, workdir)
    while process.poll() is None and not (workdir / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signum)
    if process.wait() != 75:
        raise SystemExit(f"{signum.name}: exit code {process.returncode} instead of 75; see {workdir.parent}/train.log")
    saved = checkpoint.steps(workdir)
    finish(config, workdir)
    compare(workdir, expected, f"{signum.name} at step {saved[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--seed", type=int, default=0, help="of the kill times")
    flags = parser.parse_args()
    random.seed(flags.seed)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bit for bit is a promise of the CPU
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finish(flags.config, root / "whole")
        expected = final_bits(root / "whole")
        seconds = finish(flags.config, root / "again")  # with a warm compilation cache, as every later run
        compare(root / "again", expected, f"a second run, {seconds:.0f} s")
        kill_rounds(flags.config, root / "killed", expected, flags.kills, seconds / 2)
        for signum in (signal.SIGTERM, signal.SIGINT):
            stop_and_continue(flags.config, root / signum.name, expected, signum)


if __name__ == "__main__":
    main()
