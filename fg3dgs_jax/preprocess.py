"""Turns a video of one talking person into a dataset folder to train on.

    python -m fg3dgs_jax.preprocess clip.mp4 --out data/anna --models models

What the clip should be: one face that looks into the camera, well lit, speaking for one to five minutes (from 10 s on
it works), the camera fixed, with the sound of that speech. Any frame rate, size and format that FFmpeg reads.

What is made (in DIR): the head cropped to a square at 25 FPS, region masks, the torso and the background without the
head, a camera per frame, the expression, 16 kHz sound and its features; report.json and contact_sheet.jpg: look at the
sheet before training. Warnings in the report name what will limit the result, and how to record better.

Finished steps are kept beside DIR until all is done: a run that was stopped continues when started again. Another clip,
model or option starts afresh.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from rich.table import Table

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import face, intake, legacy_writing, models, native, pose, report, sheet, video
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.data.steps import Steps, file_sha256
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console

VERSION = 2  # of the steps: raised when their results change
NOTE = "preprocess.json"  # in a folder of the field's layout, where it came from
SHEET_FRAMES, SHEET_COLUMNS = 9, 4


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("clip", type=Path, help="the video")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to make")
    parser.add_argument(
        "--models", type=Path, default=Path("models"), metavar="DIR",
        help=f"folder with {models.LANDMARKS.name} and {models.PERSON.name} (a missing one is named with its address); "
        f"{models.PARTS.name}, where it is there, finds hair (default: models)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=512, help="edge of the square frames in pixels (default: 512)")
    parser.add_argument("--fps", type=float, default=25.0, help="frames a second (default: 25)")
    parser.add_argument("--audio-features", default="logmel", metavar="NAME",
        help="audio front end: logmel (default), "
        "logmel+embedding, or the folder of a wav2vec 2.0, HuBERT or Whisper model")  # fmt: skip
    parser.add_argument("--layout", choices=("native", "legacy"), default="native", help="of DIR: this project's "
        "(default), or that of AD-NeRF, RAD-NeRF, ER-NeRF and TalkingGaussian")  # fmt: skip
    flags = parser.parse_args(argv)
    if not 64 <= flags.size <= 2048 or flags.size % 2:
        raise UserError(f"--size {flags.size}: is not an even number from 64 to 2048; 512 is usual")
    if not 10 <= flags.fps <= 60:
        raise UserError(f"--fps {flags.fps:g}: is not between 10 and 60; 25 is usual")
    return flags


def open_source(flags: argparse.Namespace) -> intake.Source:
    """Checks clip, models, packages and the output folder before any work. Raises UserError."""
    if not flags.clip.is_file():
        raise UserError(f"{flags.clip}: no such file; check the path of the clip")
    check_out(flags.out)
    audio_io.features(flags.audio_features, np.zeros(audio_io.SAMPLE_RATE, np.float32))
    info = video.probe(flags.clip)
    intake.check_header(flags.clip, info)
    landmarks, person = (models.find_model(flags.models, model) for model in (models.LANDMARKS, models.PERSON))
    has_parts = (flags.models / models.PARTS.name).is_file()
    parts = models.find_model(flags.models, models.PARTS) if has_parts else None
    models.import_mediapipe()
    return intake.Source(flags.clip, landmarks, person, parts, flags.size, flags.fps, info)


def check_out(out: Path) -> None:
    """Refuses a folder that holds anything but a dataset of ours. Raises UserError."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if any(out.iterdir()) and made_from(out) is None:
        raise UserError(f"--out {out}: holds other files and would be replaced; give a new folder")


def made_from(out: Path) -> str | None:
    """What the dataset in `out` was made from, or None if it is no dataset made by this command."""
    try:
        file = next((out / name for name in ("meta.json", NOTE) if (out / name).exists()), out / NOTE)
        content = json.loads(file.read_text())
        return str(content["source"]["key"]) if content["format"] == native.FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def source_key(flags: argparse.Namespace, source: intake.Source) -> str:
    """Changes with the clip, the models, the options that matter and the version of the steps."""
    paths = (source.clip, source.landmark_model, source.person_model, source.parts_model)
    files = [file_sha256(path) for path in paths if path]
    return hashlib.sha256(
        json.dumps([VERSION, files, flags.size, flags.fps, flags.audio_features, flags.layout]).encode()
    ).hexdigest()


