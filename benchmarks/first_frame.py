"""How soon `Head.speak` shows its first frame, once the sound that the frame needs has been heard.

    python benchmarks/first_frame.py --workdir RUN [--speech-model DIR] [--audio FILE]

The sound arrives in pieces of 20 ms, as from a microphone. The clock starts when the last piece is handed over without
which the first frame cannot be rendered, and stops when the frame is on the host. One speech before, which compiles, is
not counted. A live head should need under 200 ms; the wait for the sound itself (`look_ahead`) comes on top.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterizer as rasterizer_benchmark

from fg3dgs_jax import cli
from fg3dgs_jax.data import audio
from fg3dgs_jax.inference.head import Head

PIECE = 320  # samples
LIMIT_MS = 200.0


def first_frame(head: Head, sound: np.ndarray) -> tuple[float, float]:
    """(milliseconds from the last piece needed to the first frame, seconds of sound that were needed)."""
    handed, given = 0.0, 0

    def microphone() -> Iterator[np.ndarray]:
        nonlocal handed, given
        for start in range(0, len(sound), PIECE):
            handed, given = time.perf_counter(), start + PIECE
            yield sound[start : start + PIECE]

    frames = head.speak(microphone())
    next(frames)
    return 1e3 * (time.perf_counter() - handed), given / audio.SAMPLE_RATE


def main() -> None:
    """Prints one line and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--speech-model")
    parser.add_argument("--audio", type=Path, help="default: the clip's own sound")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "first_frame.json")
    flags = parser.parse_args()
    cli.enable_compilation_cache()
    head = Head.load(flags.workdir, speech_model=flags.speech_model)
    sound = audio.load_audio(flags.audio or head.dataset.audio_path)[: 2 * audio.SAMPLE_RATE]
    first_frame(head, sound)
    found = [first_frame(head, sound) for _ in range(flags.rounds)]
    times = [ms for ms, _ in found]
    row = {
        "ms": statistics.median(times), "ms_low": min(times), "ms_high": max(times), "heard_s": found[0][1],
        "look_ahead_s": head.hear(iter([sound])).look_ahead, "front_end": head.dataset.audio_name,
        "pixels": head.dataset.width, "limit_ms": LIMIT_MS,
    }  # fmt: skip
    print(f"first frame {row['ms']:.0f} ms [{min(times):.0f}, {max(times):.0f}] after {row['heard_s']:.2f} s of sound")
    flags.out.write_text(json.dumps({"machine": rasterizer_benchmark.machine(), "rows": [row]}, indent=1) + "\n")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
