"""Does a talking head keep time: frames, sound and lips, in short files and at the end of ten minutes; and its memory.

    python benchmarks/speech_timing.py --workdir RUN --data CLIP --models DIR [--minutes 10] [SOUND ...]

The head says each SOUND, and a programme of so many minutes: the clip's own sound and all SOUNDs over and over, up to
the clip's own at the very end. Pose and upper face are still, so that nothing but sound moves the lips. It repeats what
it was trained on: a test of when it speaks, not of how well. Everything is done by `python -m fg3dgs_jax.synthesize`
and measured on the mp4 files that it wrote:

    frames    as many as cover the sound
    sound     how many samples (48 kHz) the file's sound lies behind the given one, against the first frame's time
    lips      how many milliseconds the lips lie behind the filmed person's where the head repeats the clip, by the
              correlation of their openings over lags (positive: late); of a SOUND within the programme, behind the
              same SOUND said alone. In brackets 95 % intervals, by blocks of a second
    memory    resident, of the process, at every line of its progress
"""

import argparse
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import rasterizer as rasterizer_benchmark
from scipy import signal

from fg3dgs_jax.data import audio, face, models, video
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.inference import metrics

RATE = 48000  # Hz
FPS = 25.0
MOST_LAG, BLOCK, SAMPLES = 8, 25, 400  # frames; frames, resamples of the bootstrap
LEAST = 2 * (MOST_LAG + BLOCK)  # frames from which lips are compared
REACH = 2400  # samples to each side in which the sound is looked for: 50 ms
LIMIT_MS = 40.0
GROWTH_MB = 32.0  # of memory after the first tenth of the programme: none, but for what the allocator keeps back


class Piece(NamedTuple):
    """A sound within the programme."""

    name: str
    first: int  # frame
    frames: int


def to_frames(sound: np.ndarray) -> np.ndarray:
    """f32 [n] at 48 kHz, filled with silence to whole frames."""
    return np.pad(sound, (0, -len(sound) % round(RATE / FPS)))


def programme(own: np.ndarray, others: dict[str, np.ndarray], seconds: float) -> tuple[np.ndarray, list[Piece]]:
    """The clip's own sound and the others in turn, `seconds` long, f32 [n] at 48 kHz, and what lies whole within it."""
    turn = {"clip": to_frames(own), **{name: to_frames(sound) for name, sound in others.items()}}
    length, step = round(seconds * FPS), round(RATE / FPS)
    parts, pieces, start = [], [], length
    names = list(turn)
    while start > 0:
        name = names[-len(parts) % len(names)]  # from the end backwards: clip, last other, ..., first other, clip
        frames = len(turn[name]) // step
        start -= frames
        parts.insert(0, turn[name])
        if start >= 0:
            pieces.insert(0, Piece(name, start, frames))
    return np.concatenate(parts)[-length * step :], pieces


def say(run: Path, sound: Path, out: Path) -> dict[int, float]:
    """Lets `synthesize` write a video; returns the process's resident memory in MB by the frames done."""
    command = [sys.executable, "-m", "fg3dgs_jax.synthesize", f"--workdir={run}", f"--audio={sound}", f"--out={out}",
               "--pose=still", "--expression=still"]  # fmt: skip
    memory = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if done := re.match(r"speaking: (\d+) of", line):
                status = Path(f"/proc/{child.pid}/status").read_text()
                memory[int(done[1])] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
            else:
                print(line, end="", file=sys.stderr)
    assert child.returncode == 0, f"{' '.join(command)} ended with {child.returncode}"
    return memory


class Container(NamedTuple):
    """What an mp4 file holds, by its own time stamps."""

    frames: int
    seconds: float  # from the first frame's beginning to the last one's end
    uneven: float  # most that a frame's time is off k / FPS, seconds
    sound: np.ndarray  # f32 [n] at 48 kHz
    sound_start: float  # seconds after the first frame


