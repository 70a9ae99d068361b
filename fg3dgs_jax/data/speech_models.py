"""Front ends by name: log-mel bands, alone or with an embedding, and speech models, each a folder on disk.

A folder holds a wav2vec 2.0, HuBERT (any language) or Whisper model: config.json and model.safetensors or
pytorch_model.bin, as their publishers lay them out; nothing is downloaded. wav2vec 2.0 and HuBERT run in JAX
(`wav2vec`), Whisper through transformers, and so do the others where the name of the folder is followed by
`:transformers`. `:logits` takes the scores of the characters in place of the last hidden states, in windows of 16
vectors, as AD-NeRF's descendants do with Esperanto's.
"""

import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import embedding, hearing, torch_file, wav2vec, weights
from fg3dgs_jax.data.steps import file_sha256
from fg3dgs_jax.errors import UserError

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Encode = Callable[[np.ndarray], np.ndarray]

BUILT_IN: dict[str, Callable[[], hearing.FrontEnd]] = {
    hearing.LOGMEL.name: lambda: hearing.LOGMEL,
    embedding.NAME: embedding.front_end,
}
CHOICES = ("logits", "transformers")
KINDS = ("wav2vec2", "hubert", "whisper")
FILES = ("model.safetensors", "pytorch_model.bin")
HIDDEN_CONTEXT, LOGITS_CONTEXT = 2, 16  # vectors in a frame's window, as the field has them
WHOLE = hearing.Pieces(250, 1000, 250)  # 5 s of context on each side of 20 s; Whisper's 30 s in all
LIVE = hearing.Pieces(100, 4, 10)


def named(text: str) -> tuple[Path, set[str]]:
    """A folder and the choices after it: `models/hubert:logits`. Raises UserError for an unknown choice."""
    path, *choices = text.split(":")
    for choice in choices:
        if choice not in CHOICES:
            raise UserError(f"--audio-features {text}: {choice} is none of {', '.join(CHOICES)}")
    return Path(path), set(choices)


def name_of(text: str) -> str:
    """What this front end's features are called: the folder's name, the choice that changes them, the weights' hash."""
    if text in BUILT_IN:
        return text
    folder, choices = named(text)
    return f"{folder.resolve().name}{':logits' if 'logits' in choices else ''}@{file_sha256(_weights(folder))[:12]}"


def _weights(folder: Path) -> Path:
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds neither {' nor '.join(FILES)}; download the model's folder whole")
    return file


def for_clip(folder: Path, text: str, sound: Path, fps: float, frames: int) -> audio_io.AudioFeatures:
    """The features [frames, A, D] of a dataset's sound, computed once and kept beside it.

    Raises UserError: no such front end, or the sound cannot be read.
    """
    samples = audio_io.load_audio(sound)
    if text == hearing.LOGMEL.name:
        return audio_io.features(text, samples, fps, frames)
    if text not in BUILT_IN:
        model, choices = named(text)
        endings = "", "-logits@*" if "logits" in choices else "@*"
        kept = [file for ending in endings for file in folder.glob(f"audio_features_{model.name}{ending}.npz")]
        if not model.exists() and len(kept) == 1:  # computed where the model was
            return audio_io.load_features(kept[0])
        _json(model / "config.json")
    file = folder / f"audio_features_{name_of(text).replace(':', '-')}.npz"
    if file.is_file():
        old = audio_io.load_features(file)
        if (old.sha256, old.fps, len(old.values)) == (audio_io.audio_sha256(samples), fps, frames):
            return old
    made = audio_io.features(text, samples, fps, frames)
    try:
        audio_io.save_features(file, made)
    except OSError as error:  # a folder that others own: computed again next time
        log.warning("%s: cannot be kept (%s)", file, error.strerror)
    return made


