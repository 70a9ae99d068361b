"""Scores of predicted frames against ground truth: pixels, mouth landmarks, action units, jitter, paired intervals.

Landmark scores take MediaPipe's 478 points of `data.face.track_face`, NaN where no face was found: such frames score
NaN and are left out of means.
"""

from typing import NamedTuple

import cv2
import numpy as np

from fg3dgs_jax.data.face import FaceTrack

PSNR_CEILING = 100.0  # dB, given to equal images so that means stay finite

# The points of the usual 68-point scheme numbered 48-67 (outer lips clockwise, then inner lips) among MediaPipe's 478.
MOUTH_LANDMARKS = (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 81, 13, 311, 308, 402, 14, 178)
UPPER_INNER_LIP, LOWER_INNER_LIP = 13, 14
# MediaPipe's stand-ins for action units; left and right are averaged, differences are spelled out.
UPPER_UNITS = ("browInnerUp", "browOuterUp", "browDown", "eyeWide", "cheekSquint", "eyeSquint", "eyeBlink")
LOWER_UNITS = (
    "noseSneer", "mouthUpperUp", "mouthSmile", "mouthDimple", "mouthFrown", "mouthShrugLower", "mouthStretch",
    "mouthPress", "mouthLowerDown", "jawOpen", "mouthClose",
)  # fmt: skip
UNIT_SCALE = 5.0  # OpenFace's intensities go from 0 to 5, blendshapes from 0 to 1


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval; low and high are NaN for fewer values than two blocks."""

    mean: float
    low: float
    high: float


def psnr(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, of u8 [H, W, 3] images; `mask` bool [H, W] selects the pixels that count.

    One mean squared error over all counted pixels and channels, peak 255; 100 dB for equal images, NaN for no pixels.
    """
    error = (prediction.astype(np.float32) - truth.astype(np.float32)) / 255.0
    if mask is not None:
        error = error[mask]
    if error.size == 0:
        return float("nan")
    mse = float(np.mean(np.square(error, dtype=np.float64)))
    return PSNR_CEILING if mse == 0.0 else min(PSNR_CEILING, -10.0 * float(np.log10(mse)))


def crop(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of an image inside a half-open box (row0, row1, col0, col1)."""
    row0, row1, col0, col1 = (int(edge) for edge in box)
    return image[row0:row1, col0:col1]


def psnr_boxes(prediction: np.ndarray, truth: np.ndarray, boxes: np.ndarray) -> float:
    """PSNR over the pixels of boxes [B, 4]; overlapping pixels count once."""
    inside = np.zeros(truth.shape[:2], bool)
    for box in np.atleast_2d(boxes):
        crop(inside, box)[...] = True
    return psnr(prediction, truth, inside)


def box_error(prediction: np.ndarray, truth: np.ndarray, boxes: np.ndarray) -> float:
    """Mean absolute error over boxes [B, 4], grey levels of 255: linear, so that differences may be averaged."""
    errors = [
        np.abs(crop(prediction, b).astype(np.float32) - crop(truth, b)).mean(axis=-1).ravel()
        for b in np.atleast_2d(boxes)
    ]
    pixels = np.concatenate(errors)
    return float(pixels.mean()) if pixels.size else float("nan")


def mask_error(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute error over the pixels of a mask bool [H, W], grey levels of 255; NaN for no pixels."""
    error = np.abs(prediction.astype(np.float32) - truth)[mask]
    return float(error.mean()) if error.size else float("nan")


def _blur(image: np.ndarray) -> np.ndarray:
    taps = cv2.getGaussianKernel(11, 1.5)
    return cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_CONSTANT)


def ssim(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float]:
    """Structural similarity (Wang et al. 2004) of u8 [H, W, 3] images: (mean over the frame, mean over `mask`).

    11x11 Gaussian window of sigma 1.5, data range 1, K1 = 0.01, K2 = 0.03, per RGB channel, zero-padded borders.
    The masked value averages the whole images' SSIM map over `mask` [H, W]; NaN without mask or pixels.
    """
    a, b = prediction / 255.0, truth / 255.0
    mean_a, mean_b = _blur(a), _blur(b)
    variances = _blur(a * a) - mean_a**2 + _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2.0 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    similarity = luminance * (2.0 * covariance + 0.03**2) / (variances + 0.03**2)
    masked = similarity[mask] if mask is not None else np.empty(0)
    return float(similarity.mean()), float(masked.mean()) if masked.size else float("nan")


