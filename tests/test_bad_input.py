"""Every bad input: one sentence that names it and the fix, exit code 2, nothing half-written.

One table. A row is (name, command, the words of the sentence, how to make the input and the arguments). What a face
detector sees is scripted, so that the rows need neither MediaPipe nor a real face.
"""

import errno
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from torch_files import Tensor, zip_bytes

from fg3dgs_jax import cli, convert, evaluate, native, preprocess, synthesize, train, train_sync
from fg3dgs_jax.data import face, intake, masks, models, synthetic
from fg3dgs_jax.data.video import write_video
from fg3dgs_jax.training import checkpoint, loop

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"
FPS, SIDE = 25, 64


def clip(path: Path, seconds: float = 2.4, sound: bool = True) -> Path:
    """Noise with noise, as a real mp4."""
    random, count = np.random.default_rng(0), round(seconds * FPS)
    frames = (random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count))
    samples = random.uniform(-0.1, 0.1, round(16000 * seconds)).astype(np.float32)
    write_video(path, frames, FPS, samples if sound else None, crf=40)
    return path


def scripted_faces(patch, boxes, landmarks) -> None:
    """boxes(i) -> [n, 4] shares of the image; landmarks(i) -> [478, 3] pixels, or None where no face is seen."""

    def track_face(images, model):
        seen = [landmarks(i) for i, _ in enumerate(images)]
        points = [np.full((478, 3), np.nan) if p is None else p for p in seen]
        shapes = np.where(np.isfinite([p[0, 0] for p in points]), 0.0, np.nan)[:, None].repeat(52, 1)
        return face.FaceTrack(np.asarray(points, np.float32), shapes.astype(np.float32), tuple(map(str, range(52))))

    patch.setattr(face, "find_boxes", lambda images, model: [boxes(i) for i, _ in enumerate(images)])
    patch.setattr(face, "track_face", track_face)


class Person:
    """Stands for the person segmenter: everything is the person."""

    def __init__(self, model):
        pass

    def __enter__(self):
        return lambda image: np.ones(image.shape[:2], np.float32)

    def __exit__(self, *error):
        pass


def no_models_needed(folder: Path, patch) -> None:
    model = folder / "model"
    model.write_bytes(b"model")
    patch.setattr(models, "find_model", lambda *names: model)
    patch.setattr(models, "import_mediapipe", lambda: None)
    patch.setattr(masks, "person_segmenter", Person)


FACE = np.array([[0.3, 0.3, 0.7, 0.7]], np.float32)
TWO_FACES = np.array([[0.1, 0.3, 0.4, 0.7], [0.6, 0.3, 0.9, 0.7]], np.float32)
WIDE_MOUTH = np.zeros((478, 3), np.float32)
WIDE_MOUTH[:, 1], WIDE_MOUTH[291, 0] = 32.0, 40.0
SMALL_MOUTH = WIDE_MOUTH * (0.2, 1.0, 1.0)


def preprocess_row(make, boxes=lambda i: FACE, landmarks=lambda i: WIDE_MOUTH, argv=()):
    def prepare(folder: Path, patch) -> list[str]:
        no_models_needed(folder, patch)
        scripted_faces(patch, boxes, landmarks)
        return [str(make(folder / "clip.mp4")), f"--out={folder / 'out'}", f"--size={SIDE}", *argv]

    return prepare


def text_file(path: Path) -> Path:
    path.write_text("this is not a video")
    return path


def wrong_hash(folder: Path, patch) -> list[str]:
    (folder / models.LANDMARKS.name).write_bytes(b"not the model")
    return [str(clip(folder / "clip.mp4")), f"--out={folder / 'out'}", f"--models={folder}"]


def missing_model(folder: Path, patch) -> list[str]:
    return [str(clip(folder / "clip.mp4")), f"--out={folder / 'out'}", f"--models={folder}"]


def foreign_out(folder: Path, patch) -> list[str]:
    no_models_needed(folder, patch)
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")
    return [str(clip(folder / "clip.mp4")), f"--out={folder / 'out'}"]


