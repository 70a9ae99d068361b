"""Training a lip-sync expert on talking clips: pictures and sound of the same moment against those of other moments."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fg3dgs_jax.losses import sync
from fg3dgs_jax.training.sync_clips import MARGIN, SyncClip

NEAR = 2  # frames: sounds so close to a picture's own are neither right nor wrong
TINY = 1e-4  # keeps logarithms of cosines finite
TEMPERATURE = 0.07  # of the softmax over a batch's cosines


@dataclasses.dataclass(frozen=True)
class SyncRules:
    """How an expert is trained."""

    width: float
    steps: int
    groups: int  # stretches of clips in a batch
    windows: int  # windows in a stretch: each is compared with the sounds of all others
    span: int  # frames that a stretch is long
    rate: float  # highest learning rate; it rises for a tenth of the steps and falls as a cosine
    decay: float
    seed: int


class Batch(NamedTuple):
    """Windows, group after group."""

    crops: np.ndarray  # u8 [B, 5, 48 + 2 MARGIN, 96 + 2 MARGIN, 3]
    mel: np.ndarray  # f32 [B, 80, 16]
    clip: np.ndarray  # i32 [B]
    start: np.ndarray  # i32 [B], first frame


def take(clip: SyncClip, starts: np.ndarray) -> np.ndarray:
    """The pictures u8 [n, 5, h, w, 3] of the windows that begin at `starts` [n]."""
    return clip.crops[np.asarray(starts)[:, None] + np.arange(sync.FRAMES)]


def batches(clips: Sequence[SyncClip], learned: Sequence[np.ndarray], rules: SyncRules) -> Iterator[Batch]:
    """Endless batches of the windows that begin at the frames `learned` (i64 [n] per clip, ascending), by the seed.

    A clip is drawn in proportion to its number of windows.
    """
    lengths = np.array([len(starts) for starts in learned], np.float64)
    step = 0
    while True:
        rng, parts = np.random.default_rng([rules.seed, step]), []
        for k in rng.choice(len(clips), rules.groups, p=lengths / lengths.sum()):
            span = min(rules.span, len(learned[k]))
            begin = rng.integers(0, len(learned[k]) - span + 1)
            starts = learned[k][begin + rng.choice(span, min(rules.windows, span), replace=False)]
            which = np.full(len(starts), k, np.int32)
            parts.append(Batch(take(clips[k], starts), clips[k].mel[starts], which, starts.astype(np.int32)))
        yield Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        step += 1


def augment(key: jax.Array, crops: jax.Array) -> jax.Array:
    """f32 [B, 5, 48, 96, 3] in [0, 1] of crops with margins: moved, mirrored, brighter or darker, window by window."""
    keys = jax.random.split(key, 4)
    count = crops.shape[0]
    places = jax.random.randint(keys[0], (count, 2), 0, 2 * MARGIN + 1)
    shape = (sync.FRAMES, sync.CROP // 2, sync.CROP, 3)
    cut = jax.vmap(lambda x, p: jax.lax.dynamic_slice(x, (0, p[0], p[1], 0), shape))(crops, places)
    mirrored = jax.random.bernoulli(keys[1], 0.5, (count, 1, 1, 1, 1))
    x = jnp.where(mirrored, cut[:, :, :, ::-1], cut).astype(jnp.float32) / 255.0
    gain = jax.random.uniform(keys[2], (count, 1, 1, 1, 3), minval=0.7, maxval=1.3)
    lift = jax.random.uniform(keys[3], (count, 1, 1, 1, 1), minval=-0.1, maxval=0.1)
    return jnp.clip(x * gain + lift, 0.0, 1.0)


def contrast(face: jax.Array, voice: jax.Array, clip: jax.Array, start: jax.Array) -> jax.Array:
    """Binary cross-entropy of the cosines of all pictures with all sounds of a batch [B, D] each.

    Right pairs weigh one half; of the wrong ones those of the same clip, which differ in time alone, as much as all
    others together.
    """
    cosine = jnp.clip(face @ voice.T, TINY, 1.0 - TINY)
    same_clip = clip[:, None] == clip[None]
    apart = jnp.abs(start[:, None] - start[None])
    close, far = same_clip & (apart > NEAR), ~same_clip
    right = -jnp.log(jnp.diagonal(cosine)).mean()
    wrong = -jnp.log(1.0 - cosine)

    def mean(where: jax.Array) -> jax.Array:
        return (wrong * where).sum() / jnp.maximum(where.sum(), 1)

    others = jnp.where(far.any(), 0.5 * (mean(close) + mean(far)), mean(close))
    return 0.5 * (right + others)


def ranking(face: jax.Array, voice: jax.Array, clip: jax.Array, start: jax.Array) -> jax.Array:
    """Cross-entropy of finding the right sound among a batch's for each picture, and the right picture for each sound.

    It asks for the cosines' order alone, `contrast` for their values too. Neighbours, neither right nor wrong, are left
    out.
    """
    count = face.shape[0]
    apart = jnp.abs(start[:, None] - start[None])
    neighbours = (clip[:, None] == clip[None]) & (apart <= NEAR) & ~jnp.eye(count, dtype=bool)
    logits = jnp.where(neighbours, -jnp.inf, face @ voice.T / TEMPERATURE)
    right = jnp.arange(count)
    losses = [optax.softmax_cross_entropy_with_integer_labels(rows, right).mean() for rows in (logits, logits.T)]
    return 0.5 * (losses[0] + losses[1])


def train(
    clips: Sequence[SyncClip],
    learned: Sequence[np.ndarray],
    rules: SyncRules,
    tell: Callable[[int, float], None] = lambda step, loss: None,
    begin: sync.Sync | None = None,
) -> sync.Sync:
    """An expert trained for `rules.steps` of the `batches`; `tell(step, loss)` hears of every step.

    It goes on from the expert `begin`, whose width it keeps, or starts anew.
    """
    if begin is None:
        model = sync.SyncExpert(rules.width, rngs=nnx.Rngs(rules.seed))
    else:
        model = nnx.merge(begin.graph, begin.state)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rules.rate, max(rules.steps // 10, 1), max(rules.steps, 2))
    optimizer = optax.adamw(schedule, weight_decay=rules.decay)
    opt = optimizer.init(params)

    def loss_of(params, rest, key, batch):
        model = nnx.merge(graph, params, rest, copy=True)
        face = model.see(augment(key, batch.crops), training=True)
        voice = model.hear(batch.mel, training=True)
        both = contrast(face, voice, batch.clip, batch.start) + ranking(face, voice, batch.clip, batch.start)
        return both, nnx.split(model, nnx.Param, ...)[2]

    @jax.jit
    def step(params, rest, opt, number, batch):
        key = jax.random.fold_in(jax.random.key(rules.seed), number)
        (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params, rest, key, batch)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), rest, opt, loss

    for number, batch in zip(range(rules.steps), batches(clips, learned, rules), strict=False):
        params, rest, opt, loss = step(params, rest, opt, number, batch)
        tell(number + 1, float(loss))
    return sync.create({name: np.asarray(leaf) for name, leaf in sync.flat(_plain(graph, params, rest)).items()})


def _plain(graph: nnx.GraphDef, params: nnx.State, rest: nnx.State) -> dict:
    return nnx.to_pure_dict(nnx.split(nnx.merge(graph, params, rest))[1])
