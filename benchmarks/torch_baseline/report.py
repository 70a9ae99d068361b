"""The results of `compare.py` as a table and as a picture."""

from pathlib import Path

import cv2
import numpy as np

NAMES = {"ours": "ours", "compiled": "PyTorch, compiled", "eager": "PyTorch, eager"}
COLOURS = {
    "ours": (170, 105, 30),
    "compiled": (80, 140, 235),
    "eager": (165, 185, 205),
    "quoted": (150, 150, 150),
}  # BGR
WIDTH, ROW, BAR, LEFT, RIGHT = 1180, 78, 20, 340, 230
LONGEST = WIDTH - LEFT - RIGHT


def sides(row: dict) -> list[str]:
    """Whose values a row has, in the order of NAMES."""
    return [side for side in NAMES if side in row]


def ratios(row: dict) -> list[float]:
    """How many times better ours is than each of the others."""
    rivals = [row[side] for side in sides(row) if side != "ours"]
    return [row["ours"] / value if row["unit"] == "1/s" else value / row["ours"] for value in rivals]


def line(row: dict) -> str:
    """A row as text."""
    values = "".join(f"{row[side]:11.1f}" for side in sides(row))
    return f"{row['what']:34}{values} {row['unit']:4}" + "".join(f"{ratio:9.1f}x" for ratio in ratios(row))


def sections(results: dict) -> list[tuple[str, list[dict]]]:
    """Titles and rows in the order of the table."""
    found = []
    for scene in results["scenes"]:
        width, height = scene["pixels"]
        found.append((f"{scene['name']}: {scene['gaussians']} Gaussians, {width}x{height}", scene["rows"]))
    if results["process"]:
        found.append((f"{results['scenes'][0]['name']}: process", results["process"]))
    return found


def table(results: dict) -> str:
    """Everything, side by side; what was not measured is marked."""
    machine = results["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}; torch {machine['torch']}"]
    for title, rows in sections(results):
        names = sides(rows[0])
        head = "".join(f"{name:>11}" for name in names)
        lines += ["", title, f"{'':34}{head}      ours is better than {', '.join(names[1:])}", *map(line, rows)]
    lines += ["", quotation(results["quoted"])]
    return "\n".join(lines)


def quotation(quoted: dict) -> str:
    """The row that others measured."""
    return (
        f"QUOTED, not measured here: {quoted['what']}, 30,000 Gaussians, 512x512, two cores: forward "
        f"{quoted['forward_ms']} ms, forward + backward {quoted['forward_backward_ms']} ms"
    )


def picture(path: Path, results: dict) -> None:
    """Bars on a logarithmic axis for each row of the table, as a PNG."""
    groups = sections(results)
    height = 110 + sum(46 + ROW * len(rows) for _, rows in groups)
    canvas = np.full((height, WIDTH, 3), 255, np.uint8)
    _write(canvas, "fg3dgs_jax and PyTorch on " + results["machine"].get("gpu", results["machine"]["cpu"]), 24, 34, 0.7)
    top = _legend(canvas, sides(groups[0][1][0]), 62)
    for title, rows in groups:
        _write(canvas, title, 24, top + 26, 0.6)
        top += 46
        for row in rows:
            _bars(canvas, row, top)
            top += ROW
    _write(canvas, quotation(results["quoted"]), 24, top + 18, 0.42, COLOURS["quoted"])
    good, data = cv2.imencode(".png", canvas)
    assert good
    partial = path.with_suffix(".png.tmp")
    partial.write_bytes(data.tobytes())
    partial.replace(path)


def _legend(canvas: np.ndarray, shown: list[str], top: int) -> int:
    left = 24
    for side in shown:
        cv2.rectangle(canvas, (left, top - 12), (left + 18, top + 2), COLOURS[side], -1)
        _write(canvas, NAMES[side], left + 26, top, 0.5)
        left += 200
    _write(canvas, "logarithmic; shorter is better, but for frames a second", left, top, 0.45, COLOURS["quoted"])
    return top + 12


def _bars(canvas: np.ndarray, row: dict, top: int) -> None:
    """One row; its axis begins at half of its lowest value."""
    _write(canvas, row["what"], 24, top + 38, 0.5)
    values = [row[side] for side in sides(row)]
    start = min(values) / 2
    span = np.log(max(values) / start)
    notes = ["", *(f"  ({ratio:.1f}x)" for ratio in ratios(row))]
    for index, (side, value, note) in enumerate(zip(sides(row), values, notes, strict=True)):
        length = int(LONGEST * np.log(value / start) / span)
        y = top + index * (BAR + 2)
        cv2.rectangle(canvas, (LEFT, y), (LEFT + length, y + BAR), COLOURS[side], -1)
        _write(canvas, f"{value:.1f} {row['unit']}{note}", LEFT + length + 8, y + BAR - 5, 0.48)


def _write(canvas: np.ndarray, text: str, x: int, y: int, size: float, colour: tuple = (40, 40, 40)) -> None:
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)
