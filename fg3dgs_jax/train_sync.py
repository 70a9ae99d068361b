"""Train a lip-sync expert on talking clips: dataset folders, or videos.

    python -m fg3dgs_jax.train_sync --config=configs/sync.py data/anna data/ben --workdir=runs/sync
        learns from the first four fifths of every clip and scores the rest: does it tell sound in sync from sound moved
        by five frames?
    ... --config.test=data/ben
        scores that clip as a whole and learns from the others alone: does it work on somebody it has never seen?

Into the working directory go sync.safetensors, for --config.judges.sync of `train` and --sync of `evaluate`, and
report.json. Clips whose sound is dubbed or shifted spoil it: preprocess's report says which are. Videos need
--config.models=DIR with face_landmarker.task. Every field is explained in configs/sync.py.
"""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from fg3dgs_jax import cli
from fg3dgs_jax.data import weights
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing
from fg3dgs_jax.inference import console, lipsync
from fg3dgs_jax.losses import sync
from fg3dgs_jax.training.sync_clips import MARGIN, SyncClip, open_clip
from fg3dgs_jax.training.sync_expert import SyncRules, train

SAID_EVERY = 50  # steps
GUARD = 8  # frames between what is learned from and what is held out: windows overlap


def rules_of(config: ConfigDict) -> SyncRules:
    """The training rules of a config. Raises UserError for values that cannot be."""
    if not 1 / 32 <= config.width <= 1.0:
        raise UserError(f"--config.width={config.width:g}: must be from 0.03125 to 1")
    for name in ("steps", "groups", "windows", "span"):
        if config[name] < (1 if name in ("steps", "groups") else 2):
            raise UserError(f"--config.{name}={config[name]}: is too small")
    if not 0.0 <= config.held_share <= 0.5:
        raise UserError(f"--config.held_share={config.held_share:g}: must be from 0 to 0.5")
    fields = ("width", "steps", "groups", "windows", "span", "rate", "decay", "seed")
    return SyncRules(**{name: config[name] for name in fields})


def split(clip: SyncClip, share: float) -> tuple[tuple[int, int], np.ndarray]:
    """The range of first frames to learn from, and the held-out ones, i64 [n]."""
    count = len(clip.starts)
    cut = round(count * (1.0 - share))
    learned = cut - GUARD if share else count
    if learned < 2:
        raise UserError(f"{clip.name}: is too short to hold out {share:g} of it; lower --config.held_share")
    return (0, learned), clip.starts[cut:]


def score(expert: sync.Sync, clip: SyncClip, rows: np.ndarray, known: np.ndarray, shift: int) -> dict:
    """Accuracy on windows `rows`; the level for single windows comes from the windows `known`."""
    crops = clip.crops[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    embedded = lipsync.embed(expert, crops, clip.mel)
    level = lipsync.threshold(embedded, known, shift)
    found = lipsync.accuracy(embedded, rows, shift, level)
    curve = lipsync.offset_curve(embedded, rows)
    return {
        "clip": clip.name,
        "windows": len(rows),
        "level": level,
        "cosine": float(curve[len(curve) // 2]),
        "offset_ms": lipsync.offset_ms(curve, 25.0, lowest=False),
        **{name: list(interval) for name, interval in found.items()},
    }


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    config, workdir, paths = cli.parse_config(argv, __doc__)
    rules = rules_of(config)
    test_path = config.test and Path(config.test).resolve()
    learned = [path for path in paths if Path(path).resolve() != test_path]
    if not learned:
        raise UserError("no clip to learn from is given; name dataset folders or videos behind the flags")
    cli.keep_memory()
    cli.enable_compilation_cache()
    clips = [open_clip(path, config.models or None) for path in learned]
    parts = [split(clip, config.held_share) for clip in clips]
    test = open_clip(config.test, config.models or None) if config.test else None
    print(f"{len(clips)} clips, {sum(len(clip.crops) for clip in clips) / 25.0:.0f} s")
    with cli.alone(workdir):
        expert = train(clips, [span for span, _ in parts], rules, _teller(rules.steps))
        report = _report(expert, clips, parts, test, config)
        _write(workdir, expert, report)
    console.show(_table(report))
    print(f"wrote {workdir}/sync.safetensors and report.json")
    return 0


def _teller(total: int):
    def tell(step: int, loss: float) -> None:
        if not np.isfinite(loss):
            raise UserError(f"training stopped at step {step}: the loss is not finite; lower --config.rate")
        if step % SAID_EVERY == 0 or step == total:
            print(f"step {step} of {total}  loss {loss:.3f}", flush=True)

    return tell


def _report(expert: sync.Sync, clips: list, parts: list, test: SyncClip | None, config: ConfigDict) -> dict:
    rows = []
    for clip, ((first, stop), held) in zip(clips, parts, strict=True):
        if len(held):
            rows.append({"what": "held-out end", **score(expert, clip, held, np.arange(first, stop), config.shift)})
    if test is not None:
        # Nothing of this clip was seen: its level is that of the first clip's training windows.
        level = rows[0]["level"] if rows else 0.5
        found = score(expert, test, test.starts, test.starts, config.shift)
        crops = test.crops[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        alone = lipsync.accuracy(lipsync.embed(expert, crops, test.mel), test.starts, config.shift, level)["single"]
        rows.append({"what": "unseen clip", **found, "level": level, "single": list(alone)})
    return {"config": json.loads(config.to_json_best_effort()), "shift": config.shift, "scores": rows}


def _write(workdir: Path, expert: sync.Sync, report: dict) -> None:
    arrays = {name: np.asarray(leaf) for name, leaf in sync.flat(expert.state).items()}
    facts = {"sources": "fg3dgs_jax.train_sync", "width": str(report["config"]["width"])}
    weights.save(workdir / "sync.safetensors", "sync-expert", arrays, facts)
    with replacing(workdir / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")


def _table(report: dict) -> Table:
    shift = report["shift"]
    table = Table(title=f"in sync, or {shift} frames off? accuracy with 95 % intervals", title_justify="left")
    for position, name in enumerate(("clip", "what", "windows", "of a pair", "of a single window", "offset, ms")):
        table.add_column(name, justify="right" if position > 1 else "left")
    for row in report["scores"]:
        cells = ["{:.1f} % [{:.0f}, {:.0f}]".format(*(100 * v for v in row[name])) for name in ("pairs", "single")]
        table.add_row(row["clip"], row["what"], str(row["windows"]), *cells, f"{row['offset_ms']:+.0f}")
    return table


if __name__ == "__main__":
    cli.run(main)