def read(path: Path) -> Container:
    """Decodes a file by PyAV alone."""
    with av.open(str(path)) as container:
        times = np.array([float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.size])
    times.sort()
    with av.open(str(path)) as container:
        blocks, start = [], None
        for block in container.decode(audio=0):
            start = block.time if start is None else start
            blocks.append(block.to_ndarray()[0])
            assert block.sample_rate == RATE
    uneven = np.abs(times - times[0] - np.arange(len(times)) / FPS).max()
    length = times[-1] - times[0] + 1 / FPS
    return Container(len(times), float(length), float(uneven), np.concatenate(blocks), float(start - times[0]))


def sound_lag(found: Container, given: np.ndarray, at: float) -> int:
    """Samples that a second of the file's sound, from `at` seconds on, lies behind the given one f32 [n] at 48 kHz."""
    begin = max(min(round(at * RATE), len(given) - RATE - 2 * REACH), 2 * REACH)
    shift = round(found.sound_start * RATE)
    wanted = given[begin : begin + RATE]
    part = found.sound[begin - REACH - shift : begin + RATE + REACH - shift]
    return int(np.argmax(signal.correlate(part, wanted, "valid"))) - REACH


def opening(frames: Iterable[np.ndarray], models_folder: Path) -> np.ndarray:
    """Lip opening f64 [T] in pixels of frames u8 [H, W, 3]; NaN where no face is found."""
    model = models.find_model(models_folder, models.LANDMARKS)
    return metrics.lip_opening(face.track_face(frames, model).landmarks[..., :2])


def filmed(dataset: Dataset) -> Iterator[np.ndarray]:
    """The clip's frames, one for every number; those left out are black."""
    there = set(dataset.frame_ids.tolist())
    for index in range(dataset.num_frames):
        yield (
            dataset.pictures(index).image if index in there else np.zeros((dataset.height, dataset.width, 3), np.uint8)
        )