def full_disk_while_cutting(folder: Path, patch) -> list[str]:
    def full(*rest):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "out"))

    argv = preprocess_row(clip)(folder, patch)
    patch.setattr(intake, "cut", full)
    return argv


PREPROCESS = [
    ("no such clip", r"clip\.mp4: no such file", preprocess_row(lambda path: path)),
    ("not a video", r"clip\.mp4.*not a video", preprocess_row(text_file)),
    ("a folder", r"no such file", preprocess_row(lambda path: path.parent)),
    ("empty file", r"clip\.mp4", preprocess_row(lambda path: (path.touch(), path)[1])),
    ("no audio track", r"no audio track", preprocess_row(lambda path: clip(path, sound=False))),
    ("clip under 2 s", r"lasts 1\.\d s; give a clip of at least 2 s", preprocess_row(lambda path: clip(path, 1.2))),
    ("no face", r"no face found", preprocess_row(clip, lambda i: np.zeros((0, 4), np.float32))),
    ("two faces", r"second face.* in 100 %", preprocess_row(clip, lambda i: TWO_FACES)),
    (
        "face in under 90 % of the frames",
        r"only 82 % of the 60 frames .*none in frames 5, 20-29",
        preprocess_row(clip, landmarks=lambda i: None if i == 5 or 20 <= i < 30 else WIDE_MOUTH),
    ),
    ("mouth too small", r"the mouth is only \d+ pixels wide", preprocess_row(clip, landmarks=lambda i: SMALL_MOUTH)),
    ("missing model", r"face_landmarker\.task: the model file is missing; download it from https", missing_model),
    ("wrong-hash model", r"face_landmarker\.task.*SHA-256 differs\); download it from https", wrong_hash),
    ("foreign output folder", r"holds other files", foreign_out),
    ("unknown front end", r"hubrt: no such audio front end", preprocess_row(clip, argv=["--audio-features=hubrt"])),
    ("unknown flag", r"unrecognized arguments: --sze", preprocess_row(clip, argv=["--sze=3"])),
    ("full disk", r"disk is full|cannot be written", full_disk_while_cutting),
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "data"
    synthetic.make(path, 25, 64)
    return path


def train_row(*argv: str):
    def prepare(folder: Path, patch) -> list[str]:
        return [TINY, f"--workdir={folder / 'run'}", *argv]

    return prepare


def on_dataset(*argv: str):
    def prepare(folder: Path, patch, dataset: Path) -> list[str]:
        return [TINY, f"--config.data={dataset}", f"--workdir={folder / 'run'}", *argv]

    return prepare


def gpu_without_kernels(folder: Path, patch) -> list[str]:
    patch.setattr(jax, "default_backend", lambda: "gpu")
    patch.setattr(native, "has_cuda", lambda: False)
    return train_row()(folder, patch)


def saved_run(change=None, damage=None):
    """A run with checkpoints at steps 1 and 2; `change` of its info before saving, `damage` of the folder after."""

    def prepare(folder: Path, patch, dataset: Path) -> list[str]:
        patch.setattr(loop, "first_state", lambda run: {"step": jnp.zeros((), jnp.int32)})
        argv = on_dataset()(folder, patch, dataset)
        config, workdir = cli.parse_train(argv)
        info = loop.info_of(loop.prepare(config, train.find_dataset(config, workdir), workdir))
        for step in (1, 2):
            checkpoint.save(workdir, step, {"step": jnp.int32(step)}, change(info) if change else info)
        if damage:
            damage(workdir / "checkpoints")
        return argv

    return prepare


def workdir_that_is_a_file(folder: Path, patch, dataset: Path) -> list[str]:
    (folder / "run").write_text("years of work")
    return on_dataset()(folder, patch, dataset)


def procedural_clip_of_another_size(folder: Path, patch, dataset: Path) -> list[str]:
    shutil.copytree(dataset, folder / "run" / "data")
    return train_row()(folder, patch)


def other_seed(info: dict) -> dict:
    return {**info, "config": {**info["config"], "seed": 7}}


def other_format(root: Path) -> None:
    for folder in root.iterdir():
        record = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps({**record, "version": 99}))
        (folder / checkpoint.SUMS).write_bytes(checkpoint._sums(folder))


