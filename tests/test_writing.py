"""Files out: transparency, sound, sizes, marks; read back by FFmpeg's own decoders."""

import json
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import soundfile

from fg3dgs_jax.data import video, writing
from fg3dgs_jax.errors import UserError

ALPHA = np.zeros((48, 64), np.uint8)
ALPHA[10:30, 10:50], ALPHA[30:40, 10:50] = 255, 128


def frames(count: int):
    for _ in range(count):
        image = np.zeros((48, 64, 4), np.uint8)
        image[..., 0], image[..., 3] = 200, ALPHA
        yield image


def decoded(path, codec=None) -> list[np.ndarray]:
    """All frames as RGBA; VP9's transparency is only seen by its own library."""
    with av.open(str(path)) as container:
        if codec is None:
            return [frame.to_ndarray(format="rgba") for frame in container.decode(video=0)]
        decoder = av.CodecContext.create(codec, "r")
        decoder.extradata = container.streams.video[0].codec_context.extradata
        return [f.to_ndarray(format="rgba") for packet in container.demux(video=0) for f in decoder.decode(packet)]


@pytest.mark.parametrize(("name", "decoder", "close"), [("a.mov", None, 2), ("a.webm", "libvpx-vp9", 8)])
def test_transparency_and_sound_survive(tmp_path, name, decoder, close):
    tone = (0.5 * np.sin(np.arange(44100) * 0.05)).astype(np.float32)
    assert writing.write_video(tmp_path / name, frames(10), 25, (tone, 44100)) == 10
    seen = decoded(tmp_path / name, decoder)
    assert len(seen) == 10
    for row, column in ((5, 20), (20, 30), (35, 30)):  # away from edges: both codecs blur these a little
        assert abs(int(seen[4][row, column, 3]) - int(ALPHA[row, column])) <= close
    with av.open(str(tmp_path / name)) as container:
        assert "Synthetic media" in {k.lower(): v for k, v in container.metadata.items()}["comment"]
        sound = container.streams.audio[0]
        length = sum(frame.samples / Fraction(frame.sample_rate) for frame in container.decode(sound))
    assert float(length) == pytest.approx(0.4, abs=0.03)  # Opus packets last 0.02 s


def test_mp4_says_how_it_was_made_and_keeps_no_transparency(tmp_path):
    writing.write_video(tmp_path / "a.mp4", (frame[..., :3] for frame in frames(3)), 25)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["digital_source_type"].endswith("trainedAlgorithmicMedia")
    with pytest.raises(ValueError, match="no transparency"):
        writing.write_video(tmp_path / "b.mp4", frames(3), 25)
    with pytest.raises(UserError, match=r"one of \.mp4, \.mov, \.webm"):
        writing.write_video(tmp_path / "b.avi", frames(3), 25)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.webm"])
def test_a_flash_and_a_click_of_one_moment_stay_together(tmp_path, name):
    rate, moments = 48000, (7, 31)
    sound = np.zeros(2 * rate, np.float32)
    for k in moments:
        sound[k * rate // 25 : k * rate // 25 + 96] = 0.9
    pictures = (np.full((48, 64, 3), 255 if k in moments else 0, np.uint8) for k in range(50))
    writing.write_video(tmp_path / name, pictures, 25, (sound, rate))
    with av.open(str(tmp_path / name)) as container:
        seen = [float(f.time) for f in container.decode(video=0) if f.to_ndarray(format="gray").mean() > 128]
    with av.open(str(tmp_path / name)) as container:
        blocks = [(float(f.time), np.abs(f.to_ndarray()[0] / (32768 if name == "a.mov" else 1)))
                  for f in container.decode(audio=0)]  # fmt: skip
    heard = [time + np.argmax(part > 0.3) / rate for time, part in blocks if (part > 0.3).any()]
    assert len(seen) == 2
    # A tenth of the 40 ms that may be noticed: codecs smear a click over some milliseconds, perhaps into two blocks.
    assert min(abs(heard[0] - seen[0]), abs(heard[-1] - seen[1])) < 0.004
    assert all(min(abs(time - s) for s in seen) < 0.008 for time in heard)


def test_quality_is_chosen(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    for crf in (5, 40):
        writing.write_video(tmp_path / f"{crf}.mp4", iter([noise] * 5), 25, crf=crf)
    assert (tmp_path / "5.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size
    assert len(list(video.read_frames(tmp_path / "40.mp4"))) == 5


def test_pictures_are_exact_and_a_folder_is_never_replaced(tmp_path):
    out = tmp_path / "frames"
    tone = np.full(48000, 0.25, np.float32)
    assert writing.write_pictures(out, frames(5), 25.0, (tone, 48000)) == 5
    picture = cv2.cvtColor(cv2.imread(str(out / "000004.png"), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)
    np.testing.assert_array_equal(picture, next(frames(1)))
    assert soundfile.info(out / "audio.wav").frames == 9600
    assert "Synthetic" in json.loads((out / "info.json").read_text())["comment"]
    with pytest.raises(UserError, match="new folder"):
        writing.write_pictures(out, frames(5), 25.0)

    def broken():
        yield next(frames(1))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        writing.write_pictures(tmp_path / "other", broken(), 25.0)
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]
