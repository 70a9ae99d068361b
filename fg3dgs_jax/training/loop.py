"""The one trainer: it runs whatever stages a config lists, from the first step or from the newest checkpoint."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fg3dgs_jax.data.audio_basis import AudioBasis, audio_basis
from fg3dgs_jax.data.dataset import Dataset, prefetch, snippet_starts
from fg3dgs_jax.data.sampling import FrameSampler
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model import cameras as camera_lib
from fg3dgs_jax.model import gaussians as pool_lib
from fg3dgs_jax.model.render import HeadSpec, RasterOptions, create_motions, motion_structure
from fg3dgs_jax.training import cameras, checkpoint, checks, judges, lips, optim, seeds, stages
from fg3dgs_jax.training.previews import Preview
from fg3dgs_jax.training.progress import Progress
from fg3dgs_jax.training.signals import Interrupt, Stopped
from fg3dgs_jax.training.state import PAIRS, TrainState
from fg3dgs_jax.training.step import Plan, make_densify, make_steps
from fg3dgs_jax.types import Gaussians, Label

STEPS = 8  # in one call, where nobody looks in between
SNIPPET_FPS = 25.0  # what lip-sync experts are trained on

log = logging.getLogger(__name__)
MARGIN = 20  # pixels, both sides together; SSIM's windows that touch an edge reach 10 beyond it
HEAD_VIEWS = 40  # frames that the size of the head's window is taken from


@dataclasses.dataclass(frozen=True)
class Run:
    """A config resolved against a dataset: everything that stays the same from the first step to the last."""

    config: ConfigDict
    dataset: Dataset
    workdir: Path
    spec: HeadSpec
    graphs: dict
    tasks: dict[str, stages.RegionTask]
    stages: tuple[stages.Stage, ...]
    judges: dict  # pretrained networks by name, on the device
    basis: AudioBasis | None  # what networks see of audio windows; None: all
    lips: lips.Lips | None  # where landmarks lead them; None: nowhere

    @property
    def total_steps(self) -> int:
        return self.stages[-1].stop


def _crops(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Rows and columns that hold the boxes of a kind in every frame with a margin, multiples of 8; "" the head.

    The head is looked up in some frames spread over the clip.
    """
    eyes = np.asarray(dataset.eye_boxes)
    both = np.stack([f(eyes[..., a], axis=1) for a, f in enumerate((np.min, np.max, np.min, np.max))], -1)
    ids = np.asarray(dataset.train_ids)
    views = np.unique(np.linspace(0, len(ids) - 1, HEAD_VIEWS).astype(int))
    heads = [_bounds(dataset.pictures(int(ids[i])).labels & Label.HEAD) for i in views]
    crops = {}
    for kind, boxes in {"": np.stack(heads), "lips": np.asarray(dataset.lips_box), "eyes": both}.items():
        edges = (boxes[:, 1] - boxes[:, 0]).max(), (boxes[:, 3] - boxes[:, 2]).max()
        if kind:
            edges = (max(edges),) * 2
        wanted = (int(np.ceil(max(1.1 * edge, edge + MARGIN) / 8.0)) * 8 for edge in edges)
        crops[kind] = tuple(min(a, b) for a, b in zip(wanted, (dataset.height, dataset.width), strict=True))
    return crops


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Row and column ends of what is set in a mask [H, W]; the whole image if nothing is."""
    rows, cols = np.nonzero(mask) if mask.any() else (np.array([0, n - 1]) for n in mask.shape)
    return rows.min(), rows.max() + 1, cols.min(), cols.max() + 1


def check(config: ConfigDict) -> None:
    """Refuses a config that no dataset could make run. Raises UserError."""
    checks.check(config)
    judges.load(config)


def prepare(config: ConfigDict, dataset: Dataset, workdir: Path) -> Run:
    """Checks a config against a dataset. Raises UserError before any work is done."""
    checks.check(config)
    found = stages.stages(config)
    spec = stages.head_spec(config, dataset.audio_features.shape[1:], dataset.expression.shape[1], dataset.extent)
    graphs, shapes = motion_structure(spec)
    tasks, networks = stages.tasks(config, _crops(dataset)), jax.device_put(judges.load(config))
    led = lips.find(dataset, tasks) if any("landmarks" in stage.weights for stage in found) else None
    basis = _basis(dataset, config.audio_components)
    run = Run(config, dataset, workdir, spec, graphs, tasks, found, networks, basis, led)
    for stage in found:
        _check_frames(dataset, stage)
        _sampler(run, stage)
    checks.check_pose(config, found)
    fields = {field.name: 0 for field in dataclasses.fields(Gaussians)}
    for path in optim.paths({name: {"gaussians": fields, "motion": shapes[name]} for name in config.layers}):
        optim.group_of(path, plan(run, found[0], None).rates.groups)
    return run


def _basis(dataset: Dataset, components: int) -> AudioBasis | None:
    """The components that networks see of audio windows, from training frames alone. Raises UserError."""
    try:
        return audio_basis(dataset.audio_features[dataset.train_ids], components) if components else None
    except ValueError as error:
        raise UserError(f"--config.audio_components={components}: {dataset.path} is too little ({error})") from None


def _check_frames(dataset: Dataset, stage: stages.Stage) -> None:
    """Raises UserError where a clip cannot give what a stage of consecutive frames needs."""
    if stage.frames == 1:
        return
    if abs(dataset.fps - SNIPPET_FPS) > 0.1:
        raise UserError(
            f"{dataset.path}: has {dataset.fps:g} frames a second and the lip-sync expert of stage {stage.name!r} "
            "needs 25; run preprocess with --fps 25, or leave --config.judges.sync empty"
        )
    if not len(snippet_starts(dataset.train_ids, stage.frames)):
        raise UserError(
            f"{dataset.path}: nowhere are {stage.frames} training frames in a row, as stage {stage.name!r} needs; "
            "use a longer clip, or leave --config.judges.sync empty"
        )


def plan(run: Run, stage: stages.Stage, max_pairs: int | None) -> Plan:
    """What `make_steps` needs for a stage; `max_pairs` None: as many as it takes."""
    groups = {name: optim.Group(**fields.to_dict()) for name, fields in run.config.groups.items()}
    deviation = float(np.std(run.dataset.audio_features))
    # Along each direction, of length 1 / deviation, noise is as strong as on each value.
    each = deviation if run.basis is None else 1.0 / float(np.linalg.norm(run.basis.directions[..., 0]))
    return Plan(
        spec=run.spec,
        graphs=run.graphs,
        tasks=run.tasks,
        stage=stage,
        rates=optim.Rates(groups, stage.rates, run.dataset.extent, run.config.sh_rest, stage.only),
        options=RasterOptions(run.config.rasterizer.backend, max_pairs, run.config.rasterizer.deterministic),
        audio_noise=run.config.audio_noise.each * each,
        audio_level=run.config.audio_noise.level * deviation,
        lips=run.lips if "landmarks" in stage.weights else None,
        camera_rule=_camera_rule(run, stage),
    )


def _camera_rule(run: Run, stage: stages.Stage) -> cameras.CameraRule | None:
    """How the stage's cameras learn, or None where they do not."""
    pose = run.config.pose
    if not pose.refine or stage.name not in pose.stages:
        return None
    measured = camera_lib.accelerations(run.dataset.viewmats, run.dataset.extent)
    return cameras.CameraRule(tuple(pose.rate), tuple(pose.focal_rate), pose.smooth, pose.near, measured)


