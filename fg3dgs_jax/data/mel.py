"""What the sync models of the field hear: mel windows for the lip-sync expert, MFCC for SyncNet.

Their weights expect exactly these numbers, so they live apart from the project's own front end (`data.audio`).
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import dct

SAMPLE_RATE = 16000
# The expert: 80 columns a second, 16 of them for five frames at 25 FPS.
HOP, WINDOW, BANDS, COLUMNS = 200, 800, 80, 16
PER_SECOND = SAMPLE_RATE / HOP
PREEMPHASIS = 0.97
LOW, HIGH = 55.0, 7600.0  # Hz
REFERENCE_DB, FLOOR_DB, LIMIT = 20.0, -100.0, 4.0
# SyncNet: 100 vectors a second, 20 of them for five frames.
MFCC_HOP, MFCC_WINDOW, MFCC_FFT, MFCC_BANDS, MFCC_SIZE, MFCC_COLUMNS = 160, 400, 512, 26, 13, 20
LIFTER = 22


def slaney_mel(hertz: np.ndarray | float) -> np.ndarray:
    """Slaney's scale: linear to 1 kHz (15 mel), then 27 mel per factor 6.4."""
    hertz = np.asarray(hertz, np.float64)
    return np.where(hertz < 1000.0, hertz * 0.015, 15.0 + 27.0 * np.log(np.maximum(hertz, 1e-9) / 1000.0) / np.log(6.4))


def slaney_hertz(mel: np.ndarray) -> np.ndarray:
    """The inverse of `slaney_mel`."""
    return np.where(mel < 15.0, mel / 0.015, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))


def filters() -> np.ndarray:
    """f64 [WINDOW / 2 + 1, BANDS]: triangles of equal area, evenly spaced on Slaney's scale from LOW to HIGH."""
    edges = slaney_hertz(np.linspace(slaney_mel(LOW), slaney_mel(HIGH), BANDS + 2))
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    rise = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return np.maximum(np.minimum(rise, fall), 0.0) * (2.0 / (edges[2:] - edges[:-2]))


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """f32 [80, 1 + n / 200] in [-4, 4] of sound f32 [n] at 16 kHz: magnitudes in dB, -100 to 0 spread over the range.

    Column j is centred on sample 200 j; beyond the ends is silence.
    """
    sound = np.asarray(sound, np.float64)
    sharp = np.append(sound[:1], sound[1:] - PREEMPHASIS * sound[:-1])
    padded = np.pad(sharp, WINDOW // 2)
    taper = np.hanning(WINDOW + 1)[:-1]
    weights, parts = filters(), []
    frames = sliding_window_view(padded, WINDOW)[::HOP]
    for part in np.array_split(frames, len(frames) // 4096 + 1):
        parts.append(np.abs(np.fft.rfft(part * taper)) @ weights)
    decibel = 20.0 * np.log10(np.maximum(np.concatenate(parts), 1e-5)) - REFERENCE_DB
    scaled = 2.0 * LIMIT * (decibel - FLOOR_DB) / -FLOOR_DB - LIMIT
    return np.clip(scaled, -LIMIT, LIMIT).astype(np.float32).T


def mel_windows(sound: np.ndarray, frames: int, fps: float = 25.0) -> np.ndarray:
    """f32 [frames, 80, 16]: what is heard while frame i and the four after it are seen; beyond the ends silence."""
    columns = spectrogram(sound).T
    starts = (PER_SECOND * np.arange(frames) / fps).astype(int)
    missing = max(int(starts[-1]) + COLUMNS - len(columns), 0) if frames else 0
    padded = np.pad(columns, ((0, missing), (0, 0)), constant_values=-LIMIT)
    return padded[starts[:, None] + np.arange(COLUMNS)].transpose(0, 2, 1)


def mfcc(sound: np.ndarray) -> np.ndarray:
    """f32 [V, 13], 100 vectors a second, of sound f32 [n] in [-1, 1] at 16 kHz, taken as 16-bit numbers.

    Preemphasis 0.97, no taper, 26 triangles from 0 to 8 kHz on the scale 2595 log10(1 + f / 700) with edges on whole
    FFT bins, log, orthonormal DCT-II, sine lifter of 22; the first coefficient is the log of the frame's energy.
    """
    samples = np.round(np.asarray(sound, np.float64) * 32767.0)
    sharp = np.append(samples[:1], samples[1:] - PREEMPHASIS * samples[:-1])
    count = 1 + max(-(-(len(sharp) - MFCC_WINDOW) // MFCC_HOP), 0)
    sharp = np.pad(sharp, (0, max((count - 1) * MFCC_HOP + MFCC_WINDOW - len(sharp), 0)))
    frames = sliding_window_view(sharp, MFCC_WINDOW)[::MFCC_HOP][:count]
    power = np.abs(np.fft.rfft(frames, MFCC_FFT)) ** 2 / MFCC_FFT
    tiny = np.finfo(np.float64).eps
    energy = np.maximum(power.sum(1), tiny)
    bands = np.maximum(power @ _bin_filters(), tiny)
    cepstra = dct(np.log(bands), type=2, axis=1, norm="ortho")[:, :MFCC_SIZE]
    cepstra *= 1.0 + LIFTER / 2.0 * np.sin(np.pi * np.arange(MFCC_SIZE) / LIFTER)
    cepstra[:, 0] = np.log(energy)
    return cepstra.astype(np.float32)


def _bin_filters() -> np.ndarray:
    """f64 [MFCC_FFT / 2 + 1, 26]."""
    top = 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
    hertz = 700.0 * (10.0 ** (np.linspace(0.0, top, MFCC_BANDS + 2) / 2595.0) - 1.0)
    bins = np.floor((MFCC_FFT + 1) * hertz / SAMPLE_RATE)
    index = np.arange(MFCC_FFT // 2 + 1)[:, None]
    rise = (index - bins[:-2]) / (bins[1:-1] - bins[:-2])
    fall = (bins[2:] - index) / (bins[2:] - bins[1:-1])
    return np.maximum(np.minimum(rise, fall), 0.0)


def mfcc_windows(sound: np.ndarray, frames: int, fps: float = 25.0) -> np.ndarray:
    """f32 [n, 13, 20]: what SyncNet hears while frame i and the next four are seen; whole ones only, n <= frames."""
    vectors = mfcc(sound)
    starts = np.round(SAMPLE_RATE / MFCC_HOP * np.arange(frames) / fps).astype(int)
    starts = starts[starts + MFCC_COLUMNS <= len(vectors)]
    return vectors[starts[:, None] + np.arange(MFCC_COLUMNS)].transpose(0, 2, 1)
