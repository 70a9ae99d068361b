"""Gaussians as .ply files with the fields of 3DGS, in their order, for viewers and editors of splats."""

from pathlib import Path

import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing

COLOR_SUMS = {1: 0, 4: 9, 9: 24, 16: 45}  # coefficients per channel -> fields f_rest_*


def fields(coefficients: int) -> list[str]:
    """Names of a vertex's float32 fields for so many SH coefficients a channel."""
    rest = [f"f_rest_{i}" for i in range(COLOR_SUMS[coefficients])]
    return ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *rest, "opacity",
            "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]  # fmt: skip


def table(gaussians: types.Gaussians) -> np.ndarray:
    """One row per Gaussian, f32 [N, F]: positions, zero normals, SH, logit opacity, log scales, unit quaternion wxyz.

    SH beyond the constant is stored channel by channel, as 3DGS does.
    """
    means, sh = np.asarray(gaussians.means, np.float32), np.asarray(gaussians.sh, np.float32)
    quats = np.asarray(gaussians.quats, np.float32)
    quats = quats / np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), 1e-12)
    rest = sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), -1)
    opacity = np.asarray(gaussians.logit_opacities, np.float32)[:, None]
    return np.concatenate(
        [means, np.zeros_like(means), sh[:, 0], rest, opacity, np.asarray(gaussians.log_scales), quats], axis=1
    ).astype(np.float32)


def write(path: str | Path, gaussians: types.Gaussians, comments: tuple[str, ...] = ()) -> int:
    """Writes a binary little-endian .ply, which appears only when complete; returns the number of Gaussians.

    Raises UserError: it cannot be written, or a value is not finite.
    """
    rows = table(gaussians)
    if not np.isfinite(rows).all():
        raise UserError(f"{path}: the head holds values that are not finite; train it again")
    names = fields(gaussians.sh.shape[1])
    head = ["ply", "format binary_little_endian 1.0", *(f"comment {text}" for text in comments),
            f"element vertex {len(rows)}", *(f"property float {name}" for name in names), "end_header"]  # fmt: skip
    with replacing(path) as partial:
        partial.write_bytes("\n".join(head).encode("ascii", "replace") + b"\n" + rows.astype("<f4").tobytes())
    return len(rows)
