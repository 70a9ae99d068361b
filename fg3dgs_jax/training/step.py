"""One training step, jitted: render the regions, judge them, move the parameters (FG Eq. 3, 13, 15, 16)."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from fg3dgs_jax.losses import terms as loss_terms
from fg3dgs_jax.model import gaussians as pool_lib
from fg3dgs_jax.model import relocation
from fg3dgs_jax.model.render import HeadSpec, RasterOptions, move, render_region
from fg3dgs_jax.training import cameras, optim
from fg3dgs_jax.training import lips as lips_lib
from fg3dgs_jax.training.optim import Rates
from fg3dgs_jax.training.stages import RegionTask, Stage
from fg3dgs_jax.training.state import PAIRS, TrainState
from fg3dgs_jax.training.views import Layer, Window, frame_view, region_view, window_of
from fg3dgs_jax.types import Deltas, Frame, Snippet

SHAKING = 0xFFFFFFFE  # no step is that late: sets the key of relocation's noise apart from the others
RESET_OPACITY = 0.01  # 3DGS


@flax.struct.dataclass
class Plan:
    """Everything static about one stage's step."""

    spec: HeadSpec = flax.struct.field(pytree_node=False)
    graphs: Mapping[str, nnx.GraphDef] = flax.struct.field(pytree_node=False)
    tasks: Mapping[str, RegionTask] = flax.struct.field(pytree_node=False)
    stage: Stage = flax.struct.field(pytree_node=False)
    rates: Rates = flax.struct.field(pytree_node=False)
    options: RasterOptions = flax.struct.field(pytree_node=False)
    audio_noise: float = flax.struct.field(pytree_node=False, default=0.0)  # deviation, in units of the features
    audio_level: float = flax.struct.field(pytree_node=False, default=0.0)  # deviation of a shift common to a frame's
    lips: lips_lib.Lips | None = flax.struct.field(pytree_node=False, default=None)  # None: no landmark leads them
    camera_rule: cameras.CameraRule | None = flax.struct.field(pytree_node=False, default=None)  # None: they stay

    @property
    def judges_frames(self) -> bool:
        """Whether any loss term looks at the finished frame."""
        return any(loss_terms.of_frames(term) for term in self.stage.weights)

    @property
    def whole(self) -> bool:
        """Whether regions without boxes are looked at whole, not in the window that holds their mask.

        So they are while the head stands still, lest Gaussians stay adrift far from it.
        """
        return self.judges_frames or not self.stage.moving

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names behind `TrainState.trouble`: term i is trouble i + 1."""
        frame = [t for t in self.stage.weights if loss_terms.of_frames(t)]
        region = [f"{r}/{t}" for r in self.tasks for t in self.stage.weights if t not in frame]
        snippet = [t for t in frame if t in loss_terms.SNIPPET_TERMS]
        return (*region, *(t for t in frame if t not in snippet), *snippet, "gradient")


class Seen(NamedTuple):
    """What a step learns of its frames beside the loss."""

    terms: dict[str, jax.Array]  # by name, unweighted
    psnr: jax.Array  # dB
    radii: dict[str, jax.Array]  # region -> i32 [N]; of a snippet the largest
    pairs: jax.Array  # i32 [], the most that a region asked for


def render_layers(plan: Plan, params: Mapping, offsets: Mapping, state: TrainState, frame: Frame) -> list[Layer]:
    """All regions, front to back: whole where the stage judges the finished frame, else in their windows."""
    whole = Window(0, 0, *frame.labels.shape)
    layers = []
    for region in plan.spec.regions:
        gaussians, deltas, led = params[region.name]["gaussians"], None, None
        if plan.stage.moving:
            deltas, led = move_region(plan, region.name, params[region.name]["motion"], gaussians.means, frame)
        rendered = render_region(
            gaussians,
            state.pools[region.name].alive,
            deltas,
            (whole if plan.judges_frames else window_of(plan.tasks[region.name], frame, plan.whole)).camera(frame),
            means2d=offsets[region.name],
            options=plan.options,
        )
        layers.append(Layer(rendered, deltas, gaussians, led))
    return layers


def move_region(
    plan: Plan, region: str, motion: Mapping, means: jax.Array, frame: Frame
) -> tuple[Deltas, jax.Array | None]:
    """The deltas of a region's Gaussians, and how far from the frame's landmarks its network moves the resting lips.

    The latter is None where they are not its task. Lips go through the network with the Gaussians, in one pass.
    """
    leads = plan.lips is not None and plan.lips.region == region
    rest = jnp.asarray(plan.lips.points) if leads else jnp.zeros((0, 3))
    deltas, _ = move(plan.graphs[region], motion, jnp.concatenate([means, rest]), frame.condition)
    if not leads:
        return deltas, None
    shift = deltas.means[len(means) :]
    deltas = jax.tree.map(lambda x: x[: len(means)], deltas)
    return deltas, lips_lib.distance(lips_lib.seen(rest + shift, frame), frame.lips, plan.lips.width)


def disturb(plan: Plan, state: TrainState, frame: Frame) -> Frame:
    """The frame with noise on what its sound is described by, while the networks that hear it learn.

    Departure: twenty seconds of speech hold each sound a few times only; without noise the networks learn the clip by
    heart, and move the lips of unheard speech worse than not at all.
    """
    if not (plan.audio_noise or plan.audio_level) or "audio" not in plan.rates.ends:
        return frame
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), -1 - state.step))
    audio = frame.condition.audio
    audio += plan.audio_noise * jax.random.normal(keys[0], audio.shape)
    audio += plan.audio_level * jax.random.normal(keys[1], ())
    return frame.replace(condition=frame.condition.replace(audio=audio))


def judge(
    plan: Plan, layers: list[Layer], state: TrainState, frame: Frame, judges: Mapping
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array, jax.Array | None]:
    """The weighted loss of one frame, its terms by name, PSNR, and the finished frame where it is looked at."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    backgrounds = jax.random.uniform(key, (len(layers), 3))
    values, loss, photos, picture = {}, jnp.zeros(()), [], None
    for i, (region, layer) in enumerate(zip(plan.spec.regions, layers, strict=True)):
        task, alive = plan.tasks[region.name], state.pools[region.name].alive
        view = region_view(layer, alive, frame, task, window_of(task, frame, plan.whole), backgrounds[i], judges)
        part, terms, photo = loss_terms.judged(view, plan.stage.weights)
        photos.append(photo)
        loss += part
        values |= {f"{region.name}/{term}": value for term, value in terms.items()}
    if plan.judges_frames:
        view = frame_view(layers, frame, judges, jax.random.fold_in(key, frame.index))
        part, terms, photo = loss_terms.judged(view, plan.stage.weights)
        photos, picture = [photo], view.prediction
        loss += part
        values |= terms
    return loss, values, loss_terms.psnr(photos), picture


