"""Train a talking head: a dataset folder in, checkpoints, previews and a scored result out.

    python -m fg3dgs_jax.train --config=configs/demo.py
        makes a procedural talking head, trains on it, scores held-out frames, writes runs/demo/result.mp4
    python -m fg3dgs_jax.train --config=configs/fg3dgs.py --config.data=DIR --workdir=RUN
        trains on a folder from `preprocess`, or one in the AD-NeRF / ER-NeRF / TalkingGaussian layout
    ... --config.schedule_scale=0.2
        shortens every stage in proportion; any other field of the config is set the same way

Run the same command again to continue a run that was stopped or killed. RUN/ holds checkpoints, metrics.jsonl,
TensorBoard logs, previews/ (truth left, prediction right) and, at the end, evaluation.json, heldout.mp4 and result.mp4.
Every field is explained in fg3dgs_jax/training/defaults.py; add --config=FILE to this --help to list them.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio, expressions, synthetic
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console, heldout, speech
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.training import loop
from fg3dgs_jax.training.progress import Progress
from fg3dgs_jax.training.signals import Interrupt


def find_dataset(config: ConfigDict, workdir: Path) -> Dataset:
    """The folder that the config names, or the procedural clip, made once in the working directory."""
    expressions.check(config.expression.smooth)  # before a clip is made
    return Dataset(expressions.prepared(_open(config, workdir).clip, **config.expression))


def _open(config: ConfigDict, workdir: Path) -> Dataset:
    if config.data:
        return open_dataset(config.data, config.audio_features)
    if not config.synthetic.frames:
        raise UserError("--config.data is missing: give a dataset folder, from `python -m fg3dgs_jax.preprocess`.")
    path = workdir / "data"
    if not (path / "meta.json").exists():
        loop.check(config)  # before anything is written
        with cli.alone(workdir):
            synthetic.make(path, config.synthetic.frames, config.synthetic.size, config.synthetic.seed)
    dataset = open_dataset(path, config.audio_features)
    if (dataset.num_frames, dataset.width) != (config.synthetic.frames, config.synthetic.size):
        raise UserError(f"{path}: holds a clip of another length or size; remove it, or give another --workdir")
    return dataset


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    config, workdir = cli.parse_train(argv, __doc__)
    cli.keep_memory()
    cli.enable_compilation_cache()
    dataset = find_dataset(config, workdir)
    run = loop.prepare(config, dataset, workdir)
    print(dataset.describe())
    with cli.alone(workdir), Interrupt() as interrupt, Progress(workdir, run.total_steps) as progress:
        loop.train(run, interrupt, progress)
    if config.evaluate:
        finish(workdir, config)
    return 0


def finish(workdir: Path, config: ConfigDict) -> None:
    """Scores the held-out frames, then lets the head speak the clip's own sound from its first frame to its last."""
    head = Head.load(workdir)
    report = heldout.evaluate(head.dataset, head.render, workdir, models=config.models or None, track=console.track)
    console.show(console.score_table(report))
    sound = heldout.clip_sound(head.dataset)
    if sound is None:
        print(f"{head.dataset.audio_path}: cannot be read; result.mp4 is silent")
        sound = np.zeros(round(head.dataset.num_frames * audio.SAMPLE_RATE / head.dataset.fps), np.float32)
    heard = sound, audio.SAMPLE_RATE
    speech.write(speech.Output(workdir / "result.mp4"), head, head.own_windows(), heard, track=console.track)
    print(f"wrote {workdir}/result.mp4, heldout.mp4, heldout.jpg and evaluation.json")


if __name__ == "__main__":
    cli.run(main)
