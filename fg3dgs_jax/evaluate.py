"""Score a trained head on the frames that were held out from training.

    python -m fg3dgs_jax.evaluate --workdir RUN --models DIR
        PSNR of frame, head, mouth and eyes, SSIM, mouth landmark distance (LMD), lip opening, jitter, seconds per frame
    python -m fg3dgs_jax.evaluate --workdir RUN --models DIR --probe
        also renders them under wrong audio, a frozen mouth and shuffled expressions: does the audio drive the mouth?

Every frame is rendered with its own pose, expression, torso layer and background (the papers' test protocol).
Into RUN, or the folder given by --out, go evaluation.json (all numbers, frame by frame), heldout.npz (ids, pred, gt in
uint8, for your own scores), heldout.mp4 (truth | prediction | error, with sound) and heldout.jpg (a contact sheet that
ends with the worst frames).
Landmark scores need mediapipe (pip install 'fg3dgs_jax[preprocess]') and a folder with its face_landmarker.task.
"""

import argparse
from pathlib import Path

from fg3dgs_jax import cli
from fg3dgs_jax.data.models import LANDMARKS, find_model
from fg3dgs_jax.inference import console, heldout, probes
from fg3dgs_jax.inference.head import Head


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="a training run's folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder; default: the one it was trained on")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder with face_landmarker.task")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; default: RUN")
    parser.add_argument(
        "--probe", action="store_true", help="also render under wrong conditions; about ten times longer"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    if flags.models:
        find_model(flags.models, LANDMARKS)  # a wrong folder is an error, no folder a missing score
    out = flags.out or flags.workdir
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, flags.data)
    print(f"{flags.workdir}: step {head.run['step']}; {head.dataset.describe()}")
    report = heldout.evaluate(head.dataset, head.render, out, models=flags.models, info=head.run, track=console.track)
    console.show(console.score_table(report))
    if flags.probe:
        report["probes"] = probes.probe(
            head.dataset, head.render, flags.models, render_static=head.frozen(), track=console.track
        )
        console.show(console.probe_table(report["probes"]))
        heldout.write_json(out / "evaluation.json", report)
    print(f"wrote {', '.join(str(out / name) for name in heldout.OUTPUTS)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