def see_frame(
    plan: Plan, params: Mapping, offsets: Mapping, state: TrainState, frame: Frame, judges: Mapping
) -> tuple[jax.Array, Seen, jax.Array | None]:
    """One frame rendered and judged: its loss, what was seen, and the picture f32 [H, W, 3] where it is looked at."""
    frame = cameras.applied(state.cameras, disturb(plan, state, frame), plan.rates.extent, offsets.get(cameras.OFFSET))
    layers = render_layers(plan, params, offsets, state, frame)
    loss, terms, psnr, picture = judge(plan, layers, state, frame, judges)
    radii = {region.name: layer.rendered.radii for region, layer in zip(plan.spec.regions, layers, strict=True)}
    pairs = jnp.stack([layer.rendered.num_pairs for layer in layers]).max()
    return loss, Seen(terms, psnr, radii, pairs), picture


def see_snippet(
    plan: Plan, params: Mapping, offsets: Mapping, state: TrainState, snippet: Snippet, judges: Mapping
) -> tuple[jax.Array, Seen]:
    """Consecutive frames, one after the other: the mean of their losses plus the snippet's own terms (FG Eq. 16).

    A frame's inner values are computed again on the way back, so that memory does not grow with the frames.
    """

    @jax.checkpoint
    def one(frame: Frame) -> tuple[jax.Array, Seen, jax.Array | None]:
        return see_frame(plan, params, offsets, state, frame, judges)

    losses, seen, pictures = jax.lax.map(one, snippet.frames)
    terms = {name: value.mean() for name, value in seen.terms.items()}
    view = loss_terms.SnippetView(pictures, snippet.face_boxes, snippet.mel, judges)
    loss = losses.mean()
    for term, weight in plan.stage.weights.items():
        if term in loss_terms.SNIPPET_TERMS:
            terms[term] = loss_terms.SNIPPET_TERMS[term](view)
            loss += weight * terms[term]
    radii = {name: value.max(axis=0) for name, value in seen.radii.items()}
    return loss, Seen(terms, seen.psnr.mean(), radii, seen.pairs.max())