def damage_all(root: Path) -> None:
    for path in root.glob("*/info.json"):
        path.write_bytes(path.read_bytes()[:-1])


def full_disk_while_saving(folder: Path, patch, dataset: Path) -> list[str]:
    def full(partial, *rest):
        partial.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))

    argv = saved_run()(folder, patch, dataset)
    patch.setattr(loop, "train", lambda run, *rest: checkpoint.save(run.workdir, 3, {"step": jnp.int32(3)}, {}))
    patch.setattr(checkpoint, "_write", full)
    return argv


def broken_dataset(folder: Path, patch, dataset: Path) -> list[str]:
    shutil.copytree(dataset, folder / "data")
    (folder / "data" / "labels" / "000003.png").unlink()
    return [TINY, f"--config.data={folder / 'data'}", f"--workdir={folder / 'run'}"]


TRAIN = [
    ("a GPU without kernels for it", r"built without CUDA: .*FG3DGS_CUDA=1", gpu_without_kernels),
    ("no config", r"--config is missing", lambda folder, patch: [f"--workdir={folder / 'run'}"]),
    ("no such config", r"nowhere\.py: no such file", lambda folder, patch: ["--config=nowhere.py"]),
    ("unknown config field", r"--config\.sede.*did you mean --config\.seed\?", train_row("--config.sede=1")),
    ("wrong type", r"--config\.seed=x: expected a whole number", train_row("--config.seed=x")),
    ("no such dataset", r"nowhere", train_row("--config.data=nowhere")),
    ("dataset that is a file", r"README\.md", train_row(f"--config.data={ROOT / 'README.md'}")),
    ("no such LPIPS weights", r"nowhere\.st: no such file", on_dataset("--config.judges.lpips=nowhere.st")),
    ("no such weights, no clip either", r"nowhere\.st: no such file", train_row("--config.judges.sync=nowhere.st")),
    ("never saving", r"--config\.save_every=0: must be at least 1", train_row("--config.save_every=0")),
    ("a negative seed", r"--config\.seed=-1: must be from 0", train_row("--config.seed=-1")),
    ("no such region", r"the region 'nose'", train_row("--config.layers=('nose',)")),
    ("no region", r"--config\.layers=\(\): must name the regions", train_row("--config.layers=()")),
    (
        "more points than room",
        r"points=900: is more than its capacity of 512",
        train_row("--config.regions.face.points=900"),
    ),
    (
        "a grid without levels",
        r"face\.grid\.levels=0: must be from 1",
        train_row("--config.regions.face.grid.levels=0"),
    ),
    ("no such backend", r"backend: 'fast' is none of auto", train_row("--config.rasterizer.backend=fast")),
    ("no regular expression", r"groups\.sh\.pattern: is no regular", train_row("--config.groups.sh.pattern=(")),
    ("a rate of zero", r"rates\.means=.*two rates above 0", train_row("--config.stages.static.rates.means=(0.0, 0.0)")),
    ("a lip-sync expert of three frames", r"judges 5 frames", train_row("--config.stages.alignment.frames=3")),
    ("a working directory that is a file", r"run: cannot be written", workdir_that_is_a_file),
    ("procedural clip of another size", r"another length or size", procedural_clip_of_another_size),
    ("unknown stage", r"stage 'warp'", on_dataset("--config.schedule=('warp',)")),
    (
        "cameras in an unknown stage",
        r"--config\.pose\.stages: no stage 'warp'",
        on_dataset("--config.pose.refine=true", "--config.pose.stages=('warp',)"),
    ),
    (
        "an unknown prediction",
        r"--config\.regions\.mouth\.predicts: 'glow'",
        on_dataset("--config.regions.mouth.predicts=('glow',)"),
    ),
    ("an unknown densification", r"densify\.kind: 'mcmc'", on_dataset("--config.stages.motion.densify.kind=mcmc")),
    ("smoothing into the past", r"--config\.expression\.smooth=-1", on_dataset("--config.expression.smooth=-1.0")),
    ("damaged dataset", r"000003\.png", broken_dataset),
    ("checkpoint of another config", r"--config\.seed 7, this run has 0", saved_run(other_seed)),
    ("checkpoint of another dataset", r"another dataset", saved_run(lambda info: {**info, "dataset": "x"})),
    ("checkpoint of another format", r"version 99 and this version", saved_run(None, other_format)),
    ("every checkpoint damaged", r"every checkpoint is damaged", saved_run(None, damage_all)),
    ("full disk while saving", r"disk is full while writing.*run the same command again", full_disk_while_saving),
]


