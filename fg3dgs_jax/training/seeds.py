"""Where a region's first Gaussians go (FG Eq. 4 leaves it open).

Departure: the papers start from uniform grey points in a cube. We keep the points of that cube that a few frames' masks
agree on, in the colours seen there: the same cost, and nothing has to be moved or pruned first.
"""

import numpy as np

from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.model.cameras import project, triangulate
from fg3dgs_jax.training.stages import RegionTask

NUM_VIEWS = 24
AGREEMENT = 0.6  # share of the views whose mask must hold a point
CANDIDATES = 40_000


def _views(dataset: Dataset) -> np.ndarray:
    """Training frames spread evenly over the clip."""
    ids = np.asarray(dataset.train_ids)
    return ids[np.linspace(0, len(ids) - 1, min(NUM_VIEWS, len(ids))).astype(int)]


def _box_cubes(dataset: Dataset, task: RegionTask, ids: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Centre and half-edge in world units of the cubes that hold the region."""
    if not task.box:
        return [(np.zeros(3), 1.2 * dataset.extent)]
    boxes = np.asarray(dataset.lips_box)[:, None] if task.box == "lips" else np.asarray(dataset.eye_boxes)
    cubes = []
    for k in range(boxes.shape[1]):
        box = boxes[ids, k].astype(np.float64)
        middles = np.stack([box[:, 2] + box[:, 3], box[:, 0] + box[:, 1]], 1) / 2.0
        centre = triangulate(middles, dataset.viewmats[ids], dataset.intrinsics)
        view = dataset.viewmats[ids[0]]
        depth = float(view[2, :3] @ centre + view[2, 3])
        edge = float(np.median(box[:, 1] - box[:, 0]))
        cubes.append((centre, 0.5 * edge * abs(depth) / float(dataset.intrinsics[0])))
    return cubes


def seed_points(dataset: Dataset, task: RegionTask, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` points f32 [n, 3] (fewer if the masks leave less room) and their colours f32 [n, 3] in [0, 1]."""
    rng = np.random.default_rng(seed)
    ids = _views(dataset)
    cubes = _box_cubes(dataset, task, ids)
    share = CANDIDATES // len(cubes)
    points = np.concatenate([centre + half * rng.uniform(-1.0, 1.0, (share, 3)) for centre, half in cubes])
    votes, colors = np.zeros(len(points)), np.zeros((len(points), 3))
    for i in ids:
        pixels = project(points, dataset.viewmats[i], dataset.intrinsics)
        image, _, labels = dataset.pictures(int(i))
        inside = ((labels & task.include) != 0) & ((labels & task.exclude) == 0)
        cols = np.clip(pixels[:, 0], 0, labels.shape[1] - 1).astype(int)
        rows = np.clip(pixels[:, 1], 0, labels.shape[0] - 1).astype(int)
        hit = inside[rows, cols]
        votes += hit
        colors += hit[:, None] * image[rows, cols] / 255.0
    agreed = np.flatnonzero(votes >= min(AGREEMENT * len(ids), max(votes.max(), 1)))
    chosen = rng.permutation(agreed)[:count]
    return points[chosen].astype(np.float32), (colors[chosen] / votes[chosen, None]).astype(np.float32)