def _trouble(plan: Plan, terms: Mapping, grads: Any, pairs: jax.Array) -> jax.Array:
    """See `TrainState.trouble`. Terms are looked at in order, the gradient last."""
    values = jnp.stack([terms[name] for name in plan.term_names[:-1]])
    bad = jnp.append(~jnp.isfinite(values), ~optim.can_step(grads))
    trouble = jnp.where(bad.any(), 1 + jnp.argmax(bad), 0)
    if plan.options.max_pairs is None:
        return trouble
    return jnp.where(pairs > plan.options.max_pairs, PAIRS, trouble)


def make_step(plan: Plan):
    """`step(state, frame, judges) -> (state, metrics)`, jitted, the state donated. Metrics are scalars on the device.

    A stage of several frames takes a `Snippet` in place of a frame; `judges` are the networks that its terms ask.
    """
    return jax.jit(_step_of(plan), donate_argnums=0)


def make_steps(plan: Plan):
    """`steps(state, frames, count, judges) -> (state, metrics)`: a step for each of the first `count`, at least one, of
    stacked frames, and the metrics of the last. Otherwise as `make_step`.

    One call for several steps: a state has hundreds of arrays, and handing them over costs a tenth of a step on a CPU.
    """
    step = _step_of(plan)

    def steps(state: TrainState, frames: Frame | Snippet, count: jax.Array, judges: Mapping | None = None):
        def take(i) -> Frame | Snippet:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), frames)

        shapes = jax.eval_shape(lambda: step(state, take(0), judges)[1])
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, count, lambda i, carry: step(carry[0], take(i), judges), (state, nothing))

    return jax.jit(steps, donate_argnums=0)


def _step_of(plan: Plan):
    """The step, not yet jitted."""

    def loss_of(params, offsets, state, frame, judges):
        params = optim.freeze(params, plan.rates)
        see = see_snippet if plan.stage.frames > 1 else see_frame
        return see(plan, params, offsets, state, frame, judges)[:2]

    def step(
        state: TrainState, frame: Frame | Snippet, judges: Mapping | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        offsets = {name: jnp.zeros((pool.alive.shape[0], 2)) for name, pool in state.pools.items()}
        if plan.camera_rule is not None:
            offsets[cameras.OFFSET] = cameras.offset()
        grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, seen), (grads, screen) = grad(state.params, offsets, state, frame, judges or {})
        trouble = _trouble(plan, seen.terms, (grads, screen), seen.pairs)

        progress = (state.step - plan.stage.start) / max(plan.stage.steps - 1, 1)
        well = (trouble == 0) & (state.trouble == 0)
        degree = state.step // plan.stage.sh_every
        params, opt = optim.apply(state.params, grads, state.opt, progress, plan.rates, well, degree)
        params = shake(plan, state, params, progress, well)
        height, width = (frame.frames if plan.stage.frames > 1 else frame).labels.shape[-2:]
        pools = {
            name: pool_lib.accumulate(pool, screen[name], seen.radii[name], width, height)
            for name, pool in state.pools.items()
        }
        stepped = state.replace(step=state.step + 1, params=None, opt=None, pools=pools)
        if plan.camera_rule is not None:
            rule = plan.camera_rule
            seen_from = cameras.learn(state.cameras, frame.index, screen[cameras.OFFSET], progress, rule)
            stepped = stepped.replace(cameras=seen_from)
        held = state.replace(
            params=None,
            opt=None,
            trouble=jnp.where(state.trouble == 0, trouble, state.trouble).astype(jnp.int32),
            pairs_needed=jnp.where(state.trouble == 0, seen.pairs, state.pairs_needed).astype(jnp.int32),
        )
        new = jax.tree.map(lambda a, b: jnp.where(well, a, b), stepped, held).replace(params=params, opt=opt)
        metrics = {"loss": loss, "psnr": seen.psnr, "pairs": seen.pairs, **seen.terms}
        return new, metrics

    return step


