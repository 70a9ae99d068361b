"""The papers' tables as CSV, Markdown, and one HTML page that holds its videos, curves and pictures in itself."""

import base64
import csv
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fg3dgs_jax.files import replacing
from fg3dgs_jax.inference import edges, pictures
from fg3dgs_jax.inference.papers import COLUMNS

WORST = 4
WIDTH, HEIGHT = 640, 180  # of a curve, pixels
COLORS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.note { text-align: left }
.missing { color: #8c959f } .weak { color: #9a6700 }
video, img { max-width: 100% } figure { margin: 1rem 0 } figcaption, .note { color: #57606a; font-size: 13px }
"""


def cell(table: Mapping[str, Any], row: str, name: str, digits: int) -> str:
    """A score as text: "unavailable" where its weights are missing, "-" where it makes no sense, "~" if unreliable."""
    if name in table["unavailable"]:
        return "unavailable"
    value = table["rows"][row].get(name, math.nan)
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" + (" ~" if name in table["unreliable"] else "")


def columns(table: Mapping[str, Any]) -> list[tuple[str, str, int, str]]:
    """The columns that a table has or says are missing."""
    known = set(table["unavailable"]).union(*(set(row) for row in table["rows"].values()))
    return [column for column in COLUMNS if column[0] in known]


def notes(table: Mapping[str, Any]) -> list[str]:
    """Why scores are missing or unreliable, a sentence each."""
    found = []
    for reason in dict.fromkeys(table["unavailable"].values()):
        names = [label for name, label, *_ in COLUMNS if table["unavailable"].get(name) == reason]
        found.append(f"unavailable: {', '.join(names)}: {reason}")
    for reason in dict.fromkeys(table["unreliable"].values()):
        names = [label for name, label, *_ in columns(table) if table["unreliable"].get(name) == reason]
        names = [label for label in names if label not in " ".join(found)]
        if names:
            found.append(f"~ unreliable: {', '.join(names)}: {reason}")
    return found


def to_csv(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per table and row, one column per score; empty where there is none."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "frames", *(name for name, *_ in COLUMNS)])
    for title, table in tables.items():
        for row, scores in table["rows"].items():
            values = (scores.get(name, math.nan) for name, *_ in COLUMNS)
            texts = ["" if value is None or not math.isfinite(value) else f"{value:.6g}" for value in values]
            writer.writerow([title, row, table["frames"], *texts])
    return file.getvalue()


def to_markdown(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A section per table, with its notes."""
    lines = []
    for title, table in tables.items():
        shown = columns(table)
        lines += [f"## {title}, {table['frames']} frames", ""]
        lines += ["| | " + " | ".join(label for _, label, *_ in shown) + " |", "|---|" + "---:|" * len(shown)]
        for row in table["rows"]:
            lines.append(
                f"| {row} | " + " | ".join(cell(table, row, name, digits) for name, _, digits, _ in shown) + " |"
            )
        lines += ["", *(f"- {note}" for note in notes(table)), ""]
    return "\n".join(lines)


def curve(series: Mapping[str, Sequence[float]], ticks: Sequence[float], unit: str) -> str:
    """Lines over `ticks` as SVG; values that are not finite leave gaps."""
    known = np.array([v for values in series.values() for v in values if v is not None and math.isfinite(v)])
    if not len(known) or len(ticks) < 2:
        return ""
    low, high = float(known.min()), float(known.max())
    span, first, last = (high - low) or 1.0, ticks[0], ticks[-1]
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 40}" width="{WIDTH}" role="img">']
    for k, (name, values) in enumerate(series.items()):
        points, color = [], COLORS[k % len(COLORS)]
        for tick, value in zip(ticks, values, strict=True):
            if value is not None and math.isfinite(value):
                x = 50 + (WIDTH - 60) * (tick - first) / ((last - first) or 1.0)
                points.append(f"{x:.1f},{10 + (HEIGHT - 20) * (high - value) / span:.1f}")
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(points)}"/>')
        parts.append(
            f'<text x="{60 + 150 * k}" y="{HEIGHT + 34}" fill="{color}" font-size="12">{html.escape(name)}</text>'
        )
    for y, value in ((16, high), (HEIGHT - 4, low)):
        parts.append(f'<text x="0" y="{y}" font-size="11">{value:.3g}</text>')
    for x, value, anchor in ((50, first, "start"), (WIDTH - 10, last, "end")):
        text = f"{html.escape(unit)} {value:g}"
        parts.append(f'<text x="{x}" y="{HEIGHT + 14}" font-size="11" text-anchor="{anchor}">{text}</text>')
    return "".join([*parts, "</svg>"])


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(image: np.ndarray) -> str:
    done = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return _data("image/jpeg", done.tobytes())


