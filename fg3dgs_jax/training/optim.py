"""Learning rates and freezing as data: a regex names a group of parameters, a stage names the group's rates.

The moments of the Gaussians mirror their parameters, so that densification moves both by one function.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fg3dgs_jax import native
from fg3dgs_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose path (`region/gaussians/means`, `region/motion/grid/tables`) the pattern matches in full."""

    pattern: str
    decay: float = 0.0  # AdamW: multiplies the learning rate
    per_extent: bool = False  # rates are multiplied by the head's radius


class Adam(NamedTuple):
    """Which Adam a kind of parameters has."""

    beta1: float
    beta2: float
    epsilon: float

    @property
    def plain(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.epsilon)


MOST_DEGREE = 3
SH_DEGREES = np.repeat(np.arange(MOST_DEGREE + 1), 2 * np.arange(MOST_DEGREE + 1) + 1)  # of each of the coefficients

ADAMS = {
    "gaussians": Adam(0.9, 0.999, 1e-15),  # 3DGS
    # TG: AdamW (0.9, 0.99). Gradients of a grid that starts at 1e-4 are far below the usual eps of 1e-8: with that one
    # the mouth's attention does not learn at all.
    "motion": Adam(0.9, 0.99, 1e-15),
}


def split(params: Mapping) -> dict[str, dict]:
    """Region -> kind -> leaves turned to kind -> region -> leaves: each kind has its own Adam."""
    return {kind: {region: params[region][kind] for region in params} for kind in ADAMS}


def init(params: Mapping) -> dict:
    """Zero moments for all parameters."""
    parts = split(params)
    return {kind: adam.plain.init(parts[kind]) for kind, adam in ADAMS.items()}


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

    def of(
        self, path: str, value: jax.Array, progress: jax.Array, sh_degree: jax.Array | int = MOST_DEGREE
    ) -> jax.Array | None:
        """Learning rate of one leaf (broadcastable to it), or None where it is frozen; see `apply`."""
        name = group_of(path, self.groups)
        if name not in self.ends or path.split("/")[0] not in self.only.get(name, (path.split("/")[0],)):
            return None
        lr = rate(self.ends[name], progress) * (self.extent if self.groups[name].per_extent else 1.0)
        if path.endswith("gaussians/sh"):
            degrees = SH_DEGREES[: value.shape[1]]
            lr = lr * jnp.where(degrees <= sh_degree, np.where(degrees > 0, self.sh_rest, 1.0), 0.0)[None, :, None]
        return lr


def freeze(params: Mapping, rates: Rates) -> dict:
    """The same parameters, of which no gradient reaches those that a stage leaves frozen: XLA drops the work."""

    def hold(path, value):
        learns = rates.of(_name(path), value, jnp.zeros(())) is not None
        return value if learns else jax.lax.stop_gradient(value)

    return jax.tree_util.tree_map_with_path(hold, dict(params))


class Leaf(NamedTuple):
    """An array that learns, and all that its step depends on."""

    rates: jax.Array  # broadcastable to the others
    gradient: jax.Array
    value: jax.Array
    mean: jax.Array  # moments
    square: jax.Array
    decay: float


def apply(
    params: Mapping,
    grads: Mapping,
    opt: Mapping,
    progress: jax.Array,
    rates: Rates,
    good: jax.Array | bool = True,
    sh_degree: jax.Array | int = MOST_DEGREE,
) -> tuple[dict, dict]:
    """One optimizer step at `progress` in [0, 1] of the stage. Frozen leaves keep their values and moments.

    good bool []: where it is false nothing changes. SH coefficients above `sh_degree`, i32 [], wait at the zero they
    start from.
    """
    good = jnp.asarray(good)
    new_params = {region: {} for region in params}
    new_opt = {}
    for kind, adam in ADAMS.items():
        flat, treedef = jax.tree_util.tree_flatten_with_path(split(params)[kind])
        values = [value for _, value in flat]
        moments = jax.tree.leaves(opt[kind].mu), jax.tree.leaves(opt[kind].nu)
        slopes, learning = jax.tree.leaves(split(grads)[kind]), {}
        for i, (path, value) in enumerate(flat):
            name = f"{_name(path[:1])}/{kind}/{_name(path[1:])}"
            lr = rates.of(name, value, progress, sh_degree)
            if lr is not None:
                decay = rates.groups[group_of(name, rates.groups)].decay
                learning[i] = Leaf(lr, slopes[i], value, moments[0][i], moments[1][i], decay)
        if learning:
            count = optax.safe_increment(opt[kind].count)
            moved = descend(adam, list(learning.values()), count, good)
            for i, new in zip(learning, moved, strict=True):
                values[i], moments[0][i], moments[1][i] = new
            mu, nu = (jax.tree.unflatten(treedef, leaves) for leaves in moments)
            new_opt[kind] = opt[kind]._replace(count=jnp.where(good, count, opt[kind].count), mu=mu, nu=nu)
        else:
            new_opt[kind] = opt[kind]
        for region, tree in jax.tree.unflatten(treedef, values).items():
            new_params[region][kind] = tree
    return new_params, new_opt