def speech(folder: Path, samples: int = 8000) -> Path:
    soundfile.write(folder / "speech.wav", np.zeros(samples, np.float32), 16000)
    return folder / "speech.wav"


def synthesize_row(make_audio, *argv: str):
    def prepare(folder: Path, patch) -> list[str]:
        audio = make_audio(folder)
        return [f"--workdir={folder / 'run'}", f"--audio={audio}", f"--out={folder / 'talk.mp4'}", *argv]

    return prepare


SYNTHESIZE = [
    ("no such sound", r"none\.wav: no such file", synthesize_row(lambda folder: folder / "none.wav")),
    ("not a sound", r"text\.wav", synthesize_row(lambda folder: text_file(folder / "text.wav"))),
    ("sound without samples", r"speech\.wav", synthesize_row(lambda folder: speech(folder, 0))),
    ("no checkpoint", r"run.*holds no checkpoint", synthesize_row(speech)),
    ("not an mp4", r"talk\.avi.*mp4", synthesize_row(speech, "--out=talk.avi")),
]


def evaluate_row(samples: int):
    """A head that shall say a sound of zeros."""
    return lambda folder, patch: [f"--workdir={folder / 'run'}", f"--audio={speech(folder, samples)}"]


EVALUATE = [
    ("no checkpoint", r"run.*holds no checkpoint", lambda folder, patch: [f"--workdir={folder / 'run'}"]),
    ("no models", r"model file is missing", lambda folder, patch: [f"--workdir={folder}", f"--models={folder}"]),
    (
        "weights that are not converted",
        r"x\.pth: is damaged or no safetensors file .*convert it with",
        lambda folder, patch: [f"--workdir={folder / 'run'}", f"--lpips={text_file(folder / 'x.pth')}"],
    ),
    ("a silent sound to say", r"--audio .*speech\.wav: is silent", evaluate_row(16000)),
    ("a sound of a moment", r"--audio .*speech\.wav: lasts under half a second", evaluate_row(1600)),
    ("a sound of hours", r"--audio .*speech\.wav: lasts over 120 s", evaluate_row(121 * 16000)),
]


def convert_row(content: bytes | None, *argv: str):
    def prepare(folder: Path, patch) -> list[str]:
        if content is not None:
            (folder / "weights.pth").write_bytes(content)
        return [str(folder / "weights.pth"), f"--out={folder / 'out.safetensors'}", *argv]

    return prepare


def head_into_a_file(folder: Path, patch) -> list[str]:
    checkpoint = convert_row(LINEAR)(folder, patch)[0]
    return [checkpoint, "--data=x", f"--out={folder / 'weights.pth'}"]


LINEAR = zip_bytes({"fc.weight": Tensor(np.ones((2, 2), np.float32))})
CONVERT = [
    ("no such weights", r"weights\.pth: no such file", convert_row(None)),
    ("not weights", r"weights\.pth: is refused because it is damaged or no file of weights", convert_row(b"text")),
    (
        "a hostile file",
        r"it asks for '(posix|nt)\.system'",
        convert_row(zip_bytes(None, data_pkl=b"cposix\nsystem\n.")),
    ),
    ("unknown weights", r"weights\.pth: holds none of the weights", convert_row(LINEAR)),
    ("weights of another kind", r"weights\.pth: not the lpips weights", convert_row(LINEAR, "--kind=lpips")),
    ("a head into a file", r"weights\.pth: is a file", head_into_a_file),
    ("not a safetensors name", r"--out x\.bin: must end in", convert_row(LINEAR, "--out=x.bin")),
]


