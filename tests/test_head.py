"""Heads from checkpoints, frozen heads, speech of any length, and the two commands on hostile sound.

The head is real but tiny, and its networks are filled with noise so that it moves.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import soundfile

from fg3dgs_jax import cli, evaluate, synthesize
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import dataset as datasets
from fg3dgs_jax.data import video
from fg3dgs_jax.errors import UserError
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
    torso[..., 3] = 255

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
    monkeypatch.setattr(Head, "load", lambda _, data=None: load(run_folder, data) if data else head)
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
    assert [int(p[0, 0, 0]) // 4 for p in head.speak(windows[: 5 + 2 * MARGIN], start=20)] == [20, 21, 22, 23, 24]


def sounds(folder):
    """name -> (file, seconds)"""
    rng = np.random.default_rng(0)
    stereo = (0.2 * rng.standard_normal((96000, 2))).astype(np.float32)
    files = {
        "silent.wav": (np.zeros(16000, np.float32), 16000, "PCM_16"),
        "short.wav": (0.2 * stereo[:1600, 0], 16000, "PCM_16"),
        "hires.wav": (stereo[:72000], 96000, "FLOAT"),
        "speech.mp3": (stereo[:44100], 44100, "MPEG_LAYER_III"),
        "long.flac": (stereo[:44000, 0], 11025, "PCM_16"),
    }
    for name, (samples, rate, subtype) in files.items():
        soundfile.write(folder / name, samples, rate, subtype=subtype)
    return {name: len(samples) / rate for name, (samples, rate, _) in files.items()}


def test_any_sound_makes_a_video_of_its_length(commands, tmp_path, capsys):
    for name, seconds in sounds(tmp_path).items():
        out = tmp_path / f"{name}.mp4"
        code = cli.exit_code(synthesize.main, ["--workdir=run", f"--audio={tmp_path / name}", f"--out={out}"])
        assert code == 0, capsys.readouterr().err
        info = video.probe(out)
        # mp3 pads its ends with up to three packets of 1152 samples: 0.08 s
        assert info.num_frames == pytest.approx(np.ceil(25 * seconds - 1e-6), abs=2 if name.endswith("mp3") else 0), (
            name
        )
        assert info.has_audio
    assert "ms a frame" in capsys.readouterr().out
    sound = audio_io.load_audio(tmp_path / "hires.wav.mp4")
    assert len(sound) / 16000 == pytest.approx(19 / 25, abs=0.07)  # AAC comes in packets of 0.02 s


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--audio=missing.wav", "--out=a.mp4"], "missing.wav"),
        (["--audio=text.wav", "--out=a.mp4"], "text.wav"),
        (["--audio=empty.wav", "--out=a.mp4"], "empty.wav"),
        (["--audio=good.wav", "--out=a.avi"], "ends in .mp4"),
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
    before = sorted(tmp_path.iterdir())
    assert cli.exit_code(synthesize.main, ["--workdir=run", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


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
