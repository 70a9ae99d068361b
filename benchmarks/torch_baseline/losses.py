"""The image losses in PyTorch. Images are [H, W, C] in [0, 1]."""

import torch
from torch import Tensor

SSIM_RADIUS, SSIM_SIGMA, SSIM_C1, SSIM_C2 = 5, 1.5, 0.01**2, 0.03**2


def taps(device: torch.device | str) -> Tensor:
    """The blur along a line, f32 [11]."""
    line = torch.exp(-0.5 * (torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    return (line / line.sum()).to(device)


def blur(maps: Tensor, line: Tensor) -> Tensor:
    """Separable, zero-padded blur of maps [M, H, W]: depthwise convolutions, in two thirds of the time of products with
    band matrices (512x512)."""
    count = len(maps)
    down, along = line.view(1, 1, -1, 1).expand(count, -1, -1, -1), line.view(1, 1, 1, -1).expand(count, -1, -1, -1)
    maps = torch.nn.functional.conv2d(maps[None], down, padding=(SSIM_RADIUS, 0), groups=count)
    return torch.nn.functional.conv2d(maps, along, padding=(0, SSIM_RADIUS), groups=count)[0]


def ssim_of(moments: Tensor) -> Tensor:
    """Mean structural similarity from the blurred a, b, a a, b b, a b, [5, C, H, W]."""
    a, b, aa, bb, ab = moments.unbind(0)
    luminance = (2 * a * b + SSIM_C1) / (a * a + b * b + SSIM_C1)
    return (luminance * (2 * (ab - a * b) + SSIM_C2) / (aa - a * a + bb - b * b + SSIM_C2)).mean()


def dssim(prediction: Tensor, target: Tensor, line: Tensor) -> Tensor:
    """1 - mean SSIM, zero-padded borders; `line` from `taps`."""
    a, b = prediction.permute(2, 0, 1), target.permute(2, 0, 1)
    moments = blur(torch.cat([a, b, a * a, b * b, a * b]), line)
    return 1.0 - ssim_of(moments.view(5, *a.shape))


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (prediction - target).abs().mean()


def alpha(rendered: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Opaque inside, empty outside; all [H, W]."""
    missing = ((1 - rendered) * inside).sum() / inside.sum().clamp_min(1.0)
    return missing + (rendered * outside).sum() / outside.sum().clamp_min(1.0)
