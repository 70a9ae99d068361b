"""Train a lip-sync expert on talking clips: dataset folders, or videos.

    python -m fg3dgs_jax.train_sync --config=configs/sync.py data/anna data/ben --workdir=runs/sync
        learns from the first four fifths of every clip and scores the rest: does it tell sound in sync from sound moved
        by five frames?
    ... --config.test=data/ben
        scores that clip as a whole and learns from the others alone: does it work on somebody it has never seen?
    ... data/anna --config.init=runs/sync/sync.safetensors
        goes on from an expert that was trained before
    ... data/anna --config.own_split=true
        holds out the frames that data/anna holds out, so that `evaluate --sync` asks it about nothing it has learned

Into the working directory go sync.safetensors, for --config.judges.sync of `train` and --sync of `evaluate`, and
report.json. Clips whose sound is dubbed or shifted spoil it: preprocess's report says which are. Videos need
--config.models=DIR with face_landmarker.task. Every field is explained in configs/sync.py.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from fg3dgs_jax import cli
from fg3dgs_jax.data import weights
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console, heldout, lipsync
from fg3dgs_jax.losses import sync
from fg3dgs_jax.training.judges import load_sync
from fg3dgs_jax.training.sync_clips import FPS, MARGIN, SyncClip, open_clip, starts_within
from fg3dgs_jax.training.sync_expert import NEAR, SyncRules, train

SAID_EVERY = 50  # steps
LIMITS = {  # field -> least and most
    "width": (1 / 32, 1.0), "steps": (1, 10**6), "groups": (1, 256), "windows": (2, 256), "span": (2 * NEAR + 2, 1000),
    "rate": (1e-6, 1.0), "decay": (0.0, 1.0), "seed": (0, 2**31 - 1), "held_share": (0.0, 0.5), "shift": (1, 25),
}  # fmt: skip
GUARD = 8  # frames between what is learned from and what is held out: windows overlap


def rules_of(config: ConfigDict) -> SyncRules:
    """The training rules of a config. Raises UserError for values that cannot be."""
    for name, (least, most) in LIMITS.items():
        if not least <= config[name] <= most:
            raise UserError(f"--config.{name}={config[name]:g}: must be from {least:g} to {most:g}")
    return SyncRules(**{field.name: config[field.name] for field in dataclasses.fields(SyncRules)})


def split(clip: SyncClip, share: float, own: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The first frames of windows to learn from, and of held-out ones, i64 [n] each: the dataset's `own`, or the end.

    Raises UserError where there is nothing to learn from.
    """
    if own:
        return _own_split(clip)
    cut = round(len(clip.starts) * (1.0 - share))
    learned = clip.starts[: max(cut - GUARD, 0) if share else None]
    if len(learned) < 2:
        raise UserError(f"{clip.name}: is too short to hold out {share:g} of it; lower --config.held_share")
    return learned, clip.starts[cut:]


def _own_split(clip: SyncClip) -> tuple[np.ndarray, np.ndarray]:
    if clip.train is None:
        raise UserError(f"{clip.name}: is a video, and only a dataset folder holds out frames; drop --config.own_split")
    learned, held = starts_within(clip.train), starts_within(clip.test)
    if len(learned) < 2:
        raise UserError(f"{clip.name}: nowhere are five training frames in a row; drop --config.own_split")
    return learned, held


def embed(expert: sync.Sync, clip: SyncClip) -> lipsync.Embedded:
    """All windows of a clip, without the margins that training draws from."""
    return lipsync.embed(expert, clip.crops[:, MARGIN:-MARGIN, MARGIN:-MARGIN], clip.mel)


def score(embedded: lipsync.Embedded, rows: np.ndarray, level: float, shift: int) -> dict:
    """Accuracy on windows `rows`, single ones judged by the cosine `level`."""
    found = lipsync.accuracy(embedded, rows, shift, level)
    curve = lipsync.offset_curve(embedded, rows)
    return {
        "windows": len(rows),
        "level": level,
        "cosine": float(curve[len(curve) // 2]),
        "offset_ms": lipsync.offset_ms(curve, FPS, lowest=False),
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
    begin = load_sync(config.init, "--config.init") if config.init else None
    cli.keep_memory()
    cli.enable_compilation_cache()
    clips = [open_clip(path, config.models or None) for path in learned]
    parts = [split(clip, config.held_share, config.own_split) for clip in clips]
    test = open_clip(config.test, config.models or None) if config.test else None
    print(f"{len(clips)} clips, {sum(len(clip.crops) for clip in clips) / 25.0:.0f} s")
    with cli.alone(workdir):
        expert = train(clips, [learned for learned, _ in parts], rules, _teller(rules.steps), begin)
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
    rows, levels = [], []
    for clip, (learned, held) in zip(clips, parts, strict=True):
        embedded = embed(expert, clip)
        levels.append(lipsync.threshold(embedded, learned, config.shift))
        if len(held):
            row = score(embedded, held, levels[-1], config.shift)
            rows.append({"clip": clip.name, "what": "held-out end", **row})
    if test is not None:  # nothing of it was seen: its level is that of the others' training windows
        row = score(embed(expert, test), test.starts, float(np.mean(levels)), config.shift)
        rows.append({"clip": test.name, "what": "unseen clip", **row})
    return {"config": json.loads(config.to_json_best_effort()), "shift": config.shift, "scores": rows}


def _write(workdir: Path, expert: sync.Sync, report: dict) -> None:
    arrays = {name: np.asarray(leaf) for name, leaf in sync.flat(expert.state).items()}
    weights.save(workdir / "sync.safetensors", "sync-expert", arrays, {"sources": "fg3dgs_jax.train_sync"})
    heldout.write_json(workdir / "report.json", report)


def _table(report: dict) -> Table:
    shift = report["shift"]
    table = Table(title=f"in sync, or {shift} frames off? accuracy with 95 % intervals", title_justify="left")
    for position, name in enumerate(("clip", "what", "windows", "of a pair", "of a single window", "offset, ms")):
        table.add_column(name, justify="right" if position > 1 else "left")
    for row in report["scores"]:
        cells = [console.percent(row[name]) for name in ("pairs", "single")]
        table.add_row(row["clip"], row["what"], str(row["windows"]), *cells, f"{row['offset_ms']:+.0f}")
    return table


if __name__ == "__main__":
    cli.run(main)
