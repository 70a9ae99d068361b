"""All that training changes, in one frozen pytree."""

import flax.struct
import jax

from fg3dgs_jax.model.gaussians import Pool
from fg3dgs_jax.training.cameras import Cameras


@flax.struct.dataclass
class TrainState:
    """Saved as it is: a run restored from it continues bit for bit.

    `trouble` is 0 while all is well. A step whose loss is not finite, or whose rasterizer ran out of pairs, changes
    nothing but this field, and every later step then changes nothing at all: the host sees it at its next look.
    """

    step: jax.Array  # i32 [], steps done, over all stages
    params: dict[str, dict]  # region -> {"gaussians": Gaussians, "motion": nested dict of arrays}
    opt: dict  # {"gaussians" | "motion": optax state whose moments mirror the parameters}
    pools: dict[str, Pool]  # region -> alive mask and densification statistics
    key: jax.Array  # u32 key data; every random draw is a function of (key, step)
    trouble: jax.Array  # i32 [], 0 or 1 + index of the loss term at fault, or PAIRS
    pairs_needed: jax.Array  # i32 [], tile-Gaussian pairs the troubled step asked for
    cameras: Cameras | None = None  # corrections of the clip's cameras, where the config learns them


PAIRS = 10_000  # `trouble` of a step that needed more pairs than `max_pairs`
