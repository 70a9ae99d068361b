"""Expression from blendshapes, gaps, crops and models; MediaPipe itself where a model and a real clip are at hand."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fg3dgs_jax.data import face, models, portrait, video
from fg3dgs_jax.errors import UserError

SHARED = Path(os.environ.get("FG3DGS_SHARED", Path(__file__).parents[2] / "shared"))
NAMES = (
    *("browInnerUp", "browOuterUpLeft", "browOuterUpRight", "browDownLeft", "browDownRight"),
    *("eyeWideLeft", "eyeWideRight", "cheekSquintLeft", "cheekSquintRight", "eyeSquintLeft", "eyeSquintRight"),
    *("eyeBlinkLeft", "eyeBlinkRight", "jawOpen", "mouthClose"),
    *(f"eyeLook{way}{side}" for way in ("Up", "Down", "In", "Out") for side in ("Left", "Right")),
)


def column(name: str) -> int:
    return face.EXPRESSION_NAMES.index(name)


def blendshapes(frames: int = 100, **tracks) -> np.ndarray:
    out = np.full((frames, len(NAMES)), 0.02, np.float32)
    for name, values in tracks.items():
        out[:, NAMES.index(name)] = values
    return out


def test_a_short_blink_keeps_its_height():
    blink = np.zeros(100)
    blink[[40, 41, 80, 81]] = 0.7
    track = face.expression(blendshapes(eyeBlinkLeft=blink, eyeBlinkRight=blink), NAMES)[:, column("eyeBlink")]
    assert track[[40, 41, 80, 81]].min() > 0.95
    assert np.abs(np.delete(track, [40, 41, 80, 81])).max() < 0.05


def test_scores_are_normalised_per_person_and_sides_averaged():
    swing = 0.3 + 0.1 * np.sin(np.arange(100) / 5)
    shapes = blendshapes(browDownLeft=swing, browDownRight=swing + 0.1)
    track = face.expression(shapes, NAMES)[:, column("browDown")]
    assert 0 <= track.min() < 0.1 and 0.9 < track.max() <= 1.2
    weak = face.expression(blendshapes(cheekSquintLeft=1e-4 * swing), NAMES)
    assert weak[:, column("cheekSquint")].max() < 0.01  # what hardly varies is noise and stays small


def test_gaze_is_right_and_up_of_the_image():
    look = np.zeros(100)
    look[50:60] = 0.5
    # To the image's right: the subject's left eye looks out, the right one in.
    sideways = face.expression(blendshapes(eyeLookOutLeft=look, eyeLookInRight=look), NAMES)[:, column("gaze_x")]
    up = face.expression(blendshapes(eyeLookUpLeft=look, eyeLookUpRight=look), NAMES)[:, column("gaze_y")]
    for track in (sideways, up):
        assert track[52:58].min() > 0.9 and np.abs(track[:48]).max() < 0.05


def test_gaps_are_filled_linearly_and_at_the_ends_by_the_nearest():
    track = np.array([np.nan, 1, np.nan, np.nan, 4, np.nan], np.float32)[:, None]
    np.testing.assert_allclose(face.fill_gaps(track)[:, 0], [1, 1, 2, 3, 4, 4])
    assert np.isnan(face.fill_gaps(np.full((3, 2), np.nan, np.float32))).all()


def box(x: float, y: float, height: float) -> list[float]:
    return [x - 0.4 * height, y, x + 0.4 * height, y + height]


def test_the_crop_holds_the_head_in_every_frame():
    moving = [np.array([box(0.4 + 0.01 * k, 0.3, 0.2)], np.float32) for k in range(10)]
    found = portrait.find_portrait(moving, 1000, 1000)
    x0, y0, x1, y1 = found.crop
    assert x1 - x0 == y1 - y0 and (x1 - x0) % 2 == 0
    assert found.face == pytest.approx(200, abs=1) and found.seen == 1.0 and found.rivals == 0.0
    for frame in moving:
        low, high = frame[0, :2] * 1000, frame[0, 2:] * 1000
        assert y0 < low[1] - 0.5 * 200 and y1 > high[1] + 0.5 * 200  # hair above, shoulders below
        assert x0 < low[0] - 0.35 * 200 and x1 > high[0] + 0.35 * 200


def test_other_people_are_told_from_small_pictures():
    rival = [np.array([box(0.3, 0.3, 0.2), box(0.7, 0.3, 0.18)], np.float32)] * 5
    poster = [np.array([box(0.3, 0.3, 0.2), box(0.7, 0.3, 0.05)], np.float32)] * 5
    assert portrait.find_portrait(rival, 1000, 1000).rivals == 1.0
    assert portrait.find_portrait(poster, 1000, 1000).rivals == 0.0
    with pytest.raises(UserError, match="no face"):
        portrait.find_portrait([np.zeros((0, 4), np.float32)] * 5, 1000, 1000)


def test_models_are_named_with_their_source_and_licence(tmp_path):
    for content in (None, b"another version"):
        if content:
            (tmp_path / models.LANDMARKS.name).write_bytes(content)
        with pytest.raises(UserError, match=r"face_landmarker\.task.*download it from https.*Apache-2\.0"):
            models.find_model(tmp_path, models.LANDMARKS)


def test_without_mediapipe_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mediapipe", None)
    with pytest.raises(UserError, match="pip install"):
        models.import_mediapipe()


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason=f"no real clips at {SHARED} (FG3DGS_SHARED)")
def test_a_real_face_is_found_and_an_empty_picture_has_none():
    pytest.importorskip("mediapipe")
    clip = SHARED / "clips/woman_7s_700x700.mp4"
    image = next(video.read_frames(clip, max_side=400))
    track = face.track_face([image, np.zeros_like(image)], SHARED / "models/face_landmarker.task")
    points = track.landmarks
    assert points.shape == (2, 478, 3) and points.dtype == np.float32 and track.blendshapes.shape == (2, 52)
    assert np.isnan(points[1]).all() and np.isnan(track.blendshapes[1]).all()
    # She is near the middle; eyes (33, 263) are left and right above the mouth (13), which is above the chin (152).
    left, right, mouth, chin = points[0, [33, 263, 13, 152], :2]
    assert left[0] < mouth[0] < right[0] and max(left[1], right[1]) < mouth[1] < chin[1]
    assert 100 < mouth[0] < 300


def test_landmarks_are_pixels_of_the_picture_whatever_its_shape(monkeypatch):
    """MediaPipe's are shares of width and height: those of a tall video were once taken for shares of its width."""
    points = [SimpleNamespace(x=0.5, y=0.25, z=0.1)] * face.NUM_LANDMARKS
    shapes = [SimpleNamespace(category_name=str(i), score=0.5) for i in range(face.NUM_BLENDSHAPES)]
    shown = []

    @contextlib.contextmanager
    def landmarker(model, blendshapes):
        def detect(image):
            shown.append(image.shape)
            found = [points] if image.any() else []
            return SimpleNamespace(face_landmarks=found, face_blendshapes=[shapes])

        yield detect

    monkeypatch.setattr(face, "landmarker", landmarker)
    pictures = [
        np.full((1000, 600, 3), 9, np.uint8),
        np.full((96, 64, 3), 9, np.uint8),
        np.zeros((96, 64, 3), np.uint8),
    ]
    track = face.track_face(pictures, "model")
    assert shown == [(1000, 600, 3), (768, 512, 3), (768, 512, 3)]  # small ones are enlarged
    np.testing.assert_allclose(track.landmarks[:2, 0], [[300, 250, 60], [32, 24, 6.4]], rtol=1e-6)
    assert np.isnan(track.landmarks[2]).all() and np.isnan(track.blendshapes[2]).all()


def test_what_a_model_says_while_it_loads_is_dropped(capfd):
    """Only that: what is said before and after, and what Python raises, arrives."""
    with pytest.raises(ValueError, match="broken"):
        os.write(2, b"before\n")
        with models.hushed():
            os.write(2, b"chatter\n")
            raise ValueError("broken")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"