def sync_row(*argv: str):
    def prepare(folder: Path, patch) -> list[str]:
        return [f"--config={ROOT / 'configs' / 'sync.py'}", f"--workdir={folder / 'run'}", *argv]

    return prepare


def short_clip(folder: Path, patch, dataset: Path) -> list[str]:
    return sync_row(str(dataset))(folder, patch)


def silent_clip(folder: Path, patch, dataset: Path) -> list[str]:
    shutil.copytree(dataset, folder / "data")
    soundfile.write(folder / "data" / "audio.wav", np.zeros(16000, np.float32), 16000)
    return sync_row(str(folder / "data"))(folder, patch)


TRAIN_SYNC = [
    ("no clips", r"no clip to learn from is given", sync_row()),
    ("no such clip", r"nowhere: no such file", sync_row("nowhere")),
    ("too short a clip", r"has only 25 frames; give a clip of at least 2 s", short_clip),
    ("a silent clip", r"data: its sound is silent", silent_clip),
    ("no expert to go on from", r"nowhere\.st: no such file", sync_row("--config.init=nowhere.st", "nowhere")),
    ("too wide a network", r"--config\.width=7: must be from", sync_row("--config.width=7.0", "nowhere")),
    ("a shift of nothing", r"--config\.shift=0: must be from 1 to 25", sync_row("--config.shift=0", "nowhere")),
    ("a rate of nothing", r"--config\.rate=0: must be from 1e-06 to 1", sync_row("--config.rate=0.0", "nowhere")),
    ("an endless rate", r"--config\.rate=inf: must be from", sync_row("--config.rate=inf", "nowhere")),
    ("a rate that is none", r"--config\.rate=nan: must be from", sync_row("--config.rate=nan", "nowhere")),
    ("negative decay", r"--config\.decay=-1: must be from 0", sync_row("--config.decay=-1.0", "nowhere")),
    ("a negative seed", r"--config\.seed=-1: must be from 0", sync_row("--config.seed=-1", "nowhere")),
    ("a stretch of neighbours", r"--config\.span=3: must be from 6", sync_row("--config.span=3", "nowhere")),
    ("all held out", r"--config\.held_share=0\.9: must be from 0 to", sync_row("--config.held_share=0.9", "nowhere")),
]
COMMANDS = (
    (preprocess, PREPROCESS), (train, TRAIN), (synthesize, SYNTHESIZE), (evaluate, EVALUATE), (convert, CONVERT),
    (train_sync, TRAIN_SYNC),
)  # fmt: skip
TABLE = [
    pytest.param(command, words, prepare, id=f"{command.__name__.split('.')[-1]}: {name}")
    for command, rows in COMMANDS
    for name, words, prepare in rows
]


def everything_in(folder: Path) -> dict[str, bytes | None]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


@pytest.mark.parametrize("command, words, prepare", TABLE)
def test_bad_input(command, words, prepare, tmp_path, monkeypatch, capfd, dataset):
    needs_dataset = prepare.__code__.co_argcount == 3
    argv = prepare(tmp_path, monkeypatch, dataset) if needs_dataset else prepare(tmp_path, monkeypatch)
    before = everything_in(tmp_path)
    capfd.readouterr()
    assert cli.exit_code(command.main, argv) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(words, said[0]), said[0]
    after = everything_in(tmp_path)
    if prepare is full_disk_while_cutting:  # finished steps stay for the next attempt, out of sight
        after = {name: content for name, content in after.items() if not name.startswith(".out.preprocess")}
    assert after == before


def test_nan_in_training_names_step_and_term_and_keeps_the_good_checkpoint(tmp_path, dataset, capfd):
    workdir = tmp_path / "run"
    short = ["--config.layers=('face',)", "--config.schedule=('static',)", "--config.save_every=1"]
    argv = [TINY, f"--config.data={dataset}", f"--workdir={workdir}", *short]
    # An infinite rate: 0 * inf makes the means NaN in the first step whose gradient counts.
    assert cli.exit_code(train.main, [*argv, "--config.stages.static.rates.means=(1e999, 1e999)"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search(r"stopped at step \d+: .*not finite", said[0])
    assert not checkpoint.steps(workdir)
