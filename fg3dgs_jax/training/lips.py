"""Lips led by their landmarks: what the video says of their motion beside its pixels.

Departure from both papers. A picture loss pulls a lip only as far as its colours overlap with where it should be, and
after tens of visits to each frame lips open little more than half as far as they were filmed. So points on the resting
lips go through the motion network too, and should be seen where the frame's landmarks are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax.data.clip import MOUTH_POINTS
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model.cameras import triangulate
from fg3dgs_jax.training.stages import RegionTask
from fg3dgs_jax.types import Frame, Label


class Lips(NamedTuple):
    """The resting lips, and who moves them."""

    region: str
    points: np.ndarray  # f32 [20, 3], world units: outer and inner contour
    width: float  # between their corners, the median in pixels


def find(dataset: Dataset, tasks: Mapping[str, RegionTask]) -> Lips:
    """The world points nearest to each lip landmark's rays through the training frames, and the lips' region.

    The region is the first one whose mask holds lips. Raises UserError: there is none.
    """
    owners = [name for name, task in tasks.items() if task.include & Label.LIPS and not task.exclude & Label.LIPS]
    owners += [name for name, task in tasks.items() if task.include & Label.HEAD and not task.exclude & Label.LIPS]
    if not owners:
        raise UserError(
            f"--config.layers={','.join(tasks)}: landmarks lead lips, and no region's mask holds any; add lips to a "
            "region's include, or set the stages' weights.landmarks to 0"
        )
    ids = np.asarray(dataset.train_ids)
    marks = np.asarray(dataset.landmarks)[ids, MOUTH_POINTS].astype(np.float64)
    points = [triangulate(marks[:, k], dataset.viewmats[ids], dataset.intrinsics) for k in range(marks.shape[1])]
    width = float(np.median(np.linalg.norm(marks[:, 0] - marks[:, 6], axis=-1)))
    return Lips(owners[0], np.asarray(points, np.float32), width)


def seen(points: jax.Array, frame: Frame) -> jax.Array:
    """World points f32 [N, 3] in the frame's pixels f32 [N, 2]."""
    camera = points @ frame.viewmat[:3, :3].T + frame.viewmat[:3, 3]
    return camera[:, :2] / jnp.maximum(camera[:, 2:], 1e-6) * frame.intrinsics[:2] + frame.intrinsics[2:]


def distance(points: jax.Array, landmarks: jax.Array, width: float) -> jax.Array:
    """Mean distance of moved lip points f32 [20, 2] from the landmarks, both centred on their mean, in lip widths.

    Centred, as LMD is: where the whole mouth is belongs to the pose.
    """
    apart = (points - points.mean(0)) - (landmarks - landmarks.mean(0))
    return jnp.sqrt(jnp.square(apart).sum(-1) + (1e-3 * width) ** 2).mean() / width
