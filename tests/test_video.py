"""Video in and out: times, geometry, sound, and files that are damaged or hostile."""

import shutil

import av
import numpy as np
import pytest

from fg3dgs_jax.data import audio, decoder, video
from fg3dgs_jax.errors import UserError


def grey_frames(count: int, size=(64, 48), start: int = 16, step: int = 3):
    """Frame k is uniformly grey with value start + step * k."""
    for k in range(count):
        yield np.full((size[1], size[0], 3), start + step * k, np.uint8)


def numbers(images, start: int = 16, step: int = 3) -> list[int]:
    return [round((float(image[image.shape[0] // 2, image.shape[1] // 2, 0]) - start) / step) for image in images]


@pytest.fixture(scope="module")
def clip30(tmp_path_factory):
    """60 frames at 30 FPS with two seconds of a 440 Hz tone that starts at 0.5 s."""
    path = tmp_path_factory.mktemp("video") / "clip30.mp4"
    time = np.arange(2 * 44100) / 44100
    tone = (0.5 * np.sin(2 * np.pi * 440 * time) * (time > 0.5)).astype(np.float32)
    assert video.write_video(path, grey_frames(60), 30, (tone, 44100), crf=8) == 60
    return path


def test_probe(clip30):
    info = video.probe(clip30)
    assert (info.width, info.height, info.fps, info.num_frames, info.has_audio) == (64, 48, 30.0, 60, True)
    assert info.duration == pytest.approx(2.0, abs=1e-6)


def test_thirty_to_twenty_five_takes_the_nearest_in_time(clip30):
    times = []
    seen = numbers(video.read_frames(clip30, 25, times=times))
    # A frame at k / 25 s lies exactly between two sources for k = 5n + 2 or so: either of them is nearest.
    wanted = np.arange(50) / 25 * 30
    assert len(seen) == 50
    assert np.abs(np.array(seen) - wanted).max() <= 0.5 + 1e-9
    np.testing.assert_allclose(times, np.array(seen) / 30, atol=1e-4)


def test_same_rate_keeps_every_frame_and_a_higher_rate_repeats(clip30):
    assert numbers(video.read_frames(clip30, 30)) == list(range(60))
    assert numbers(video.read_frames(clip30, 60))[:6] in ([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 3])
    assert len(list(video.read_frames(clip30, 60))) == 120


def test_first_and_every(clip30):
    assert numbers(video.read_frames(clip30, 30, first=50)) == list(range(50, 60))
    assert numbers(video.read_frames(clip30, 30, every=20)) == [0, 20, 40]


def test_crop_replicates_the_border_and_resizes(tmp_path):
    ramp = np.repeat(np.linspace(30, 220, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    video.write_video(tmp_path / "ramp.mp4", (ramp for _ in range(30)), 25, crf=4)
    image = next(video.read_frames(tmp_path / "ramp.mp4", crop=(-32, 0, 64, 96), size=48))
    assert image.shape == (48, 48, 3)
    # Left third: the left column repeated; then the ramp at half the size. H.264 at crf 4 is right within a few levels.
    assert np.abs(image[10, :15].astype(int) - 30).max() <= 4
    assert np.abs(image[10, 20:46, 0].astype(int) - ramp[10, 9:62:2, 0][:26]).max() <= 6
    assert np.abs(image[40, 20:46].astype(int) - image[10, 20:46]).max() <= 4  # rows below the image: its last row
    small = next(video.read_frames(tmp_path / "ramp.mp4", max_side=32))
    assert small.shape == (32, 32, 3)


def test_colours_survive_a_round_trip(tmp_path):
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128)]
    frames = (np.full((32, 32, 3), colours[k // 10], np.uint8) for k in range(40))
    video.write_video(tmp_path / "c.mp4", frames, 25, crf=4)
    for k, image in enumerate(video.read_frames(tmp_path / "c.mp4", every=10)):
        # Limited-range YUV 4:2:0 costs about 2 levels; a wrong matrix (BT.601 for 709) would cost more than 10.
        assert np.abs(image[16, 16].astype(int) - colours[k]).max() <= 4


def test_odd_sizes_are_padded_and_the_file_says_it_is_synthetic(tmp_path):
    path = tmp_path / "odd.mp4"
    video.write_video(path, (np.zeros((33, 51, 3), np.uint8) for _ in range(5)), 25, metadata={"title": "anna"})
    with av.open(str(path)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (52, 34)
        assert "Synthetic media" in container.metadata["comment"]
        assert container.metadata["title"] == "anna"
    assert [p.name for p in tmp_path.iterdir()] == ["odd.mp4"]


@pytest.mark.parametrize("seconds", [0.4, 3.0])
def test_sound_is_as_long_as_the_frames(tmp_path, seconds):
    path = tmp_path / "a.mp4"
    video.write_video(path, grey_frames(25), 25, np.zeros(round(16000 * seconds), np.float32))
    with av.open(str(path)) as container:
        # One AAC packet (1024 samples, 64 ms) is the smallest unit of length.
        stream = container.streams.audio[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(1.0, abs=0.065)


def test_sound_starts_with_the_picture(clip30):
    sound = audio.load_audio(clip30)
    start = np.flatnonzero(np.abs(sound) > 0.1)[0] / 16000
    assert start == pytest.approx(0.5, abs=0.01)  # AAC smears an onset over a few milliseconds


def test_nothing_is_left_when_writing_fails(tmp_path):
    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        raise RuntimeError("the renderer stopped")

    with pytest.raises(RuntimeError):
        video.write_video(tmp_path / "x.mp4", frames(), 25)
    with pytest.raises(UserError, match="no frame"):
        video.write_video(tmp_path / "x.mp4", iter(()), 25)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_video_is_refused_in_one_sentence(tmp_path, clip30):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(clip30.read_bytes()[:600])
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{clip30}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {clip30}\n")
    for name in ("text.mp4", "cut.mp4", "list.m3u8", "list.ffconcat", "missing.mp4"):
        with pytest.raises(UserError, match=name) as error:
            list(video.read_frames(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        video.probe("http://127.0.0.1:9/clip.mp4")


def test_a_corrupt_tail_gives_what_decodes_and_a_warning(tmp_path, clip30):
    path = tmp_path / "tail.mp4"
    data = bytearray(clip30.read_bytes())  # written with the index in front: a cut file can still be opened
    path.write_bytes(data[: len(data) * 2 // 3])
    warnings = []
    seen = numbers(video.read_frames(path, 30, warnings=warnings))
    assert 10 < len(seen) < 60
    # Pictures are stored out of order: one near the cut may be missing, and its neighbour stands for it.
    assert seen[:-4] == list(range(len(seen) - 4)) and np.abs(np.array(seen) - np.arange(len(seen))).max() <= 1
    assert len(warnings) == 1 and "the rest is left out" in warnings[0]


def test_stopping_early_ends_the_child(clip30):
    frames = video.read_frames(clip30, 30)
    next(frames)
    frames.close()  # would hang or leave a zombie if the child were not killed and waited for


def test_a_decoder_that_dies_is_one_sentence(monkeypatch, clip30):
    monkeypatch.setattr(video.sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="stopped the decoder"):
        list(video.read_frames(clip30))


class Stamp:
    """A frame that is nothing but its time."""

    def __init__(self, time):
        self.time = time


def picked(times, fps, rate=30.0):
    return [round(time, 6) for _, time, _ in decoder.resample_times(map(Stamp, times), 0.0, rate, fps)]


def test_varying_rates_missing_and_repeated_times():
    assert picked([0.0, 0.5, 0.52, 0.54, 1.0], 10) == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.54, 0.54, 1.0, 1.0, 1.0][:10]
    assert picked([0.0, None, None], 30) == [0.0, pytest.approx(1 / 30, abs=1e-5), pytest.approx(2 / 30, abs=1e-5)]
    assert picked([0.0, 0.04, 0.04, 0.02, 0.08], 25, 25) == [0.0, 0.04, 0.08]


def test_limits(monkeypatch):
    with pytest.raises(decoder.DecodeError, match="longer than the limit"):
        picked([0.0, decoder.MAX_SECONDS + 1], 25)
    monkeypatch.setattr(decoder, "MAX_PIXELS", 100)
    with pytest.raises(decoder.DecodeError, match="above the limit"):
        decoder.to_rgb(av.VideoFrame(64, 48, "rgb24"))


def test_a_recorder_that_was_held_upright(tmp_path):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :16] = 255  # a mark at the top left, as stored
    video.write_video(tmp_path / "flat.mp4", (image for _ in range(5)), 25, crf=4)
    data = bytearray((tmp_path / "flat.mp4").read_bytes())
    # The matrix that phones write: x' = height - y, y' = x, a quarter turn clockwise (16.16 and 2.30 fixed point).
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16
    matrix = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30], ">i4").tobytes()
    data[start : start + len(matrix)] = matrix
    (tmp_path / "upright.mp4").write_bytes(data)
    info = video.probe(tmp_path / "upright.mp4")
    assert (info.width, info.height) == (32, 64)
    seen = next(video.read_frames(tmp_path / "upright.mp4"))
    assert seen.shape == (64, 32, 3)
    assert seen[4, 28].min() > 200 and seen[4, 4].max() < 50 and seen[60, 28].max() < 50  # now at the top right
