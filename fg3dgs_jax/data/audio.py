"""Audio in (any file that holds sound), 16 kHz mono, and the built-in front end: log-mel windows per video frame."""

import dataclasses
import hashlib
import math
import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fg3dgs_jax.data.video import decode_in_child
from fg3dgs_jax.errors import UserError

SAMPLE_RATE = 16000
HOP = 320  # samples: 50 vectors a second, two per frame at 25 FPS, as HuBERT and wav2vec 2.0
WINDOW = 800  # samples, 50 ms
FFT = 1024
BANDS = 64
CONTEXT = 16  # vectors in a frame's window, 0.32 s
LOG_FLOOR = 1e-4  # mel amplitude; keeps digital silence finite
LOUDEST = 16.0  # of full scale: floating-point files may exceed 1 a little, and those in another unit by thousands
SPEECH_LEVEL = 0.1  # RMS that loud speech is brought to, so that recordings of different gain agree
# Mean and deviation of log-mel over speech at SPEECH_LEVEL. Constants, so that training and inference agree.
LOG_MEAN, LOG_STD = -2.5, 2.0


@dataclasses.dataclass(frozen=True)
class AudioFeatures:
    """Feature windows with what is needed to know whether they fit a model and a clip."""

    values: np.ndarray  # f32 [T, A, D]: per frame a window of A vectors of D dimensions
    name: str  # the front end
    fps: float
    sample_rate: int
    sha256: str  # of the 16-bit samples they were computed from


def load_audio(
    path: str | Path, sample_rate: int = SAMPLE_RATE, warnings: list[str] | None = None, *, whole: bool = False
) -> np.ndarray:
    """f32 [n] in about [-1, 1], mono: any rate, channel count and sample format; of a video its audio track.

    Of a video, sample 0 is at the time of the first frame. Channels are averaged, the rate converted by soxr.
    warnings: receives sentences on damaged parts. whole: refuse a file whose end is missing.
    Raises UserError: no such file, no audio track, nothing readable, values that are no sound.
    """
    parts = []
    for message, data in decode_in_child(path, {"what": "samples", "sample_rate": int(sample_rate)}):
        if "samples" in message:
            parts.append(np.frombuffer(data, "<f4"))
        if whole and message.get("cut"):
            raise UserError(f"{path} is cut off ({message['warning'].split(' (')[0]}); export it again")
        if "warning" in message and warnings is not None:
            warnings.append(message["warning"])
    sound = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if sound.size and not -LOUDEST <= sound.min() <= sound.max() <= LOUDEST:
        raise UserError(f"{path}: its samples lie far beyond full scale, -1 to 1; export it again, normalised")
    return sound


