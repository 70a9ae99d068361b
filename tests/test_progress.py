"""What a run logs: readable in a terminal and in a file, complete and without doubles after a kill."""

import io
import json
import re

import pytest
from rich.console import Console

from fg3dgs_jax.training import progress
from fg3dgs_jax.training.progress import Progress, drop_from

METRICS = {"loss": 0.25, "psnr": 26.5, "alive/face": 1000.0, "alive/mouth": 200.0, "face/l1": 0.1}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def quiet():
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_every_update_is_a_line(tmp_path):
    with Progress(tmp_path, 40, console=quiet()) as p:
        p.update(20, "static", METRICS)
        p.update(40, "motion", {"loss": float("nan"), "psnr": 1 / 3})
    first, second = lines(tmp_path)
    assert first["step"] == 20 and first["stage"] == "static" and first["face/l1"] == 0.1
    assert second["loss"] is None and second["psnr"] == 0.333333
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_resumed_run_replaces_the_lines_after_its_checkpoint(tmp_path):
    with Progress(tmp_path, 100, console=quiet()) as p:
        for step in (20, 40, 60, 80):
            p.update(step, "static", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "lo')  # killed while writing
    with Progress(tmp_path, 100, console=quiet()) as p:  # continues from a checkpoint at 50
        for step in (60, 80, 100):
            p.update(step, "motion", {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(20, 1), (40, 1), (60, 2), (80, 2), (100, 2)]


def test_nothing_is_dropped_before_the_first_update(tmp_path):
    with Progress(tmp_path, 100, console=quiet()) as p:
        p.update(20, "static", {"loss": 1.0})
    with Progress(tmp_path, 100, console=quiet()):
        pass  # a finished run started again
    assert len(lines(tmp_path)) == 1


def test_plain_lines_come_every_few_seconds(tmp_path):
    console, clock = quiet(), Clock()
    with Progress(tmp_path, 1000, console=console, clock=clock) as p:
        for step in range(10, 110, 10):
            clock.now += 1.0
            p.update(step, "motion", METRICS)
    printed = console.file.getvalue().splitlines()
    assert len(printed) == 2  # at 1 s and 6 s of 10
    assert "\x1b" not in "".join(printed)
    assert printed[1] == "motion  60/1000  loss 0.25  psnr 26.5  1200 Gaussians  10.0 it/s  0:01:34 left"


def test_last_step_always_prints(tmp_path):
    console, clock = quiet(), Clock()
    with Progress(tmp_path, 20, console=console, clock=clock) as p:
        p.update(10, "motion", METRICS)
        p.update(20, "motion", METRICS)
    assert "20/20" in console.file.getvalue()


def test_a_terminal_gets_one_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with Progress(tmp_path, 40, console=console) as p:
        p.update(20, "static", METRICS)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "static" in text and "20/40" in text and "1200 Gaussians" in text


def test_speed_forgets_the_compilation(tmp_path):
    console, clock = quiet(), Clock()
    with Progress(tmp_path, 10_000, console=console, clock=clock) as p:
        for step, seconds in ((1, 0.0), (2, 60.0), (100, 10.0), (200, 10.0), (300, 10.0), (400, 10.0)):
            clock.now += seconds
            p.update(step, "motion", METRICS)
    assert clock.now > progress.SPEED_OVER
    # 398 steps in the last 40 s; over all 100 s it would be 4.
    assert lines(tmp_path)[-1]["steps_per_second"] == pytest.approx(398 / 40)


def test_drop_from_keeps_the_file_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    drop_from(path, 3)  # no file, nothing to do
    path.write_text('{"step": 1}\n{"step": 3}\n[]\n{"step": 2}\n')
    drop_from(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and list(tmp_path.iterdir()) == [path]
