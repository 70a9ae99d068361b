"""A procedural talking head with exact ground truth, as a native dataset folder: the default clip of the demo and the
tests. No real face, no network.

The head of `synthetic_head` says what `synthetic_speech` makes up, blinks, frowns and looks around, and moves before a
fixed camera; `synthetic_paint` draws it. Poses, masks, landmarks and expression are those the pictures were made of.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import dataset as datasets
from fg3dgs_jax.data import synthetic_head as heads
from fg3dgs_jax.data import synthetic_paint as paint
from fg3dgs_jax.data import synthetic_scene as scene
from fg3dgs_jax.data import synthetic_speech, video
from fg3dgs_jax.data.synthetic_rays import project
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.types import Label

FOCAL = 2.3  # image widths
DISTANCE = 0.75  # world units from the camera to the resting head
RAISED = 0.012  # world units that the head sits above the image's centre
PIVOT = np.array([0.0, -0.09, -0.02])  # world units; the neck joint that the head turns about
EXPRESSION = {  # name in the dataset, as `preprocess` has it -> field of `Face`
    "browInnerUp": "brow_up", "browOuterUp": "brow_outer", "browDown": "brow_down", "eyeWide": "wide",
    "cheekSquint": "cheek", "eyeSquint": "squint", "eyeBlink": "blink", "gaze_x": "gaze_x", "gaze_y": "gaze_y",
}  # fmt: skip
BLINK = (0.35, 0.9, 1.0, 0.85, 0.5, 0.2)  # closure in successive frames
BLINK_EVERY = (0.6, 1.8)  # s; often, so that the training frames of a clip of ten seconds hold several


def make(
    path: str | Path, num_frames: int = 150, size: int = 256, seed: int = 0, *, fps: float = 25.0,
    video_path: str | Path | None = None,
) -> None:  # fmt: skip
    """Writes the clip of a seed as a dataset folder: the same bits for the same arguments.

    Args:
      path: the dataset folder.
      num_frames: at least 25; frames are drawn and written one by one, so any length fits in memory.
      size: width and height in pixels, at least 64.
      fps: frames per second.
      video_path: also write the clip as this .mp4 with sound, and the sound as .wav beside it, to feed `preprocess`.

    Raises UserError.
    """
    if num_frames < 25 or size < 64:
        raise UserError(f"a procedural clip needs at least 25 frames of 64 pixels, not {num_frames} of {size}")
    speech = synthetic_speech.speak(num_frames / fps, fps, num_frames, seed)
    faces = act(speech, fps, seed)
    look = paint.make_look(seed)
    intrinsics = np.array([FOCAL * size, FOCAL * size, size / 2, size / 2], np.float32)
    viewmats = move(num_frames, fps, seed)
    background = scene.render_background(seed, size, size)
    unit = heads.UNIT * FOCAL * size / DISTANCE
    torso = scene.render_torso(seed, unit, (size / 2, size / 2 - RAISED / heads.UNIT * unit), look.skin, size, size)
    frames = _draw(look, faces, viewmats, intrinsics, torso, background)
    train, test = clips.split_ids(num_frames, fps)
    meta = datasets.Meta(
        width=size, height=size, fps=fps, num_frames=num_frames, intrinsics=tuple(intrinsics.tolist()),
        expression_names=tuple(EXPRESSION), train=tuple(train.tolist()), test=tuple(test.tolist()),
        extent=round(heads.UNIT * float(np.percentile(look.shape.radius, 98)), 4),
        source={"procedural": True, "seed": seed},
    )  # fmt: skip
    tracks = ground_truth(look, faces, viewmats, intrinsics, size)
    features = audio_io.features("logmel", speech.audio, fps, num_frames)
    datasets.write_dataset(path, meta, tracks, frames, background, speech.audio, features)
    if video_path is not None:
        clip = datasets.open_dataset(path, cache_bytes=0)
        pictures = (clip.pictures(index).image for index in range(num_frames))
        video.write_video(video_path, pictures, fps, speech.audio)
        audio_io.save_wav(Path(video_path).with_suffix(".wav"), speech.audio)


def act(speech: synthetic_speech.Speech, fps: float, seed: int) -> list[heads.Face]:
    """The face of every frame: the mouth from the speech, the rest from the seed."""
    rng = np.random.default_rng([seed, 6])
    count = len(speech.open)
    names = ("brow_up", "brow_outer", "wide", "cheek", "squint")
    moods = {name: np.clip(1.4 * _wander(rng, count, 0.35 * fps) - 0.5, 0, 1) for name in names}
    moods["brow_down"] = np.clip(1.4 * _wander(rng, count, 0.35 * fps) - 0.7, 0, 1) * (1 - moods["brow_up"])
    moods["wide"] = np.maximum(0.8 * moods["wide"] - moods["squint"], 0)
    blink = np.zeros(count + len(BLINK))
    start = rng.uniform(0.4, 1.2) * fps
    while start < count:
        blink[int(start) : int(start) + len(BLINK)] = BLINK
        start += rng.uniform(*BLINK_EVERY) * fps
    looks, stays = rng.uniform(-1, 1, (count, 2)) * [0.8, 0.6], rng.integers(int(0.5 * fps), int(1.4 * fps), count)
    gaze = np.repeat(looks, stays, axis=0)
    gaze = ndimage.gaussian_filter1d(gaze[:count], 0.02 * fps, axis=0, mode="nearest")
    tracks = {"open": speech.open, "width": speech.width, "blink": blink[:count], **moods}
    tracks |= {"gaze_x": gaze[:, 0], "gaze_y": gaze[:, 1]}
    return [heads.Face(**{name: float(track[i]) for name, track in tracks.items()}) for i in range(count)]


def move(num_frames: int, fps: float, seed: int) -> np.ndarray:
    """Smooth head motion as world-to-camera matrices, f32 [T, 4, 4]: the world is the head, the camera moves."""
    rng = np.random.default_rng([seed, 7])
    wander = np.stack([_wander(rng, num_frames, 0.6 * fps) for _ in range(6)], -1)
    rotations = Rotation.from_euler("YXZ", wander[:, :3] * [8, 4.5, 3], degrees=True).as_matrix()
    shifts = wander[:, 3:] * [0.005, 0.002, 0.006]
    camera = np.diag([1.0, -1.0, -1.0])  # OpenCV axes: y down, z away
    viewmats = np.tile(np.eye(4), (num_frames, 1, 1))
    viewmats[:, :3, :3] = camera @ rotations
    viewmats[:, :3, 3] = (PIVOT - rotations @ PIVOT + shifts + [0, RAISED, 0]) @ camera + [0, 0, DISTANCE]
    return viewmats.astype(np.float32)


def _wander(rng: np.random.Generator, count: int, smooth: float) -> np.ndarray:
    """A random smooth track of about unit deviation, cut at 2; `smooth` in frames."""
    track = ndimage.gaussian_filter1d(rng.standard_normal(count + int(8 * smooth)), smooth)[int(4 * smooth) :][:count]
    return np.clip(track * np.sqrt(2 * smooth * np.sqrt(np.pi)), -2, 2)


def ground_truth(
    look: paint.Look, faces: list[heads.Face], viewmats: np.ndarray, intrinsics: np.ndarray, size: int
) -> datasets.Tracks:
    """The tracks that the pictures are drawn from; landmarks in the order of `synthetic_head.landmarks`."""
    landmarks = np.stack([
        project(heads.landmarks(heads.deform(look.shape, face)), viewmat, intrinsics)
        for face, viewmat in zip(faces, viewmats, strict=True)
    ]).astype(np.float32)  # fmt: skip
    lips, eyes = clips.region_boxes(landmarks, size, size)
    expression = np.array([[getattr(face, field) for field in EXPRESSION.values()] for face in faces], np.float32)
    return datasets.Tracks(viewmats, expression, lips, eyes, landmarks, clips.mouth_opening(landmarks))


def _draw(look, faces, viewmats, intrinsics, torso: np.ndarray, background: np.ndarray) -> Iterator[datasets.Layers]:
    height, width = background.shape[:2]
    backdrop = clips.over(torso, background).astype(np.float32)
    covered = torso[..., 3] >= 128

    def draw(index: int) -> datasets.Layers:
        surface = heads.deform(look.shape, faces[index])
        color, alpha, labels = paint.render_head(look, surface, viewmats[index], intrinsics, width, height)
        image = np.round(255 * color + (1 - alpha[..., None]) * backdrop).astype(np.uint8)
        behind = covered & ((labels & Label.HEAD) == 0)
        return datasets.Layers(image, labels | np.where(behind, np.uint8(Label.TORSO), np.uint8(0)), torso)

    return datasets.ahead(draw, range(len(faces)), workers=2, depth=4)