def save_wav(path: str | Path, audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes f32 [n] in [-1, 1] as 16-bit PCM; the file appears under its name only when complete."""
    import soundfile

    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        soundfile.write(partial, np.clip(audio, -1, 1), sample_rate, subtype="PCM_16", format="WAV")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def num_frames(audio: np.ndarray, fps: float = 25.0, sample_rate: int = SAMPLE_RATE) -> int:
    """Video frames that cover the whole sound, at least one."""
    return max(1, math.ceil(len(audio) * fps / sample_rate - 1e-6))


def audio_sha256(audio: np.ndarray) -> str:
    """Of the samples as 16-bit integers: the same for f32 samples and for the wav file written from them."""
    return hashlib.sha256(np.round(np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes()).hexdigest()


def mel_filters(bands: int = BANDS, low: float = 60.0, high: float = 7600.0) -> np.ndarray:
    """f32 [FFT/2+1, bands]: triangles equally spaced on the mel scale (2595 log10(1 + f/700)), unit sum each."""
    mel = np.linspace(*(2595 * np.log10(1 + np.array([low, high]) / 700)), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    freqs = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)[:, None]
    rise = (freqs - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - freqs) / (edges[2:] - edges[1:-1])
    weights = np.clip(np.minimum(rise, fall), 0, None)
    return (weights / np.maximum(weights.sum(0), 1e-9)).astype(np.float32)


def log_mel(audio: np.ndarray) -> np.ndarray:
    """f32 [V, BANDS] from f32 [n] at 16 kHz: vector j is centred on (j + 0.5) * HOP samples; about unit scale."""
    count = max(1, math.ceil(len(audio) / HOP))
    before = (WINDOW - HOP) // 2
    padded = np.pad(audio.astype(np.float32), (before, count * HOP - len(audio) + WINDOW))
    taper = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    filters = mel_filters()
    frames = sliding_window_view(padded, WINDOW)[::HOP][:count]
    parts = [np.abs(np.fft.rfft(part * taper, FFT)) @ filters for part in np.array_split(frames, count // 2048 + 1)]
    return ((np.log(np.concatenate(parts) + LOG_FLOOR) - LOG_MEAN) / LOG_STD).astype(np.float32)


def speech_gain(audio: np.ndarray) -> float:
    """Factor that brings the loud parts (90th percentile of 20 ms RMS) to SPEECH_LEVEL, between 1/10 and 10."""
    if len(audio) < HOP:
        return 1.0
    rms = np.sqrt(np.mean(audio[: len(audio) // HOP * HOP].reshape(-1, HOP) ** 2, axis=1))
    return float(np.clip(SPEECH_LEVEL / max(float(np.percentile(rms, 90)), 1e-9), 0.1, 10.0))


def windows(vectors: np.ndarray, frames: int, fps: float = 25.0, per_second: float = SAMPLE_RATE / HOP) -> np.ndarray:
    """f32 [frames, CONTEXT, D]: for each frame the vectors around its time i / fps, the ends filled with silence."""
    centre = np.round(np.arange(frames) * per_second / fps).astype(int)
    silence = np.full((1, vectors.shape[1]), (math.log(LOG_FLOOR) - LOG_MEAN) / LOG_STD, np.float32)
    index = centre[:, None] + np.arange(-CONTEXT // 2, CONTEXT // 2)
    index = np.where((index >= 0) & (index < len(vectors)), index, len(vectors))
    return np.concatenate([vectors, silence])[index]


def log_mel_windows(audio: np.ndarray, frames: int, fps: float = 25.0) -> np.ndarray:
    """f32 [frames, 16, 64] from f32 [n] at 16 kHz: the front end "logmel" that needs no weights."""
    return windows(log_mel(audio * speech_gain(audio)), frames, fps)


def features(name: str, audio: np.ndarray, fps: float = 25.0, frames: int | None = None) -> AudioFeatures:
    """Feature windows of f32 [n] at 16 kHz by a front end of `speech_models`: a built-in name or a model's folder.

    Raises UserError if there is no such front end.
    """
    frames = num_frames(audio, fps) if frames is None else frames
    if name == "logmel":
        values = log_mel_windows(audio, frames, fps)
    else:
        from fg3dgs_jax.data import hearing, speech_models  # which stand on this module

        front = speech_models.front_end(name)
        name, values = front.name, hearing.windows(audio, front, fps, frames)
    return AudioFeatures(values, name, float(fps), SAMPLE_RATE, audio_sha256(audio))


def save_features(path: str | Path, features: AudioFeatures) -> None:
    """Writes a self-describing .npz; the file appears under its name only when complete."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            fields = {f.name: getattr(features, f.name) for f in dataclasses.fields(features) if f.name != "values"}
            np.savez(file, features=features.values, **fields)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_features(path: str | Path) -> AudioFeatures:
    """Reads what `save_features` wrote. Raises UserError if the file is missing or something else."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            values = np.asarray(data["features"], np.float32)
            if values.ndim != 3:
                raise ValueError("not [T, A, D]")
            rest = (str(data["name"]), float(data["fps"]), int(data["sample_rate"]), str(data["sha256"]))
            return AudioFeatures(values, *rest)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no audio features ({error}); run preprocess again") from error
