"""The pre-flight report of a clip: what a good talking head needs, measured; pass, warn or fail, and the fix."""

import dataclasses

import cv2
import numpy as np

from fg3dgs_jax.data import audio as audio_io

PASS, WARN, FAIL = "pass", "warn", "fail"
MAX_LAG = 15  # frames either way
SYNC_WINDOW = 4  # frames: a best lag within it counts as in sync
SYNC_R = 0.32  # below it the sound does not explain the lips: clips in sync reach 0.40 to 0.65, a dubbed one 0.22
SYNC_COMPONENTS = 24
SHARP = 0.3  # fine against coarse contrast of a face that was filmed sharp


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    value: str
    fix: str = ""  # what to do about it; empty when passed


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the checks look at."""

    fps: float  # of the source
    seconds: float
    seen: np.ndarray  # bool [T], frames with a face
    rivals: float  # share of the searched frames with a second person
    mouth_pixels: float  # median width of the lips in source pixels
    angles: np.ndarray  # f32 [T, 3], yaw, pitch, roll in degrees
    pose_error: float  # RMS re-projection in pixels at 512
    face_light: np.ndarray  # f32 [n], mean luminance of the face in some frames, 0 to 255
    sharpness: float  # see `sharpness`
    audio: np.ndarray  # f32 [n] at 16 kHz
    sync: np.ndarray  # f32 [2 * MAX_LAG + 1], see `sync_curve`
    notes: tuple[str, ...] = ()  # what decoding had to leave out


def checks(facts: Facts) -> list[Check]:
    """All lines of the report."""
    return [
        *(Check("file", WARN, note, "export the clip again if that part matters") for note in facts.notes),
        _grade("clip length", facts.seconds, "{:.1f} s", 60, 5, "record one to five minutes of speech"),
        _grade("frame rate", facts.fps, "{:.3g} FPS", 24.9, 15, "record with 25 FPS or more; frames are repeated"),
        _grade(
            "face found", 100 * facts.seen.mean(), "in {:.1f} % of frames", 99, 90, "leave out parts without a face"
        ),
        _grade("one person", -100 * facts.rivals, "{:.0f} % of frames show another", -0.5, -10, "crop the others away"),
        _grade("mouth size", facts.mouth_pixels, "lips {:.0f} px wide", 50, 25, "film closer or with more pixels"),
        _turning(facts.angles),
        _grade(
            "head pose",
            -facts.pose_error,
            "landmarks re-project to {:.2f} px",
            -1.5,
            -4,
            "use a steadier, sharper clip",
        ),
        *_light(facts.face_light),
        _grade(
            "sharpness", facts.sharpness, "{:.2f} of a sharp face", 0.5, 0.25, "focus on the eyes; avoid re-encoding"
        ),
        *_sound(facts.audio),
        _sync(facts.sync, len(facts.seen) / facts.seconds),
    ]


def _grade(name: str, value: float, text: str, good: float, poor: float, fix: str) -> Check:
    status = PASS if value >= good else WARN if value >= poor else FAIL
    return Check(name, status, text.format(abs(value)), "" if status == PASS else fix)


def _turning(angles: np.ndarray) -> Check:
    low, high = np.percentile(angles[:, 0], [2, 98])
    text = f"yaw {low:+.0f} to {high:+.0f} degrees, {high - low:.0f} in all"
    if max(abs(low), abs(high)) > 45:
        return Check("head turns", WARN, text, "keep the face within 45 degrees of the camera")
    if high - low < 4:
        return Check("head turns", WARN, text, "let the head move a little: its shape is seen only through turns")
    return Check("head turns", PASS, text)


def _light(light: np.ndarray) -> list[Check]:
    mean, change = float(light.mean()), float(light.std() / max(light.mean(), 1.0))
    good = 60 <= mean <= 215
    steady = change < 0.1
    return [
        Check("exposure", PASS if good else WARN, f"face at {mean:.0f} of 255", "" if good else "light the face"),
        Check("steady light", PASS if steady else WARN, f"varies by {100 * change:.1f} %",
              "" if steady else "switch off automatic exposure; avoid moving shadows"),
    ]  # fmt: skip


def loudness(audio: np.ndarray, fps: float, frames: int) -> np.ndarray:
    """RMS of the sound around each frame, f32 [frames], from f32 [n] at 16 kHz."""
    length = audio_io.SAMPLE_RATE / fps
    edges = np.clip(np.round((np.arange(frames + 1) - 0.5) * length).astype(int), 0, len(audio))
    total = np.concatenate([[0.0], np.cumsum(audio.astype(np.float64) ** 2)])
    return np.sqrt((total[edges[1:]] - total[edges[:-1]]) / np.maximum(np.diff(edges), 1)).astype(np.float32)


def _sound(audio: np.ndarray) -> list[Check]:
    level = loudness(audio, 50.0, max(1, len(audio) * 50 // audio_io.SAMPLE_RATE))
    loud = float(np.percentile(level, 95))
    silence = float((level < 0.06 * loud).mean()) if loud > 1e-4 else 1.0
    clipped = float((np.abs(audio) > 0.995).mean()) if len(audio) else 0.0
    lines = [_grade("speech", -100 * silence, "{:.0f} % silence", -40, -80, "use a clip with more speech")]
    if clipped > 1e-3:
        lines.append(Check("sound level", WARN, f"{100 * clipped:.1f} % of samples clipped", "record less loudly"))
    return lines


def _sync(curve: np.ndarray, fps: float) -> Check:
    lag = int(np.argmax(curve)) - MAX_LAG
    near = float(curve[MAX_LAG - SYNC_WINDOW : MAX_LAG + SYNC_WINDOW + 1].max())
    text = f"sound explains lips with r = {near:.2f} in place, best {curve.max():.2f} at {lag:+d} frames"
    fix = ""
    if curve.max() > max(near, SYNC_R) + 0.1:
        fix = f"the sound is {1000 * abs(lag) / fps:.0f} ms {'late' if lag > 0 else 'early'}: move it"
    elif near < SYNC_R:
        fix = "sound and lips may not belong together: check for dubbing or an offset"
    return Check("sound and lips", WARN if fix else PASS, text, fix)


def sync_curve(audio: np.ndarray, opening: np.ndarray, fps: float = 25.0) -> np.ndarray:
    """Correlation of the lip opening f32 [T] with its prediction from sound, by lag in frames, f32 [2 MAX_LAG + 1].

    Ridge regression from the principal components of log-mel windows, cross-validated over five contiguous blocks
    with a guard between training and test. Lag +k: the lips at frame i are predicted from the sound around frame i + k.
    """
    frames = len(opening)
    windows = audio_io.log_mel_windows(audio, frames, fps)
    features = windows.reshape(frames, 8, 2, 16, 4).mean((2, 4)).reshape(frames, -1).astype(np.float64)
    features -= features.mean(0)
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    components = (left * values)[:, :SYNC_COMPONENTS]
    components /= max(components.std(), 1e-9)
    lags = range(-MAX_LAG, MAX_LAG + 1)
    return np.array([_explained(components, opening.astype(np.float64), lag) for lag in lags], np.float32)


def _explained(features: np.ndarray, target: np.ndarray, lag: int) -> float:
    rows = np.arange(len(target))
    rows = rows[(rows + lag >= 0) & (rows + lag < len(features))]
    x, y = features[rows + lag], target[rows]
    prediction = np.zeros(len(y))
    for test in np.array_split(np.arange(len(y)), 5):
        train = np.ones(len(y), bool)
        train[max(test[0] - 8, 0) : test[-1] + 9] = False
        middle, mean = x[train].mean(0), y[train].mean()
        a = x[train] - middle
        gram = a.T @ a + 0.1 * len(a) * np.eye(a.shape[1])
        prediction[test] = (x[test] - middle) @ np.linalg.solve(gram, a.T @ (y[train] - mean)) + mean
    deviation = prediction.std() * y.std()
    return float(((prediction - prediction.mean()) * (y - y.mean())).mean() / deviation) if deviation > 1e-12 else 0.0


def sharpness(face: np.ndarray) -> float:
    """How much fine detail a face u8 [h, w, 3] has; about 1 when filmed sharp: contrast at 1-2 pixels against 4-8."""
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32)
    blurred = [grey, *(cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (1.0, 4.0, 8.0))]
    fine, coarse = (blurred[0] - blurred[1]).std(), (blurred[2] - blurred[3]).std()
    return float(fine / max(coarse, 1e-3)) / SHARP
