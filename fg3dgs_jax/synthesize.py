"""Let a trained head speak: any sound in, a video with that sound out.

    python -m fg3dgs_jax.synthesize --workdir RUN --audio speech.wav --out talk.mp4

The sound may be any file that holds audio (wav, mp3, flac, m4a, ogg, a video), of any sample rate and channel count.
The video lasts as long as the sound. Head pose, eyes, torso and background follow the training clip from --start on,
back and forth without a jump where the sound is longer, unless told otherwise:

    --pose idle --expression blinks          gentle motion and natural blinks in place of the clip's
    --set browInnerUp=0.8                    a coefficient held; --timeline FILE.json moves them over time:
                                             {"browInnerUp": [[0.0, 0.0], [1.5, 1.0]]}, pairs of second and value
    --out talk.mov, talk.webm, frames        transparency: ProRes 4444, VP9, a folder of PNG pictures
    --paste-back clip.mp4                    into the full picture of the video that the clip was cropped from

The file is marked as synthetic media in its metadata; with --certificate and --key it also holds signed content
credentials (C2PA) that say so.
"""

import argparse
from pathlib import Path

import numpy as np

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import credentials, hearing
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console, expression, speech
from fg3dgs_jax.inference.control import EXPRESSIONS, ORBIT_SECONDS, Control
from fg3dgs_jax.inference.control import check as check_control
from fg3dgs_jax.inference.head import Head

SOUND_RATE = 48000  # Hz, of the sound in the video


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, metavar="RUN", help="a training run's folder, or a baked head: "
        "NAME.safetensors of `python -m fg3dgs_jax.export`")  # fmt: skip
    add("--audio", type=Path, required=True, metavar="FILE", help="what the head is to say")
    add("--out", type=Path, required=True, metavar="FILE", help=".mp4, .mov, .webm, or a folder's name for pictures")
    add("--data", type=Path, metavar="DIR", help="dataset folder; default: the one it was trained on")
    add("--features", type=Path, metavar="FILE.npy", help="the sound's features, for a head trained on ones from files")
    add("--speech-model", metavar="DIR", help="folder of the speech model the head was trained on; :logits after it "
        "takes its characters' scores")  # fmt: skip
    act = parser.add_argument_group("what the head does").add_argument
    act("--start", type=int, default=0, metavar="FRAME", help="frame of the clip to start from, or to hold still")
    act("--pose", default="clip", metavar="HOW", help="clip, still, idle, or a file: .npy or .npz of world-to-camera "
        "matrices, a transforms .json (default: clip)")  # fmt: skip
    act("--expression", default="clip", choices=EXPRESSIONS, help="of the upper face (default: clip)")
    act("--set", action="append", default=[], metavar="NAME=VALUE", help="hold a coefficient; may be repeated")
    act("--timeline", type=Path, metavar="FILE.json", help="move coefficients over time")
    act("--mouth-gain", type=float, default=1.0, metavar="X", help="of the motion that sound causes, 0 to 2")
    act("--gate", default=f"{hearing.GATE:g}", metavar="DB", help="quieter than loud speech by this is silence and "
        f"closes the mouth; off: nothing is (default: {hearing.GATE:g})")  # fmt: skip
    act("--orbit", type=float, default=0.0, metavar="DEGREES", help="the camera swings so far to each side, within "
        "what the clip shows of the head")  # fmt: skip
    act("--orbit-seconds", type=float, default=ORBIT_SECONDS, metavar="S", help="for one swing there and back")
    act("--seed", type=int, default=0, help="of idle motion and blinks")
    look = parser.add_argument_group("what the file is like").add_argument
    look("--fps", type=float, help="frames a second; default: the clip's")
    look("--size", type=int, metavar="PIXELS", help="edge of the square frames; default: the clip's")
    look("--crf", type=int, help="quality of mp4 and webm, lower is better (default: 16 and 24)")
    look("--background", metavar="FILE|#rrggbb", help="a picture or a colour in place of the clip's background")
    look("--paste-back", type=Path, metavar="CLIP", help="put the head back into the video that the clip came from")
    look("--certificate", type=Path, metavar="PEM", help="sign content credentials (C2PA) into the file with this "
         "certificate chain, and --key")  # fmt: skip
    look("--key", type=Path, metavar="PEM", help="the private key of --certificate")
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> speech.Output:
    """What to write. Refuses outputs that cannot be, before any work is done. Raises UserError."""
    if (flags.certificate is None) != (flags.key is None):
        raise UserError("--certificate and --key go together; give both, or neither")
    signing = credentials.load(flags.certificate, flags.key) if flags.certificate else None
    output = speech.Output(flags.out, flags.fps, flags.size, flags.crf, flags.background, flags.paste_back, signing)
    speech.check(output)
    if flags.audio.exists() and flags.out.exists() and flags.audio.samefile(flags.out):
        raise UserError(f"--out {flags.out}: is the file of --audio; give another name")
    return output


def read_gate(text: str) -> float | None:
    """--gate as a number, or None for off. Raises UserError."""
    try:
        return None if text == "off" else float(text)
    except ValueError:
        raise UserError(f"--gate {text}: is neither a number of decibels nor off") from None


def read_control(flags: argparse.Namespace, head: Head) -> Control:
    """What the head is to do. Raises UserError for what this head cannot."""
    names = head.dataset.expression_names
    control = Control(
        pose=flags.pose,
        expression=flags.expression,
        sliders=expression.read_sliders(flags.set, names),
        timeline=expression.read_timeline(flags.timeline, names) if flags.timeline else {},
        gain=flags.mouth_gain,
        gate=read_gate(flags.gate),
        orbit=flags.orbit,
        orbit_seconds=flags.orbit_seconds,
        start=flags.start,
        seed=flags.seed,
    )
    check_control(head.dataset, control)
    return control


def read_sound(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The sound f32 [n] mono at 16 kHz for the networks, and at 48 kHz for the video."""
    heard, kept = audio_io.load_audio(path, whole=True), audio_io.load_audio(path, SOUND_RATE)
    if not heard.size:
        raise UserError(f"--audio {path}: holds no sound; export it again")
    return heard, kept


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    output = check(flags)
    heard, kept = read_sound(flags.audio)
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, flags.data, speech_model=flags.speech_model)
    control = read_control(flags, head)
    ear = speech.hear(head, heard, flags.features, control.gate)
    done = speech.write(output, head, ear, (kept, SOUND_RATE), control, track=console.track)
    print(f"wrote {flags.out}: {done.frames} frames, {done.seconds:.2f} s, in {done.spent:.1f} s")
    return 0


if __name__ == "__main__":
    cli.run(main)