def make(flags: argparse.Namespace, source: intake.Source, key: str, steps: Steps) -> list[report.Check]:
    """Runs all steps and puts the dataset in place. Returns the report."""
    found = intake.read_portrait(steps.run("portrait", lambda folder: intake.search(source, folder, console.track)))
    frames = intake.Cut.open(
        steps.run("frames", lambda folder: intake.cut(source, found.crop, folder, console.track), found.crop)
    )
    scale = (found.crop[2] - found.crop[0]) / source.size
    seen = intake.Seen.open(
        steps.run("faces", lambda folder: intake.look(source, frames, scale, folder, console.track))
    )
    dataset = steps.run(
        "dataset", lambda folder: build(flags, source, key, found, frames, seen, folder), flags.audio_features
    )
    if flags.layout == "legacy":
        dataset = steps.run("legacy", lambda folder: write_legacy(dataset, folder), flags.layout)
    (dataset / "key").unlink()
    replace_folder(dataset, flags.out)
    return [report.Check(**line) for line in json.loads((flags.out / "report.json").read_text())["checks"]]


def build(flags, source: intake.Source, key: str, found, frames: intake.Cut, seen: intake.Seen, folder: Path) -> None:
    """Poses, layers, features, report and contact sheet: the whole dataset folder."""
    print("poses: fitting shape, focal length and cameras", flush=True)
    hair, background, share = intake.learn_layers(frames, seen)
    solved = pose.solve_poses(seen.raw, source.size, frames.times)
    poses = intake.place_head(solved, frames, seen, hair)
    tracks = intake.tracks(poses, seen, source.size)
    count = len(frames.times)
    train, test = clips.split_ids(count, source.fps)
    fit = {"error": poses.error, "raw_error": poses.raw_error, "smoothing_frames": poses.smoothing}
    origin = {"command": "preprocess", "key": key, "clip": source.clip.name, "crop": found.crop, "pose": fit}
    meta = native.Meta(
        source.size, source.size, source.fps, count, tuple(poses.intrinsics.tolist()), face.EXPRESSION_NAMES,
        tuple(train.tolist()), tuple(test.tolist()), intake.HEAD_RADIUS, origin,
    )  # fmt: skip
    made = intake.in_order(lambda i: intake.frame_layers(frames, seen, hair, i), console.track(range(count), "layers"))
    features = audio_io.features(flags.audio_features, frames.audio, source.fps, count)
    native.write_dataset(folder, meta, tracks, made, background, frames.audio, features)
    curve = report.sync_curve(frames.audio, tracks.mouth_open, source.fps)
    facts = gather_facts(source, found, frames, seen, poses, curve)
    checks = report.checks(facts)
    summary = {"checks": [dataclasses.asdict(line) for line in checks], "background_seen": share,
               "sync": {"lags": list(range(-report.MAX_LAG, report.MAX_LAG + 1)), "r": curve.tolist()}}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(summary, indent=1))
    picture = contact_sheet(folder, source, frames, seen, poses, tracks, facts, checks)
    (folder / "contact_sheet.jpg").write_bytes(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes())


def write_legacy(native_folder: Path, folder: Path) -> None:
    """The finished dataset once more in the field's layout, with the report and where it came from beside it."""
    legacy_writing.write(open_dataset(native_folder), folder, console.track)
    for name in ("report.json", "contact_sheet.jpg"):
        shutil.copyfile(native_folder / name, folder / name)
    meta = json.loads((native_folder / "meta.json").read_text())
    (folder / NOTE).write_text(json.dumps({name: meta[name] for name in ("format", "version", "source")}, indent=1))


def gather_facts(source, found, frames: intake.Cut, seen: intake.Seen, poses: pose.Poses, curve) -> report.Facts:
    """What the report looks at."""
    light, sharp = [], []
    for index in frames.spread(40):
        points = seen.landmarks[index, :, :2]
        (x0, y0), (x1, y1) = (np.clip(p, 0, source.size).astype(int) for p in (points.min(0), points.max(0)))
        part = np.ascontiguousarray(frames.image(index)[y0:y1, x0:x1])
        if part.size:
            light.append(part.mean())
            sharp.append(report.sharpness(part))
    scale = (found.crop[2] - found.crop[0]) / source.size
    return report.Facts(
        source.info.fps, len(frames.times) / source.fps, seen.found, found.rivals,
        intake.mouth_pixels(seen.raw) * scale, intake.angles(poses.viewmats), poses.error * 512 / source.size,
        np.array(light), float(np.median(sharp)), frames.audio, curve, frames.warnings,
    )  # fmt: skip