@functools.lru_cache(maxsize=2)
def front_end(text: str) -> hearing.FrontEnd:
    """The front end of a built-in name, or of `FOLDER[:logits][:transformers]`.

    Raises UserError: no such front end, weights that do not fit a folder, what it needs is not installed.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]()
    folder, choices = named(text)
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}: is a {kind!r} model; give one of {', '.join(KINDS)}")
    if "logits" in choices and kind == "whisper":
        raise UserError(f"{folder}:logits: Whisper's encoder has no scores of characters; leave :logits out")
    file = _weights(folder)
    make = _jax_encoder if kind != "whisper" and "transformers" not in choices else _transformers_encoder
    try:
        encode = make(folder, kind, config, _arrays(file), "logits" in choices)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: its weights do not fit its config.json ({error}); download it again") from None
    logits = "logits" in choices
    return hearing.FrontEnd(
        name=name_of(text),
        context=LOGITS_CONTEXT if logits else HIDDEN_CONTEXT,
        before=LOGITS_CONTEXT // 2 if logits else 0,
        encode=encode,
        scale=_unit_variance if kind != "whisper" and _normalised(folder) else lambda sound: 1.0,
        whole=WHOLE,
        live=LIVE,
    )


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError
        return content
    except OSError:
        raise UserError(
            f"{file.parent}: no such audio front end (it has no {file.name}); give {' or '.join(BUILT_IN)}, a file of "
            "features, or the folder of a wav2vec 2.0, HuBERT or Whisper model, such as facebook/hubert-large-ls960-ft "
            "(Apache-2.0)"
        ) from None
    except ValueError:
        raise UserError(f"{file}: is not a model's description; download the folder again") from None


def _arrays(file: Path) -> Arrays:
    if file.suffix == ".safetensors":
        return weights.read_safetensors(file)[0]
    try:
        return torch_file.tensors(torch_file.read(file))
    except torch_file.Refused as reason:
        raise UserError(f"{file}: is refused because {reason}; download it again") from None


def _normalised(folder: Path) -> bool:
    """Whether the model was trained on sound of unit variance."""
    file = folder / "preprocessor_config.json"
    return bool(_json(file).get("do_normalize", True)) if file.is_file() else True


def _unit_variance(sound: np.ndarray) -> float:
    return 1.0 / math.sqrt(float(np.var(sound.astype(np.float64))) + 1e-7) if len(sound) else 1.0


def _jax_encoder(folder: Path, kind: str, config: dict, arrays: Arrays, logits: bool) -> Encode:
    import jax

    spec = wav2vec.shape(config)
    stored = jax.device_put(wav2vec.take(arrays, spec))
    if logits and "lm_head.weight" not in stored:
        raise ValueError("it has no scores of characters, leave :logits out")
    return lambda samples: np.asarray(wav2vec.encode(stored, _padded(samples, spec.reach), spec, logits))


def _padded(samples: np.ndarray, reach: int) -> np.ndarray:
    """Sound f32 [320 m] with as many zeros around it as give m vectors, vector j around the sample (j + 0.5) * 320."""
    before = (reach - audio_io.HOP) // 2
    return np.pad(samples.astype(np.float32), (before, reach - audio_io.HOP - before))


def _transformers_encoder(folder: Path, kind: str, config: dict, arrays: Arrays, logits: bool) -> Encode:
    """The same through transformers and PyTorch. Weights are put in by name: nothing is unpickled."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"{folder}: needs {error.name or 'transformers'}; install it with pip install 'fg3dgs_jax[speech]'"
        ) from None
    settings = transformers.AutoConfig.for_model(**config)
    head = {"wav2vec2": transformers.Wav2Vec2ForCTC, "hubert": transformers.HubertForCTC}.get(kind) if logits else None
    model = head(settings) if head else transformers.AutoModel.from_config(settings)
    prefix = "" if head else "model." if kind == "whisper" else f"{kind}."
    given = {name.removeprefix(prefix): torch.from_numpy(np.array(value)) for name, value in _new_names(arrays).items()}
    missing = [name for name in model.load_state_dict(given, strict=False).missing_keys if not _unused(name)]
    if missing:
        raise KeyError(missing[0])
    model.eval()
    if kind == "whisper":
        return _whisper(model.encoder, settings)
    reach = wav2vec.shape(config).reach

    def encode(samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out = model(torch.from_numpy(_padded(samples, reach))[None])
        return (out.logits if head else out.last_hidden_state)[0].float().numpy()

    return encode


def _unused(name: str) -> bool:
    return name.endswith("masked_spec_embed") or name.startswith("decoder.")


def _new_names(arrays: Arrays) -> Arrays:
    """Weight norm under the names that PyTorch gives it since 2.0."""
    ends = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {name if (end := name.rsplit(".", 1)[-1]) not in ends else name.removesuffix(end) + ends[end]: value
            for name, value in arrays.items()}  # fmt: skip


def _whisper(encoder, settings) -> Encode:
    import torch
    import transformers

    hear = transformers.WhisperFeatureExtractor(feature_size=settings.num_mel_bins)

    def encode(samples: np.ndarray) -> np.ndarray:
        mel = hear(samples, sampling_rate=audio_io.SAMPLE_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            out = encoder(mel).last_hidden_state[0]
        return out[: len(samples) // audio_io.HOP].float().numpy()  # it always hears 30 s, most of them silent

    return encode