def shake(plan: Plan, state: TrainState, params: dict, progress: jax.Array, well: jax.Array) -> dict:
    """The parameters with noise on the means of faint Gaussians, where the stage densifies by relocation and all is
    `well`."""
    rule, rates = plan.stage.densify, plan.rates.ends.get("means")
    if rule is None or rule.kind != "relocation" or not rule.noise or rates is None:
        return params
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), SHAKING), state.step)
    reach = rule.noise * optim.rate(rates, progress) / plan.rates.extent
    for i, region in enumerate(plan.spec.regions):
        name, gaussians = region.name, params[region.name]["gaussians"]
        shaken = relocation.shaken(jax.random.fold_in(key, i), gaussians, state.pools[name].alive, reach)
        means = jnp.where(well, shaken, gaussians.means)
        params = {**params, name: {**params[name], "gaussians": gaussians.replace(means=means)}}
    return params


def make_densify(plan: Plan):
    """`densify(state) -> (state, metrics)`, jitted at fixed shapes: every region's pool by the stage's rule."""
    rule = plan.stage.densify

    def densify(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        progress = (state.step - plan.stage.start - rule.start) / max(rule.stop - rule.start, 1)
        low, high = rule.min_opacity
        params, pools, metrics = dict(state.params), dict(state.pools), {}
        mu, nu = dict(state.opt["gaussians"].mu), dict(state.opt["gaussians"].nu)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        for i, region in enumerate(plan.spec.regions):
            name = region.name
            if rule.kind == "relocation":
                change, limits = relocation.relocate, {"faint": rule.faint, "growth": rule.growth}
            else:
                change = pool_lib.densify_and_prune
                limits = {
                    "grad_threshold": plan.tasks[name].grad_threshold,
                    "percent_dense": rule.percent_dense,
                    "extent": plan.rates.extent,
                    "min_opacity": low + (high - low) * jnp.clip(progress, 0.0, 1.0),
                    "max_radius": rule.max_radius,
                    "max_scale": rule.max_scale * plan.rates.extent,
                }
            gaussians, (mu[name], nu[name]), pools[name], counts = change(
                jax.random.fold_in(key, 1 + i), params[name]["gaussians"], (mu[name], nu[name]), pools[name], **limits
            )
            if rule.reset_every:
                due = (state.step - plan.stage.start) % rule.reset_every < rule.every  # the first round after it
                kept = gaussians, (mu[name], nu[name])
                lowered = pool_lib.reset_opacity(*kept, RESET_OPACITY)
                gaussians, (mu[name], nu[name]) = jax.tree.map(functools.partial(jnp.where, due), lowered, kept)
            params[name] = {**params[name], "gaussians": gaussians}
            metrics |= {f"{name}/{count}": value for count, value in counts.items()}
        opt = {**state.opt, "gaussians": state.opt["gaussians"]._replace(mu=mu, nu=nu)}
        return state.replace(params=params, pools=pools, opt=opt), metrics

    return jax.jit(densify, donate_argnums=0)
