"""Pictures while training: a few fixed frames, truth beside prediction, a file every few hundred steps."""

import functools
from collections.abc import Mapping
from pathlib import Path

import cv2
import jax
import numpy as np
from flax import nnx

from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.model.render import HeadSpec, render_frame
from fg3dgs_jax.training import cameras
from fg3dgs_jax.training.state import TrainState
from fg3dgs_jax.types import Camera

NUM_FRAMES = 3


class Preview:
    """Renders the same held-out frames (training frames where none are held out) at every call."""

    def __init__(self, spec: HeadSpec, graphs: Mapping[str, nnx.GraphDef], dataset: Dataset, workdir: Path):
        ids = np.asarray(dataset.test_ids if len(dataset.test_ids) else dataset.train_ids)
        self.frames = [int(i) for i in ids[np.linspace(0, len(ids) - 1, NUM_FRAMES + 2).astype(int)[1:-1]]]
        self.dataset = dataset
        self.folder = Path(workdir) / "previews"
        self.render = jax.jit(functools.partial(render_frame, spec, graphs), static_argnames="moving")

    def save(self, state: TrainState, step: int, moving: bool) -> Path:
        """Writes previews/STEP.jpg: a row per frame, truth left, prediction right."""
        alive = {name: pool.alive for name, pool in state.pools.items()}
        rows = []
        for index in self.frames:
            frame = cameras.applied(state.cameras, self.dataset.frame(index), self.dataset.extent)
            camera = Camera(frame.viewmat, frame.intrinsics, self.dataset.width, self.dataset.height)
            picture = self.render(state.params, alive, frame.condition, camera, frame.backdrop, moving=moving)
            rows.append(np.hstack([frame.image, np.asarray(picture)]))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step:06d}.jpg"
        cv2.imwrite(str(path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
        return path
