"""Before anything is timed: both sides draw the same pictures and their gradients are the same.

Tolerances. PICTURE: frames are bytes; both sides round the same float32 sums added in another order, so a value near a
half may land one step apart. IMAGE and GRADIENT, relative to the whole array's norm: two Gaussians whose depths differ
by rounding may swap, and a weight near 1/255 or a transmittance near 1e-4 may fall on the other side of the threshold;
each such pixel differs by up to 0.02, and there are few. On CUDA gsplat projects, sorts and sums in its own way, and
`cases.prepared` keeps opacities below both sides' caps of alpha.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fg3dgs_jax.training import optim
from fg3dgs_jax.training.step import see_frame

from . import convert
from .cases import Case, fresh
from .sides import Ours, Theirs

PICTURE = {"cpu": 55.0, "cuda": 40.0}  # PSNR of frames in dB, at least
IMAGE = {"cpu": 2e-3, "cuda": 1e-2}
GRADIENT = {"cpu": 2e-2, "cuda": 5e-2}
NAMES = ("means", "quats", "scales", "opacities", "colors")


def relative(a, b) -> float:
    """Norm of the difference relative to the norm of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


def check(case: Case, ours: Ours, theirs: Theirs) -> dict[str, float]:
    """Raises AssertionError where the sides differ; else how much they do."""
    kind = theirs.device.type
    found = {**check_frames(case, ours, theirs, PICTURE[kind]), **check_rasterizer(ours, theirs, kind)}
    for stage in case.plans:
        found |= check_step(case, theirs, stage, kind)
    return found


def check_frames(case: Case, ours: Ours, theirs: Theirs, limit: float) -> dict[str, float]:
    """Whole frames, audio to bytes, baked or not: the largest difference in steps of 255, and the lowest PSNR."""
    largest, psnr = 0, np.inf
    for index in range(len(case.frames)):
        for a, b in ((ours.frame, theirs.frame), (ours.baked_frame, theirs.baked_frame)):
            difference = np.abs(a(index).astype(np.int16) - b(index))
            largest = max(largest, int(difference.max()))
            psnr = min(psnr, 10 * np.log10(255**2 / max(np.mean(difference.astype(np.float64) ** 2), 1e-10)))
    assert psnr >= limit, f"frames differ: PSNR {psnr:.1f} dB, largest difference {largest} of 255"
    return {"frame_max_difference_of_255": largest, "frame_psnr_db": float(psnr)}


def check_rasterizer(ours: Ours, theirs: Theirs, kind: str) -> dict[str, float]:
    """Colour and alpha, and the gradients of every input."""
    images, gradients = jax.device_get(ours.pull())
    their_images, their_gradients = theirs.pull()
    image = max(relative(b.detach().cpu(), a) for a, b in zip(images, their_images, strict=True))
    assert image <= IMAGE[kind], f"layers differ by {image:.1e} of their norm"
    worst = 0.0
    for layer, their_layer in zip(gradients, their_gradients, strict=True):
        for name, a, b in zip(NAMES, layer, their_layer, strict=True):
            difference = relative(b.cpu(), a)
            assert difference <= GRADIENT[kind], f"gradients of {name} differ by {difference:.1e} of their norm"
            worst = max(worst, difference)
    return {"layer_relative": image, "layer_gradient_relative": worst}


def check_step(case: Case, theirs: Theirs, stage: str, kind: str) -> dict[str, float]:
    """The stage's loss, and its gradient for every parameter that learns."""
    loss, gradients, backgrounds = our_gradients(case, stage)
    trainer = theirs.trainer(stage)
    frame = theirs.prepared(case.plans[stage])[0]
    their_loss, _ = trainer.loss(frame, torch.from_numpy(backgrounds).to(theirs.device))
    their_loss.backward()
    value = their_loss.item()
    difference = abs(value - loss) / abs(loss)
    assert difference <= GRADIENT[kind], f"{stage}: losses {loss:.6f} and {value:.6f}"
    wanted, worst = convert.tensors(gradients, case.alive), 0.0
    for name, parameter in trainer.head.named_parameters():
        if parameter.grad is None:
            assert not wanted[name].any(), f"{stage}: {name} learns on one side only"
            continue
        away = relative(parameter.grad.cpu(), wanted[name])
        assert away <= GRADIENT[kind], f"{stage}: gradients of {name} differ by {away:.1e} of their norm"
        worst = max(worst, away)
    return {f"{stage}_loss_relative": difference, f"{stage}_gradient_relative": worst}


def our_gradients(case: Case, stage: str) -> tuple[float, dict, np.ndarray]:
    """Loss and gradients of the case's first frame without audio noise, and the backgrounds f32 [regions, 3] drawn."""
    plan, state = case.plans[stage].replace(audio_noise=0.0, audio_level=0.0), fresh(case, stage)
    offsets = {name: jnp.zeros((len(pool.alive), 2)) for name, pool in state.pools.items()}

    def loss_of(params, state, frame):
        return see_frame(plan, optim.freeze(params, plan.rates), offsets, state, frame, {})[0]

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(state.params, state, case.frames[0])
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    return float(loss), gradients, np.array(jax.random.uniform(key, (len(plan.spec.regions), 3)))
