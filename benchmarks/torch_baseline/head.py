"""A head in PyTorch: Gaussians and motion networks of every region, drawn front to back into one picture.

head = Head(description, compiled=True)
head.load_state_dict(tensors)          # both from `convert`
picture = head.frame(audio, expression, viewmat, intrinsics, backdrop)   # u8 [H, W, 3]
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import motion, raster


class Region(nn.Module):
    """One layer's Gaussians and what moves them."""

    def __init__(self, count: int, coefficients: int, network: nn.Module):
        super().__init__()
        self.means = nn.Parameter(torch.zeros(count, 3))
        self.quats = nn.Parameter(torch.zeros(count, 4))
        self.log_scales = nn.Parameter(torch.zeros(count, 3))
        self.logit_opacities = nn.Parameter(torch.zeros(count))
        self.sh_dc = nn.Parameter(torch.zeros(count, 1, 3))  # apart: they learn faster
        self.sh_rest = nn.Parameter(torch.zeros(count, coefficients - 1, 3))
        self.motion = network
        self.baked: tuple | None = None

    def constants(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """What no condition changes: the network's part, opacities, SH."""
        sh = torch.cat([self.sh_dc, self.sh_rest], 1)
        return self.motion.constants(self.means), torch.sigmoid(self.logit_opacities), sh

    def forward(self, audio: Tensor, expression: Tensor) -> tuple[list[Tensor], motion.Deltas]:
        """What `rasterize` takes (means, quats, scales, opacities, SH), and the deltas behind it."""
        known, opacities, sh = self.constants() if self.baked is None else self.baked
        deltas = self.motion(known, audio, expression)
        moved = [
            value if delta is None else value + delta
            for value, delta in zip((self.means, self.quats, self.log_scales), deltas, strict=True)
        ]
        return [moved[0], moved[1], torch.exp(moved[2]), opacities, sh], deltas


def composite(colors: Sequence[Tensor], alphas: Sequence[Tensor], backdrop: Tensor) -> Tensor:
    """Premultiplied layers, front to back, over f32 [H, W, 3]."""
    for color, alpha in zip(reversed(colors), reversed(alphas), strict=True):
        backdrop = color + (1 - alpha)[..., None] * backdrop
    return backdrop


def finish(colors: Sequence[Tensor], alphas: Sequence[Tensor], backdrop: Tensor) -> Tensor:
    """The picture u8 [H, W, 3] over a backdrop u8."""
    picture = composite(colors, alphas, backdrop.float() / 255)
    return torch.round(picture.clamp(0, 1) * 255).to(torch.uint8)


class Head(nn.Module):
    """Built from `convert.describe`; `compiled` uses torch.compile wherever it works."""

    def __init__(self, description: dict, *, compiled: bool):
        super().__init__()
        self.compiled = compiled
        coefficients = (description["sh_degree"] + 1) ** 2
        self.regions = nn.ModuleDict()
        for region in description["regions"]:
            grid = motion.GridShape(**region["grid"])
            network = motion.create(region["motion"], grid, description["heard"], description["expression_dim"])
            self.regions[region["name"]] = Region(region["count"], coefficients, network)
        self._finish = torch.compile(finish) if compiled else finish
        if compiled:
            for region in self.regions.values():
                region.compile()

    def bake(self) -> None:
        """Computes once what no condition changes; the parameters must stay as they are from now on."""
        with torch.no_grad():
            for region in self.regions.values():
                region.baked = region.constants()

    def frame(self, audio: Tensor, expression: Tensor, viewmat: Tensor, intrinsics: Tensor, backdrop: Tensor) -> Tensor:
        """From audio windows [8, A, D] and expressions [8, E] to the picture u8 [H, W, 3] over a backdrop u8."""
        height, width, _ = backdrop.shape
        with torch.no_grad():
            scenes = [region(audio, expression)[0] for region in self.regions.values()]
            layers = [self.draw(scene, viewmat, intrinsics, width, height) for scene in scenes]
            return self._finish([layer.color for layer in layers], [layer.alpha for layer in layers], backdrop)

    def draw(
        self, scene: Sequence[Tensor], viewmat: Tensor, intrinsics: Tensor, width: int, height: int
    ) -> raster.Image:
        """One layer: on a CPU by `raster`, on a GPU by gsplat."""
        return draw(scene, viewmat, intrinsics, width, height, self.compiled)


def draw(
    scene: Sequence[Tensor], viewmat: Tensor, intrinsics: Tensor, width: int, height: int, compiled: bool
) -> raster.Image:
    """`scene`: means, quats, scales, opacities, and colors [N, 3] or SH [N, K, 3]."""
    if scene[0].is_cuda:
        return draw_gsplat(scene, viewmat, intrinsics, width, height)
    return raster.rasterize(scene, viewmat, intrinsics, width, height, compiled)


def draw_gsplat(scene: Sequence[Tensor], viewmat: Tensor, intrinsics: Tensor, width: int, height: int) -> raster.Image:
    """The same by gsplat 1.5.3."""
    from gsplat import rasterization

    *shape, colors = scene
    fx, fy, cx, cy = intrinsics.unbind()
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    camera = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one]).view(1, 3, 3)
    degree = round(colors.shape[1] ** 0.5) - 1 if colors.ndim == 3 else None
    color, alpha, found = rasterization(
        *shape, colors, viewmat[None], camera, width, height, sh_degree=degree, packed=False,
        near_plane=raster.NEAR, eps2d=raster.DILATION,
    )  # fmt: skip
    means2d = found["means2d"]
    if means2d.requires_grad:
        means2d.retain_grad()
    return raster.Image(color[0], alpha[0, ..., 0], means2d, (found["radii"][0] > 0).all(-1))
