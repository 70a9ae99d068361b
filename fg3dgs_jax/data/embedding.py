"""Google's speech embedding beside log-mel bands: a front end whose weights come with a package, not with a download.

96 numbers that a small convolutional network, trained to tell spoken words apart, makes of 0.8 s of sound (Lin et al.
2020, arXiv:2002.01322; Apache-2.0). openWakeWord 0.4.0 carries it as ONNX files, which onnxruntime runs:
`pip install 'fg3dgs_jax[embedding]'`. Made to hear a word every 80 ms, it is asked here every 20 ms, and the bands stay
beside it: it knows what is said, they know when.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import hearing
from fg3dgs_jax.data.steps import file_sha256
from fg3dgs_jax.errors import UserError

NAME = "logmel+embedding"
INSTALL = "pip install 'fg3dgs_jax[embedding]'"
FILES = {  # SHA-256: other files of these names hear differently
    "melspectrogram.onnx": "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
    "embedding_model.onnx": "ba754db3cd768a524c655ea90655ee5e6055a43b8dfd29366a11e93716ae9e51",
}
FRAMES = 76  # mel frames that an embedding sees, 10 ms apart
SPAN = 512  # samples that a mel frame sees
STEP = 160  # samples from one mel frame to the next
# Samples on each side of the sound, so that vector j is in the middle of the frames it is made from.
AROUND = (FRAMES - 1) * STEP // 2 + (SPAN - audio_io.HOP) // 2
SPREAD = 16.0  # deviation of an embedding's numbers over speech
BATCH = 64
_CONTEXT = -(-AROUND // audio_io.HOP) + 1  # vectors

Mel = Callable[[np.ndarray], np.ndarray]  # f32 [n] in 16-bit units -> f32 [(n - 512) // 160 + 1, 32]
Embed = Callable[[np.ndarray], np.ndarray]  # f32 [B, 76, 32, 1] -> f32 [B, 96]


@functools.lru_cache(maxsize=1)
def front_end() -> hearing.FrontEnd:
    """The front end NAME. Raises UserError: its packages are not installed, or hold other files."""
    mel, embed = _networks()

    def encode(samples: np.ndarray) -> np.ndarray:
        bands = audio_io.log_mel(samples)
        return np.concatenate([bands, embeddings(samples, mel, embed)], axis=1)

    return hearing.FrontEnd(
        name=NAME,
        context=audio_io.CONTEXT,
        before=audio_io.CONTEXT // 2,
        encode=encode,
        scale=audio_io.speech_gain,
        whole=hearing.Pieces(_CONTEXT, 512, _CONTEXT),
        live=hearing.Pieces(_CONTEXT, 2, _CONTEXT),
    )


def embeddings(samples: np.ndarray, mel: Mel, embed: Embed) -> np.ndarray:
    """f32 [m, 96] of sound f32 [320 m] at 16 kHz, vector j around the samples (j + 0.5) * 320, silence around it."""
    count = len(samples) // audio_io.HOP
    sound = np.pad(samples[: count * audio_io.HOP].astype(np.float32), AROUND)
    # Bands are cut 80 dB below the loudest: a full tone behind the sound makes that the same in every piece of it.
    tone = np.sin(2 * np.pi * 1000.0 * np.arange(2 * SPAN) / audio_io.SAMPLE_RATE).astype(np.float32)
    rows = mel(np.concatenate([sound, tone]) * 32767.0)
    seen = sliding_window_view(rows, FRAMES, axis=0)[:: audio_io.HOP // STEP][:count].transpose(0, 2, 1)[..., None]
    parts = [embed(np.ascontiguousarray(seen[i : i + BATCH], np.float32)) for i in range(0, count, BATCH)]
    return np.concatenate([np.zeros((0, 96), np.float32), *parts]) / np.float32(SPREAD)


def _networks() -> tuple[Mel, Embed]:
    files = _files()
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"--audio-features {NAME}: needs onnxruntime; install it with {INSTALL}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    mel, embed = (
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]) for file in files
    )

    def run(session, x: np.ndarray) -> np.ndarray:
        return session.run(None, {session.get_inputs()[0].name: x})[0]

    # What openWakeWord does between the two, to bring the bands where the embedding had them in training.
    return lambda x: run(mel, x[None])[0, 0] / 10.0 + 2.0, lambda x: run(embed, x)[:, 0, 0]


def _files() -> list[Path]:
    """The ONNX files of the installed package, whose code is not imported."""
    found = importlib.util.find_spec("openwakeword")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"--audio-features {NAME}: needs openwakeword 0.4.0; install it with {INSTALL}")
    folder = Path(next(iter(found.submodule_search_locations))) / "resources" / "models"
    for name, digest in FILES.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: is missing or not that of openwakeword 0.4.0; {INSTALL} installs it")
    return [folder / name for name in FILES]
