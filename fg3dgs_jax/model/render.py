"""A frame of the head: motion -> deformed Gaussians -> a layer per region -> composite (FG Eq. 8, 12, 14)."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fg3dgs_jax.model import gaussians as pool_lib
from fg3dgs_jax.model import motion as motion_lib
from fg3dgs_jax.model import talking_gaussian
from fg3dgs_jax.model.hashgrid import GridSpec
from fg3dgs_jax.rasterizer import BACKENDS, NEAR, rasterize
from fg3dgs_jax.rasterizer import ffi as rasterizer_calls
from fg3dgs_jax.types import Camera, Condition, Deltas, Gaussians, Rendered

_CLEAR = 0.5 / 255.0  # alpha that files round to 0: the colour under it does not matter


@dataclasses.dataclass(frozen=True)
class RegionSpec:
    """One layer of the head: its name, its kind of motion network (see `motion.create`) and that network's grid."""

    name: str
    motion: str
    grid: GridSpec
    predicts: tuple[str, ...] = ()  # see `motion.create`; empty: what the kind usually does


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Everything static about a head: what is needed to rebuild its networks around stored arrays."""

    regions: tuple[RegionSpec, ...]  # front to back: FG Eq. 14 composites them in this order
    audio_shape: tuple[int, int]  # (A, D) of one audio window
    expression_dim: int
    sh_degree: int
    audio_components: int = 0  # of a window, which networks see in its place; 0: they see windows

    @property
    def heard(self) -> tuple[int, ...]:
        """What networks are built for: (A, D), or (A, D, C) where they see C components, see `motion.create`."""
        return (*self.audio_shape, *([self.audio_components] if self.audio_components else []))


@dataclasses.dataclass(frozen=True)
class RasterOptions:
    """How the rasterizer is called: see `rasterizer.rasterize`."""

    backend: str = "auto"
    max_pairs: int | None = None
    deterministic: bool = False

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ValueError(f"{self.backend!r} is none of {', '.join(BACKENDS)}")


USUAL = RasterOptions()


def create_motions(spec: HeadSpec, seed: int) -> tuple[dict[str, nnx.GraphDef], dict[str, dict]]:
    """Fresh motion networks: per region a static graph definition and a plain dict of float32 arrays."""
    return motion_structure(spec)[0], _fresh(spec, seed)


@functools.partial(jax.jit, static_argnums=0)
def _fresh(spec: HeadSpec, seed: jax.Array) -> dict[str, dict]:
    """One program: leaf by leaf, a network's first values take seconds of compilation."""
    params = {}
    for i, region in enumerate(spec.regions):
        module = _create(spec, region, nnx.Rngs(jax.random.fold_in(jax.random.key(seed), i)))
        params[region.name] = nnx.to_pure_dict(nnx.state(module))
    return params


def _create(spec: HeadSpec, region: RegionSpec, rngs: nnx.Rngs) -> nnx.Module:
    if region.motion in talking_gaussian.KINDS:
        return talking_gaussian.create(region.motion, region.grid, spec.audio_shape, rngs=rngs)
    given = (spec.heard, spec.expression_dim)
    return motion_lib.create(region.motion, region.grid, *given, rngs=rngs, predicts=region.predicts)


@functools.lru_cache(maxsize=8)
def motion_structure(spec: HeadSpec) -> tuple[dict[str, nnx.GraphDef], dict[str, dict]]:
    """What `create_motions` returns with shapes in place of arrays: nothing is computed, so nothing compiles.

    Once per spec: tracing takes a third of a second. The result is shared; leave it as it is.
    """
    graphs, shapes = {}, {}
    for region in spec.regions:
        graphs[region.name], state = nnx.split(nnx.eval_shape(lambda r=region: _create(spec, r, nnx.Rngs(0))))
        shapes[region.name] = nnx.to_pure_dict(state)
    return graphs, shapes


def move(graph: nnx.GraphDef, motion: Mapping, means: jax.Array, condition: Condition) -> tuple[Deltas, dict]:
    """The deltas of one region's Gaussians for one frame, and what its network reveals of its attention."""
    return nnx.merge(graph, motion)(means, condition)


def render_region(
    gaussians: Gaussians,
    alive: jax.Array,
    deltas: Deltas | None,
    camera: Camera,
    *,
    means2d: jax.Array | None = None,
    options: RasterOptions = USUAL,
) -> Rendered:
    """One region's layer. `deltas` None renders the static head; `means2d` as in `rasterize`."""
    return _rasterize(pool_lib.activate(gaussians, alive, deltas), camera, means2d, options)


def _rasterize(
    region: tuple[jax.Array, ...], camera: Camera, means2d: jax.Array | None, options: RasterOptions
) -> Rendered:
    return rasterize(
        *region,
        camera.viewmat,
        camera.intrinsics,
        camera.width,
        camera.height,
        means2d=means2d,
        max_pairs=options.max_pairs,
        backend=options.backend,
        deterministic=options.deterministic,
    )


