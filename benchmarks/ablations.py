"""Both papers' ablation tables on one clip: trains the set with several seeds, scores held-out frames, compares pairs.

    python benchmarks/ablations.py --data DIR --models DIR --runs RUNS --budget-minutes 10
    ... --only tg,fg --schedule-scale 0.2 --anchor FILE.npz
    ... --variant fg_pose=fg,pose.refine=true --variant fg_small=fg,regions.face.capacity=8192
    ... --start RUN/checkpoints/00011000 --variant hrpa=fg,judges.sync=FILE --only fg,hrpa --score sync=FILE

Rows are those of configs/ablations.py, and variants: NAME=ROW,FIELD=VALUE,.. with fields of the config. Each row is
compared with the full model of its paper (a variant with its row) on the same frames: the frames' differences,
averaged over the seeds, with 95 % block-bootstrap intervals. An anchor holds others' predictions of the same frames
(`ids`, `pred` u8 [n, H, W, 3], and any `pred_NAME` beside it).

With --start all rows and seeds continue from one checkpoint, so that only its later stages are compared; it must fit
their schedule. --score NAME=FILE gives `evaluate` the weights of lpips, sync, syncnet or inception.

One process trains at a time. A run that is finished is not trained again, one that was stopped continues: the same
command takes up where it was. With --budget-minutes a short pilot run times each row, and its schedule is scaled so
that training lasts about so long; with --schedule-scale all rows take the same number of steps.
Writes ablations.json and ablations.md into benchmarks/results (or --results).
"""

import argparse
import hashlib
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import branch
import numpy as np
import rasterizer as rasterizer_benchmark

from fg3dgs_jax import cli
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing
from fg3dgs_jax.inference import heldout, metrics, papers
from fg3dgs_jax.training import checkpoint

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "ablations.py"
ROWS: dict[str, tuple[str, Callable, str]] = runpy.run_path(str(CONFIGS))["ROWS"]
FULL = {"talking_gaussian": "tg", "fg3dgs": "fg"}
# name, for people, decimals; what is there once per frame is also compared in pairs
COLUMNS = (
    ("psnr", "PSNR", 2), ("psnr_head", "head", 2), ("psnr_mouth", "mouth", 2), ("psnr_eyes", "eyes", 2),
    ("ssim", "SSIM", 4), ("ssim_head", "head", 4), ("lpips", "LPIPS", 4), ("lmd", "LMD, px", 3),
    ("lip_opening_r", "lip r", 3), ("aue_lower", "AUE lower", 2), ("aue_upper", "AUE upper", 2),
    ("jitter", "jitter", 2), ("sync", "sync", 3),
)  # fmt: skip
PILOT_SCALE = 0.02  # of the full schedule: enough steps that compiling no longer hides their speed
OVERHEAD = 60.0  # s of a run in which no step is taken: compiling, checkpoints
BLOCK, SAMPLES = 6, 4000  # of the bootstrap: frames, resamples
SAME_FRAME = 4.0  # grey levels by which an anchor's ground truth may differ from the dataset's, on average