def first_state(run: Run) -> TrainState:
    """Step 0: seeded Gaussians, fresh networks, zero moments."""
    _, motions = create_motions(run.spec, run.config.seed)
    params, pools = {}, {}
    for i, region in enumerate(run.spec.regions):
        fields = run.config.regions[region.name]
        points, colors = seeds.seed_points(run.dataset, run.tasks[region.name], fields.points, run.config.seed + i)
        if len(points) < 16:
            raise UserError(
                f"{run.dataset.path}: the masks of region {region.name!r} agree on no points; "
                "look at the dataset's contact sheet, its labels or poses are off."
            )
        gaussians, pools[region.name] = pool_lib.from_points(points, colors, fields.capacity, run.spec.sh_degree)
        params[region.name] = {"gaussians": gaussians, "motion": _hearing(motions[region.name], run.basis)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=optim.init(params),
        pools=pools,
        key=jax.random.key_data(jax.random.key(run.config.seed)),
        trouble=jnp.zeros((), jnp.int32),
        pairs_needed=jnp.zeros((), jnp.int32),
        cameras=cameras.init(run.dataset.num_frames) if run.config.pose.refine else None,
    )


def _hearing(motion: dict, basis: AudioBasis | None) -> dict:
    """A fresh motion network with its constants filled in."""
    if basis is None or "audio" not in motion:
        return motion
    constants = {name: jnp.asarray(value) for name, value in basis._asdict().items()}
    return {**motion, "audio": {**motion["audio"], "basis": constants}}


def info_of(run: Run) -> dict:
    """What a checkpoint says about itself: enough to rebuild the head without the config file."""
    return {
        "config": json.loads(run.config.to_json_best_effort()),
        "spec": dataclasses.asdict(run.spec),
        "dataset": run.dataset.fingerprint,
        "data": str(Path(run.dataset.path).resolve()),
    }


