"""Heads from checkpoints, frozen heads, speech of any length, and the two commands on hostile sound.

The head is real but tiny, and its networks are filled with noise so that it moves.
"""

import dataclasses
import json

import av
import cv2
import jax
import numpy as np
import pytest
import soundfile
from test_audio import encode

from fg3dgs_jax import cli, evaluate, synthesize
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import dataset as datasets
from fg3dgs_jax.data import video
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import speech
from fg3dgs_jax.inference.control import Control
from fg3dgs_jax.inference.head import MARGIN, Head
from fg3dgs_jax.model import gaussians, render
from fg3dgs_jax.model.hashgrid import GridSpec
from fg3dgs_jax.training import checkpoint
from fg3dgs_jax.types import Label

SIZE, FRAMES = 32, 44


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A native dataset folder: a grey square on a background whose level is the frame's number."""
    path = tmp_path_factory.mktemp("clip") / "data"
    rng = np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(FRAMES * 640)).astype(np.float32)
    train, test = clips.split_ids(FRAMES, 25.0)
    viewmats = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    viewmats[:, :3, 3] = [0.0, 0.0, 1.0]
    viewmats[:, 0, 3] = np.linspace(-0.02, 0.02, FRAMES)
    meta = datasets.Meta(
        SIZE, SIZE, 25.0, FRAMES, (60.0, 60.0, 16.0, 16.0), ("AU01", "AU45"), tuple(map(int, train)),
        tuple(map(int, test)), 0.15, {},
    )  # fmt: skip
    tracks = datasets.Tracks(
        viewmats=viewmats,
        expression=rng.random((FRAMES, 2), np.float32),
        lips_box=np.tile(np.array([18, 26, 12, 20], np.int32), (FRAMES, 1)),
        eye_boxes=np.tile(np.array([[8, 12, 8, 12], [8, 12, 20, 24]], np.int32), (FRAMES, 1, 1)),
        landmarks=np.zeros((FRAMES, 68, 2), np.float32),
        mouth_open=np.zeros(FRAMES, np.float32),
    )
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[4:28, 4:28] = Label.HEAD
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    torso = np.zeros((SIZE, SIZE, 4), np.uint8)
    torso[:, :24, 3] = 255  # the background, the grey image, shows in the columns on the right

    def frames():
        for i in range(FRAMES):
            torso[..., :3] = 4 * i
            yield datasets.Layers(image, labels, torso.copy())

    datasets.write_dataset(path, meta, tracks, frames(), image, sound, audio_io.features("logmel", sound, 25.0))
    return path


@pytest.fixture(scope="module")
def run_folder(folder, tmp_path_factory):
    """A run's folder with one checkpoint, as the trainer writes them."""
    workdir = tmp_path_factory.mktemp("run")
    grid = GridSpec(levels=2, min_resolution=4, max_resolution=8, features=1, log2_table=8, bound=0.2)
    regions = (render.RegionSpec("mouth", "cross_audio", grid), render.RegionSpec("eyes", "cross_expression", grid))
    spec = render.HeadSpec(regions, (16, 64), 2, 0)
    _, motions = render.motion_structure(spec)
    rng = np.random.default_rng(1)
    # Fresh networks end in (near) zeros: noise instead makes the head move. These kinds move means alone, so that no
    # Gaussian grows over the corner where tests read the backdrop.
    # Divided by the root of a layer's inputs, noise keeps the motion at some hundredths of a unit.
    motions = jax.tree.map(
        lambda x: rng.normal(0, 1.2 / np.sqrt(max(1, np.prod(x.shape[:-1]))), x.shape).astype(np.float32), motions
    )
    params, pools = {}, {}
    for name in ("mouth", "eyes"):
        shape, pools[name] = gaussians.init(jax.random.key(2), 24, 20, 0.05, 0)
        small = shape.replace(
            log_scales=np.full((24, 3), np.log(0.01), np.float32),  # half a pixel
            logit_opacities=np.full(24, 3.0, np.float32),
        )
        params[name] = {"gaussians": small, "motion": motions[name]}
    opened = datasets.open_dataset(folder)
    info = {
        "config": {"audio_features": None},
        "spec": dataclasses.asdict(spec),
        "dataset": opened.fingerprint,
        "data": str(folder),
    }
    checkpoint.save(workdir, 7, {"step": np.int32(7), "params": params, "pools": pools}, info)
    return workdir


