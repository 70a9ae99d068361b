"""The image losses in PyTorch. Images are [H, W, C] in [0, 1]."""

import functools

import torch
from torch import Tensor

SSIM_RADIUS, SSIM_SIGMA, SSIM_C1, SSIM_C2 = 5, 1.5, 0.01**2, 0.03**2


@functools.cache
def _band(size: int, device: torch.device) -> Tensor:
    """The zero-padded 11-tap blur of a line as a matrix [size, size]."""
    offsets = torch.arange(size)[:, None] - torch.arange(size)[None]
    taps = torch.exp(-0.5 * (torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2).sum()
    inside = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2) / taps
    return torch.where(offsets.abs() <= SSIM_RADIUS, inside, 0.0).to(device)


def blur_by_products(maps: Tensor) -> Tensor:
    """Separable blur of maps [M, H, W] as two matrix products."""
    return _band(maps.shape[1], maps.device) @ maps @ _band(maps.shape[2], maps.device)


def blur_by_convolutions(maps: Tensor) -> Tensor:
    """The same as two convolutions of single channels."""
    line = _band(4 * SSIM_RADIUS, maps.device)[2 * SSIM_RADIUS, SSIM_RADIUS : 3 * SSIM_RADIUS + 1]
    maps = torch.nn.functional.conv2d(maps[:, None], line.view(1, 1, -1, 1), padding=(SSIM_RADIUS, 0))
    return torch.nn.functional.conv2d(maps, line.view(1, 1, 1, -1), padding=(0, SSIM_RADIUS))[:, 0]


def ssim_of(moments: Tensor) -> Tensor:
    """Mean structural similarity from the blurred a, b, a a, b b, a b, [5, C, H, W]."""
    a, b, aa, bb, ab = moments.unbind(0)
    luminance = (2 * a * b + SSIM_C1) / (a * a + b * b + SSIM_C1)
    return (luminance * (2 * (ab - a * b) + SSIM_C2) / (aa - a * a + bb - b * b + SSIM_C2)).mean()


def dssim(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean SSIM, zero-padded borders."""
    a, b = prediction.permute(2, 0, 1), target.permute(2, 0, 1)
    moments = BLUR(torch.cat([a, b, a * a, b * b, a * b]))
    return 1.0 - ssim_of(moments.view(5, *a.shape))


BLUR = blur_by_products


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (prediction - target).abs().mean()


def alpha(rendered: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Opaque inside, empty outside; all [H, W]."""
    missing = ((1 - rendered) * inside).sum() / inside.sum().clamp_min(1.0)
    return missing + (rendered * outside).sum() / outside.sum().clamp_min(1.0)