def mouth_distance(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LMD per frame, f64 [T] in pixels, of landmarks [T, 478, 2]: 20 mouth points, each set centred on its mean."""

    def centred(points: np.ndarray) -> np.ndarray:
        mouth = np.asarray(points, np.float64)[:, MOUTH_LANDMARKS]
        return mouth - mouth.mean(axis=1, keepdims=True)

    return np.linalg.norm(centred(prediction) - centred(truth), axis=-1).mean(axis=-1)


def lip_opening(landmarks: np.ndarray) -> np.ndarray:
    """Distance of the inner lips' middles, f64 [T] in pixels, of landmarks [T, 478, 2]."""
    points = np.asarray(landmarks, np.float64)
    return np.linalg.norm(points[:, UPPER_INNER_LIP] - points[:, LOWER_INNER_LIP], axis=-1)


def action_units(track: FaceTrack, names: tuple[str, ...]) -> np.ndarray:
    """f64 [T, len(names)], 0 to 5: stand-ins for OpenFace's intensities from blendshapes; NaN where no face was."""
    column = {name: track.blendshapes[:, i] for i, name in enumerate(track.names)}
    sides = [[column[k] for k in (name, f"{name}Left", f"{name}Right") if k in column] for name in names]
    return UNIT_SCALE * np.stack([np.mean(found, axis=0) for found in sides], axis=-1).astype(np.float64)


def action_unit_error(prediction: FaceTrack, truth: FaceTrack, names: tuple[str, ...]) -> float:
    """AUE: squared error of the action units, summed over them, mean over the frames in which both have a face."""
    if not prediction.names or not truth.names:
        return float("nan")
    error = ((action_units(prediction, names) - action_units(truth, names)) ** 2).sum(-1)
    return float(np.nanmean(error)) if np.isfinite(error).any() else float("nan")


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two series [T] over the entries finite in both; NaN if fewer than 3 or one is constant."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if a.size < 3 or np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def range_ratio(prediction: np.ndarray, truth: np.ndarray) -> float:
    """How far one series [T] swings of what the other does: ratio of their standard deviations over the entries finite
    in both; NaN if fewer than 3 or the truth is constant. Beside `correlation`, which a timid copy passes too."""
    prediction, truth = np.asarray(prediction, np.float64), np.asarray(truth, np.float64)
    both = np.isfinite(prediction) & np.isfinite(truth)
    if both.sum() < 3 or np.ptp(truth[both]) == 0.0:
        return float("nan")
    return float(prediction[both].std() / truth[both].std())


def jitter(landmarks: np.ndarray, ids: np.ndarray) -> float:
    """Root mean square of the landmarks' second difference in time, pixels per frame squared.

    Over all points of landmarks [T, L, 2]; only three frames whose `ids` [T] follow each other make a difference, so
    held-out blocks are not joined. NaN without such frames.
    """
    ids = np.asarray(ids)
    if len(ids) < 3:
        return float("nan")
    points = np.asarray(landmarks, np.float64)
    second = points[2:] - 2.0 * points[1:-1] + points[:-2]
    adjacent = (np.diff(ids)[1:] == 1) & (np.diff(ids)[:-1] == 1)
    squared = np.square(second[adjacent]).sum(axis=-1)
    return float(np.sqrt(np.nanmean(squared))) if np.isfinite(squared).any() else float("nan")


def block_rows(count: int, block: int, samples: int, seed: int) -> np.ndarray:
    """Indices [samples, count] of moving-block resamples of `count` frames: blocks keep the likeness of neighbours."""
    blocks = -(-count // block)
    starts = np.random.default_rng(seed).integers(0, count - block + 1, (samples, blocks))
    return (starts[..., None] + np.arange(block)).reshape(samples, -1)[:, :count]


def _resampled_means(values: np.ndarray, block: int, samples: int, seed: int) -> np.ndarray:
    """Means [samples, K] of moving-block resamples of values [T, K].

    One row of NaN for fewer values than two blocks: a block of everything would pretend certainty.
    """
    count = len(values)
    if count < 2 * block:
        return np.full((1, values.shape[1]), np.nan)
    return values[block_rows(count, block, samples, seed)].mean(axis=1)


def block_bootstrap(values: np.ndarray, block: int = 6, samples: int = 4000, seed: int = 0) -> Interval:
    """Mean of values [T] (frames in order) with a 95 % moving-block bootstrap interval; non-finite ones left out."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(_resampled_means(values[:, None], block, samples, seed)[:, 0], (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def paired_reduction(
    ours: np.ndarray, other: np.ndarray, block: int = 6, samples: int = 4000, seed: int = 0
) -> dict[str, Interval]:
    """How much lower `ours` [T] is than `other` [T] on the same frames, resampled in pairs.

    Returns:
      "difference": other - ours in the values' unit; "relative": 1 - mean(ours) / mean(other). Positive: ours is lower.
    """
    both = np.stack([np.asarray(ours, np.float64), np.asarray(other, np.float64)], axis=1)
    both = both[np.isfinite(both).all(axis=1)]
    if not len(both) or both[:, 1].mean() == 0.0:
        missing = Interval(float("nan"), float("nan"), float("nan"))
        return {"difference": missing, "relative": missing}
    means = _resampled_means(both, block, samples, seed)
    relative = 1.0 - means[:, 0] / np.maximum(means[:, 1], 1e-12)
    mean_ours, mean_other = both.mean(axis=0)
    difference_low, difference_high = np.percentile(means[:, 1] - means[:, 0], (2.5, 97.5))
    relative_low, relative_high = np.percentile(relative, (2.5, 97.5))
    return {
        "difference": Interval(float(mean_other - mean_ours), float(difference_low), float(difference_high)),
        "relative": Interval(float(1.0 - mean_ours / mean_other), float(relative_low), float(relative_high)),
    }
