"""Let a trained head speak: any sound in, a video with that sound out.

    python -m fg3dgs_jax.synthesize --workdir RUN --audio speech.wav --out talk.mp4

The sound may be any file that holds audio (wav, mp3, flac, m4a, ogg, a video), of any sample rate and channel count.
The video lasts as long as the sound. Head pose, eyes, torso and background follow the training clip from --start on,
back and forth without a jump where the sound is longer. The file is marked as synthetic media in its metadata.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console, speech
from fg3dgs_jax.inference.head import Head

SOUND_RATE = 48000  # Hz, of the sound in the video


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="a training run's folder")
    parser.add_argument("--audio", type=Path, required=True, metavar="FILE", help="what the head is to say")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.mp4", help="the video to write")
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder; default: the one it was trained on")
    parser.add_argument("--start", type=int, default=0, metavar="FRAME", help="frame of the clip to start from")
    parser.add_argument(
        "--features", type=Path, metavar="FILE.npy", help="the sound's features, for a head trained on ones from files"
    )
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> None:
    """Refuses outputs that cannot be, before any work is done."""
    if flags.out.suffix.lower() != ".mp4":
        raise UserError(f"--out {flags.out}: is not an mp4 file; give a name that ends in .mp4")
    folder = flags.out.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or flags.out.is_dir():
        raise UserError(f"--out {flags.out}: cannot be written there; give a file in a folder that you may write to")
    if flags.audio.exists() and flags.out.exists() and flags.audio.samefile(flags.out):
        raise UserError(f"--out {flags.out}: is the file of --audio; give another name")


def read_sound(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The sound f32 [n] mono at 16 kHz for the networks, and at 48 kHz for the video."""
    heard, kept = audio_io.load_audio(path), audio_io.load_audio(path, SOUND_RATE)
    if not heard.size:
        raise UserError(f"--audio {path}: holds no sound; export it again")
    return heard, kept


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    check(flags)
    heard, kept = read_sound(flags.audio)
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, flags.data)
    fps = head.dataset.fps
    if not 0 <= flags.start < head.dataset.num_frames:
        raise UserError(f"--start {flags.start}: the clip has frames 0 to {head.dataset.num_frames - 1}; choose one")
    length = audio_io.num_frames(heard, fps)
    windows = head.read_windows(flags.features, length) if flags.features else head.listen(heard)
    done = speech.write(flags.out, head, windows, (kept, SOUND_RATE), start=flags.start, track=console.track)
    pace = f"{1000.0 * done.seconds_per_frame:.0f} ms a frame to render"
    print(f"wrote {flags.out}: {done.frames} frames, {done.seconds:.2f} s, {pace}")
    return 0


if __name__ == "__main__":
    cli.run(main)
