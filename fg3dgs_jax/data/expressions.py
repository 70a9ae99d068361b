"""Expression tracks as a config wants them: ranges of this person's training frames, smoothed where lids are not meant.

Nothing of a held-out frame reaches what others are trained on: ranges come from training frames, and held-out frames
are smoothed among themselves, the others among theirs.
"""

import dataclasses

import numpy as np

from fg3dgs_jax.data.clip import Clip
from fg3dgs_jax.data.face import FAST, centred, normalised
from fg3dgs_jax.errors import UserError

QUICK = (*FAST, "AU05", "AU45")  # never smoothed: lids and gaze move within two frames
BLINKS = ("eyeBlink", "AU45")
SIGMAS = 3.0  # how many of them a kernel reaches


def prepared(clip: Clip, normalise: bool = False, smooth: float = 0.0) -> Clip:
    """The clip with other expressions; the clip itself where nothing is asked for.

    normalise: coefficients are stretched so that 0 is what is usual in the training frames and 1 is strong (gaze: 0
    usual, 1 far), as `face.expression` does over a whole clip. smooth: deviation of a Gaussian over time, in frames,
    for all but QUICK ones. Raises UserError, see `check`.
    """
    check(smooth)
    track = np.array(clip.expression, np.float32)
    for column, name in enumerate(clip.expression_names):
        if normalise:
            track[:, column] = _stretched(name, track[:, column], clip.train_ids)
        if smooth and name not in QUICK:
            track[:, column] = smoothed(track[:, column], clip.test_ids, smooth)
    return clip if not (normalise or smooth) else dataclasses.replace(clip, expression=track)


def check(smooth: float) -> None:
    """Raises UserError: a negative or endless `smooth`."""
    if not 0.0 <= smooth < np.inf:
        raise UserError(f"--config.expression.smooth={smooth:g}: give a deviation in frames, 0 or above")


def _stretched(name: str, track: np.ndarray, among: np.ndarray) -> np.ndarray:
    if name.startswith("gaze"):
        return centred(track, track[among])
    return normalised(track, 99.0 if name in BLINKS else 97.0, track[among])


def smoothed(track: np.ndarray, held_out: np.ndarray, sigma: float) -> np.ndarray:
    """A track [T] under a Gaussian of `sigma` frames; frames `held_out` and the others know nothing of each other."""
    reach = max(1, int(np.ceil(SIGMAS * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    apart = np.zeros(len(track), bool)
    apart[held_out] = True
    out = np.empty(len(track))
    for group in (apart, ~apart):
        total, weight = (np.convolve(np.pad(x * group, reach), kernel, "valid") for x in (track, np.ones(len(track))))
        out[group] = total[group] / weight[group]
    return out.astype(np.float32)
