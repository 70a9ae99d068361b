"""What a run tells while it trains: one bar (or a line every few seconds), metrics.jsonl, TensorBoard."""

import collections
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from tensorboardX import SummaryWriter

LINE_EVERY = 5.0  # seconds between two lines where there is no terminal
SPEED_OVER = 30.0  # seconds over which the speed is averaged: long enough to be steady, short enough to follow stages


class Progress:
    """Use as `with Progress(workdir, total_steps) as p: p.update(step, stage, metrics)`.

    A run that continues from a checkpoint writes the steps after it again: the first update drops what is logged from
    its step on, so that metrics.jsonl has one line a step however often the run was killed.

    Args:
      workdir: gets metrics.jsonl and tensorboard/.
      total_steps: of all stages.
      console: where the bar or the lines go; default stderr.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workdir, self.total_steps = Path(workdir), total_steps
        self._console, self._clock = console or Console(stderr=True), clock
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._last_line, self._file, self._board = -math.inf, None, None
        text = "{task.fields[text]}"
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn(text))
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("compiling", total=total_steps, text="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()

    def update(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Shows and logs the metrics of the moment when `step` steps are done.

        `loss`, `psnr` (dB) and `alive/<region>` (Gaussians, summed) appear in the bar; all are logged. A value that is
        not finite is logged as null, which JSON can say.
        """
        if self._file is None:
            self._open(step)
        speed = self._speed(step)
        record = {"step": step, "stage": stage, **{name: _plain(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(record | {"steps_per_second": _plain(speed)}) + "\n")
        self._file.flush()
        for name, value in {**metrics, "steps_per_second": speed}.items():
            if math.isfinite(value):  # TensorBoard draws no others
                self._board.add_scalar(name, value, step)
        self._show(step, stage, metrics, speed)

    def _open(self, step: int) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / "metrics.jsonl"
        drop_from(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=step)

    def _speed(self, step: int) -> float:
        """Steps a second over the last SPEED_OVER seconds; NaN until two updates are there."""
        now = self._clock()
        self._recent.append((now, step))
        while len(self._recent) > 2 and now - self._recent[1][0] > SPEED_OVER:
            self._recent.popleft()
        then, first = self._recent[0]
        return (step - first) / (now - then) if now > then else math.nan

    def _show(self, step: int, stage: str, metrics: Mapping[str, float], speed: float) -> None:
        alive = [value for name, value in metrics.items() if name.startswith("alive/")]
        parts = [f"{name} {metrics[name]:.4g}" for name in ("loss", "psnr") if name in metrics]
        parts += [f"{sum(alive):.0f} Gaussians"] if alive else []
        if math.isfinite(speed) and speed > 0.0:
            left = timedelta(seconds=round((self.total_steps - step) / speed))
            parts += [f"{speed:.1f} it/s", f"{left} left"]
        text = "  ".join(parts)
        self._bar.update(self._task, completed=step, description=stage, text=text)
        now = self._clock()
        if not self._console.is_terminal and (now - self._last_line >= LINE_EVERY or step >= self.total_steps):
            self._last_line = now
            line = f"{stage}  {step}/{self.total_steps}  {text}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def drop_from(path: Path, step: int) -> None:
    """Removes the lines of a JSONL file whose "step" is not below `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            print(f"{path}: dropped a broken line", file=sys.stderr)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _plain(value: float) -> float | None:
    # Six digits say all that a float32 mean over pixels knows.
    return float(f"{float(value):.6g}") if math.isfinite(value) else None
