"""The few directions in which a clip's audio windows vary most: what networks see of them who learn from little.

A window of the speech embedding beside log-mel bands has 2,560 numbers, twenty seconds of speech have 500 windows, and
a network that sees all of them learns the sentence by heart. Principal components keep what the windows differ in, and
nobody's lips are looked at to find them. Beyond both papers.
"""

from typing import NamedTuple

import numpy as np

MOST = 2000  # windows that are looked at, spread over the clip


class AudioBasis(NamedTuple):
    """Coefficients of windows f32 [L, A, D]: (windows - mean) . directions, f32 [L, C], of deviation 1 all together."""

    mean: np.ndarray  # f32 [A, D]
    directions: np.ndarray  # f32 [A, D, C], the strongest first, orthogonal and of equal length


def audio_basis(windows: np.ndarray, components: int) -> AudioBasis:
    """The first `components` principal components C of audio windows f32 [L, A, D].

    Raises ValueError: windows have no such number of components.
    """
    rows = windows.reshape(len(windows), -1)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST)).round().astype(int))]
    mean = rows.mean(0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(rows - mean, full_matrices=False)
    if not 1 <= components <= (sizes > 1e-6 * sizes[0]).sum():
        raise ValueError(f"{len(rows)} audio windows do not vary in {components} directions")
    deviation = np.sqrt(np.square(sizes[:components]).sum() / (len(rows) * components))
    shape = windows.shape[1:]
    directions = (axes[:components].T / deviation).reshape(*shape, components)
    return AudioBasis(mean.reshape(shape).astype(np.float32), directions.astype(np.float32))
