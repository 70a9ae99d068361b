"""Export a trained head: baked, to speak fast and anywhere, or as 3DGS .ply files for viewers and editors of splats.

    python -m fg3dgs_jax.export --workdir RUN --out anna.safetensors
        baked: all that neither sound nor expression changes is computed once. anna.safetensors and anna.json hold the
        head and what it needs of its clip, load in under a second, and stand in for a run's folder:
        python -m fg3dgs_jax.synthesize --workdir anna.safetensors --audio speech.wav --out talk.mp4
    python -m fg3dgs_jax.export --workdir RUN --out head.ply
        the head as it was learnt, before any motion
    python -m fg3dgs_jax.export --workdir RUN --audio speech.wav --out frames
        one file per frame of a speech: frames/000000.ply, ...; --every 5 takes each fifth, --frames 50 the first 50

All regions are in one .ply, in world coordinates (y up, the head's centre the origin); --region takes one of them.
The cameras of the frames are not part of a .ply: frames/cameras.json holds them, world to camera in OpenCV axes.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data.writing import SYNTHETIC_MARK
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import baked, console, ply
from fg3dgs_jax.inference.head import Head


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, metavar="RUN", help="a training run's folder, or a baked head")
    add("--out", type=Path, required=True, metavar="FILE|DIR", help=".safetensors (and .json beside it), .ply, or "
        "with --audio a new folder")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="dataset folder; default: the one it was trained on")
    add("--audio", type=Path, metavar="FILE", help="what the head says; one .ply per frame")
    add("--speech-model", metavar="DIR", help="folder of the speech model the head was trained on")
    add("--every", type=int, default=1, metavar="N", help="of the frames, take each N-th (default: 1)")
    add("--frames", type=int, metavar="N", help="of the frames taken, only the first N")
    add("--region", metavar="NAME", help="one region, such as face, mouth or eyes; default: all")
    flags = parser.parse_args(argv)
    if flags.every < 1 or (flags.frames is not None and flags.frames < 1):
        raise UserError("--every and --frames take whole numbers from 1 on")
    if baked.is_baked(flags.out) and (flags.audio or flags.region):
        raise UserError(f"--out {flags.out}: a baked head is whole and silent; leave out --audio and --region")
    return flags


def check_out(flags: argparse.Namespace) -> None:
    """Refuses an output that cannot be. Raises UserError."""
    folder = flags.out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {flags.out}: cannot be written there; give a name in a folder that you may write to")
    known = flags.out.suffix.lower() == ".ply" or baked.is_baked(flags.out)
    if not flags.audio and (not known or flags.out.is_dir()):
        raise UserError(f"--out {flags.out}: must end in .safetensors or .ply; a folder goes with --audio")
    if baked.is_baked(flags.out) and baked.is_baked(flags.workdir):
        raise UserError(f"--workdir {flags.workdir}: is baked already; copy its two files")
    if flags.audio and flags.out.exists():
        raise UserError(f"--out {flags.out}: is there already; give the name of a new folder")


def export_frames(flags: argparse.Namespace, head: Head, regions: list[str]) -> int:
    """One file per frame taken, and cameras.json, in a folder that appears only when complete; returns their number."""
    fps, comments = head.dataset.fps, (SYNTHETIC_MARK,)
    sound = audio_io.load_audio(flags.audio, whole=True)
    wanted = range(0, audio_io.num_frames(sound, fps), flags.every)[: flags.frames]
    partial = flags.out.with_name(f".{flags.out.name}.{os.getpid()}.partial")
    cameras = []
    try:
        partial.mkdir()
        moving = head.pose_gaussians(sound)
        done = -1
        for index in console.track(wanted, "exporting"):
            for _ in range(index - done):
                gaussians, viewmat = next(moving)
            done = index
            ply.write(partial / f"{index:06d}.ply", gaussians(regions), comments)
            cameras.append({"frame": index, "seconds": index / fps, "viewmat": np.asarray(viewmat).tolist()})
        intrinsics = np.asarray(head.dataset.intrinsics).tolist()
        content = {"fps": fps, "width": head.dataset.width, "height": head.dataset.height, "intrinsics": intrinsics}
        (partial / "cameras.json").write_text(json.dumps({**content, "frames": cameras}, indent=1))
        os.replace(partial, flags.out)
    except OSError as error:
        raise UserError(f"--out {flags.out}: cannot be written ({error.strerror}); free space first") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(cameras)


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    check_out(flags)
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, flags.data, speech_model=flags.speech_model)
    names = [region.name for region in head.spec.regions]
    if flags.region and flags.region not in names:
        raise UserError(f"--region {flags.region}: this head has {', '.join(names)}")
    regions = [flags.region] if flags.region else names
    if baked.is_baked(flags.out):
        kept = baked.write(flags.out, head, track=console.track)
        both = " and ".join(str(flags.out.with_suffix(ending)) for ending in baked.ENDINGS)
        print(f"wrote {both}: {', '.join(f'{count} Gaussians of {name}' for name, count in kept.items())}")
    elif flags.audio:
        print(f"wrote {flags.out}: {export_frames(flags, head, regions)} frames")
    else:
        count = ply.write(flags.out, head.gaussians(regions))
        print(f"wrote {flags.out}: {count} Gaussians of {', '.join(regions)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
