"""Ours and PyTorch's, each with the same calls: `frame`, `draw`, `pull`, `stepper`; they return when all is done."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.rasterizer import rasterize
from fg3dgs_jax.training.loop import STEPS, stacked
from fg3dgs_jax.training.step import make_steps

from . import convert, training
from . import head as torch_head
from .cases import Case, fresh


def cotangents(case: Case) -> list[np.ndarray]:
    """Random gradients of every layer's colour and alpha, [H, W, 4] each."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=(case.height, case.width, 4)).astype(np.float32) for _ in case.scenes]


class Ours:
    """fg3dgs_jax, by the functions that its commands call."""

    def __init__(self, case: Case):
        self.case = case
        self.scene = jax.device_put((case.scenes, case.viewmat, case.intrinsics))
        self.upstream = jax.device_put(cotangents(case))
        self._draw, self._pull = jax.jit(self._images), jax.jit(self._gradients)

    def _images(self, scene):
        layers, viewmat, intrinsics = scene
        drawn = [rasterize(*layer, viewmat, intrinsics, self.case.width, self.case.height) for layer in layers]
        return [jnp.concatenate([layer.color, layer.alpha[..., None]], -1) for layer in drawn]

    def _gradients(self, scene, upstream):
        layers, *camera = scene
        images, pull = jax.vjp(lambda layers: self._images((layers, *camera)), layers)
        return images, pull(upstream)[0]

    def frame(self, index: int, head: Head | None = None) -> np.ndarray:
        frame = self.case.frames[index % len(self.case.frames)]
        return (head or self.case.head).render(frame.condition, frame.viewmat, frame.backdrop)

    def baked_frame(self, index: int) -> np.ndarray:
        return self.frame(index, self._baked)

    @functools.cached_property
    def _baked(self) -> Head:
        head = self.case.head
        return Head(head.spec, head.bake(), None, head.dataset)

    def draw(self, _index: int = 0):
        return jax.block_until_ready(self._draw(self.scene))

    def pull(self, _index: int = 0):
        return jax.block_until_ready(self._pull(self.scene, self.upstream))

    def stepper(self, stage: str) -> Callable[[int], float]:
        """A call takes STEPS steps, as the trainer's; the last one's loss comes back to the host."""
        steps, held = make_steps(self.case.plans[stage]), {"state": fresh(self.case, stage)}
        frames = self.case.frames
        given = jax.device_put(stacked([frames[i % len(frames)] for i in range(STEPS)]))

        def call(_index: int) -> float:
            held["state"], metrics = steps(held["state"], given, STEPS)
            jax.block_until_ready(held["state"])
            return float(metrics["loss"])

        return call


class Theirs:
    """PyTorch, eager or compiled, on a CPU or a CUDA device."""

    def __init__(self, case: Case, device: str, compiled: bool):
        self.case, self.device, self.compiled = case, torch.device(device), compiled
        alive = case.alive
        self.description = convert.describe(case.head.spec, alive)
        self.weights = convert.tensors(case.state.params, alive)
        self.head = self.fresh_head()
        self.scene = [[self._put(array).requires_grad_() for array in layer] for layer in case.scenes]
        self.camera = self._put(case.viewmat), self._put(case.intrinsics), case.width, case.height
        self.upstream = [self._put(array) for array in cotangents(case)]
        any_plan = next(iter(case.plans.values()))
        self.frames = self.prepared(any_plan) if case.plans else []

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def fresh_head(self) -> torch_head.Head:
        head = torch_head.Head(self.description, compiled=self.compiled)
        head.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in self.weights.items()})
        return head.to(self.device)

    def prepared(self, plan) -> list[training.Frame]:
        """The case's frames as the stage's step takes them."""
        found: dict[int, training.Frame] = {}
        for frame in self.case.frames:
            if id(frame) not in found:
                arrays = convert.frame(frame, plan)
                found[id(frame)] = training.load_frame(
                    {n: self._put(array) for n, array in arrays.items()}, self.device
                )
        return [found[id(frame)] for frame in self.case.frames]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def baked_frame(self, index: int) -> np.ndarray:
        """As `frame`, of a head that has computed once what no condition changes."""
        return self.frame(index, self._baked)

    @functools.cached_property
    def _baked(self) -> torch_head.Head:
        head = self.fresh_head()
        head.bake()
        return head

    def frame(self, index: int, head: torch_head.Head | None = None) -> np.ndarray:
        """What comes with a frame is put on the device first, and the picture comes back to the host, as with ours."""
        frame = self.case.frames[index % len(self.case.frames)]
        condition = frame.condition.audio, frame.condition.expression
        given = [self._put(array) for array in (*condition, frame.viewmat, frame.intrinsics, frame.backdrop)]
        return (head or self.head).frame(*given).cpu().numpy()

    def _images(self) -> list[torch.Tensor]:
        drawn = [torch_head.draw(layer, *self.camera, self.compiled) for layer in self.scene]
        return [torch.cat([layer.color, layer.alpha[..., None]], -1) for layer in drawn]

    def draw(self, _index: int = 0) -> list[torch.Tensor]:
        with torch.no_grad():
            images = self._images()
        self.wait()
        return images

    def pull(self, _index: int = 0):
        leaves = [array for layer in self.scene for array in layer]
        images = self._images()
        found = torch.autograd.grad(images, leaves, self.upstream)
        self.wait()
        return images, [found[i : i + 5] for i in range(0, len(found), 5)]

    def trainer(self, stage: str) -> training.Trainer:
        plan, head = self.case.plans[stage], self.fresh_head()
        names = [name for name, _ in head.named_parameters()]
        step = int(fresh(self.case, stage).step)
        return training.Trainer(head, convert.stage(plan, step, names, self.case.frames[0]))

    def stepper(self, stage: str) -> Callable[[int], float]:
        """A call takes STEPS steps; the last one's loss comes back to the host, as late as ours."""
        trainer, frames = self.trainer(stage), self.prepared(self.case.plans[stage])

        def call(_index: int) -> float:
            for i in range(STEPS):
                loss = trainer.step(frames[i % len(frames)])
            self.wait()
            return float(loss)

        return call
