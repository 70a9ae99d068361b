"""A walk from clip to talking head, in pictures of your own run.

    python -m fg3dgs_jax.train --config=configs/demo.py
    python -m fg3dgs_jax.tour --workdir runs/demo --out tour

writes tour/tour.md, which explains each stage beside its picture, and the pictures (all of them in all.jpg): the clip
with its regions, what is behind the head, what was learnt, and the head as it speaks, keeps silent, turns, blinks and
lies over another background. With --audio the head says that, else the clip's own words.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import sheet, speech_models
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing
from fg3dgs_jax.inference import pictures
from fg3dgs_jax.inference.control import Control
from fg3dgs_jax.inference.head import Head

COLUMNS, SECONDS = 6, 3.0
SHOWN = 10  # the frame of a speech that stands for it
STRIP = 26  # pixels, for a line of text
CHECKS = 12  # squares along an edge of the pattern behind a transparent head


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.tour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="a training run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder; default: the one it was trained on")
    parser.add_argument("--audio", type=Path, metavar="FILE", help="what the head says; default: the clip's sound")
    flags = parser.parse_args(argv)
    if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise UserError(f"--out {flags.out}: is there already; give the name of a new folder")
    return flags


def row(images: list[np.ndarray], text: str) -> np.ndarray:
    """Pictures beside each other over a line of text, u8 [H, W, 3]."""
    images = pictures.contact_sheet(images, COLUMNS)
    strip = np.full((STRIP, images.shape[1], 3), pictures.PAPER, np.uint8)
    sheet.write(strip, text, (8, STRIP - 8))
    return np.concatenate([images, strip])


def some(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Six of them, spread evenly."""
    return [frames[i] for i in pictures.spread(len(frames), COLUMNS)]


def checkered(size: int) -> np.ndarray:
    """Grey squares u8 [size, size, 3]."""
    index = np.arange(size) * CHECKS // size
    return np.where((np.add.outer(index, index) % 2)[..., None], 200, 130).astype(np.uint8).repeat(3, 2)


def clip_pictures(head: Head) -> dict[str, np.ndarray]:
    """What the head was trained on."""
    dataset = head.dataset
    ids = [int(i) for i in dataset.train_ids[pictures.spread(len(dataset.train_ids), COLUMNS)]]
    found = [dataset.pictures(i) for i in ids]
    return {
        "clip": row([part.image for part in found], "frames of the clip"),
        "regions": row([sheet.tinted(part.image, part.labels) for part in found], "regions: who moves what"),
        "behind": row([part.backdrop for part in found], "torso and background, the head taken away"),
        "learnt": row([head.render(*_own(head, i)) for i in ids], "the same frames, rendered"),
    }


def _own(head: Head, index: int) -> tuple:
    frame = head.dataset.frame(index)
    return frame.condition, frame.viewmat, frame.backdrop


def speech_pictures(head: Head, speak: Callable, quiet: Callable) -> dict[str, np.ndarray]:
    """What it does. `speak` and `quiet`: a control (and more) to frames, saying something and nothing."""
    names, still = head.dataset.expression_names, Control("still", "still")
    strongest = int(np.argmax(head.dataset.expression.std(0)))
    slider = Control("still", "still", sliders={names[strongest]: 1.0})
    board = checkered(head.dataset.height)
    return {
        "speaks": row(some(speak(still)), "one pose, one expression: only sound moves it"),
        "silent": row(some(quiet(still)), "silence: the most closed mouth, and still"),
        "gain": row([speak(Control("still", "still", gain=gain))[SHOWN] for gain in (0.0, 0.5, 1.0, 1.5)],
                    "mouth motion times 0, 0.5, 1, 1.5"),
        "idle": row(some(speak(Control("idle", "clip"))), "gentle motion of its own"),
        "orbit": row(some(quiet(Control("still", "still", orbit=20.0, orbit_seconds=SECONDS))),
                     "the camera swings as far as the clip allows"),
        "slider": row([quiet(still)[0], quiet(slider)[0]], f"at rest, and {names[strongest]} at 1"),
        "background": row(some(speak(still, background=board)), "another background"),
    }  # fmt: skip


TEXT = {
    "clip": "`preprocess` crops a portrait video to the head at 25 FPS; here it may be the procedural one.",
    "regions": "Masks say which pixels each region learns from: face, mouth, eyes; the rest of the head is hair.",
    "behind": "The head is taken away, and neck and background go on behind it.",
    "learnt": "`train` fits Gaussians per region and the networks that move them by sound and expression.",
    "speaks": "`synthesize --pose still --expression still`",
    "silent": "In silence a gate replaces the sound by that of a closed mouth (`--gate`).",
    "gain": "`--mouth-gain`",
    "idle": "`--pose idle`",
    "orbit": "`--orbit 20`",
    "slider": "`--set NAME=VALUE`, or `--timeline FILE.json`",
    "background": "`--background`, and `.mov`, `.webm` or PNG pictures for none",
}


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, flags.data)
    path = flags.audio or head.dataset.audio_path
    sound = audio_io.load_audio(path, whole=True)[: int(SECONDS * audio_io.SAMPLE_RATE)]
    if audio_io.num_frames(sound, head.dataset.fps) <= SHOWN:
        raise UserError(f"{path}: lasts under half a second; give some words with --audio")
    own = head.dataset.audio_name not in speech_models.BUILT_IN and not flags.audio
    ear = head.own_windows()[: int(SECONDS * head.dataset.fps) + 8] if own else sound
    quiet = np.repeat(head.rest[:1], len(ear), 0) if own else np.zeros_like(sound)
    made = clip_pictures(head) | speech_pictures(
        head, lambda control, **look: list(head.speak(ear, control, **look)),
        lambda control, **look: list(head.speak(quiet, control, **look)),
    )  # fmt: skip
    flags.out.mkdir(parents=True, exist_ok=True)
    lines = ["# From clip to talking head", "", f"{head.dataset.describe()}; step {head.run.get('step')}.", ""]
    for name, picture in made.items():
        pictures.save(flags.out / f"{name}.jpg", picture)
        lines += [TEXT[name], "", f"![{name}]({name}.jpg)", ""]
    width = max(picture.shape[1] for picture in made.values())
    padded = [
        np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=pictures.PAPER) for p in made.values()
    ]
    pictures.save(flags.out / "all.jpg", np.concatenate(padded), quality=85)
    with replacing(flags.out / "tour.md") as partial:
        partial.write_text("\n".join(lines))
    print(f"wrote {flags.out / 'tour.md'} and {len(made)} pictures")
    return 0


if __name__ == "__main__":
    cli.run(main)