def composite(layers: Sequence[Rendered], backdrop: jax.Array) -> jax.Array:
    """Lay premultiplied layers, front to back, over a backdrop f32 [H, W, 3] (FG Eq. 14, premultiplied)."""
    color = backdrop
    for layer in reversed(layers):
        color = over(layer.color, layer.alpha, color)
    return color


@jax.custom_vjp
def over(color: jax.Array, alpha: jax.Array, behind: jax.Array) -> jax.Array:
    """A premultiplied layer f32 [H, W, 3] of alpha [H, W] over what is behind it.

    XLA's sum over three channels, the gradient by alpha, takes ten times as long on a CPU as adding them up.
    """
    return color + (1.0 - alpha)[..., None] * behind


def _over_forward(color: jax.Array, alpha: jax.Array, behind: jax.Array) -> tuple[jax.Array, tuple]:
    return over(color, alpha, behind), (alpha, behind)


def _over_backward(seen: tuple[jax.Array, jax.Array], pull: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    alpha, behind = seen
    by_alpha = -sum(pull[..., c] * behind[..., c] for c in range(3))
    return pull, by_alpha, (1.0 - alpha)[..., None] * pull


over.defvjp(_over_forward, _over_backward)


def cut_out(layers: Sequence[Rendered], backdrop: jax.Array) -> jax.Array:
    """Lay premultiplied layers over a backdrop f32 [H, W, 4] of straight alpha; straight alpha again, for files."""
    alpha = backdrop[..., 3]
    color = composite(layers, backdrop[..., :3] * alpha[..., None])
    for layer in reversed(layers):
        alpha = layer.alpha + (1.0 - layer.alpha) * alpha
    return jnp.concatenate([color / jnp.maximum(alpha, _CLEAR)[..., None], alpha[..., None]], axis=-1)


def draw(
    spec: HeadSpec,
    params: Mapping[str, Mapping],
    alive: Mapping[str, jax.Array],
    deltas: Mapping[str, Deltas | None],
    camera: Camera,
    backdrop: jax.Array,
    *,
    options: RasterOptions = USUAL,
) -> jax.Array:
    """One finished frame, u8, of regions moved by given deltas, over a backdrop u8 [H, W, 3] or [H, W, 4].

    A backdrop of four channels has straight alpha, and so has the frame.
    """
    regions = [
        pool_lib.activate(params[region.name]["gaussians"], alive[region.name], deltas[region.name])
        for region in spec.regions
    ]
    return paint(regions, camera, backdrop, options=options)


def paint(
    regions: Sequence[tuple[jax.Array, ...]],
    camera: Camera,
    backdrop: jax.Array,
    *,
    options: RasterOptions = USUAL,
) -> jax.Array:
    """One finished frame, u8, of regions front to back: of each what `rasterize` takes first, means to SH colours.

    Backdrop as in `draw`. Every region is sorted and stops by itself, so regions that lie within each other show as FG
    Eq. 14 has them. On a CPU one native pass over the tiles does it all, and no float picture is ever written.
    """
    plain = functools.partial(paint_reference, options=options)
    if options.backend == "reference" or options.max_pairs is not None:
        return plain(regions, camera, backdrop)
    native = functools.partial(rasterizer_calls.paint, near=NEAR)
    return jax.lax.platform_dependent(list(regions), camera, backdrop, cpu=native, default=plain)


def paint_reference(
    regions: Sequence[tuple[jax.Array, ...]], camera: Camera, backdrop: jax.Array, options: RasterOptions = USUAL
) -> jax.Array:
    """`paint` layer by layer, the specification."""
    layers = [_rasterize(region, camera, None, options) for region in regions]
    lay = composite if backdrop.shape[-1] == 3 else cut_out
    color = lay(layers, backdrop.astype(jnp.float32) / 255.0)
    return jnp.round(jnp.clip(color, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def render_frame(
    spec: HeadSpec,
    graphs: Mapping[str, nnx.GraphDef],
    params: Mapping[str, Mapping],
    alive: Mapping[str, jax.Array],
    condition: Condition,
    camera: Camera,
    backdrop: jax.Array,
    *,
    moving: bool = True,
    options: RasterOptions = USUAL,
) -> jax.Array:
    """One finished frame, u8 [H, W, 3]: `params[region]` holds `gaussians` and `motion`, backdrop as in `draw`."""
    deltas: dict[str, Deltas | None] = dict.fromkeys(params)
    if moving:
        for name, graph in graphs.items():
            deltas[name], _ = move(graph, params[name]["motion"], params[name]["gaussians"].means, condition)
    return draw(spec, params, alive, deltas, camera, backdrop, options=options)
