"""Speech models as front ends: random small ones. Where PyTorch and transformers are installed, they are the oracle."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import hearing, speech_models, wav2vec
from fg3dgs_jax.errors import UserError

CONVOLUTIONS = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_dim": [8] * 7,
                "num_feat_extract_layers": 7}  # fmt: skip
SMALL = {
    **CONVOLUTIONS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 11,
}  # fmt: skip
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def noise(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


def random_arrays(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a wav2vec 2.0 or HuBERT under their published names, of the size of fresh ones."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}

    def put(name: str, *shape: int, norm: bool = False) -> None:
        spread = 0.5 / np.sqrt(max(1, np.prod(shape[1:])))
        arrays[f"{config['model_type']}.{name}.weight"] = np.float32(rng.normal(float(norm), spread, shape))
        arrays[f"{config['model_type']}.{name}.bias"] = np.float32(rng.normal(0, 0.1, shape[0]))

    size, inner, group = config["hidden_size"], config["intermediate_size"], config["feat_extract_norm"] == "group"
    for i, (kernel, width) in enumerate(zip(config["conv_kernel"], config["conv_dim"], strict=True)):
        put(f"feature_extractor.conv_layers.{i}.conv", width, 1 if i == 0 else width, kernel)
        if group:
            del arrays[f"{config['model_type']}.feature_extractor.conv_layers.{i}.conv.bias"]
        if i == 0 or not group:
            put(f"feature_extractor.conv_layers.{i}.layer_norm", width, norm=True)
    put("feature_projection.layer_norm", config["conv_dim"][-1], norm=True)
    put("feature_projection.projection", size, config["conv_dim"][-1])
    put("encoder.pos_conv_embed.conv", size, size // config["num_conv_pos_embedding_groups"], 16)
    put("encoder.layer_norm", size, norm=True)
    for i in range(config["num_hidden_layers"]):
        for part in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"):
            put(f"encoder.layers.{i}.{part}", size, size)
        put(f"encoder.layers.{i}.feed_forward.intermediate_dense", inner, size)
        put(f"encoder.layers.{i}.feed_forward.output_dense", size, inner)
        for part in ("layer_norm", "final_layer_norm"):
            put(f"encoder.layers.{i}.{part}", size, norm=True)
    arrays["lm_head.weight"] = np.float32(rng.normal(0, 0.1, (config["vocab_size"], size)))
    arrays["lm_head.bias"] = np.float32(rng.normal(0, 0.1, config["vocab_size"]))
    return arrays


def write(folder, config: dict, arrays: dict) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    config = {"model_type": "hubert", **SMALL, **BASE}
    return write(tmp_path_factory.mktemp("models") / "tiny-hubert", config, random_arrays(config))


def test_a_front_end_from_a_folder(hubert):
    front = speech_models.front_end(hubert)
    assert front.name.startswith("tiny-hubert@") and (front.context, front.before) == (2, 0)
    assert front.encode(noise(320 * 7)).shape == (7, 16)  # one vector per 320 samples, whatever the convolutions eat
    # As the field stores HuBERT's: frame i holds the vectors 2i and 2i + 1.
    sound = noise(16000)
    made = audio_io.features(hubert, sound, 25.0)
    assert made.values.shape == (25, 2, 16) and made.name == front.name
    vectors = front.encode(np.pad(sound * np.float32(front.scale(sound)), (5120, 34 * 320)))
    np.testing.assert_allclose(made.values.reshape(50, 16), vectors[16:66], atol=1e-4)  # f32; silence around it
    logits = speech_models.front_end(f"{hubert}:logits")
    assert (logits.context, logits.before) == (16, 8) and logits.encode(noise(6400)).shape == (20, 11)


@pytest.mark.parametrize(("samples", "fps"), [(1, 25.0), (641, 25.0), (9_601, 30.0)])
def test_lengths_are_exact(hubert, samples, fps):
    ear = hearing.Hearing(noise(samples), speech_models.front_end(hubert), fps)
    assert len(list(ear)) == int(np.ceil(samples * fps / 16000)) + 2 * hearing.MARGIN


def test_long_sound_is_cut_into_pieces_that_hardly_show(hubert, monkeypatch):
    front, longest = speech_models.front_end(hubert), 0

    def encode(samples):
        nonlocal longest
        longest = max(longest, len(samples))
        return front.encode(samples)

    sound = noise(16000 * 2)
    at_once = front.encode(sound)
    cut = hearing.Pieces(20, 30, 20)
    parts = np.concatenate(list(hearing.pieces([sound], encode, cut)))
    assert longest == 70 * 320 and parts.shape == at_once.shape
    # Attention and norms over time see two thirds of the sound only; what they make of it stays close.
    assert np.corrcoef(parts.ravel(), at_once.ravel())[0, 1] > 0.9


def test_live_sound_through_a_speech_model(hubert):
    front, sound = speech_models.front_end(hubert), noise(16000)
    ear = hearing.Hearing(iter(np.array_split(sound, 60)), front)
    windows = np.stack([heard.window for heard in ear])
    assert windows.shape == (33, 2, 16) and np.isfinite(windows).all()
    assert ear.look_ahead < 0.6


def test_features_of_a_clip_are_kept_and_describe_themselves(hubert, tmp_path, monkeypatch):
    audio_io.save_wav(tmp_path / "audio.wav", noise(16000))
    first = speech_models.for_clip(tmp_path, hubert, tmp_path / "audio.wav", 25.0, 25)
    files = list(tmp_path.glob("audio_features_tiny-hubert@*.npz"))
    assert len(files) == 1 and audio_io.load_features(files[0]).name == first.name
    with monkeypatch.context() as patch:
        patch.setattr(speech_models, "front_end", None)  # not asked again, even where the model is gone
        again = speech_models.for_clip(tmp_path, hubert, tmp_path / "audio.wav", 25.0, 25)
        gone = speech_models.for_clip(tmp_path, "elsewhere/tiny-hubert", tmp_path / "audio.wav", 25.0, 25)
        with pytest.raises(UserError, match="no such audio front end"):  # other features of it are not these
            speech_models.for_clip(tmp_path, "elsewhere/tiny-hubert:logits", tmp_path / "audio.wav", 25.0, 25)
    np.testing.assert_array_equal(again.values, first.values)
    np.testing.assert_array_equal(gone.values, first.values)
    audio_io.save_wav(tmp_path / "audio.wav", noise(32000)[16000:])  # another sound: computed afresh
    assert (speech_models.for_clip(tmp_path, hubert, tmp_path / "audio.wav", 25.0, 25).values != first.values).any()


def test_what_is_no_speech_model_is_refused_in_one_sentence(hubert, tmp_path):
    config = {"model_type": "hubert", **SMALL, **BASE}
    whole = random_arrays(config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("hello")
    lacking = {name: value for name, value in whole.items() if "q_proj" not in name}
    rows = {
        "nowhere": "no such audio front end",
        str(tmp_path / "empty"): "no such audio front end",
        str(tmp_path / "text"): "not a model's description",
        write(tmp_path / "bert", {"model_type": "bert"}, whole): "is a 'bert' model",
        write(tmp_path / "lacking", config, lacking): "do not fit its config.json",
        write(tmp_path / "strange", {**config, "hidden_act": "relu"}, whole): "hidden_act is not gelu",
        write(tmp_path / "strides", {**config, "conv_stride": [4] * 7}, whole): "not per 320",
        f"{hubert}:logit": "logit is none of logits, transformers",
    }
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "weights")
    rows[str(tmp_path / "bert")] = "is a 'bert' model"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    rows[str(tmp_path / "bare")] = "neither model.safetensors nor pytorch_model.bin"
    for text, said in rows.items():
        with pytest.raises(UserError, match=said) as error:
            speech_models.front_end(text)
        assert "\n" not in str(error.value)


# --- against the oracle ---------------------------------------------------------------------------------------------


@pytest.fixture
def oracle():
    pytest.importorskip("torch", reason="PyTorch is not installed (CONTRIBUTING.md, parity tests)")
    return pytest.importorskip("transformers", reason="transformers is not installed (CONTRIBUTING.md, parity tests)")


@pytest.mark.parametrize(("kind", "variant", "logits"), [
    ("wav2vec2", BASE, ":logits"), ("wav2vec2", LARGE, ""), ("hubert", BASE, ""), ("hubert", LARGE, ":logits"),
])  # fmt: skip
def test_parity_with_transformers_on_random_weights(oracle, kind, variant, logits, tmp_path):
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    name = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}[kind]
    model = getattr(oracle, f"{name}ForCTC")(getattr(oracle, f"{name}Config")(**SMALL, **variant)).eval()
    folder, sound = tmp_path / "m", noise(6400)
    model.save_pretrained(folder)
    heard = torch.from_numpy(np.pad(sound, 40))[None]
    with torch.inference_mode():
        expected = model(heard).logits if logits else getattr(model, kind)(heard).last_hidden_state
    ours = speech_models.front_end(f"{folder}{logits}")
    theirs = speech_models.front_end(f"{folder}{logits}:transformers")
    assert ours.name == theirs.name  # the same features, whoever computes them
    assert wav2vec.shape(json.loads((folder / "config.json").read_text())).reach == 400
    # f32 through the layers, and norms that divide by the spread of eight channels.
    np.testing.assert_allclose(ours.encode(sound), expected[0].numpy(), atol=2e-4)
    np.testing.assert_allclose(theirs.encode(sound), expected[0].numpy(), atol=1e-5)
    # The older file format, read without unpickling.
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    speech_models.front_end.cache_clear()
    again = speech_models.front_end(f"{folder}{logits}")
    np.testing.assert_array_equal(again.encode(sound), ours.encode(sound))


def test_whisper_through_transformers(oracle, tmp_path):
    import torch

    torch.manual_seed(0)
    settings = oracle.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=24, vocab_size=100, num_mel_bins=80, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = oracle.WhisperModel(settings).eval()
    model.save_pretrained(tmp_path / "whisper-tiny")
    front = speech_models.front_end(str(tmp_path / "whisper-tiny"))
    sound = noise(16000 * 3)
    mel = oracle.WhisperFeatureExtractor(feature_size=80)(sound, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        expected = model.encoder(mel.input_features).last_hidden_state[0, :150].numpy()
    np.testing.assert_allclose(front.encode(sound), expected, atol=1e-5)
    made = audio_io.features(str(tmp_path / "whisper-tiny"), noise(16000 * 40), 25.0)  # longer than its 30 s
    assert made.values.shape == (1000, 2, 16)
    with pytest.raises(UserError, match="leave :logits out"):
        speech_models.front_end(f"{tmp_path / 'whisper-tiny'}:logits")
