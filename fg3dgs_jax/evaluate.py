"""Score a trained head on the frames that were held out from training.

    python -m fg3dgs_jax.evaluate --workdir RUN --models DIR
        PSNR of frame, head, mouth and eyes, SSIM, mouth landmark distance (LMD), lip opening, jitter, seconds per frame
    ... --lpips FILE --sync FILE --syncnet FILE --inception FILE
        the other scores of the papers' tables, by weights from `convert` and `train_sync`: LPIPS, sync, LSE-C, LSE-D
        and FID; a score whose weights are missing is said to be unavailable
    ... --audio speech.wav
        also lets the head say another sound (the papers' Table II) and scores how well the lips fit it; a head that
        was not trained on log-mel bands hears it with --speech-model DIR or --features FILE.npy
    ... --refine-poses
        also fits the pose of every held-out frame to its pixels outside the mouth and hanging hair, and reports the
        scores with and without: what is lost to the pose rather than to the head
    ... --training-frames
        also scores as many frames that it was trained on: where these are no better, it has learned too little rather
        than by heart, and more steps help
    ... --probe
        also renders them under wrong audio, a frozen mouth and shuffled expressions: does the audio drive the mouth?

Every frame is rendered with its own pose, expression, torso layer and background (the papers' test protocol).
Into RUN, or the folder given by --out, go evaluation.json (all numbers, frame by frame), tables.csv, tables.md,
report.html (tables, videos, curves and worst frames in one file), heldout.npz (ids, pred, gt in uint8, for your own
scores), heldout.mp4 (truth | prediction | error, with sound), heldout.jpg (a contact sheet that ends with the worst
frames) and driven.mp4.
Landmark scores need mediapipe (pip install 'fg3dgs_jax[preprocess]') and a folder with its face_landmarker.task.
"""

import argparse
from pathlib import Path

import numpy as np

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.data.models import LANDMARKS, find_model
from fg3dgs_jax.data.writing import write_video
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console, heldout, page, papers, paths, pictures, probes, speech
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.inference.performance import Ear

WEIGHTS = {
    "lpips": "LPIPS, from `convert`",
    "sync": "a lip-sync expert, from `train_sync` or `convert`",
    "syncnet": "SyncNet, from `convert`",
    "inception": "Inception v3 for FID, from `convert`",
}
PAGES = ("tables.csv", "tables.md", "report.html")
REFINED, TRAINED = "held-out frames, poses fitted outside the mouth", "frames that it was trained on"
DRIVEN = "driven by"
SILENT = 1e-3  # RMS below which a sound is silent
MOST_SECONDS = 120  # of --audio: its frames are scored together, 20 MB a second at 512 x 512


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="a training run's folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder; default: the one it was trained on")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder with face_landmarker.task")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; default: RUN")
    for name, what in WEIGHTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    parser.add_argument("--audio", type=Path, metavar="FILE", help="another sound for the head to say")
    parser.add_argument("--features", type=Path, metavar="FILE.npy", help="that sound's features, for a head trained "
                        "on ones from files")  # fmt: skip
    parser.add_argument("--speech-model", metavar="DIR", help="folder of the speech model the head was trained on")
    parser.add_argument(
        "--probe", action="store_true", help="also render under wrong conditions; about ten times longer"
    )
    parser.add_argument("--training-frames", action="store_true", help="also score frames that it was trained on")
    parser.add_argument("--refine-poses", action="store_true", help="also score with poses fitted outside the mouth")
    return parser.parse_args(argv)


def read_sound(path: Path) -> np.ndarray:
    """The sound of --audio, f32 [n] at 16 kHz. Raises UserError: not readable, silent, shorter than half a second."""
    sound = audio.load_audio(path, whole=True)
    if len(sound) < audio.SAMPLE_RATE // 2:
        raise UserError(f"--audio {path}: lasts under half a second; give at least some words")
    if len(sound) > MOST_SECONDS * audio.SAMPLE_RATE:
        raise UserError(f"--audio {path}: lasts over {MOST_SECONDS} s, more than is scored at once; give a part of it")
    if float(np.sqrt(np.mean(np.square(sound)))) < SILENT:
        raise UserError(f"--audio {path}: is silent; give a sound in which somebody speaks")
    return sound