@pytest.fixture(scope="module")
def head(run_folder):
    return Head.load(run_folder)


@pytest.fixture
def commands(head, run_folder, monkeypatch):
    """The commands with this head, compiled once, wherever they ask for the folder `run`."""
    load = Head.load
    monkeypatch.setattr(Head, "load", lambda _, data=None, speech_model=None: load(run_folder, data) if data else head)
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    return head


def frame(head, index, audio=None):
    condition = clips.condition(head.dataset.audio_features, head.dataset.expression, index)
    if audio is not None:
        condition = condition.replace(audio=condition.audio * audio)
    return condition, head.dataset.viewmats[index], head.dataset.pictures(index).backdrop


def test_a_loaded_head_renders_what_the_model_renders(run_folder, head):
    _, info = checkpoint.load_for_inference(run_folder)
    assert head.run["step"] == 7 and head.run["trained_on_this_data"]
    assert head.spec.regions[0].grid == GridSpec(**info["spec"]["regions"][0]["grid"])
    picture = head.render(*frame(head, 3))
    assert picture.dtype == np.uint8 and picture.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(picture, head.render(*frame(head, 3)))
    assert (picture != head.render(*frame(head, 3, audio=-1.0))).any()  # it listens
    np.testing.assert_array_equal(
        picture[0, 0], [12, 12, 12]
    )  # the backdrop of frame 3 at a corner no Gaussian reaches
    assert (picture != picture[0, 0]).any()


def test_a_frozen_head_hears_nothing(head):
    still = head.frozen([5])
    np.testing.assert_array_equal(still(*frame(head, 3)), still(*frame(head, 3, audio=-1.0)))
    # The mean over one frame is that frame's own motion. Compiled apart, so a rounding step may differ.
    condition, viewmat, backdrop = frame(head, 5)
    difference = still(condition, viewmat, backdrop).astype(int) - head.render(condition, viewmat, backdrop)
    assert np.abs(difference).max() <= 1
    assert (head.frozen([5, 20])(condition, viewmat, backdrop) != still(condition, viewmat, backdrop)).any()


def test_loading_says_what_does_not_fit(run_folder, folder, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        Head.load(tmp_path)
    with pytest.raises(UserError, match="no such dataset"):
        Head.load(run_folder, tmp_path / "nowhere")
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((FRAMES, 16, 29), np.float32))
    head = Head.load(run_folder)
    with pytest.raises(UserError, match=r"\(16, 29\) a frame"):
        head.read_windows(other, FRAMES)
    np.save(other, np.zeros((FRAMES, 16, 64), np.float32))
    with pytest.raises(UserError, match="lasts 200 frames"):
        head.read_windows(other, 200)
    assert head.read_windows(other, FRAMES + 3).shape == (FRAMES + 3 + 2 * MARGIN, 16, 64)


def test_listening_hears_the_same_windows_as_the_dataset(head):
    """But for the ends, where there is silence instead of nothing, and the loudness, judged with that silence."""
    sound = audio_io.load_audio(head.dataset.audio_path)
    heard = head.listen(sound)
    assert heard.shape == (FRAMES + 2 * MARGIN, 16, 64)
    inner = slice(8, FRAMES - 8)
    difference = np.abs(heard[MARGIN:-MARGIN][inner] - head.dataset.audio_features[inner])
    assert difference.max() < 0.05  # in deviations of speech; the gain changes by a few per cent at most


