"""One side in a process of its own: seconds from its start to the first frame, then the memory of frames and steps.

    python benchmarks/torch_baseline/startup.py ours DEVICE RUN [DATA]
    python benchmarks/torch_baseline/startup.py eager|compiled DEVICE FOLDER     # FOLDER: what `convert.export` wrote

Prints "frame" when the first picture is on the host, then a line of JSON. The parent holds the clock.
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
FRAMES, STEPS = 20, 5


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mb() -> float:
    """Of this process; from Linux itself, since a child's `ru_maxrss` begins at what its parent had then."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(workdir: str, data: str | None, device: str) -> dict:
    """As `synthesize` starts: load, compile or read what was compiled, draw."""
    from fg3dgs_jax import cli

    cli.keep_memory()
    cli.enable_compilation_cache()
    from fg3dgs_jax.inference.head import Head

    head = Head.load(workdir, data)
    frame = head.dataset.frame(int(head.dataset.test_ids[0]))
    head.render(frame.condition, frame.viewmat, frame.backdrop)
    print("frame", flush=True)
    for _ in range(FRAMES):
        head.render(frame.condition, frame.viewmat, frame.backdrop)
    found = {"frames_mb": memory_of_jax(device)}
    from torch_baseline import cases, sides

    case = cases.trained(Path(workdir), data and Path(data))
    step = sides.Ours(case).stepper("motion")
    for index in range(STEPS):
        step(index)
    return {**found, "training_mb": memory_of_jax(device)}


def memory_of_jax(device: str) -> float:
    """Peak: of the device where it is one of its own, else of the process."""
    if device != "cuda":
        return peak_mb()
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20


def theirs(folder: Path, device: str, compiled: bool) -> dict:
    """Without JAX in the process: weights and frames come from safetensors."""
    import torch
    from safetensors.torch import load_file

    from torch_baseline import head as heads
    from torch_baseline import training

    torch.set_num_threads(cores())
    head = heads.Head(json.loads((folder / "head.json").read_text()), compiled=compiled)
    head.load_state_dict(load_file(folder / "head.safetensors"))
    head.to(device)
    frame = training.load_frame(load_file(folder / "frame.safetensors"), device)
    given = frame.audio, frame.expression, frame.viewmat, frame.intrinsics, frame.backdrop
    head.frame(*given).cpu()
    print("frame", flush=True)
    for _ in range(FRAMES):
        head.frame(*given).cpu()
    found = {"frames_mb": memory_of_torch(device)}
    trainer = training.Trainer(head, json.loads((folder / "motion.json").read_text()))
    for _ in range(STEPS):
        float(trainer.step(frame))
    return {**found, "training_mb": memory_of_torch(device)}


def memory_of_torch(device: str) -> float:
    """As `memory_of_jax`."""
    if device != "cuda":
        return peak_mb()
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    """See the module's docstring."""
    side, device, folder, *data = sys.argv[1:]
    if side == "ours":
        found = ours(folder, data[0] if data else None, device)
    else:
        found = theirs(Path(folder), device, side == "compiled")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
