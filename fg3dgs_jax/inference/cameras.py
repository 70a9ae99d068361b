"""Cameras that training corrected, and poses of held-out frames found by the head itself.

A measured pose is off by a pixel or so, which costs a sharp head more than a blurred one. Training corrects the frames
it sees; a held-out frame gets what its landmarks outside the mouth, and how the head moves, tell of them. To tell
errors of the pose from errors of the head, its pose may be refined as well: on pixels outside the mouth only, so that
nothing is learned of its lips, and not on hanging hair.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fg3dgs_jax import types
from fg3dgs_jax.data.clip import MOUTH_POINTS
from fg3dgs_jax.data.clip import condition as condition_at
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.inference.heldout import Track, untracked
from fg3dgs_jax.model import cameras
from fg3dgs_jax.model import render as rendering

STEPS = 40  # of the refinement of one frame
RATE, END = 3e-3, 0.06  # radians and head radii of the first step; the last is this share of it
PIXELS = 0.25  # or so many pixels, where pictures are small
DECAYS = (0.8, 0.95)  # of Adam's moments: few steps
SHAPE_FRAMES = 500  # that the rigid face is found from
MOUTH_MARGIN = 0.1  # of the lips' box, left out around it


def corrected(dataset: Dataset, stored: Mapping[str, np.ndarray], own: bool = True) -> Dataset:
    """The dataset seen through the cameras of a checkpoint's `training.cameras.Cameras`; see there.

    Frames that training did not see get what their landmarks and their motion tell of the measured pose's error, as
    these told of it in the frames it did see, and what the nearest ones' corrections add to that.
    own: whether it is the dataset that was trained on; of another one only the focal length is corrected.
    """
    log_focal, known = stored["focal"][0], np.asarray(stored["visits"]) > 0
    plain = np.zeros((dataset.num_frames, cameras.SIZE), np.float32)
    if not own:
        return _moved(dataset, plain, log_focal)
    twists = np.asarray(stored["twists"])
    if known.any() and not known.all():
        signs = _signs(_moved(dataset, twists, log_focal), _moved(dataset, plain, log_focal), np.flatnonzero(known))
        twists = cameras.filled(twists, known, cameras.foretold(twists, known, signs))
    return _moved(dataset, twists, log_focal)


def _moved(dataset: Dataset, twists: np.ndarray, log_focal: np.ndarray) -> Dataset:
    move = jax.jit(cameras.corrected, static_argnums=4)
    viewmats, intrinsics = move(dataset.viewmats, dataset.intrinsics, twists, log_focal, float(dataset.extent))
    return with_cameras(dataset, np.asarray(viewmats), np.asarray(intrinsics))


def _signs(seen: Dataset, measured: Dataset, ids: np.ndarray) -> np.ndarray:
    """What tells of a measured pose's error, [T, 2 K + 6].

    How far landmarks outside the mouth lie, in pixels, from where the measured cameras see a rigid face: the points
    nearest to the landmarks' rays through frames `ids` of the dataset whose cameras were corrected. And how the head
    moves: a tracker that lags, or that smooths, is off by some of it.
    """
    landmarks = np.asarray(measured.landmarks, np.float64)[:, : MOUTH_POINTS.start]
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), SHAPE_FRAMES)).astype(int))]
    face = [cameras.triangulate(marks, seen.viewmats[ids], seen.intrinsics) for marks in landmarks[ids].swapaxes(0, 1)]
    misses = landmarks - cameras.project(np.array(face), measured.viewmats, measured.intrinsics)
    motion = cameras.velocities(measured.viewmats, float(measured.extent))
    return np.concatenate([misses.reshape(len(misses), -1), motion], 1)


def with_cameras(dataset: Dataset, viewmats: np.ndarray, intrinsics: np.ndarray | None = None) -> Dataset:
    """The same clip with other cameras: viewmats f32 [T, 4, 4], intrinsics f32 [4]."""
    intrinsics = dataset.intrinsics if intrinsics is None else intrinsics
    return Dataset(dataclasses.replace(dataset.clip, viewmats=viewmats, intrinsics=intrinsics))


def refine(
    spec: rendering.HeadSpec,
    params: Mapping[str, Mapping],
    alive: Mapping[str, jax.Array],
    dataset: Dataset,
    ids: Sequence[int] | np.ndarray,
    *,
    steps: int = STEPS,
    track: Track = untracked,
) -> tuple[Dataset, np.ndarray]:
    """The dataset with the poses of frames `ids` moved to where the head fits their pictures best.

    Looked at are all pixels outside the lips' box but hair below the eyes, by mean absolute error. Params and alive as
    in `render.render_frame`. Returns also the twists f32 [n, 6] that were found (`model.cameras`).
    """
    graphs, _ = rendering.motion_structure(spec)
    depth = float(np.median(np.asarray(dataset.viewmats)[:, 2, 3]))
    rate = max(RATE, PIXELS * depth / float(dataset.intrinsics[0] * dataset.extent))
    fit = jax.jit(functools.partial(_fit, spec, graphs, float(dataset.extent), steps, rate))
    viewmats, twists = np.array(dataset.viewmats), []
    for index in track(list(map(int, ids)), "poses"):
        frame = dataset.frame(index)
        weight = _steady(frame)
        given = condition_at(dataset.audio_features, dataset.expression, index)
        viewmat, twist = fit(params, alive, frame.replace(condition=given), weight)
        viewmats[index] = viewmat
        twists.append(np.asarray(twist))
    return with_cameras(dataset, viewmats), np.stack(twists)


def _steady(frame: types.Frame) -> np.ndarray:
    """What moves as the head does, f32 [H, W]: 0 in the lips' box with a margin and on hair below the eyes, else 1.

    Hair that hangs stays where it is when the head turns; fitted with it, eyes and mouth lie beside themselves.
    """
    row0, row1, col0, col1 = (int(edge) for edge in frame.lips_box)
    margin = round(MOUTH_MARGIN * (row1 - row0))
    weight = np.ones(frame.labels.shape, np.float32)
    weight[max(row0 - margin, 0) : row1 + margin, max(col0 - margin, 0) : col1 + margin] = 0.0
    eyes = int(np.asarray(frame.eye_boxes)[:, 1].max())
    weight[eyes:][(np.asarray(frame.labels)[eyes:] & types.Label.HAIR) > 0] = 0.0
    return weight


def _fit(spec, graphs, extent: float, steps: int, rate: float, params, alive, frame: types.Frame, weight: jax.Array):
    """The viewmat f32 [4, 4] and the twist [6] of the least error among `steps` steps of Adam from the given pose."""
    target, backdrop = (jnp.asarray(image, jnp.float32) / 255.0 for image in (frame.image, frame.backdrop))
    deltas = {
        name: rendering.move(graph, params[name]["motion"], params[name]["gaussians"].means, frame.condition)[0]
        for name, graph in graphs.items()
    }
    height, width = weight.shape

    def place(twist):
        return cameras.corrected(
            jnp.asarray(frame.viewmat), jnp.asarray(frame.intrinsics), twist, jnp.zeros(()), extent
        )

    def error(twist):
        camera = types.Camera(*place(twist), width, height)
        layers = [
            rendering.render_region(params[r.name]["gaussians"], alive[r.name], deltas[r.name], camera)
            for r in spec.regions
        ]
        missed = jnp.abs(rendering.composite(layers, backdrop) - target).mean(-1)
        return (missed * weight).sum() / weight.sum()

    adam = optax.adam(optax.exponential_decay(rate, steps, END), *DECAYS, eps=1e-12)

    def step(carry, _):
        twist, state, best = carry
        value, slope = jax.value_and_grad(error)(twist)
        best = jax.tree.map(lambda new, old: jnp.where(value < best[0], new, old), (value, twist), best)
        change, state = adam.update(slope, state)
        return (twist + change, state, best), None

    start = jnp.zeros(cameras.SIZE)
    (_, _, (_, twist)), _ = jax.lax.scan(step, (start, adam.init(start), (jnp.inf, start)), None, length=steps)
    return place(twist)[0], twist
