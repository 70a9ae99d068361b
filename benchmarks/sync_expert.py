"""How well an expert of `train_sync` tells sound in sync from sound moved by five frames.

    python benchmarks/sync_expert.py --work DIR [--config.FIELD=VALUE ...] [CLIP CLIP CLIP]

First on the procedural head: 120 s of it, the last fifth held out. Then each of the CLIPs (dataset folders of
`preprocess`, or videos with --config.models=DIR) as a whole by an expert of the others: people it has never seen.
"of a pair": the share of windows whose own sound fits better than the moved one; "of a single window": each judged
alone. 95 % intervals come from a bootstrap of blocks of a second. Cases that are done in DIR are not trained again.
Where the procedural mouth does the same five frames later, in pauses, nobody could tell: "at best" is what an expert
with perfect eyes and ears would reach, who guesses there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import rasterizer as rasterizer_benchmark
from numpy.lib.stride_tricks import sliding_window_view
from rich.table import Table

from fg3dgs_jax import cli, train_sync
from fg3dgs_jax.data import synthetic, synthetic_speech
from fg3dgs_jax.inference import console, heldout
from fg3dgs_jax.losses import sync
from fg3dgs_jax.training.sync_clips import FPS

CONFIG = Path(__file__).parents[1] / "configs" / "sync.py"
FRAMES, SIZE = 3000, 160
SAME = 0.05  # of full opening or width, below which two mouths look alike: under a pixel of the crops


def scored(folder: Path, argv: list[str]) -> dict:
    """report.json of a `train_sync` run in `folder`."""
    if not (folder / "report.json").exists():
        code = cli.exit_code(train_sync.main, [f"--config={CONFIG}", f"--workdir={folder}", *argv])
        if code:
            raise SystemExit(code)
    return json.loads((folder / "report.json").read_text())


def cases(work: Path, clips: list[str], flags: list[str]) -> dict[str, dict]:
    """Every case's report, by its name."""
    head = work / "procedural"
    if not (head / "meta.json").exists():
        synthetic.make(head, FRAMES, SIZE)
    found = {"procedural head": scored(work / "run-procedural", [*flags, str(head)])}
    for clip in clips if len(clips) > 1 else []:
        name = Path(clip).name
        found[f"without {name}"] = scored(work / f"run-without-{name}", [*flags, f"--config.test={clip}", *clips])
    return found


def at_best(frames: int, held_share: float, shift: int) -> float:
    """Accuracy on the procedural clip's held-out pairs of an expert who knows the mouth to SAME, and else guesses."""
    speech = synthetic_speech.speak(frames / FPS, FPS, frames, seed=0)
    mouths = np.stack([speech.open, speech.width], axis=-1)
    windows = sliding_window_view(mouths, sync.FRAMES, axis=0)  # [n, 2, 5]
    held = np.arange(round(len(windows) * (1.0 - held_share)), len(windows))
    alike = []
    for later in (held - shift, held + shift):
        known = later < len(windows)
        gap = np.abs(windows[held[known]] - windows[later[known]]).max(axis=(1, 2))
        alike.append((gap < SAME).mean())
    return 1.0 - 0.5 * float(np.mean(alike))


def table(rows: list[dict]) -> Table:
    shown = Table(title="in sync, or 5 frames off? accuracy with 95 % intervals", title_justify="left")
    for name in ("expert", "clip", "what", "windows", "of a pair", "of a single window"):
        shown.add_column(name)
    for row in rows:
        cells = [console.percent(row[name]) for name in ("pairs", "single")]
        shown.add_row(row["expert"], row["clip"], row["what"], str(row["windows"]), *cells)
    return shown


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips and runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sync_expert.json")
    flags, rest = parser.parse_known_args()
    fields = [text for text in rest if text.startswith("--")]
    found = cases(flags.work, [text for text in rest if not text.startswith("--")], fields)
    rows = []
    for expert, report in found.items():
        config = {name: value for name, value in report["config"].items() if name not in ("test", "models")}
        rows += [{"expert": expert, **score, "config": config} for score in report["scores"]]
    config = rows[0]["config"]
    best = at_best(FRAMES, config["held_share"], config["shift"])
    console.show(table(rows))
    print(f"procedural head, at best: {100 * best:.1f} %")
    command = " ".join(["python benchmarks/sync_expert.py --work DIR", *fields, "CLIP ..."])
    machine = rasterizer_benchmark.machine()
    heldout.write_json(flags.out, {"command": command, "machine": machine, "at best": best, "rows": rows})
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
