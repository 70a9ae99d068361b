"""One training step of a stage in PyTorch: render the regions in their windows, judge them, move the parameters."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import losses, raster
from .head import Head, composite


class View(NamedTuple):
    """What a region must look like in its window of a frame; masks f32 [h, w] in {0, 1}."""

    image: Tensor  # f32 [h, w, 3]
    inside: Tensor
    outside: Tensor  # must stay empty; what is neither is not judged
    origin: Tensor  # f32 [4], of the window in the intrinsics: (0, 0, column, row)


class Frame(NamedTuple):
    """A frame on the device."""

    audio: Tensor  # f32 [8, A, D]
    expression: Tensor  # f32 [8, E]
    viewmat: Tensor  # f32 [4, 4]
    intrinsics: Tensor  # f32 [4]
    image: Tensor  # u8 [H, W, 3]
    backdrop: Tensor  # u8 [H, W, 3]
    taps: Tensor  # `losses.taps`
    views: dict[str, View]  # by region; empty where a stage judges the finished frame


def load_frame(tensors: Mapping[str, Tensor], device: torch.device | str) -> Frame:
    """From `convert.frame`'s arrays as tensors."""
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    names = dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith("views."))
    views = {name: View(*(tensors[f"views.{name}.{field}"] for field in View._fields)) for name in names}
    return Frame(*(tensors[field] for field in Frame._fields[:-2]), losses.taps(device), views)


def judge_region(
    color: Tensor,
    alpha: Tensor,
    deltas: Sequence[Tensor | None],
    view: View,
    background: Tensor,
    taps: Tensor,
    weights: Mapping[str, float],
    share: float,
) -> Tensor:
    """The weighted loss of one region's layer over a background colour [3]."""
    target = torch.where(view.inside[..., None] > 0, view.image, background)
    judged = (view.inside + view.outside)[..., None] > 0
    prediction = torch.where(judged, color + (1 - alpha)[..., None] * background, target)
    loss = weights.get("alpha", 0.0) * losses.alpha(alpha, view.inside, view.outside)
    loss = loss + weights.get("l1", 0.0) * share * losses.l1(prediction, target)
    if weights.get("dssim"):
        loss = loss + weights["dssim"] * share * losses.dssim(prediction, target, taps)
    for name, delta in zip(("delta_means", "delta_quats", "delta_log_scales"), deltas, strict=True):
        if delta is not None:
            loss = loss + weights.get(name, 0.0) * delta.abs().mean()
    return loss


def judge_frame(
    colors: Sequence[Tensor], alphas: Sequence[Tensor], frame: Frame, weights: Mapping[str, float]
) -> Tensor:
    """The weighted loss of the finished frame."""
    prediction, target = composite(colors, alphas, frame.backdrop.float() / 255), frame.image.float() / 255
    loss = weights.get("frame_l1", 0.0) * losses.l1(prediction, target)
    return loss + weights.get("frame_dssim", 0.0) * losses.dssim(prediction, target, frame.taps)


class Statistics:
    """What densification asks of a region since it last ran."""

    def __init__(self, like: Tensor):
        self.gradient, self.count = like.new_zeros(len(like)), like.new_zeros(len(like))

    def add(self, image: raster.Image, width: int, height: int) -> None:
        """Screen gradients in NDC units of the Gaussians that were seen."""
        gradient = image.means2d.grad.reshape(-1, 2)
        norm = torch.linalg.vector_norm(gradient * gradient.new_tensor([0.5 * width, 0.5 * height]), dim=1)
        self.gradient += norm * image.seen
        self.count += image.seen


class Trainer:
    """A stage over a head; `stage` from `convert.stage`."""

    def __init__(self, head: Head, stage: dict):
        self.head, self.stage, self.weights = head, stage, stage["weights"]
        device = next(head.parameters()).device
        self.generator = torch.Generator(device).manual_seed(0)
        self.judge_region = torch.compile(judge_region, dynamic=False) if head.compiled else judge_region
        self.judge_frame = torch.compile(judge_frame) if head.compiled else judge_frame
        self.statistics = {name: Statistics(region.means) for name, region in head.regions.items()}
        self.steps = 0
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the Gaussians, AdamW for the networks; what the stage freezes asks for no gradient."""
        groups: dict[str, list[dict]] = {"gaussians": [], "motion": []}
        for name, parameter in self.head.named_parameters():
            rates = self.stage["rates"].get(name)
            parameter.requires_grad_(rates is not None)
            if rates is not None:
                kind = "motion" if ".motion." in name else "gaussians"
                groups[kind].append({"params": [parameter], "lr": rates["ends"][0], **rates})
        settings = {"eps": 1e-15, "fused": True}
        adams = [
            torch.optim.Adam(groups["gaussians"], betas=(0.9, 0.999), **settings),
            torch.optim.AdamW(groups["motion"], betas=(0.9, 0.99), **settings) if groups["motion"] else None,
        ]
        return [adam for adam in adams if adam is not None]

    def loss(self, frame: Frame, backgrounds: Tensor) -> tuple[Tensor, list[raster.Image]]:
        """The stage's loss of one frame, with a background colour [3] per region."""
        if frame.views:
            return self._loss_of_regions(frame, backgrounds)
        height, width, _ = frame.image.shape
        layers = []
        for region in self.head.regions.values():
            scene, _ = region(frame.audio, frame.expression)
            layers.append(self.head.draw(scene, frame.viewmat, frame.intrinsics, width, height))
        images = [layer.color for layer in layers], [layer.alpha for layer in layers]
        return self.judge_frame(*images, frame, self.weights), layers

    def _loss_of_regions(self, frame: Frame, backgrounds: Tensor) -> tuple[Tensor, list[raster.Image]]:
        total, layers = 0.0, []
        for (name, region), background in zip(self.head.regions.items(), backgrounds, strict=True):
            view = frame.views[name]
            scene, deltas = region(frame.audio, frame.expression)
            height, width = view.inside.shape
            layer = self.head.draw(scene, frame.viewmat, frame.intrinsics - view.origin, width, height)
            share = self.stage["shares"][name]
            total = total + self.judge_region(
                layer.color, layer.alpha, deltas, view, background, frame.taps, self.weights, share
            )
            layers.append(layer)
        return total, layers

    def step(self, frame: Frame) -> Tensor:
        """One step; returns the loss on the device."""
        frame = self._disturb(frame)
        backgrounds = torch.rand(len(self.head.regions), 3, generator=self.generator, device=frame.viewmat.device)
        self._set_rates()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss, layers = self.loss(frame, backgrounds)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        height, width, _ = frame.image.shape
        for statistics, layer in zip(self.statistics.values(), layers, strict=True):
            if layer.means2d.grad is not None:
                statistics.add(layer, width, height)
        self.steps += 1
        return loss.detach()

    def _set_rates(self) -> None:
        progress = min(max((self.steps - self.stage["start"]) / max(self.stage["steps"] - 1, 1), 0.0), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                first, last = group["ends"]
                group["lr"] = first * (last / first) ** progress

    def _disturb(self, frame: Frame) -> Frame:
        """Noise on the audio, as `training.step.disturb`."""
        each, level = self.stage["audio_noise"]
        if not (each or level):
            return frame
        noise = torch.randn(frame.audio.numel() + 1, generator=self.generator, device=frame.audio.device)
        return frame._replace(audio=frame.audio + each * noise[1:].view_as(frame.audio) + level * noise[0])
