"""What commands show: tables of scores and progress that also reads well in a log file."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

from fg3dgs_jax.inference import page

LINE_SECONDS = 5.0  # between progress lines where there is no terminal

# name in the report, name for people, decimals, better when
SCORES = (
    ("psnr", "PSNR frame, dB", 2, "higher"),
    ("psnr_head", "PSNR head, dB", 2, "higher"),
    ("psnr_mouth", "PSNR mouth box, dB", 2, "higher"),
    ("psnr_eyes", "PSNR eye boxes, dB", 2, "higher"),
    ("edge_error", "error at the outline, of 255", 2, "lower"),
    ("ssim", "SSIM frame", 3, "higher"),
    ("ssim_head", "SSIM head", 3, "higher"),
    ("lmd", "LMD, px", 2, "lower"),
    ("lip_opening_r", "lip opening, r with truth", 2, "higher"),
    ("lip_opening_range", "  its range, of the truth's", 2, "near 1"),
    ("jitter", "landmark jitter, px/frame²", 2, "near truth's"),
    ("jitter_truth", "  the truth's own", 2, ""),
    ("frames_without_face", "predictions without a face", 0, "lower"),
    ("seconds_per_frame", "seconds per frame, median", 4, "lower"),
)


def show(table: Table) -> None:
    """Prints a table to stdout, in a log file wide enough for its columns."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def track(items: Sequence, name: str) -> Iterable:
    """Passes `items` through under a progress bar on stderr, or with a line every few seconds without a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        return rich_track(items, description=name, console=console, transient=True)
    return _lines(items, name, console)


def _lines(items: Sequence, name: str, console: Console) -> Iterator:
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > LINE_SECONDS:
            said = time.monotonic()
            console.print(f"{name}: {done} of {len(items)}", highlight=False)
        yield item


def _number(value: float | None, digits: int) -> str:
    """A number as text; nothing where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(interval: Sequence[float | None]) -> str:
    """A share with its interval, which may be missing, as "93.1 % [91, 95]"."""
    mean, low, high = (_number(part and 100.0 * part, digits) for part, digits in zip(interval, (1, 0, 0), strict=True))
    return f"{mean} %" + (f" [{low}, {high}]" if low else "")


def score_table(report: dict, what: str = "held-out frames") -> Table:
    """The scores of `heldout.score` with their 95 % intervals; what is missing says why."""
    table = Table(title=f"{len(report['frames'])} {what}", title_justify="left")
    for name, justify in (("score", "left"), ("mean", "right"), ("95 % interval", "right"), ("better", "left")):
        table.add_column(name, justify=justify)
    for name, label, digits, better in SCORES:
        if name in report["unavailable"]:
            table.add_row(label, "unavailable", "", "")
        elif name in report["summary"]:
            low, high = (_number(edge, digits) for edge in report["intervals"].get(name, (None, None)))
            table.add_row(label, _number(report["summary"][name], digits), low and f"{low} to {high}", better)
    table.caption = "; ".join(f"unavailable: {reason}" for reason in sorted(set(report["unavailable"].values())))
    table.caption_justify = "left"
    return table


def paper_table(title: str, table: dict) -> Table:
    """A table of `papers`: a line per score, a column per row, and why some are missing or unreliable."""
    shown = Table(title=f"{title}, {table['frames']} frames", title_justify="left")
    shown.add_column("score")
    for row in table["rows"]:
        shown.add_column(row, justify="right")
    shown.add_column("better")
    for name, label, digits, better in page.columns(table):
        shown.add_row(label, *(page.cell(table, row, name, digits) for row in table["rows"]), better)
    shown.caption, shown.caption_justify = "; ".join(page.notes(table)), "left"
    return shown


def probe_table(report: dict) -> Table:
    """The result of `probes.probe`: scores under each condition, and how much lower the right one's error is."""
    table = Table(title="what drives the head: right conditions against wrong ones", title_justify="left")
    columns = ("condition", "LMD, px", "lip r", "mouth error", "eye error", "right is lower by", "95 % interval")
    for position, name in enumerate(columns):
        table.add_column(name, justify="right" if position else "left")
    names = dict.fromkeys([*report["conditions"], *report["reductions"]])
    for name in names:
        values = report["conditions"].get(name, {})
        cells = [_number(values.get(key), 2) for key in ("lmd", "lip_opening_r", "mouth_error", "eye_error")]
        reduction = report["reductions"].get(name, {"metric": "", "relative": (None, None, None)})
        mean, low, high = (_number(part and 100.0 * part, 1) for part in reduction["relative"])
        gain = mean and f"{mean} % of {reduction['metric'].replace('_', ' ')}"
        table.add_row(name, *cells, gain, low and f"{low} to {high}")
    return table
