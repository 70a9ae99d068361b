"""A run that begins where another one was: the same head at the same step, under another config or seed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from fg3dgs_jax import cli
from fg3dgs_jax.train import find_dataset
from fg3dgs_jax.training import checkpoint, loop


def begin(folder: Path, arguments: Sequence[str], workdir: Path) -> None:
    """Puts the checkpoint in `folder` into `workdir`, for `train` with `arguments` to continue from.

    What the config's seed decides from there on is drawn anew: backgrounds, patches, noise, the order of frames.
    Raises UserError where the config makes another model than the checkpoint holds.
    """
    config, _ = cli.parse_train([*arguments, f"--workdir={workdir}"], __doc__)
    run = loop.prepare(config, find_dataset(config, workdir), workdir)
    shutil.copytree(folder, workdir / "checkpoints" / folder.name)
    state, step, _ = checkpoint.restore_latest(workdir, loop.first_state(run))
    key = jax.random.key_data(jax.random.key(config.seed))
    checkpoint.save(workdir, step, state.replace(key=key), loop.info_of(run))
