"""The rasterizer on a CPU in vectorised PyTorch: projection and tiles; `blend` does the rest."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blend import LOWEST, MIN_ALPHA, PIXELS, SLOT, TILE, Blend, Pairs, growing

DILATION, NEAR, MARGIN = 0.3, 0.01, 0.15
SHORTEST = 16  # tiles of a round: a shorter one would be compiled by itself
EMPTY = torch.tensor([0.0, 0.0, 0.0, 2 * LOWEST])  # conic and log opacity of an empty place


class Image(NamedTuple):
    """One layer, and what densification asks of it."""

    color: Tensor  # f32 [H, W, 3], premultiplied
    alpha: Tensor  # f32 [H, W]
    means2d: Tensor  # f32 [N, 2], pixels; its gradient is kept while gradients are recorded
    seen: Tensor  # bool [N]


SH = (0.28209479177387814, 0.4886025119029199, 1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
SH3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def sh_basis(directions: Tensor, count: int) -> Tensor:
    """Real spherical harmonics [N, count] of unit directions [N, 3], count 1, 4, 9 or 16; signs as in 3DGS."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, SH[0])]
    if count > 1:
        basis += [-SH[1] * y, SH[1] * z, -SH[1] * x]
    if count > 4:
        basis += [SH[2] * x * y, -SH[2] * y * z, SH[3] * (2 * z * z - x * x - y * y), -SH[2] * x * z]
        basis += [SH[4] * (x * x - y * y)]
    if count > 9:
        basis += [-SH3[0] * y * (3 * x * x - y * y), SH3[1] * x * y * z, -SH3[2] * y * (4 * z * z - x * x - y * y)]
        basis += [SH3[3] * z * (2 * z * z - 3 * x * x - 3 * y * y), -SH3[2] * x * (4 * z * z - x * x - y * y)]
        basis += [SH3[4] * z * (x * x - y * y), -SH3[0] * x * (x * x - 3 * y * y)]
    return torch.stack(basis, -1)


def rotation_rows(quats: Tensor) -> Tensor:
    """Rotations [N, 3, 3] of quaternions [N, 4] wxyz of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
) -> tuple[Tensor, ...]:
    """EWA splatting: means2d [N, 2], shape [N, 4] (conic a, b, c and log opacity), rgb [N, 3]; without gradients the
    depth [N] (infinite where invisible) and the box of tiles i64 [N, 4] (column, row, columns, rows; 0, 0 likewise)."""
    rotation = viewmat[:3, :3]
    points = means @ rotation.T + viewmat[:3, 3]
    axes = (rotation @ rotation_rows(quats)) * scales[:, None, :]
    fx, fy, cx, cy = intrinsics.unbind()
    x, y, z = points.unbind(-1)
    near = z <= NEAR
    inverse = 1 / torch.where(near, 1.0, z)
    u = torch.clamp(fx * x * inverse, -MARGIN * width - cx, (1 + MARGIN) * width - cx)
    v = torch.clamp(fy * y * inverse, -MARGIN * height - cy, (1 + MARGIN) * height - cy)
    along = (fx * axes[:, 0] - u[:, None] * axes[:, 2]) * inverse[:, None]
    down = (fy * axes[:, 1] - v[:, None] * axes[:, 2]) * inverse[:, None]
    xx, xy, yy = (along * along).sum(-1) + DILATION, (along * down).sum(-1), (down * down).sum(-1) + DILATION
    determinant = xx * yy - xy * xy
    means2d = torch.stack([fx * x * inverse + cx, fy * y * inverse + cy], -1)
    opacity = opacities.clamp_min(1e-6)
    shape = torch.stack([yy / determinant, -xy / determinant, xx / determinant, torch.log(opacity)], -1)
    if colors.ndim == 3:
        center = -rotation.T @ viewmat[:3, 3]
        basis = sh_basis(torch.nn.functional.normalize(means - center, dim=-1), colors.shape[1])
        colors = (0.5 + (basis[..., None] * colors).sum(1)).clamp_min(0.0)

    reach = 2 * torch.log((opacity / MIN_ALPHA).clamp_min(1.0))
    extent = torch.sqrt(reach[:, None] * torch.stack([xx, yy], -1))
    low = torch.ceil(means2d - extent - 0.5).clamp_min(0)
    high = torch.floor(means2d + extent - 0.5)
    high = torch.stack([high[:, 0].clamp_max(width - 1), high[:, 1].clamp_max(height - 1)], -1)
    visible = (opacities >= MIN_ALPHA) & ~near & (low <= high).all(-1)
    first = (low / TILE).long()
    count = torch.where(visible[:, None], (high / TILE).long() - first + 1, 0)
    depth = torch.where(visible, z, float("inf"))
    return means2d, shape, colors, depth.detach(), torch.cat([first, count], -1)


def tiles_of(ranks: Tensor, order: Tensor, before: Tensor, boxes: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Per pair of a Gaussian (its rank by depth, i64 [P]) and a tile: the Gaussian and the tile, i64 [P] each."""
    gaussians = order[ranks]
    col, row, across, _ = boxes[gaussians].unbind(-1)
    place = torch.arange(len(ranks), device=ranks.device) - before[ranks]
    down = torch.div(place, across.clamp_min(1), rounding_mode="floor")
    return gaussians, (row + down) * columns + col + place - down * across