def flags_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(prog="python benchmarks/ablations.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder, see fg3dgs_jax.train")
    add("--models", type=Path, metavar="DIR", help="folder with face_landmarker.task, for LMD, AUE and jitter")
    add("--runs", type=Path, required=True, metavar="DIR", help="where runs are kept, a folder each")
    add("--only", default="", metavar="NAMES", help=f"of {','.join(ROWS)} and the variants; default: all")
    add("--variant", action="append", default=[], metavar="NAME=ROW,FIELD=VALUE,..", help="a row of your own")
    add("--seeds", default="0,1,2", metavar="N,N", help="default: 0,1,2")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--schedule-scale", type=float, metavar="X", help="of the full schedule, the same for all")
    length.add_argument("--budget-minutes", type=float, metavar="M", help="of training for each run")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the config, in every row")
    add("--start", type=Path, metavar="RUN/checkpoints/STEP", help="a checkpoint that all rows continue from")
    add("--score", action="append", default=[], metavar="NAME=FILE", help="weights for `evaluate`: sync=FILE")
    add("--anchor", type=Path, metavar="FILE.npz", help="others' predictions of the same frames")
    add("--refine-poses", action="store_true", help="also score with held-out poses fitted outside the mouth")
    add("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    return parser.parse_args(argv)


def rows_of(flags: argparse.Namespace) -> dict[str, tuple[str, list[str], str]]:
    """name -> (config's name, fields to set, label) of what is to be trained. Raises UserError."""
    common = [f"--config.{field}" for field in flags.set]
    known = {name: (name, common, label) for name, (_, _, label) in ROWS.items()}
    for text in flags.variant:
        name, _, rest = text.partition("=")
        row, *fields = rest.split(",")
        if row not in ROWS or not name or name in known or not all("=" in field for field in fields):
            raise UserError(
                f"--variant {text}: write NAME=ROW,FIELD=VALUE with a new NAME and ROW of {', '.join(ROWS)}"
            )
        known[name] = (row, [*common, *(f"--config.{field}" for field in fields)], f"{row}, {', '.join(fields)}")
    chosen = [name.strip() for name in flags.only.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"--only {unknown[0]}: no such row; there are {', '.join(known)}")
    if "fg_no_hrpa" not in chosen and not any(field.startswith("--config.judges.sync=") for field in common):
        print("fg_no_hrpa is left out: without --set judges.sync=FILE the full model is the same")
        known.pop("fg_no_hrpa")
    return {name: known[name] for name in (chosen or known)}


def reference_of(name: str, rows: Mapping[str, tuple[str, list[str], str]]) -> str:
    """The row that a row is compared with: itself for the full models."""
    row = rows[name][0]
    return row if name not in ROWS else FULL[ROWS[row][0]]


def _command(module: str, arguments: Sequence[str], log: Path) -> None:
    """Runs `python -m fg3dgs_jax.MODULE`; its output goes to a file. Raises UserError with its last line."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the package need not be installed
    with log.open("ab") as file:
        command = [sys.executable, "-m", f"fg3dgs_jax.{module}", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{module} failed ({' '.join(last)}); see {log}")


def log_of(workdir: Path) -> Path:
    """Where the commands of a run write."""
    return workdir.with_name(f"{workdir.name}.log")


def train(row: tuple[str, list[str], str], seed: int, scale: float, flags: argparse.Namespace, workdir: Path) -> None:
    """Trains a run to its end, or continues it; nothing happens where it is finished."""
    arguments = [f"--config={CONFIGS}:{row[0]}", f"--config.data={flags.data.resolve()}", f"--config.seed={seed}",
                 f"--config.schedule_scale={scale!r}", "--config.evaluate=false", *row[1]]  # fmt: skip
    noted, meant = workdir / "finished.json", [*arguments, *([str(flags.start)] if flags.start else [])]
    if noted.exists():
        if json.loads(noted.read_text()) != meant:
            raise UserError(f"{workdir}: was trained by another command; give another --runs, or remove it")
        return
    if flags.start and not checkpoint.steps(workdir):
        branch.begin(flags.start, arguments, workdir)
    _command("train", [*arguments, f"--workdir={workdir.resolve()}"], log_of(workdir))
    with replacing(noted) as partial:
        partial.write_text(json.dumps(meant))


def score(flags: argparse.Namespace, workdir: Path) -> dict:
    """The report of `fg3dgs_jax.evaluate`, made once."""
    path, known = workdir / "evaluation.json", {}
    if path.exists():
        known = json.loads(path.read_text())
    if "tables" not in known or (flags.refine_poses and "refined_poses" not in known):
        arguments = ["--workdir", str(workdir.resolve())]
        arguments += ["--models", str(flags.models.resolve())] if flags.models else []
        arguments += ["--refine-poses"] if flags.refine_poses else []
        arguments += [f"--{text}" for text in flags.score]
        _command("evaluate", arguments, log_of(workdir))
        known = json.loads(path.read_text())
    return known


def scale_for(minutes: float, workdir: Path, config_name: str) -> float:
    """The schedule that lasts `minutes`, from the speed of a pilot run's stages in its metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    config, seconds = cli.load_config(f"{CONFIGS}:{config_name}"), 0.0
    for name in config.schedule:
        speeds = [line["steps_per_second"] for line in lines if line["stage"] == name]
        speeds = [speed for speed in speeds if speed]
        if speeds:  # the fastest stretch is one without compilation
            seconds += config.stages[name].steps / max(speeds)
    if not seconds:
        raise UserError(f"{workdir}: the pilot run was too short to time; give --schedule-scale")
    return float(f"{min(max(60.0 * minutes - OVERHEAD, 10.0) / seconds, 1.0):.3g}")


def collect(flags: argparse.Namespace, rows: Mapping, seeds: Sequence[int]) -> tuple[dict, dict]:
    """Trains and scores everything. Returns row -> its seeds' reports, and row -> its schedule's scale."""
    flags.runs.mkdir(parents=True, exist_ok=True)
    found, scales = {}, {}
    for name, row in rows.items():
        scales[name] = flags.schedule_scale
        if flags.budget_minutes:
            pilot = flags.runs / f"{name}-pilot"
            train(row, 0, PILOT_SCALE, flags, pilot)
            scales[name] = scale_for(flags.budget_minutes, pilot, row[0])
        reports = []
        for seed in seeds:
            workdir = flags.runs / f"{name}-{seed}"
            print(f"{name}, seed {seed}, schedule x {scales[name]:g}", flush=True)
            train(row, seed, scales[name], flags, workdir)
            reports.append(score(flags, workdir))
        found[name] = reports
        if flags.refine_poses:
            found[f"{name} +poses"] = [{**report["refined_poses"], "tables": {}} for report in reports]
    return found, scales


def anchors(path: Path, dataset: Dataset, models: Path | None, runs: Path) -> dict[str, dict]:
    """Reports of others' predictions, `pred` and any `pred_NAME`, kept beside the runs. Raises UserError."""
    try:
        content = path.read_bytes()
        with np.load(path, allow_pickle=False) as arrays:
            given = {name: arrays[name] for name in arrays if name in ("ids", "gt") or name.startswith("pred")}
        ids, shape = given.pop("ids").astype(np.int32), given["pred"].shape
        if shape != (len(ids), dataset.height, dataset.width, 3) or not set(ids) <= set(dataset.test_ids.tolist()):
            raise ValueError
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--anchor {path}: needs `ids` among the held-out frames and `pred` u8 [n, {dataset.height}, "
            f"{dataset.width}, 3]; give a file made from this dataset"
        ) from None
    truth = np.stack([dataset.pictures(int(i)).image for i in ids])
    if "gt" in given and np.abs(given.pop("gt").astype(np.int16) - truth).mean() > SAME_FRAME:
        raise UserError(f"--anchor {path}: its ground truth shows other frames than {dataset.path}")
    kept, mark = runs / "anchor.json", hashlib.sha256(content + str(models).encode()).hexdigest()
    if kept.exists() and (stored := json.loads(kept.read_text()))["mark"] == mark:
        return stored["reports"]
    reports = {}
    for name, pictures in given.items():
        frames = heldout.Heldout(ids, pictures, truth, np.zeros(len(ids)))
        reports["anchor" if name == "pred" else f"anchor, {name[5:]}"] = heldout.score(dataset, frames, models)
    heldout.write_json(kept, {"mark": mark, "reports": reports})
    return json.loads(kept.read_text())["reports"]


def value(report: Mapping, name: str) -> float:
    """A score of one run; NaN where it is not there."""
    found = report["summary"].get(name, row_of(report, papers.OURS).get(name))
    return math.nan if found is None else float(found)


def row_of(report: Mapping, row: str) -> Mapping[str, float]:
    """A row of the papers' table of held-out frames; empty where it is not there."""
    return report.get("tables", {}).get(papers.HELD_OUT, {"rows": {}})["rows"].get(row, {})


def summary(reports: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Score -> mean over the seeds and their standard deviation (NaN for one seed)."""
    table = {}
    for name, _, _ in COLUMNS:
        values = np.array([value(report, name) for report in reports])
        if np.isfinite(values).all():
            spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
            table[name] = {"mean": float(values.mean()), "sd": spread}
    return table


def series(reports: Sequence[Mapping], name: str, ids: Sequence[int]) -> np.ndarray:
    """A score of frames `ids`, f64 [seeds, n]; NaN where it is not there."""
    rows = [{frame["id"]: frame.get(name) for frame in report["frames"]} for report in reports]
    return np.array([[math.nan if row[i] is None else row[i] for i in ids] for row in rows], np.float64)


def shared_ids(*groups: Sequence[Mapping]) -> list[int]:
    """The frames that all reports have."""
    return sorted(set.intersection(*({frame["id"] for frame in r["frames"]} for group in groups for r in group)))


def compare(ours: Sequence[Mapping], other: Sequence[Mapping]) -> dict[str, dict]:
    """Score -> ours minus the other's on the frames that both have: mean and 95 % interval."""
    ids, found = shared_ids(ours, other), {}
    for name, _, _ in COLUMNS:
        a, b = (series(reports, name, ids).mean(axis=0) for reports in (ours, other))
        if np.isfinite(a - b).any():
            found[name] = metrics.paired_reduction(b, a, BLOCK, SAMPLES)["difference"]._asdict()
    a, b = (series(reports, "lip_opening", ids) for reports in (ours, other))
    truth = series(ours[:1], "lip_opening_truth", ids)[0]
    if np.isfinite(truth).any() and len(ids) >= 2 * BLOCK:
        picks = metrics.block_rows(len(ids), BLOCK, SAMPLES, 0)
        whole = np.arange(len(ids))[None]
        drawn, mean = (_correlations(a, truth, rows) - _correlations(b, truth, rows) for rows in (picks, whole))
        low, high = np.nanpercentile(drawn, (2.5, 97.5))
        found["lip_opening_r"] = {"mean": float(mean[0]), "low": float(low), "high": float(high)}
    return found


def _correlations(openings: np.ndarray, truth: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Per resample [S] of frames `picks` [S, n], the mean over seeds [K, n] of Pearson's r with the truth [n]."""
    return np.array([np.mean([metrics.correlation(row[p], truth[p]) for row in openings]) for p in picks])


def comparisons(found: Mapping, rows: Mapping, others: Mapping) -> dict[str, dict]:
    """ "row against row" -> `compare`: rows with their reference, FG with TG, every row with every anchor."""
    pairs = {}
    for name in rows:
        reference = reference_of(name, rows)
        if reference in found and reference != name:
            pairs[f"{name} against {reference}"] = compare(found[name], found[reference])
    for fg, tg in (("fg", "tg"), ("fg +poses", "tg +poses")):
        if fg in found and tg in found:
            pairs[f"{fg} against {tg}"] = compare(found[fg], found[tg])
    for name in found:
        plain = name.removesuffix(" +poses")
        if plain != name:
            pairs[f"{name} against {plain}"] = compare(found[name], found[plain])
        pairs |= {f"{name} against {anchor}": compare(found[name], [report]) for anchor, report in others.items()}
    return pairs


def to_markdown(title: str, lines: Mapping[str, Mapping[str, Mapping]], show: Callable[[Mapping, int], str]) -> str:
    """A table with a line per entry and a column per score that any of them has."""
    shown = [column for column in COLUMNS if any(column[0] in scores for scores in lines.values())]
    text = [f"## {title}", "", "| | " + " | ".join(label for _, label, _ in shown) + " |",
            "|---|" + "---:|" * len(shown)]  # fmt: skip
    for name, scores in lines.items():
        cells = (show(scores[key], digits) if key in scores else "" for key, _, digits in shown)
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


def with_spread(score: Mapping, digits: int) -> str:
    """mean ± sd."""
    spread = score["sd"]
    return f"{score['mean']:.{digits}f}" + (f" ± {spread:.{digits}f}" if math.isfinite(spread) else "")


def with_interval(score: Mapping, digits: int) -> str:
    """+mean [low, high], bold where the interval is clear of zero."""
    mean, low, high = (score[key] for key in ("mean", "low", "high"))
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = flags_of(argv)
    rows, seeds = rows_of(flags), [int(seed) for seed in flags.seeds.split(",")]
    if flags.start and not (flags.schedule_scale and (flags.start / "info.json").is_file()):
        raise UserError(f"--start {flags.start}: must be a checkpoint's folder, and goes with --schedule-scale")
    dataset = open_dataset(flags.data)
    others = anchors(flags.anchor, dataset, flags.models, make(flags.runs)) if flags.anchor else {}
    found, scales = collect(flags, rows, seeds)
    scores = {name: summary(reports) for name, reports in {**found, **{k: [r] for k, r in others.items()}}.items()}
    truth = row_of(next(iter(found.values()))[0], papers.TRUTH)
    shown = {name: {"mean": truth[name], "sd": math.nan} for name in ("jitter", "sync") if name in truth}
    scores |= {papers.TRUTH: shown} if shown else {}
    pairs = comparisons(found, rows, others)
    frames = len(shared_ids(*found.values()))
    labels = {name: f"{name}: {rows[name][2]}" if name in rows else name for name in scores}
    text = "\n".join([
        to_markdown(f"{frames} held-out frames, mean ± sd over seeds {flags.seeds}",
                    {labels[name]: table for name, table in scores.items()}, with_spread),
        to_markdown("Differences on the same frames, 95 % intervals", pairs, with_interval),
    ])  # fmt: skip
    print(text)
    flags.results.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/ablations.py " + " ".join(argv)
    record = {"machine": rasterizer_benchmark.machine(), "command": command, "scales": scales, "frames": frames,
              "seeds": seeds, "rows": labels, "scores": scores, "differences": pairs}  # fmt: skip
    heldout.write_json(flags.results / "ablations.json", record)
    with replacing(flags.results / "ablations.md") as partial:
        partial.write_text(text)
    return 0


def make(path: Path) -> Path:
    """The folder itself, there or made."""
    heldout.make_folder(path)
    return path


if __name__ == "__main__":
    cli.run(main)