def can_step(grads: Mapping) -> jax.Array:
    """bool []: whether the squares of all gradients are finite, as `apply` needs them to be."""
    leaves = jax.tree.leaves(grads)
    return jax.lax.platform_dependent(*leaves, cpu=_can_step_native, default=can_step_reference)


def can_step_reference(*leaves: jax.Array) -> jax.Array:
    """`can_step` in plain JAX, the specification."""
    return jnp.stack([jnp.isfinite(jnp.square(leaf)).all() for leaf in leaves]).all()


def _can_step_native(*leaves: jax.Array) -> jax.Array:
    return native.call("fg3dgs_can_step", [jax.ShapeDtypeStruct((), jnp.int32)], leaves)[0] != 0


def descend(adam: Adam, leaves: list[Leaf], count: jax.Array, good: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Value and moments of each leaf after the step that makes `count` of them; as they were where not `good`.

    On a CPU one native pass changes all of them in place.
    """
    decays = [leaf.decay for leaf in leaves]
    arrays = [leaf[:-1] for leaf in leaves]
    return jax.lax.platform_dependent(
        arrays,
        count,
        good,
        cpu=functools.partial(_descend_native, adam, decays),
        default=functools.partial(descend_reference, adam, decays),
    )


def descend_reference(
    adam: Adam, decays: list[float], arrays: list[tuple[jax.Array, ...]], count: jax.Array, good: jax.Array
) -> list[tuple[jax.Array, ...]]:
    """`descend` by optax, the specification; `arrays` are the leaves without their `decays`."""
    rates, slopes, values, means, squares = zip(*arrays, strict=True)
    state = optax.ScaleByAdamState(count - 1, list(means), list(squares))
    directions, state = adam.plain.update(list(slopes), state)
    moved = [v - r * (d + decay * v) for v, r, d, decay in zip(values, rates, directions, decays, strict=True)]
    new = zip(moved, state.mu, state.nu, strict=True)
    return jax.tree.map(functools.partial(jnp.where, good), list(new), list(zip(values, means, squares, strict=True)))


def _descend_native(
    adam: Adam, decays: list[float], arrays: list[tuple[jax.Array, ...]], count: jax.Array, good: jax.Array
) -> list[tuple[jax.Array, ...]]:
    left = [1.0 - beta**count for beta in (adam.beta1, adam.beta2)]
    operands, results, aliases = [jnp.stack([good.astype(jnp.float32), *left])], [], {}
    for rates, *rest in arrays:
        if rates.ndim:  # repeats along the first axis
            rates = jnp.broadcast_to(rates, (1, *rest[0].shape[1:]))
        operands += [rates.reshape(-1), *rest]
        for at in (-3, -2, -1):
            aliases[len(operands) + at] = len(results)
            results.append(jax.ShapeDtypeStruct(rest[0].shape, jnp.float32))
    moved = native.call(
        "fg3dgs_adam",
        results,
        operands,
        aliases,
        beta1=np.float64(adam.beta1),
        beta2=np.float64(adam.beta2),
        epsilon=np.float32(adam.epsilon),
        decays=np.float32(decays),
    )
    return list(zip(moved[::3], moved[1::3], moved[2::3], strict=True))
