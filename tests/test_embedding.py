"""The speech embedding as a front end: what a vector hears, by networks that only sum, and the real ones."""

import numpy as np
import pytest

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import embedding, hearing, speech_models
from fg3dgs_jax.errors import UserError


def mel(sound):
    """Mel frames of sums: 512 samples each, 160 apart."""
    rows = np.lib.stride_tricks.sliding_window_view(sound, embedding.SPAN)[:: embedding.STEP].sum(1)
    return np.repeat(rows[:, None], 32, 1).astype(np.float32)


def embed(windows):
    assert windows.dtype == np.float32 and windows.shape[1:] == (76, 32, 1) and len(windows) <= embedding.BATCH
    return np.repeat(windows.sum((1, 2, 3))[:, None], 96, 1)


@pytest.mark.parametrize("count", [0, 1, 7, 150])
def test_a_vector_sees_as_much_sound_before_its_middle_as_after(count):
    for at in {0, count // 2 * 320 + 160, 320 * count - 1} if count else ():
        sound = np.zeros(320 * count, np.float32)
        sound[at] = 1.0
        vectors = embedding.embeddings(sound, mel, embed)
        assert vectors.shape == (count, 96) and vectors.dtype == np.float32
        middles = (np.arange(count) + 0.5) * 320
        reach = embedding.AROUND + 160
        np.testing.assert_array_equal(vectors[:, 0] != 0, (at >= middles - reach) & (at < middles + reach))
    assert embedding.embeddings(np.zeros(0, np.float32), mel, embed).shape == (0, 96)


def test_pieces_of_a_sound_are_heard_as_the_whole():
    sound = np.random.default_rng(0).normal(size=320 * 400).astype(np.float32)
    whole = embedding.embeddings(sound, mel, embed)
    cut = hearing.Pieces(embedding._CONTEXT, 37, embedding._CONTEXT)
    parts = np.concatenate(list(hearing.pieces([sound], lambda x: embedding.embeddings(x, mel, embed), cut)))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=0.5)  # float32 sums of 76 x 512 samples of up to 1e5


@pytest.mark.parametrize("found", ["nothing", "empty", "other"])
def test_what_is_missing_is_named(found, tmp_path, monkeypatch):
    folder = tmp_path / "openwakeword"
    if found != "nothing":
        (folder / "resources" / "models").mkdir(parents=True)
        (folder / "__init__.py").touch()
    if found == "other":
        for name in embedding.FILES:
            (folder / "resources" / "models" / name).write_bytes(b"another network")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    embedding.front_end.cache_clear()
    speech_models.front_end.cache_clear()
    with pytest.raises(UserError, match=r"openwakeword 0\.4\.0.*install"):
        speech_models.front_end(embedding.NAME)


def test_the_real_network_hears_pieces_as_the_whole():
    embedding.front_end.cache_clear()
    speech_models.front_end.cache_clear()
    front = speech_models.front_end(embedding.NAME)
    time = np.arange(320 * 150) / audio_io.SAMPLE_RATE
    sound = (0.1 * np.sin(2 * np.pi * 150 * time * (1 + 0.2 * time)) * np.sin(7 * time)).astype(np.float32)
    whole = front.encode(sound)
    assert whole.shape == (150, 64 + 96) and 0.5 < whole[:, 64:].std() < 2.0
    np.testing.assert_array_equal(whole[:, :64], audio_io.log_mel(sound))
    parts = np.concatenate(list(hearing.pieces([sound], front.encode, hearing.Pieces(front.whole.left, 20, 20))))
    np.testing.assert_allclose(parts[:, 64:], whole[:, 64:], atol=1e-3)  # float32 convolutions in other batches
    made = audio_io.features(embedding.NAME, sound, 25.0, 75)
    assert made.values.shape == (75, 16, 160) and made.name == embedding.NAME
