"""Sound in pieces: the same windows as at once, bounded look-ahead, exact lengths, and the gate."""

import dataclasses

import numpy as np
import pytest

from fg3dgs_jax.data import audio, hearing

RATE = audio.SAMPLE_RATE


def noise(seconds: float, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


def numbers(samples: np.ndarray) -> np.ndarray:
    """A front end that says which samples it saw: the first of each vector's 320."""
    return samples.reshape(-1, audio.HOP)[:, :1]


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 321, 6400, 9999])
@pytest.mark.parametrize("cut", [hearing.Pieces(3, 2, 1), hearing.Pieces(0, 7, 5), hearing.Pieces(50, 1000, 50)])
def test_pieces_give_one_vector_per_320_samples_in_order(samples, cut):
    sound, widest = np.arange(samples, dtype=np.float32), 0

    def encode(part):
        nonlocal widest
        widest = max(widest, len(part))
        return numbers(part)

    chunks = np.array_split(sound, max(1, samples // 777))
    vectors = [row for block in hearing.pieces(chunks, encode, cut) for row in block[:, 0]]
    assert vectors == list(range(0, samples, 320))
    assert widest <= (cut.left + cut.hop + cut.right) * audio.HOP  # memory does not grow with the sound


def test_hearing_at_once_is_the_log_mel_of_the_sound_between_silences():
    sound = noise(1.3)
    ear = hearing.Hearing(sound, hearing.LOGMEL, 25.0, gate=None)
    heard = np.stack([item.window for item in ear])
    length = audio.num_frames(sound)
    assert heard.shape == (length + 2 * hearing.MARGIN, 16, 64) and ear.samples == len(sound)
    silence = 8 * audio.HOP  # four frames
    padded = np.pad(sound * np.float32(audio.speech_gain(sound)), (silence, silence + audio.HOP))
    expected = audio.windows(audio.log_mel(padded), length + 2 * hearing.MARGIN)
    np.testing.assert_allclose(heard, expected, atol=1e-5)  # f32, the same operations on the same numbers


@pytest.mark.parametrize("fps", [24.0, 25.0, 30.0])
def test_live_sound_gives_the_same_windows_and_only_what_it_needs_is_awaited(fps):
    sound, front = noise(2.0), hearing.LOGMEL
    fixed = dataclasses.replace(front, scale=lambda x: 1.0)
    whole = list(hearing.Hearing(sound, fixed, fps))
    arrived = 0

    def microphone():
        nonlocal arrived
        for start in range(0, len(sound), 160):
            arrived = min(start + 160, len(sound))
            yield sound[start : start + 160]

    ear = hearing.Hearing(microphone(), fixed, fps)
    late = []
    for row, (heard, expected) in enumerate(zip(ear, whole, strict=True)):
        np.testing.assert_allclose(heard.window, expected.window, atol=1e-5)  # f32, other pieces
        # Output frame k needs the window of clip frame k + 3, row k + 7.
        late.append(arrived / RATE - (row - 2 * hearing.MARGIN + 1) / fps)
    assert max(late[: len(late) // 2]) <= ear.look_ahead + 160 / RATE
    assert ear.look_ahead < 0.4 and ear.frames(fps) == np.ceil(2.0 * fps)


def test_the_gate_closes_in_silence_but_not_between_words():
    speech, hush = noise(1.0), np.zeros(round(0.2 * RATE), np.float32)
    sound = np.concatenate([speech, hush, speech, np.zeros(RATE, np.float32), speech])
    gates = hearing.gates(sound, 105)[hearing.MARGIN : -hearing.MARGIN]
    assert (gates[:59] == 1).all()  # a pause of 0.2 s is within a word
    assert (gates[61:75] == 0).all() and (gates[85:] == 1).all()
    live = hearing.Hearing(iter(np.array_split(sound, 300)), hearing.LOGMEL)
    assert (np.array([heard.open for heard in live])[65:79] == 0).all()
    # Room noise 25 dB below the voice is no silence to a gate of 35 dB, and is to one of 20 dB.
    room = np.concatenate([speech, noise(1.0, 0.1 * 10 ** (-25 / 20))])
    assert (hearing.gates(room, 50)[35:50] == 1).all()
    assert (hearing.gates(room, 50, gate=20.0)[35:50] == 0).all()
    assert (hearing.gates(np.zeros(RATE, np.float32), 25, gate=None) == 1).all()


def test_a_sound_that_is_all_faint_is_silence_whatever_its_gain():
    assert (hearing.gates(noise(1.0, 1e-3), 25) == 0).all()  # -60 dB of full scale


def test_a_constant_offset_does_not_keep_the_mouth_from_closing():
    sound = np.concatenate([noise(1.0), np.zeros(RATE, np.float32)]) + 0.02  # 34 dB below full scale
    gates = hearing.gates(sound, 50)[hearing.MARGIN : -hearing.MARGIN]
    assert (gates[:20] == 1).all() and (gates[36:] == 0).all()