def drive(head: Head, ear: Ear, sound: np.ndarray, networks: papers.Networks, models: Path | None, out: Path) -> dict:
    """Lets the head say a sound, which it hears by `ear`, into driven.mp4 and scores the lips (Table II)."""
    count = audio.num_frames(sound, head.dataset.fps)
    images = np.empty((count, head.dataset.height, head.dataset.width, 3), np.uint8)
    positions, performance = np.empty(count), head.perform(ear)
    for i in console.track(range(count), "another sound"):
        images[i], positions[i] = (frame := next(performance)).picture, frame.position
    boxes = paths.track_at(head.dataset.face_boxes, positions)
    write_video(out / "driven.mp4", iter(images), head.dataset.fps, sound)
    return papers.driven(images, boxes, sound, head.dataset.fps, networks, models)


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    if flags.models:
        find_model(flags.models, LANDMARKS)  # a wrong folder is an error, no folder a missing score
    networks = papers.load({name: getattr(flags, name) for name in WEIGHTS})
    sound = read_sound(flags.audio) if flags.audio else None
    out = flags.out or flags.workdir
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, flags.data, speech_model=flags.speech_model)
    dataset = head.dataset
    ear = None if sound is None else speech.hear(head, sound, flags.features)
    print(f"{flags.workdir}: step {head.run['step']}; {dataset.describe()}")
    heldout.make_folder(out)
    frames = heldout.predict(dataset, head.render, track=console.track)
    report = heldout.full_report(dataset, frames, flags.models, head.run)
    tables = {papers.HELD_OUT: papers.table(dataset, frames, report, networks, flags.models)}
    heldout.save(out, dataset, frames, report)
    console.show(console.score_table(report))
    if flags.refine_poses:
        refined, moves = head.refine_poses(dataset.test_ids, console.track)
        better = heldout.predict(refined, head.render, track=console.track, name="with refined poses")
        scores = heldout.score(refined, better, flags.models)
        report["refined_poses"] = {**scores, "mean_twist": np.abs(moves).mean(axis=0).tolist()}
        tables[REFINED] = papers.table(refined, better, scores, networks, flags.models)
        console.show(console.score_table(scores, REFINED))
    if flags.training_frames:
        ids = dataset.train_ids[pictures.spread(len(dataset.train_ids), len(dataset.test_ids))]
        learned = heldout.predict(dataset, head.render, ids, track=console.track, name=TRAINED)
        report["training_frames"] = heldout.score(dataset, learned, flags.models)
        console.show(console.score_table(report["training_frames"], TRAINED))
    if ear is not None:
        tables[f"{DRIVEN} {flags.audio.name}"] = drive(head, ear, sound, networks, flags.models, out)
    for title, table in tables.items():
        console.show(console.paper_table(title, table))
    if flags.probe:
        report["probes"] = probes.probe(
            dataset, head.render, flags.models, render_static=head.frozen(), track=console.track
        )
        console.show(console.probe_table(report["probes"]))
    report["tables"] = tables
    heldout.write_json(out / "evaluation.json", report)
    write_pages(dataset, out, f"{flags.workdir.name}, step {head.run['step']}", tables, report, frames)
    print(f"wrote {', '.join(str(out / name) for name in (*heldout.OUTPUTS, *PAGES))}")
    return 0


def write_pages(dataset: Dataset, out: Path, title: str, tables: dict, report: dict, frames: heldout.Heldout) -> None:
    """tables.csv, tables.md and report.html."""
    driven = any(table.startswith(DRIVEN) for table in tables)
    videos = [out / "heldout.mp4", *([out / "driven.mp4"] if driven else [])]
    page.write_text(out / "tables.csv", page.to_csv(tables))
    page.write_text(out / "tables.md", page.to_markdown(tables))
    html = page.to_html(title, tables, report, frames, videos, lambda index: dataset.pictures(index).labels)
    page.write_text(out / "report.html", html)


if __name__ == "__main__":
    cli.run(main)
