"""How much of a clip's lip motion its sound tells, whoever listens: in seconds, without training a head.

    python benchmarks/what_sound_tells.py --data DIR [--features logmel+embedding] [--components 24]

Kernel ridge regression from a frame's audio window to its 20 lip landmarks, the head's pose taken off: on the frames
that the dataset holds out, and on eight blocks of the whole clip in turn, each told by the others but for the frames
whose windows overlap it. A yardstick for trained heads, and for front ends: over the blocks, since some dozens of
held-out frames are told well or badly by chance.
Prints a table, and writes JSON with --out FILE.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rasterizer as rasterizer_benchmark

from fg3dgs_jax import cli
from fg3dgs_jax.data.audio_basis import audio_basis
from fg3dgs_jax.data.clip import GUARD_FRAMES, MOUTH_POINTS
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import metrics
from fg3dgs_jax.model.cameras import project, triangulate

BLOCKS = 8
WIDTH, RIDGE = 0.5, 0.3  # of the kernel, in median squared distances, and of the regression
UPPER, LOWER = 14, 18  # middles of the inner lips


def lips_of(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Lips about their middle, [T, 20, 2] in pixels: how far they are from where a rigid head would show them, and that
    rest as the clip shows it on average, [20, 2]."""
    marks = np.asarray(dataset.landmarks, np.float64)[:, MOUTH_POINTS]
    rest = [triangulate(points, dataset.viewmats, dataset.intrinsics) for points in marks.swapaxes(0, 1)]
    rigid = project(np.array(rest), dataset.viewmats, dataset.intrinsics)
    moved = marks - rigid
    return moved - moved.mean(1, keepdims=True), (rigid - rigid.mean(1, keepdims=True)).mean(0)


def told(seen: np.ndarray, wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """All rows' values [T, M] by kernel ridge regression on the rows `known` of what is seen, [T, C]."""
    lengths = np.square(seen).sum(1)
    apart = np.maximum(lengths[:, None] + lengths[known] - 2.0 * seen @ seen[known].T, 0.0)
    kernel = np.exp(-WIDTH / np.median(apart[known]) * apart)
    mean = wanted[known].mean(0)
    return kernel @ np.linalg.solve(kernel[known] + RIDGE * np.eye(len(known)), wanted[known] - mean) + mean


def score(
    windows: np.ndarray, dataset: Dataset, components: int, parts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> dict:
    """Means over parts (frames that tell, frames that are told) of LMD in pixels, r and range of the opening."""
    moved, rest = lips_of(dataset)
    found = []
    for known, asked in parts:
        rows = windows
        if components:
            basis = audio_basis(windows[known], components)
            rows = (windows - basis.mean).reshape(len(windows), -1) @ basis.directions.reshape(-1, components)
        rows = rows.reshape(len(rows), -1)
        guess = told(rows, moved.reshape(len(moved), -1), known).reshape(moved.shape)
        openings = [
            np.linalg.norm(lips[asked, UPPER] - lips[asked, LOWER], axis=-1) for lips in (guess + rest, moved + rest)
        ]
        away = np.linalg.norm(guess[asked] - moved[asked], axis=-1).mean()
        still = np.linalg.norm(moved[known].mean(0) - moved[asked], axis=-1).mean()
        found.append((away, still, metrics.correlation(*openings), metrics.range_ratio(*openings)))
    return dict(
        zip(("lmd", "lmd_still", "lip_opening_r", "lip_opening_range"), np.mean(found, 0).tolist(), strict=True)
    )


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    parser = cli.Parser(
        prog="python benchmarks/what_sound_tells.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    parser.add_argument("--features", default=None, metavar="NAME", help="front end; default: the folder's own")
    parser.add_argument("--components", type=int, default=24, help="of a window, principal ones; 0: the whole window")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the scores go as JSON; default: nowhere")
    flags = parser.parse_args(argv)
    dataset = open_dataset(flags.data, audio_features=flags.features)
    windows, every = np.asarray(dataset.audio_features, np.float64), np.arange(dataset.num_frames)
    blocks = [
        (np.flatnonzero((every < block[0] - GUARD_FRAMES) | (every > block[-1] + GUARD_FRAMES)), block)
        for block in np.array_split(every, BLOCKS)
    ]
    parts = {"held-out frames": [(dataset.train_ids, dataset.test_ids)], f"{BLOCKS} blocks in turn": blocks}
    try:
        found = {name: score(windows, dataset, flags.components, part) for name, part in parts.items()}
    except ValueError as error:
        raise UserError(f"--components {flags.components}: {flags.data} is too little ({error})") from None
    print(f"{dataset.audio_name}, {flags.components or 'all'} components; LMD in pixels, of a still mouth, r, range")
    for name, row in found.items():
        print(f"{name:20s}", *(f"{value:6.2f}" for value in row.values()))
    report = {
        "machine": rasterizer_benchmark.machine(), "frames": dataset.num_frames, "front_end": dataset.audio_name,
        "components": flags.components, "scores": found,
    }  # fmt: skip
    if flags.out:
        flags.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
