"""Speech-like sound and the mouth that goes with it: syllables of consonants and vowels, with pauses.

Vowels are harmonics of a gliding pitch under formants, fricatives are shaped noise, nasals and stops are made with
closed lips. The mouth follows the phones' targets through a smoothing window (coarticulation), so that it is a
deterministic function of the sound around a moment, and vowels are the louder the wider the mouth.
"""

import dataclasses

import numpy as np
from scipy import ndimage, signal

SAMPLE_RATE = 16000
CONTROL_RATE = 200  # Hz, of everything that changes slowly; 80 samples
SMOOTHING = 0.035  # s, deviation of the Gaussian that lips follow their targets with


@dataclasses.dataclass(frozen=True)
class Phone:
    """Targets of one sound: mouth opening in [0, 1], width in [-1 round, 1 wide], voice and noise level, formants."""

    open: float
    width: float
    voice: float
    noise: float
    formants: tuple[float, float, float]  # Hz; of noise: its band's centre first


VOWELS = {
    "a": Phone(1.00, 0.0, 1.00, 0.0, (760, 1200, 2500)),
    "e": Phone(0.60, 0.6, 0.70, 0.0, (480, 1900, 2550)),
    "i": Phone(0.30, 1.0, 0.45, 0.0, (280, 2300, 3000)),
    "o": Phone(0.65, -0.8, 0.75, 0.0, (450, 850, 2450)),
    "u": Phone(0.25, -1.0, 0.40, 0.0, (310, 720, 2300)),
}
CONSONANTS = {
    "m": Phone(0.0, 0.0, 0.12, 0.0, (250, 1000, 2200)),
    "b": Phone(0.0, 0.0, 0.03, 0.0, (200, 900, 2200)),
    "s": Phone(0.12, 0.5, 0.0, 0.10, (5500, 1800, 2600)),
    "f": Phone(0.08, 0.2, 0.0, 0.06, (3500, 1100, 2300)),
    "l": Phone(0.30, 0.2, 0.25, 0.0, (380, 1300, 2700)),
}
PAUSE = Phone(0.0, 0.0, 0.0, 0.0, (400, 1500, 2500))


@dataclasses.dataclass(frozen=True)
class Speech:
    """A sound and the mouth that makes it."""

    audio: np.ndarray  # f32 [n], 16 kHz, in [-1, 1]
    open: np.ndarray  # f32 [T], mouth opening in [0, 1] per video frame
    width: np.ndarray  # f32 [T], in [-1 round, 1 wide]


def speak(seconds: float, fps: float, num_frames: int, seed: int) -> Speech:
    """Speech-like sound of `seconds` and its mouth in `num_frames` frames; the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    steps = int(np.ceil(seconds * CONTROL_RATE)) + 1
    phones = _phones(rng, steps)
    track = np.array([(p.open, p.width, p.voice, p.noise, *p.formants) for p in phones])[:steps].T
    mouth = ndimage.gaussian_filter1d(track[:2], SMOOTHING * CONTROL_RATE, axis=1, mode="nearest")
    sound = ndimage.gaussian_filter1d(track[2:], 0.012 * CONTROL_RATE, axis=1, mode="nearest")
    audio = _voice(rng, sound)[: round(seconds * SAMPLE_RATE)]
    times = np.arange(num_frames) / fps
    at = lambda values: np.interp(times, np.arange(steps) / CONTROL_RATE, values).astype(np.float32)  # noqa: E731
    return Speech(audio.astype(np.float32), at(mouth[0]), at(mouth[1]))


def _phones(rng: np.random.Generator, steps: int) -> list[Phone]:
    """One phone per control step."""
    phones = [PAUSE] * int(0.15 * CONTROL_RATE)
    while len(phones) < steps:
        for _ in range(rng.integers(3, 9)):  # the syllables of a phrase
            consonant = CONSONANTS[rng.choice(list(CONSONANTS))]
            vowel = VOWELS[rng.choice(list(VOWELS))]
            stress = rng.uniform(0.8, 1.05)
            vowel = dataclasses.replace(vowel, open=min(vowel.open * stress, 1.0), voice=vowel.voice * stress)
            phones += [consonant] * int(rng.uniform(0.06, 0.10) * CONTROL_RATE)
            phones += [vowel] * int(rng.uniform(0.12, 0.26) * CONTROL_RATE)
        phones += [PAUSE] * int(rng.uniform(0.20, 0.55) * CONTROL_RATE)
    return phones


def _voice(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Samples of control tracks [5, steps]: voice and noise level, three formants."""
    steps = sound.shape[1]
    count = steps * SAMPLE_RATE // CONTROL_RATE
    times = np.arange(count) * CONTROL_RATE / SAMPLE_RATE
    voice, noise, *formants = (np.interp(times, np.arange(steps), track) for track in sound)
    drift = ndimage.gaussian_filter1d(rng.standard_normal(steps), 0.3 * CONTROL_RATE, mode="nearest")
    pitch = np.interp(times, np.arange(steps), 120 * np.exp(0.12 * drift / max(drift.std(), 1e-6)))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    voiced = np.zeros(count)
    for harmonic in range(1, 31):
        frequency = harmonic * pitch
        level = sum(
            g / (1 + ((frequency - f) / b) ** 2) for f, g, b in zip(formants, (1, 0.5, 0.2), (70, 90, 130), strict=True)
        )
        voiced += level * np.sin(harmonic * phase)
    hiss = signal.sosfilt(
        signal.butter(2, [2500, 7000], "bandpass", fs=SAMPLE_RATE, output="sos"), rng.standard_normal(count)
    )
    audio = 0.22 * voice * voiced + noise * hiss + 5e-4 * rng.standard_normal(count)
    return 0.9 * np.tanh(audio)