def contact_sheet(folder: Path, source, frames, seen, poses, tracks, facts: report.Facts, checks) -> np.ndarray:
    """One page: frames under their overlays, what is behind the head, curves, the report."""
    scale = sheet.CELL / source.size
    cells = []
    for index in frames.spread(SHEET_FRAMES):
        labels = clips.read_picture(folder / "labels" / f"{index:06d}.png", 1)
        picture = sheet.cell(sheet.tinted(frames.image(index), labels))
        sheet.draw_landmarks(picture, tracks.landmarks[index], scale)
        sheet.draw_boxes(picture, np.stack([tracks.lips_box[index], *tracks.eye_boxes[index]]), scale)
        sheet.draw_axes(picture, poses.viewmats[index], poses.intrinsics, scale, intake.HEAD_RADIUS)
        sheet.write(picture, f"frame {index}", (8, 18))
        cells.append(picture)
    background = clips.read_picture(folder / "background.png", 3)
    torsos = [clips.read_picture(folder / "torso" / f"{i:06d}.png", 4) for i in frames.spread(4)[1:3]]
    cells += [sheet.cell(background), *(sheet.cell(clips.over(torso, background)) for torso in torsos)]
    width, count = SHEET_COLUMNS * sheet.CELL, len(frames.times)
    energy = report.loudness(frames.audio, source.fps, count)
    lips = [("lip opening", tracks.mouth_open, (255, 120, 200)), ("loudness", energy, (120, 200, 255))]
    turns = [(name, facts.angles[:, k], sheet.TINTS[k][1]) for k, name in enumerate(("yaw", "pitch", "roll"))]
    names = face.EXPRESSION_NAMES
    eyes = [(name, tracks.expression[:, names.index(name)], sheet.TINTS[k + 2][1])
            for k, name in enumerate(("browInnerUp", "eyeBlink", "gaze_x"))]  # fmt: skip
    sync = [("r", facts.sync, (120, 255, 160))]
    ticks, lags = f"frames 0 to {count - 1}", f"lag -{report.MAX_LAG} to +{report.MAX_LAG}"
    half = [
        sheet.curves(t, width // 2, 190, title, ticks) for t, title in ((turns, "head, degrees"), (eyes, "expression"))
    ]
    strips = [
        np.hstack([sheet.curves(lips, width * 3 // 4, 190, "lips and sound", ticks),
                   sheet.curves(sync, width // 4, 190, "sound explains lips", lags)]),
        np.hstack(half),
        sheet.table([(c.name, c.status, c.value, c.fix) for c in checks], width),
    ]  # fmt: skip
    return sheet.page(cells, SHEET_COLUMNS, strips)


def replace_folder(new: Path, out: Path) -> None:
    """Moves the finished folder to `out`, in the place of an older dataset of ours."""
    old = new.with_name("replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)


def show(checks: list[report.Check], out: Path) -> None:
    """The report on screen."""
    table = Table(title=f"{out}", title_justify="left")
    for name in ("", "check", "measured", "what to do"):
        table.add_column(name)
    colours = {report.PASS: "green", report.WARN: "yellow", report.FAIL: "red"}
    for line in checks:
        table.add_row(f"[{colours[line.status]}]{line.status}[/]", line.name, line.value, line.fix)
    console.show(table)
    print(f"wrote {out}; look at {out / 'contact_sheet.jpg'} before training")


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    flags.out = Path(os.path.abspath(flags.out))
    source = open_source(flags)
    key = source_key(flags, source)
    if made_from(flags.out) == key and (flags.out / "report.json").is_file():
        lines = json.loads((flags.out / "report.json").read_text())["checks"]
        show([report.Check(**line) for line in lines], flags.out)
        return 0
    steps = Steps(flags.out.with_name(f".{flags.out.name}.preprocess"), key)
    with cli.alone(steps.folder, "--out"):
        try:
            checks = make(flags, source, key, steps)
        except UserError as error:
            if not isinstance(error.__cause__, OSError):  # a full disk: finished steps stay
                steps.clear()
            raise
        steps.clear()
    show(checks, flags.out)
    return 0


if __name__ == "__main__":
    cli.run(main)
