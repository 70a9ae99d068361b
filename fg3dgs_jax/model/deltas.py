"""What motion networks may change of a Gaussian, and how their outputs become `types.Deltas`."""

import jax
import jax.numpy as jnp

from fg3dgs_jax.types import Deltas

MEANS_SCALE = 1e-2  # world units per unit of network output (TG code; kept for FG's eyes and mouth)
# Field of `Deltas` -> numbers per Gaussian. The papers' own are the first three; their ablations add the others.
OUTPUTS = {"means": 3, "quats": 4, "log_scales": 3, "opacities": 1, "colors": 3}
DEFORMATION = ("means", "quats", "log_scales")  # TG Eq. 4, FG Eq. 8


def of(kind: str, predicts: tuple[str, ...]) -> tuple[str, ...]:
    """What a kind of network predicts: `predicts`, or where that is empty what is usual for it (FG Eq. 8, 12)."""
    return tuple(predicts) or (DEFORMATION if kind in ("face", "released_face") else ("means",))


def width(predicts: tuple[str, ...]) -> int:
    """Numbers per Gaussian of a network that predicts these fields."""
    return sum(OUTPUTS[name] for name in predicts)


def split(out: jax.Array, predicts: tuple[str, ...], reach: jax.Array | float = 1.0) -> Deltas:
    """Deltas from a network's output f32 [N, width]; `reach` multiplies the means. Means not predicted are zeros."""
    parts, start = {}, 0
    for name in predicts:
        parts[name] = out[:, start : start + OUTPUTS[name]]
        start += OUTPUTS[name]
    parts["means"] = (MEANS_SCALE * reach) * parts["means"] if "means" in parts else jnp.zeros((out.shape[0], 3))
    if "opacities" in parts:
        parts["opacities"] = parts["opacities"][:, 0]
    return Deltas(**parts)
