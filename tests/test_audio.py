"""Sound: any rate, channels and width; windows around each frame; files that describe themselves."""

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from fg3dgs_jax.data import audio
from fg3dgs_jax.errors import UserError


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(
    ("rate", "channels", "subtype", "suffix"),
    [(16000, 1, "PCM_16", "wav"), (48000, 2, "PCM_24", "wav"), (44100, 6, "FLOAT", "wav"), (8000, 1, "PCM_U8", "wav"),
     (8000, 1, "PCM_16", "wav"), (96000, 2, "FLOAT", "wav"), (22050, 2, "PCM_16", "flac"), (48000, 1, "VORBIS", "ogg")],
)  # fmt: skip
def test_any_rate_width_and_channel_count(tmp_path, rate, channels, subtype, suffix):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.repeat(tone(rate)[:, None], channels, 1), rate, subtype=subtype)
    sound = audio.load_audio(path)
    assert sound.dtype == np.float32
    assert len(sound) == pytest.approx(16000, abs=200 if suffix == "ogg" else 2)
    middle = slice(2000, 14000)  # away from the resampler's ends; 8 bits and Vorbis are right within 1 %
    assert np.abs(sound[middle] - tone(16000)[middle]).max() < 0.012


def encode(path, codec: str, sound: np.ndarray, rate: int) -> None:
    """A file of f32 [n] in a lossy codec, as recorders write them: with the codec's own delay and padding."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, len(sound), 1024):
            part = np.ascontiguousarray(sound[None, start : start + 1024], np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("seconds", [2.0, 0.5, 1.237])
@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.m4a", "aac", 44100), ("b.m4a", "aac", 16000), ("c.mov", "aac", 48000), ("d.mp3", "libmp3lame", 44100),
     ("e.mkv", "libmp3lame", 44100)],
)  # fmt: skip
def test_what_a_codec_pads_is_no_sound(tmp_path, name, codec, rate, seconds):
    sound = tone(rate, seconds)
    encode(tmp_path / name, codec, sound, rate)
    found = audio.load_audio(tmp_path / name, whole=True)
    assert len(found) == pytest.approx(16000 * len(sound) / rate, abs=2)  # rounding, twice
    assert audio.num_frames(found[: round(16000 * seconds)]) == np.ceil(25 * seconds)
    # Nor is it moved: a tone of RMS 0.35 is in phase, away from the ends, but for what codecs lose of it.
    middle = slice(2000, len(found) - 2000)
    assert np.sqrt(np.mean((found - tone(16000, seconds + 1)[: len(found)])[middle] ** 2)) < 0.05


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a", "mkv"])
def test_half_a_file_is_refused_where_the_whole_is_asked_for(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix in ("wav", "flac"):
        soundfile.write(path, tone(16000, 2.0), 16000)
    else:
        encode(path, "aac" if suffix == "m4a" else "libmp3lame", tone(44100, 2.0), 44100)
    whole = path.read_bytes()
    assert len(audio.load_audio(path, whole=True)) == pytest.approx(32000, abs=2)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"x\.{suffix} (is cut off \(the audio ends after .* s\); export|is not a)"):
        audio.load_audio(path, whole=True)


def test_gaps_in_a_recording_become_silence(tmp_path):
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for start in (0, 16000):  # half a second each, at 0 s and at 1 s
            samples = (20000 * tone(16000, 0.5)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sound = audio.load_audio(tmp_path / "gap.mkv")
    assert len(sound) == 24000
    loud = np.sqrt((sound.reshape(6, -1) ** 2).mean(1)) > 0.05
    assert loud.tolist() == [True, True, False, False, True, True]


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "s.wav", np.stack([tone(16000), -tone(16000)], 1), 16000)
    assert np.abs(audio.load_audio(tmp_path / "s.wav")).max() < 1e-3


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not a sound at all" * 50])
def test_what_is_no_sound_is_refused(tmp_path, content):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.wav"):
        audio.load_audio(tmp_path / "x.wav")


@pytest.mark.parametrize("wrong", [np.inf, 3e4])
def test_samples_in_another_unit_are_refused(tmp_path, wrong):
    sound = tone(16000, 0.2)
    sound[100] = wrong
    soundfile.write(tmp_path / "x.wav", sound, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"x\.wav: its samples lie far beyond full scale"):
        audio.load_audio(tmp_path / "x.wav")


def test_a_wav_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(0), 16000)
    with pytest.raises(UserError, match=r"x\.wav"):
        audio.load_audio(tmp_path / "x.wav")


def test_save_wav_and_the_hash_agree_with_the_file(tmp_path):
    sound = tone(16000).astype(np.float32)
    audio.save_wav(tmp_path / "t.wav", sound)
    again = audio.load_audio(tmp_path / "t.wav")
    assert np.abs(again - sound).max() < 1e-4  # 16 bits
    assert [p.name for p in tmp_path.iterdir()] == ["t.wav"]


def test_number_of_frames_covers_the_sound():
    assert [audio.num_frames(np.zeros(n)) for n in (0, 1, 640, 641, 16000)] == [1, 1, 1, 2, 25]


def test_windows_are_centred_on_their_frames():
    sound = np.zeros(16000, np.float32)
    sound[8000:8160] = tone(16000)[:160]  # 10 ms at 0.5 s: frame 12.5
    windows = audio.log_mel_windows(sound, 25)
    assert windows.shape == (25, 16, 64)
    energy = windows.mean(2)
    # Vector j of frame i is centred 20 (j - 8) + 10 ms from the frame's time.
    places = [(np.argmax(energy[i]) - 7.5) * 0.02 + i / 25 for i in (10, 12, 13, 15)]
    np.testing.assert_allclose(places, 0.505, atol=0.011)


def test_ends_are_silence_and_silence_is_finite():
    silent = audio.log_mel_windows(np.zeros(16000, np.float32), 25)
    assert np.isfinite(silent).all()
    loud = audio.log_mel_windows(tone(16000).astype(np.float32), 25)
    np.testing.assert_allclose(loud[0, :7], silent[0, 0, 0], atol=1e-5)  # before the sound


def test_features_do_not_depend_on_the_recording_level():
    speech = np.random.default_rng(0).normal(size=16000).astype(np.float32) * np.hanning(16000).astype(np.float32)
    loud, quiet = (audio.log_mel_windows(speech * level, 25) for level in (0.3, 0.06))
    np.testing.assert_allclose(loud, quiet, atol=1e-3)
    # Ordinary speech level gives values about unit scale, so that networks need no statistics of the clip.
    assert abs(loud[8:17].mean()) < 1.5 and 0.2 < loud.std() < 2


def test_features_describe_themselves(tmp_path):
    sound = tone(16000).astype(np.float32)
    made = audio.features("logmel", sound, 25.0)
    audio.save_features(tmp_path / "f.npz", made)
    read = audio.load_features(tmp_path / "f.npz")
    np.testing.assert_array_equal(read.values, made.values)
    assert (read.name, read.fps, read.sample_rate, read.sha256) == ("logmel", 25.0, 16000, audio.audio_sha256(sound))


def test_unknown_front_ends_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="hubrt"):
        audio.features("hubrt", np.zeros(16000, np.float32))
    np.savez(tmp_path / "other.npz", a=1)
    (tmp_path / "text.npz").write_text("x")
    for name in ("other.npz", "text.npz", "missing.npz"):
        with pytest.raises(UserError, match=name):
            audio.load_features(tmp_path / name)