def lip_lag(lips: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """By how many ms an opening f64 [T] lies behind the wanted one f64 [T], with a 95 % interval, and r without lag."""
    count = min(len(lips), len(wanted)) - 2 * MOST_LAG
    later = np.stack([lips[shift : shift + count] for shift in range(2 * MOST_LAG + 1)])
    still = wanted[MOST_LAG : MOST_LAG + count]

    def best(rows: np.ndarray) -> float:
        curve = np.array([metrics.correlation(row[rows], still[rows]) for row in later])
        top = int(np.clip(np.argmax(curve), 1, 2 * MOST_LAG - 1))
        left, middle, right = curve[top - 1 : top + 2]
        bend = left - 2 * middle + right
        return (top - MOST_LAG + (0.5 * (left - right) / bend if bend < 0 else 0.0)) * 1000 / FPS

    spread = [best(rows) for rows in metrics.block_rows(count, BLOCK, SAMPLES, 0)]
    low, high = np.percentile(spread, (2.5, 97.5))
    r = metrics.correlation(later[MOST_LAG], still)
    found = {"ms": best(np.arange(count)), "low": float(low), "high": float(high), "r": r}
    return {name: round(value, 3) for name, value in found.items()}


def assert_measure(truth: np.ndarray) -> None:
    """A lag that is put in must be what is found."""
    for frames in (-3, 0, 2):
        found = lip_lag(np.roll(truth, frames), truth)["ms"]
        assert abs(found - frames * 1000 / FPS) < 2, f"{frames} frames were measured as {found:.1f} ms"


def timing(name: str, given: np.ndarray, video_path: Path, at: Iterable[float]) -> dict:
    """Frames and sound of a video that says `given`, f32 [n] at 48 kHz; the sound is compared at some seconds."""
    found = read(video_path)
    row = {"sound": name, "seconds": len(given) / RATE, "frames": found.frames,
           "expected": math.ceil(len(given) / RATE * FPS - 1e-6), "video_seconds": round(found.seconds, 4),
           "uneven_ms": round(1e3 * found.uneven, 3), "sound_start_ms": round(1e3 * found.sound_start, 3),
           "sound_lag_samples": {f"{second:.2f} s": sound_lag(found, given, second) for second in at}}  # fmt: skip
    assert row["frames"] == row["expected"], row
    return row


def short(run: Path, sound: Path, folder: Path) -> tuple[dict, Path]:
    """One sound said alone: its row, and the video."""
    out = folder / f"{sound.stem}.mp4"
    say(run, sound, out)
    given = audio.load_audio(sound, RATE)
    return timing(sound.stem, given, out, (0.0, len(given) / RATE - 1)), out


def long(run: Path, given: np.ndarray, pieces: list[Piece], folder: Path) -> tuple[dict, Path]:
    """The programme: its row without lips, and the video."""
    sound, out = folder / "programme.wav", folder / "programme.mp4"
    audio.save_wav(sound, given, RATE)
    begin = time.perf_counter()
    memory = say(run, sound, out)
    spent = time.perf_counter() - begin
    row = timing("programme", given, out, [pieces[i].first / FPS for i in (0, len(pieces) // 2, -1)])
    settled = [mb for frame, mb in memory.items() if frame >= 0.1 * row["frames"]]
    row |= {"wall_seconds": round(spent, 1), "rss_mb": {k: round(v, 1) for k, v in thinned(memory).items()},
            "growth_mb": round(max(settled) - settled[0], 1)}  # fmt: skip
    assert row["growth_mb"] < GROWTH_MB, row
    return row, out


def thinned(values: dict[int, float], most: int = 12) -> dict[int, float]:
    """At most so many entries, the first and the last among them."""
    keys = list(values)
    return {keys[i]: values[keys[i]] for i in np.unique(np.linspace(0, len(keys) - 1, most).astype(int))}


def lips(path: Path, pieces: list[Piece], alone: dict[str, np.ndarray], models_folder: Path) -> list[dict]:
    """Lags of the programme's first, middle and last repetition of the clip, and of the last of every other sound."""
    own = [piece for piece in pieces if piece.name == "clip"]
    last = {piece.name: piece for piece in pieces}
    chosen = {own[0], own[len(own) // 2], *(piece for piece in last.values() if piece.frames >= LEAST)}
    rows, frames, passed = [], video.read_frames(path, FPS), 0
    for piece in sorted(chosen, key=lambda piece: piece.first):
        skip = piece.first - passed
        part = opening(itertools.islice(frames, skip, skip + piece.frames), models_folder)
        passed = piece.first + piece.frames
        rows.append({"sound": piece.name, "at_seconds": piece.first / FPS, **lip_lag(part, alone[piece.name])})
    return rows


def show(report: dict) -> None:
    """Prints the tables."""
    for row in [*report["short"], report["long"]]:
        print(
            f"{row['sound']:20} {row['frames']:6} frames of {row['expected']}, sound {row['sound_lag_samples']} samples"
        )
    print(f"memory {report['long']['rss_mb']} MB")
    for row in report["lips"]:
        print(f"{row['sound']:20} at {row['at_seconds']:7.2f} s: lips {row['ms']:+.1f} ms "
              f"[{row['low']:+.1f}, {row['high']:+.1f}], r {row['r']:.2f}")  # fmt: skip


def main() -> None:
    """Prints tables and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="a trained run, or a baked head")
    parser.add_argument("--data", type=Path, required=True, metavar="CLIP", help="the dataset it was trained on")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder with face_landmarker.task")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("sounds", type=Path, nargs="*", metavar="SOUND")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speech_timing.json")
    flags = parser.parse_args()
    dataset = open_dataset(flags.data)
    truth = opening(filmed(dataset), flags.models)
    assert_measure(truth)
    given = {path.stem: audio.load_audio(path, RATE) for path in flags.sounds}
    own = audio.load_audio(dataset.audio_path, RATE)[: round(dataset.num_frames / FPS * RATE)]
    sound, pieces = programme(own, given, 60 * flags.minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        said = [short(flags.workdir, path, folder) for path in flags.sounds]
        whole, path = long(flags.workdir, sound, pieces, folder)
        look = functools.partial(opening, models_folder=flags.models)
        alone = {"clip": truth, **{row["sound"]: look(video.read_frames(out, FPS)) for row, out in said}}
        report = {"machine": rasterizer_benchmark.machine(), "head": flags.workdir.stem, "pixels": dataset.width,
                  "minutes": flags.minutes, "limit_ms": LIMIT_MS, "short": [row for row, _ in said], "long": whole,
                  "lips": lips(path, pieces, alone, flags.models)}  # fmt: skip
    show(report)
    flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
