"""Learning rates and freezing as data: a regex names a group of parameters, a stage names the group's rates.

The moments of the Gaussians mirror their parameters, so that densification moves both by one function.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fg3dgs_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose path (`region/gaussians/means`, `region/motion/grid/tables`) the pattern matches in full."""

    pattern: str
    decay: float = 0.0  # AdamW: multiplies the learning rate
    per_extent: bool = False  # rates are multiplied by the head's radius


ADAMS = {
    "gaussians": optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-15),  # 3DGS
    # TG: AdamW (0.9, 0.99). Gradients of a grid that starts at 1e-4 are far below the usual eps of 1e-8: with that one
    # the mouth's attention does not learn at all.
    "motion": optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-15),
}


def split(params: Mapping) -> dict[str, dict]:
    """Region -> kind -> leaves turned to kind -> region -> leaves: each kind has its own Adam."""
    return {kind: {region: params[region][kind] for region in params} for kind in ADAMS}


def init(params: Mapping) -> dict:
    """Zero moments for all parameters."""
    parts = split(params)
    return {kind: adam.init(parts[kind]) for kind, adam in ADAMS.items()}


def _name(path: tuple) -> str:
    """`(DictKey('face'), GetAttrKey('means'))` -> `face/means`."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def group_of(path: str, groups: Mapping[str, Group]) -> str:
    """The one group whose pattern matches the path in full."""
    found = [name for name, group in groups.items() if re.fullmatch(group.pattern, path)]
    if len(found) != 1:
        raise UserError(f"--config.groups: the parameter {path} belongs to {found or 'no group'}, not to one.")
    return found[0]


def paths(params: Mapping) -> list[str]:
    """The path of every parameter, as the patterns see it."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(dict(params))[0]]


def rate(ends: tuple[float, float], progress: jax.Array) -> jax.Array:
    """Log-linear from ends[0] to ends[1] as progress goes from 0 to 1."""
    return ends[0] * (ends[1] / ends[0]) ** jnp.clip(progress, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What `apply` needs to know of the stage: the groups and their rates."""

    groups: Mapping[str, Group]
    ends: Mapping[str, tuple[float, float]]  # group -> (first, last); a group that is absent is frozen
    extent: float  # radius of the head, world units, for groups with `per_extent`
    sh_rest: float  # factor for SH coefficients above degree 0
    only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # group -> where it is not frozen

    def of(self, path: str, value: jax.Array, progress: jax.Array) -> jax.Array | None:
        """Learning rate of one leaf (broadcastable to it), or None where it is frozen."""
        name = group_of(path, self.groups)
        if name not in self.ends or path.split("/")[0] not in self.only.get(name, (path.split("/")[0],)):
            return None
        lr = rate(self.ends[name], progress) * (self.extent if self.groups[name].per_extent else 1.0)
        if path.endswith("gaussians/sh"):
            lr = lr * jnp.where(jnp.arange(value.shape[1]) == 0, 1.0, self.sh_rest)[None, :, None]
        return lr


def freeze(params: Mapping, rates: Rates) -> dict:
    """The same parameters, of which no gradient reaches those that a stage leaves frozen: XLA drops the work."""

    def hold(path, value):
        learns = rates.of(_name(path), value, jnp.zeros(())) is not None
        return value if learns else jax.lax.stop_gradient(value)

    return jax.tree_util.tree_map_with_path(hold, dict(params))


def apply(params: Mapping, grads: Mapping, opt: Mapping, progress: jax.Array, rates: Rates) -> tuple[dict, dict]:
    """One optimizer step at `progress` in [0, 1] of the stage. Frozen leaves keep their values and moments."""
    new_params = {region: {} for region in params}
    new_opt = {}
    for kind, adam in ADAMS.items():
        flat, treedef = jax.tree_util.tree_flatten_with_path(split(params)[kind])
        names = [f"{_name(path[:1])}/{kind}/{_name(path[1:])}" for path, _ in flat]
        values = [value for _, value in flat]
        lrs = [rates.of(name, value, progress) for name, value in zip(names, values, strict=True)]
        decays = [rates.groups[group_of(name, rates.groups)].decay for name in names]
        if all(lr is None for lr in lrs):
            moved, new_opt[kind] = values, opt[kind]
        else:
            directions, state = adam.update(split(grads)[kind], opt[kind])
            new_opt[kind] = _thaw(state, opt[kind], [lr is not None for lr in lrs])
            moved = [
                value if lr is None else value - lr * (direction + decay * value)
                for value, lr, decay, direction in zip(values, lrs, decays, jax.tree.leaves(directions), strict=True)
            ]
        for region, tree in jax.tree.unflatten(treedef, moved).items():
            new_params[region][kind] = tree
    return new_params, new_opt


def _thaw(state: optax.ScaleByAdamState, old: optax.ScaleByAdamState, learns: list[bool]) -> optax.ScaleByAdamState:
    """The new moments where a leaf learns, the old ones where it is frozen."""

    def choose(new, kept):
        leaves = [n if on else k for on, n, k in zip(learns, jax.tree.leaves(new), jax.tree.leaves(kept), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(new), leaves)

    return state._replace(mu=choose(state.mu, old.mu), nu=choose(state.nu, old.nu))