def _table(title: str, table: Mapping[str, Any]) -> str:
    """A line per score, so that all of them fit on any screen, with what is missing or weak and why."""
    lines = [f"<tr><th></th>{''.join(f'<th>{html.escape(row)}</th>' for row in table['rows'])}<th></th></tr>"]
    for name, label, digits, better in columns(table):
        cells = []
        for row in table["rows"]:
            text = cell(table, row, name, digits)
            kind = "missing" if text in ("unavailable", "-") else "weak" if text.endswith("~") else ""
            cells.append(f'<td class="{kind}">{text}</td>')
        if name in table["unavailable"]:
            remark = table["unavailable"][name]
        else:
            remark = f"better: {better}" + (
                f"; unreliable: {table['unreliable'][name]}" if name in table["unreliable"] else ""
            )
        lines.append(
            f'<tr><td>{html.escape(label)}</td>{"".join(cells)}<td class="note">{html.escape(remark)}</td></tr>'
        )
    heading = f"<h2>{html.escape(title)}, {table['frames']} frames</h2>"
    return f"{heading}<table>{''.join(lines)}</table>{_offsets(table)}"


def _offsets(table: Mapping[str, Any]) -> str:
    """Sync over the offset of the sound, a chart per network."""
    charts = []
    for network, what in (("sync", "sync expert's cosine"), ("syncnet", "SyncNet's distance")):
        series = {row: curves[network] for row, curves in table["curves"].items() if network in curves}
        if series:
            length = len(next(iter(series.values())))
            ticks = list(range(-(length // 2), length // 2 + 1))
            drawn = curve(series, ticks, "moved by")
            charts.append(
                f"<figure>{drawn}<figcaption>{what} with the sound moved by so many frames</figcaption></figure>"
            )
    return "".join(charts)


def to_html(
    title: str, tables: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any], heldout: Any,
    videos: Sequence[Path], labels: Callable[[int], np.ndarray] | None = None,
) -> str:  # fmt: skip
    """A page that needs nothing beside itself: tables, videos, curves over the held-out frames, and the worst ones.

    labels: frame number -> u8 [H, W], to show the head's outline enlarged.
    """
    frames = report["frames"]
    ids = [frame["id"] for frame in frames]
    parts = [_table(name, table) for name, table in tables.items()]
    first = _picture(pictures.side_by_side(heldout.truth[0], heldout.predictions[0], f"frame {ids[0]}"))
    for path in videos:
        source, name = _data("video/mp4", path.read_bytes()), html.escape(path.name)
        poster = f' poster="{first}"' if path == videos[0] else ""
        parts.append(
            f'<figure><video controls loop{poster} src="{source}"></video><figcaption>{name}</figcaption></figure>'
        )
    for series, caption in (
        ({"head": "psnr_head", "mouth": "psnr_mouth"}, "PSNR in dB over the held-out frames"),
        ({"ours": "lip_opening", "ground truth": "lip_opening_truth"}, "lip opening in pixels"),
    ):
        lines = {label: [f.get(name, math.nan) for f in frames] for label, name in series.items()}
        if drawn := curve(lines, ids, "frame"):
            parts.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
    worst = np.argsort([frame["psnr_head"] for frame in frames])[:WORST]
    parts.append("<h2>Worst frames by the head's PSNR</h2>")
    for i in worst:
        pair = pictures.side_by_side(heldout.truth[i], heldout.predictions[i], f"frame {ids[i]}")
        parts.append(f'<figure><img alt="" src="{_picture(pair)}"></figure>')
    parts += _outlines(frames, heldout, labels) if labels else []
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _outlines(frames: Sequence[Mapping], heldout: Any, labels: Callable[[int], np.ndarray]) -> list[str]:
    """Crops of the head's outline: of the frame where it is worst, and of the one in the middle by that error."""
    order = np.argsort([frame["edge_error"] for frame in frames])
    parts = ["<h2>The head's outline, ground truth above prediction</h2>"]
    for i in (order[-1], order[len(order) // 2]):
        crops = edges.sheet(heldout.truth[i], heldout.predictions[i], labels(frames[i]["id"]))
        if crops is not None:
            text = f"frame {frames[i]['id']}: error {frames[i]['edge_error']:.1f} of 255"
            parts.append(f'<figure><img alt="" src="{_picture(crops)}"><figcaption>{text}</figcaption></figure>')
    return parts


def write_text(path: Path, text: str) -> None:
    """The file appears only when complete."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