def train(run: Run, interrupt: Interrupt, track: Progress) -> TrainState:
    """Runs or continues the run to its end and returns the final state. Raises Stopped once saved on request."""
    state = first_state(run)
    restored = checkpoint.restore_latest(run.workdir, state, expect=info_of(run))
    if restored is not None:
        state = jax.tree.map(jnp.asarray, restored[0])
        log.info("continuing from step %d", int(state.step))
    preview = Preview(run.spec, run.graphs, run.dataset, run.workdir)
    max_pairs = run.config.rasterizer.max_pairs or None
    for stage in run.stages:
        while int(state.step) < stage.stop:
            state, max_pairs = _run_segment(run, stage, state, max_pairs, interrupt, track, preview)
    _save(run, state)
    return state


def _save(run: Run, state: TrainState) -> None:
    state = jax.device_get(state)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
        # A finite gradient under a broken learning rate; no later step could leave a checkpoint of this.
        raise _not_finite("parameters", int(state.step))
    checkpoint.save(run.workdir, int(state.step), state, info_of(run), keep=run.config.keep)


def _sampler(run: Run, stage: stages.Stage) -> FrameSampler:
    ids = run.dataset.train_ids
    if stage.frames > 1:
        ids = snippet_starts(ids, stage.frames)
    return FrameSampler(ids, run.config.seed, stage.curricula, run.dataset.metrics)


def _frames(run: Run, stage: stages.Stage, start: int) -> Iterable:
    return prefetch(run.dataset, _sampler(run, stage).frame_ids(start, stage.stop), length=stage.frames)


def _run_segment(run, stage, state, max_pairs, interrupt, track, preview) -> tuple[TrainState, int | None]:
    """Steps of one stage at one pair capacity: to the stage's end, or until the capacity must grow."""
    rules = plan(run, stage, max_pairs)
    steps_fn, densify_fn = make_steps(rules), make_densify(rules) if stage.densify else None
    done = int(state.step)
    frames = iter(_frames(run, stage, done))
    while done < stage.stop:
        count = next(k for k in range(1, STEPS + 1) if k == STEPS or _looks(run, stage, done + k))
        given = [next(frames) for _ in range(count)]
        state, metrics = steps_fn(state, jax.device_put(stacked(given)), count, run.judges)
        done += count
        densifying = _densifies(stage, done)
        saving = done % run.config.save_every == 0
        looking = done % run.config.log_every == 0 or done == stage.stop
        if looking or saving or densifying or interrupt.requested:
            trouble = int(state.trouble)
            if trouble == PAIRS:
                return _more_pairs(state, max_pairs)
            if trouble:
                raise _not_finite(rules.term_names[trouble - 1], int(state.step))
        if densifying:
            state, counts = densify_fn(state)
            metrics = {**metrics, **counts}
        if looking:
            alive = {f"alive/{name}": pool.alive.sum() for name, pool in state.pools.items()}
            track.update(done, stage.name, {k: float(v) for k, v in jax.device_get({**metrics, **alive}).items()})
        if done % run.config.preview_every == 0:
            preview.save(state, done, stage.moving)
        if interrupt.requested:
            _save(run, state)
            raise Stopped(f"saved at step {done} of {run.total_steps}; run the same command again to continue")
        if saving:
            _save(run, state)
    return state, max_pairs


def stacked(frames: list) -> Any:
    """So many frames that every call has the same shapes; the last one fills up."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *frames, *[frames[-1]] * (STEPS - len(frames)))


def _looks(run: Run, stage: stages.Stage, done: int) -> bool:
    """Whether anything but the next step is due after so many."""
    every = (run.config.save_every, run.config.log_every, run.config.preview_every)
    return done == stage.stop or any(done % n == 0 for n in every) or _densifies(stage, done)


def _densifies(stage: stages.Stage, done: int) -> bool:
    rule, local = stage.densify, done - stage.start
    return rule is not None and rule.start < local <= rule.stop and local % rule.every == 0


def _more_pairs(state: TrainState, max_pairs: int) -> tuple[TrainState, int]:
    """The step that overflowed changed nothing: it runs again with room for a quarter more than it needed."""
    grown = max(2 * max_pairs, 1 << int(1.25 * int(state.pairs_needed)).bit_length())
    log.warning(
        "step %d needs %d tile-Gaussian pairs and has room for %d: running it again with room for %d",
        int(state.step), int(state.pairs_needed), max_pairs, grown,
    )  # fmt: skip
    return state.replace(trouble=jnp.zeros((), jnp.int32)), grown


def _not_finite(term: str, step: int) -> UserError:
    return UserError(
        f"training stopped at step {step}: the term {term} is not finite; the last good checkpoint is kept, "
        "lower the learning rates (--config.stages.*.rates) or look for a damaged frame and run the same command again."
    )