def test_speech_is_as_long_as_the_sound_and_follows_the_clip(head):
    windows = head.listen(np.zeros(16000 * 4, np.float32))  # 100 frames, more than twice the clip
    levels = [int(picture[0, 0, 0]) // 4 for picture in head.speak(windows)]
    assert len(levels) == 100
    assert levels[:30] == list(range(30))  # its own backdrops in order
    assert np.abs(np.diff(levels)).max() <= 1 and max(levels) == FRAMES - 1  # no jump at the turns
    assert [int(p[0, 0, 0]) // 4 for p in head.speak(windows[: 5 + 2 * MARGIN], Control(start=20))] == [
        20,
        21,
        22,
        23,
        24,
    ]


def test_frames_without_background_lie_over_any_background(head):
    sound = (0.1 * np.random.default_rng(0).standard_normal(3 * 640)).astype(np.float32)
    cut = list(head.speak(sound, alpha=True))
    assert cut[0].shape == (SIZE, SIZE, 4) and (cut[0][:, 30:, 3] == 0).all() and (cut[0][:, :8, 3] == 255).all()
    for colour in (10, 200):
        background = np.full((SIZE, SIZE, 3), colour, np.uint8)
        for layer, frame in zip(cut, head.speak(sound, background=background), strict=True):
            # One level of rounding of colour, one of alpha.
            assert np.abs(clips.over(layer, background).astype(int) - frame).max() <= 2
            assert (frame[:, 30:] == colour).all()
    for layer, frame in zip(cut, head.speak(sound), strict=True):
        assert np.abs(clips.over(layer, head.dataset.background).astype(int) - frame).max() <= 2


def test_gain_scales_the_motion_that_sound_causes(head):
    sound = (0.1 * np.random.default_rng(0).standard_normal(5 * 640)).astype(np.float32)
    shown = {gain: np.stack(list(head.speak(sound, Control("still", "still", gain=gain)))) for gain in (0, 0.999, 1, 2)}
    assert (shown[0] == shown[0][0]).all()  # no gain, no motion
    assert np.abs(shown[0.999].astype(int) - shown[1]).mean() < 0.5  # another program, nearly the same head
    assert (shown[1] != shown[1][0]).any() and (shown[2] != shown[1]).any()


def test_silence_keeps_the_mouth_still_in_its_most_closed_pose(head):
    silent, still = np.zeros(20 * 640, np.float32), Control("still", "still")
    frames = np.stack(list(head.speak(silent, still)))
    assert (frames == frames[0]).all()
    # What silence looks like is among the clip's most closed mouths; without a gate the network is asked instead.
    assert head.rest.shape == (8, 16, 64)
    assert (np.stack(list(head.speak(silent, Control("still", "still", gate=None)))) != frames).any()


def test_a_head_hears_by_the_front_end_it_was_trained_on(run_folder, monkeypatch, tmp_path):
    sound = np.zeros(3200, np.float32)
    with pytest.raises(UserError, match="trained on logmel; leave it out"):
        Head.load(run_folder, speech_model="models/hubert").hear(sound)
    head = Head.load(run_folder)
    other = dataclasses.replace(head.dataset.clip, audio_name="hubert@0123")
    monkeypatch.setattr(head, "dataset", datasets.Dataset(other))
    with pytest.raises(UserError, match="give the folder of that model with --speech-model"):
        head.hear(sound)
    head.speech_model = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such audio front end"):
        head.hear(sound)


def test_what_cannot_be_done_as_asked_is_said(head, caplog):
    list(head.speak(np.zeros(3200, np.float32), Control("still", orbit=40.0, orbit_seconds=0.4)))
    assert any("the orbit is held to" in record.getMessage() for record in caplog.records)


def test_what_is_said_later_is_shown_as_much_later(head):
    """A/V offset: one part of a sound has the same pictures wherever it is, and others a frame before and after."""
    random = np.random.default_rng(0)
    sound = (random.uniform(0, 0.2, 50).repeat(640) * random.standard_normal(50 * 640)).astype(np.float32)
    still = Control("still", "still")
    early, late = (np.stack(list(head.speak(np.roll(sound, k * 640), still))).astype(int) for k in (0, 9))
    middle = early[8:32]  # as far from both ends as anything is heard
    # Bands are summed in other places of a matrix: a last bit may move a grey level.
    np.testing.assert_allclose(late[17:41], middle, atol=1)
    for other in (late[16:40], late[18:42]):
        assert (np.abs(other - middle).max((1, 2, 3)) > 1).mean() > 0.8


@pytest.mark.parametrize("fps", [10.0, 25.0, 30.0, 50.0])
def test_any_frame_rate_shows_the_same_moments(head, fps):
    sound = (0.1 * np.random.default_rng(0).standard_normal(10_000)).astype(np.float32)  # 15.6 frames
    usual, frames = list(head.speak(sound)), list(head.speak(sound, fps=fps))
    assert len(usual) == 16 and len(frames) == int(np.ceil(10_000 * fps / 16000))
    for k, frame in enumerate(frames):
        if (k * 25) % fps == 0:
            np.testing.assert_array_equal(frame, usual[k * 25 // int(fps)])


def test_live_sound_is_spoken_as_it_comes(head):
    sound = (0.1 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32)
    given = 0

    def microphone():
        nonlocal given
        for start in range(0, len(sound), 320):
            given = start + 320
            yield sound[start : start + 320]

    frames, waited = head.speak(microphone(), Control(start=2)), []
    for k, frame in enumerate(frames):
        waited.append(given / 16000 - k / 25)
        assert int(frame[0, 0, 0]) // 4 == k + 2
    assert len(waited) == 25 and max(waited) < 0.4  # look-ahead, and one piece of sound


def test_files_of_every_kind(head, tmp_path):
    sound = (0.1 * np.random.default_rng(0).standard_normal(4 * 1920)).astype(np.float32), 48000
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30] = 250
    cv2.imwrite(str(tmp_path / "wall.png"), picture)
    for name, options in {
        "a.mov": {}, "a.webm": {"crf": 40}, "frames": {"size": 48}, "small.mp4": {"size": 16, "fps": 50.0, "crf": 30},
        "wall.mp4": {"background": str(tmp_path / "wall.png")}, "green.webm": {"background": "#00ff00"},
    }.items():  # fmt: skip
        output = speech.Output(tmp_path / name, **options)
        assert output.alpha == (name in ("a.mov", "a.webm", "frames"))
        done = speech.write(output, head, head.listen(sound[0][::3]), sound)
        assert done.frames == (8 if "small" in name else 4) and done.seconds == pytest.approx(0.16)
    assert cv2.imread(str(tmp_path / "frames" / "000003.png"), cv2.IMREAD_UNCHANGED).shape == (48, 48, 4)
    assert video.probe(tmp_path / "small.mp4").width == 16
    green = next(video.read_frames(tmp_path / "green.webm"))[16, 30]
    np.testing.assert_allclose(green, [0, 255, 0], atol=12)  # 4:2:0


def test_paste_back_into_the_video_the_clip_came_from(head, tmp_path, monkeypatch):
    """Twice the clip's size around it, with a frame of stripes."""
    wide = np.tile(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (96, 1, 3))
    crop = (16, 16, 80, 80)

    def source():
        for index in range(FRAMES):
            frame = wide.copy()
            frame[16:80, 16:80] = cv2.resize(head.dataset.pictures(index).image, (64, 64))
            yield frame

    video.write_video(tmp_path / "source.mp4", source(), 25, crf=4)
    pinned = dataclasses.replace(head.dataset.clip, crop=crop)
    monkeypatch.setattr(head, "dataset", datasets.Dataset(pinned))
    output = speech.Output(tmp_path / "back.mp4", paste_back=tmp_path / "source.mp4", crf=4)
    sound = np.zeros(4 * 1920, np.float32), 48000
    speech.write(output, head, head.listen(sound[0][::3]), sound, Control(start=3))
    back = list(video.read_frames(tmp_path / "back.mp4"))
    assert len(back) == 4 and back[0].shape == (96, 96, 3)
    assert np.abs(back[2][:16].astype(int) - wide[:16]).max() < 8  # H.264 twice
    # Inside: what the head shows over the torso of the clip's own frame, level 4 * 5 there.
    assert abs(int(back[2][48, 22, 0]) - 20) < 12


def sounds(folder):
    """name -> (file, seconds)"""
    rng = np.random.default_rng(0)
    stereo = (0.2 * rng.standard_normal((96000, 2))).astype(np.float32)
    files = {
        "silent.wav": (np.zeros(16000, np.float32), 16000, "PCM_16"),
        "short.wav": (0.2 * stereo[:1600, 0], 16000, "PCM_16"),
        "hires.wav": (stereo[:72000], 96000, "FLOAT"),
        "phone.wav": (stereo[:6000, 0], 8000, "PCM_16"),
        "speech.mp3": (stereo[:44100], 44100, "MPEG_LAYER_III"),
        "long.flac": (stereo[:44000, 0], 11025, "PCM_16"),
    }
    for name, (samples, rate, subtype) in files.items():
        soundfile.write(folder / name, samples, rate, subtype=subtype)
    encode(folder / "memo.m4a", "aac", stereo[:44100, 0], 44100)
    return {name: len(samples) / rate for name, (samples, rate, _) in files.items()} | {"memo.m4a": 1.0}


def test_any_sound_makes_a_video_of_its_length(commands, tmp_path, capsys):
    for name, seconds in sounds(tmp_path).items():
        out = tmp_path / f"{name}.mp4"
        code = cli.exit_code(synthesize.main, ["--workdir=run", f"--audio={tmp_path / name}", f"--out={out}"])
        assert code == 0, capsys.readouterr().err
        info = video.probe(out)
        assert info.num_frames == np.ceil(25 * seconds - 1e-6), name
        assert info.has_audio
    assert "25 frames, 1.00 s, in " in capsys.readouterr().out
    sound = audio_io.load_audio(tmp_path / "hires.wav.mp4")
    assert len(sound) / 16000 == pytest.approx(19 / 25, abs=0.07)  # AAC comes in packets of 0.02 s


def clicks_in(path) -> list[float]:
    """The times of clicks in a file's sound, as a player plays them: by the stamps of the decoded blocks."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        parts = [(float(frame.time), frame.to_ndarray()[0]) for frame in container.decode(stream)]
        rate, times = stream.codec_context.sample_rate, []
        for begin, part in parts:
            loud = np.flatnonzero(np.abs(part) > 0.3)
            times += [begin + loud[0] / rate] if len(loud) and (not times or begin - times[-1] > 0.1) else []
    return times


@pytest.mark.parametrize("name", ["wav", "m4a"])
def test_sound_stays_where_it_is_in_the_video(commands, tmp_path, name):
    """A/V offset: clicks of the input, heard at the same times of the mp4, whose first frame is shown at 0."""
    wanted, rate = [0.25, 0.9, 1.5], 44100
    sound = np.zeros(2 * rate, np.float32)
    for time in wanted:
        sound[round(time * rate) : round(time * rate) + 60] = 0.9
    path, out = tmp_path / f"clicks.{name}", tmp_path / "talk.mp4"
    soundfile.write(path, sound, rate) if name == "wav" else encode(path, "aac", sound, rate)
    assert cli.exit_code(synthesize.main, ["--workdir=run", f"--audio={path}", f"--out={out}"]) == 0
    with av.open(str(out)) as container:
        stamps = [float(frame.time) for frame in container.decode(video=0)]
    np.testing.assert_allclose(stamps, np.arange(50) / 25, atol=1e-6)
    # AAC smears a click over some milliseconds; a frame, 40 ms, is what may be noticed.
    np.testing.assert_allclose(clicks_in(out), wanted, atol=0.008)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--audio=missing.wav", "--out=a.mp4"], "missing.wav"),
        (["--audio=text.wav", "--out=a.mp4"], "text.wav"),
        (["--audio=empty.wav", "--out=a.mp4"], "empty.wav"),
        (["--audio=half.wav", "--out=a.mp4"], "half.wav is cut off"),
        (["--audio=good.wav", "--out=a.avi"], "one of .mp4"),
        (["--audio=good.wav", "--out=a.mp4", "--certificate=c.pem"], "--certificate and --key go together"),
        (["--audio=good.wav", "--out=a.mp4", "--crf=90"], "--crf 90"),
        (["--audio=good.wav", "--out=a.mov", "--crf=9"], "--crf"),
        (["--audio=good.wav", "--out=a.mp4", "--fps=0"], "--fps 0"),
        (["--audio=good.wav", "--out=a.mp4", "--size=33"], "--size 33"),
        (["--audio=good.wav", "--out=a.mp4", "--background=none.png"], "none.png"),
        (["--audio=good.wav", "--out=a.mp4", "--paste-back=none.mp4"], "none.mp4"),
        (["--audio=good.wav", "--out=a.mp4", "--paste-back=x.mp4", "--size=64"], "leave out --size"),
        (["--audio=good.wav", "--out=a.mp4", "--set=AU99=1"], "no AU99"),
        (["--audio=good.wav", "--out=a.mp4", "--set=AU01"], "NAME=NUMBER"),
        (["--audio=good.wav", "--out=a.mp4", "--timeline=none.json"], "none.json"),
        (["--audio=good.wav", "--out=a.mp4", "--pose=none.npy"], "none.npy"),
        (["--audio=good.wav", "--out=a.mp4", "--gate=loud"], "--gate loud"),
        (["--audio=good.wav", "--out=a.mp4", "--mouth-gain=9"], "--mouth-gain 9"),
        (["--audio=good.wav", "--out=nowhere/a.mp4"], "folder that you may write to"),
        (["--audio=good.wav", "--out=a.mp4", "--start=44"], "frames 0 to 43"),
        (["--audio=good.wav", "--out=a.mp4", "--data=nowhere"], "no such dataset"),
        (["--audio=good.wav"], "--out"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(commands, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("not a sound")
    soundfile.write("empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write("good.wav", np.zeros(3200, np.float32), 16000)
    (tmp_path / "half.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:3333])
    before = sorted(tmp_path.iterdir())
    assert cli.exit_code(synthesize.main, ["--workdir=run", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_evaluate_scores_another_sound_fitted_poses_and_training_frames(commands, tmp_path):
    out, sound = tmp_path / "scores", tmp_path / "speech.wav"
    soundfile.write(sound, 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32), 16000)
    flags = ["--workdir=run", f"--out={out}", f"--audio={sound}", "--refine-poses", "--training-frames"]
    assert cli.exit_code(evaluate.main, flags) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["tables"]["driven by speech.wav"]["frames"] == 25
    assert len(list(video.read_frames(out / "driven.mp4"))) == 25
    # fitted on the pixels outside the mouth, so the frames as a whole are at least not missed by more
    assert report["refined_poses"]["summary"]["psnr"] > report["summary"]["psnr"] - 0.1
    assert len(report["refined_poses"]["mean_twist"]) == 6
    learned = [frame["id"] for frame in report["training_frames"]["frames"]]
    assert len(learned) == len(report["frames"]) and set(learned) <= set(commands.dataset.train_ids.tolist())


def test_evaluate_hears_by_a_files_features_or_says_what_is_missing(commands, tmp_path, monkeypatch, capsys):
    other = dataclasses.replace(commands.dataset.clip, audio_name="hubert@0123")
    monkeypatch.setattr(commands, "dataset", datasets.Dataset(other))
    monkeypatch.delitem(vars(commands), "front_end", raising=False)  # what it has heard by so far
    sound, features, out = tmp_path / "speech.wav", tmp_path / "speech.npy", tmp_path / "scores"
    samples = 0.1 * np.random.default_rng(0).standard_normal(9600).astype(np.float32)
    soundfile.write(sound, samples, 16000)
    np.save(features, audio_io.log_mel_windows(samples, 15))
    flags = ["--workdir=run", f"--out={out}", f"--audio={sound}"]
    assert cli.exit_code(evaluate.main, flags) == 2
    assert "--speech-model" in capsys.readouterr().err and not out.exists()
    assert cli.exit_code(evaluate.main, [*flags, f"--features={features}"]) == 0
    assert json.loads((out / "evaluation.json").read_text())["tables"]["driven by speech.wav"]["frames"] == 15


def test_evaluate_prints_a_table_and_writes_json(commands, tmp_path, capsys):
    out = tmp_path / "scores"
    assert cli.exit_code(evaluate.main, ["--workdir=run", f"--out={out}", "--probe"]) == 0
    shown = capsys.readouterr().out
    for words in ("PSNR mouth box", "unavailable", "seconds per frame", "static head", "shuffled expression"):
        assert words in shown
    report = json.loads((out / "evaluation.json").read_text())
    assert report["run"]["step"] == 7 and report["run"]["data"] == str(commands.dataset.path)
    assert set(report["probes"]["reductions"]["wrong audio, mean"]) == {"metric", "difference", "relative"}
    assert cli.exit_code(evaluate.main, ["--workdir=run", f"--models={tmp_path}"]) == 2
    assert "face_landmarker.task" in capsys.readouterr().err