def sort_stable(keys: Tensor, below: int) -> Tensor:
    """Stable order of keys in [0, below): numpy's radix sort of 16-bit keys takes a fifth of torch.sort's time."""
    if below > 2**16:
        return torch.sort(keys, stable=True).indices
    return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))


def lay_out(gaussians: Tensor, tiles: Tensor, columns: int, rows: int) -> Pairs:
    """Pairs in depth order to slots: a stable sort by tile, then the lists cut into pieces of SLOT."""
    by_tile = gaussians[sort_stable(tiles, columns * rows)]
    count = torch.bincount(tiles, minlength=columns * rows)
    start = torch.cumsum(count, 0) - count
    used = torch.argsort(count, descending=True)[: int((count > 0).sum())]
    slots = torch.div(count[used] + SLOT - 1, SLOT, rounding_mode="floor")
    longest = int(slots[0]) if len(used) else 0
    rounds = torch.searchsorted(-slots, -torch.arange(longest)).clamp_min(min(len(used), SHORTEST)).tolist()
    tile = torch.cat([used[:n] for n in rounds]) if rounds else used
    skip = SLOT * torch.repeat_interleave(torch.arange(longest), torch.tensor(rounds, dtype=torch.long))
    place = skip[:, None] + torch.arange(SLOT)
    there = place < count[tile][:, None]
    index = by_tile[torch.where(there, start[tile][:, None] + place, 0)] if len(used) else place
    origin = TILE * torch.stack([tile % columns, tile // columns], -1) + TILE / 2
    return Pairs(index, there, origin, used, tuple(rounds))


def polynomials(
    means2d: Tensor, shape: Tensor, rgb: Tensor, index: Tensor, there: Tensor, origin: Tensor
) -> tuple[Tensor, Tensor]:
    """Per place of a slot: the exponent log(opacity) - d^T conic d / 2 as a polynomial (1, x, y, xx, xy, yy) of the
    pixel's offset from the tile's middle, [S, K, 6], and the colour and 1, [S, K, 4]."""
    flat = index.reshape(-1)
    mean = means2d.index_select(0, flat).view(*index.shape, 2)
    shape = shape.index_select(0, flat).view(*index.shape, 4)
    a, b, c, log_opacity = torch.where(there[..., None], shape, EMPTY).unbind(-1)
    dx, dy = (origin[:, None] - mean).unbind(-1)
    u, v = a * dx + b * dy, b * dx + c * dy
    constant = log_opacity - 0.5 * (u * dx + v * dy)
    color = rgb.index_select(0, flat).view(*index.shape, 3)
    return torch.stack([constant, -u, -v, -0.5 * a, -b, -0.5 * c], -1), torch.cat(
        [color, torch.ones_like(color[..., :1])], -1
    )


@functools.cache
def steps(compiled: bool) -> tuple[Callable, ...]:
    """`project`, `tiles_of` and `polynomials`; numbers of Gaussians, pairs and slots change with every frame."""
    functions = (project, tiles_of, polynomials)
    return tuple(map(growing, functions)) if compiled else functions


def rasterize(
    scene: Sequence[Tensor], viewmat: Tensor, intrinsics: Tensor, width: int, height: int, compiled: bool
) -> Image:
    """`fg3dgs_jax.rasterizer.rasterize` on the CPU; `scene`: means, quats, scales, opacities, colors or SH."""
    project_, tiles_of_, polynomials_ = steps(compiled)
    means2d, shape, rgb, depth, boxes = project_(*scene, viewmat, intrinsics, width, height)
    if means2d.requires_grad:
        means2d.retain_grad()
    columns, rows = -(-width // TILE), -(-height // TILE)
    with torch.no_grad():
        order = torch.argsort(depth)
        count = (boxes[:, 2] * boxes[:, 3])[order]
        ranks = torch.repeat_interleave(torch.arange(len(count)), count)
        gaussians, tiles = tiles_of_(ranks, order, torch.cumsum(count, 0) - count, boxes, columns)
        pairs = lay_out(gaussians, tiles, columns, rows)
    coefficients, features = polynomials_(means2d, shape, rgb, *pairs[:3])
    image = Blend.apply(coefficients, features, pairs, compiled)
    canvas = image.new_zeros(columns * rows, 4, PIXELS).index_copy(0, pairs.tiles, image)
    canvas = canvas.view(rows, columns, 4, TILE, TILE).permute(0, 3, 1, 4, 2).reshape(rows * TILE, columns * TILE, 4)
    return Image(canvas[:height, :width, :3], canvas[:height, :width, 3], means2d, boxes[:, 2] > 0)
