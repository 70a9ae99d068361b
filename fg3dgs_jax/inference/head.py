"""A trained head that renders: one frame, the held-out frames' way, or a whole speech."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data import expressions, hearing, speech_models
from fg3dgs_jax.data.clip import TOKENS
from fg3dgs_jax.data.clip import condition as condition_at
from fg3dgs_jax.data.clip import tokens as token_rows
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.data.legacy import LATE_FRAMES, as_released, read_array
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import baked, cameras, performance
from fg3dgs_jax.inference.control import Control
from fg3dgs_jax.inference.control import plan as plan_of
from fg3dgs_jax.inference.heldout import Render, Track, untracked
from fg3dgs_jax.model import bake as baking
from fg3dgs_jax.model import render as rendering
from fg3dgs_jax.model import talking_gaussian
from fg3dgs_jax.training import checkpoint

log = logging.getLogger(__name__)

MARGIN = TOKENS // 2  # frames that a condition reaches before and after its own
MEAN_FRAMES = 200  # training frames behind the mean deltas of a frozen head
REST_FRAMES = 16  # most closed, and most open, mouths among which the one for silence is found
LIVE_SECONDS = 3600.0  # of live sound that are planned ahead; what lasts longer goes through the plan again, backwards


class Head:
    """A head with its Gaussians and networks on the device, and the clip that its poses and backdrops come from."""

    def __init__(
        self,
        spec: rendering.HeadSpec,
        params: Mapping[str, Mapping],
        alive: Mapping[str, jax.Array],
        dataset: Dataset,
        run: dict | None = None,
        options: rendering.RasterOptions | None = None,
    ):
        """`params[region]` holds `gaussians` (types.Gaussians) and `motion` (nested dict), `alive[region]` bool [N].

        Of a baked head `params[region]` is a bake.BakedRegion, and `alive` is None. `run` says where the head came
        from, for reports.
        """
        self.spec, self.dataset, self.run = spec, dataset, dict(run or {})
        self.speech_model: str | None = None  # FOLDER[:logits], see `front_end`
        self.config: dict = {}  # of the training run, as far as it is known
        self._params, self._alive = jax.device_put((dict(params), alive if alive is None else dict(alive)))
        graphs, _ = rendering.motion_structure(spec)
        options = options or rendering.RasterOptions()
        intrinsics, width, height = dataset.intrinsics, dataset.width, dataset.height

        def posed(params, alive, deltas, viewmat, backdrop):
            camera = types.Camera(viewmat, jnp.asarray(intrinsics), width, height)
            if alive is None:
                return baking.draw(spec, params, deltas, camera, backdrop, options=options)
            return rendering.draw(spec, params, alive, deltas, camera, backdrop, options=options)

        def deltas(params, condition):
            if alive is None:
                return baking.move(spec, params, condition)
            return {
                name: rendering.move(graph, params[name]["motion"], params[name]["gaussians"].means, condition)[0]
                for name, graph in graphs.items()
            }

        def frame(params, alive, condition, viewmat, backdrop):
            return posed(params, alive, deltas(params, condition), viewmat, backdrop)

        def louder(params, alive, condition, silence, gain, viewmat, backdrop):
            still = deltas(params, condition.replace(audio=silence))
            moved = jax.tree.map(lambda a, b: a + gain * (b - a), still, deltas(params, condition))
            return posed(params, alive, moved, viewmat, backdrop)

        self._frame, self._posed, self._deltas, self._louder = map(jax.jit, (frame, posed, deltas, louder))

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        data: str | Path | None = None,
        options: rendering.RasterOptions | None = None,
        speech_model: str | None = None,
    ) -> "Head":
        """The head of a run's newest good checkpoint, with its dataset (or the folder `data` in its place).

        workdir may also be a baked head, either of its two files, which brings what speech needs of its dataset.
        speech_model: the front end of a head that was trained on a speech model's features, `FOLDER[:logits]`.
        Raises UserError: no checkpoint, no dataset, or a dataset whose inputs do not fit the head's networks.
        """
        if baked.is_baked(workdir):
            return cls._load_baked(Path(workdir), data, options, speech_model)
        state, info = checkpoint.load_for_inference(workdir)
        spec = baked.read_spec(info["spec"])
        dataset = _dataset(data or info["data"], info["config"], spec, workdir)
        if state.get("cameras"):
            dataset = cameras.corrected(dataset, state["cameras"], info["dataset"] == dataset.fingerprint)
        _, motions = rendering.motion_structure(spec)
        params = {
            name: {"gaussians": types.Gaussians(**region["gaussians"]), "motion": _motion(region, motions[name])}
            for name, region in state["params"].items()
        }
        alive = {name: pool["alive"] for name, pool in state["pools"].items()}
        run = {"workdir": str(workdir), "step": int(state["step"]), "data": str(dataset.path)}
        run["trained_on_this_data"] = info["dataset"] == dataset.fingerprint
        head = cls(spec, params, alive, dataset, run, options)
        head._came_with(info["config"], speech_model)
        return head

    @classmethod
    def _load_baked(
        cls, path: Path, data: str | Path | None, options: rendering.RasterOptions | None, speech_model: str | None
    ) -> "Head":
        spec, regions, clip, facts = baked.read(path)
        dataset = _dataset(data, facts["config"], spec, path) if data else Dataset(clip)
        if dataset.fingerprint == clip.fingerprint:  # its cameras may have been corrected
            dataset = cameras.with_cameras(dataset, clip.viewmats, clip.intrinsics)
        run = {**facts["run"], "baked": str(path), "data": str(dataset.path)}
        known = run.get("trained_on_this_data", False)  # heads that come from no run say nothing
        run["trained_on_this_data"] = known and clip.fingerprint == dataset.fingerprint
        head = cls(spec, regions, None, dataset, run, options)
        head.rest = facts["rest"]
        head._came_with(facts["config"], speech_model)
        return head

    def _came_with(self, config: Mapping, speech_model: str | None) -> None:
        """What a run's config says of the sound."""
        self.config = dict(config)
        chosen = config.get("audio_features")
        folder = chosen and speech_models.named(chosen)[0].is_dir()
        self.speech_model = speech_model or (chosen if folder else None)

    def bake(self) -> dict[str, baking.BakedRegion]:
        """What stays the same in all frames, computed once, as numpy arrays."""
        if self._alive is None:
            return jax.device_get(self._params)
        return baking.bake(self.spec, self._params, self._alive)

    def render(self, condition: types.Condition, viewmat: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
        """One frame on the host, u8, shaped as the backdrop u8 [H, W, 3] or RGBA [H, W, 4]; viewmat f32 [4, 4]."""
        return np.asarray(self._frame(self._params, self._alive, condition, viewmat, backdrop))

    def refine_poses(self, ids: Sequence[int] | np.ndarray, track: Track = untracked) -> tuple[Dataset, np.ndarray]:
        """The dataset with the poses of frames `ids` fitted to their pictures, the mouth left out: `cameras.refine`."""
        if self._alive is None:
            raise UserError("poses cannot be fitted by a baked head; give the folder of the run it was baked from")
        return cameras.refine(self.spec, self._params, self._alive, self.dataset, ids, track=track)

    def frozen(self, ids: Sequence[int] | None = None) -> Render:
        """A renderer whose head keeps the mean deltas of frames `ids` (default: up to 200 training frames)."""
        if ids is None:
            train = self.dataset.train_ids
            ids = train[np.unique(np.linspace(0, len(train) - 1, MEAN_FRAMES).astype(int))]
        total = None
        for index in ids:
            given = condition_at(self.dataset.audio_features, self.dataset.expression, int(index))
            deltas = self._deltas(self._params, given)
            total = deltas if total is None else jax.tree.map(jnp.add, total, deltas)
        mean = jax.tree.map(lambda x: x / len(ids), total)

        def render(condition: types.Condition, viewmat: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
            return np.asarray(self._posed(self._params, self._alive, mean, viewmat, backdrop))

        return render

    @functools.cached_property
    def rest(self) -> np.ndarray:
        """The audio windows f32 [8, A, D] that close the mouth best: those around a frame of the clip.

        Of the clip's most closed mouths the one whose sound moves this head furthest away from its widest open ones.
        Silence itself is no such sound: people listen, and breathe, with parted lips.
        """
        dataset = self.dataset
        order = dataset.train_ids[np.argsort(dataset.mouth_open[dataset.train_ids], kind="stable")]
        still = np.median(dataset.expression, axis=0, keepdims=True).astype(np.float32).repeat(TOKENS, 0)

        def moved(index: int) -> np.ndarray:
            given = types.Condition(token_rows(dataset.audio_features, int(index)), still)
            return np.concatenate([np.ravel(part.means) for part in self._deltas(self._params, given).values()])

        shut = np.stack([moved(index) for index in order[:REST_FRAMES]])
        wide = np.mean([moved(index) for index in order[-REST_FRAMES:]], axis=0)
        best = order[int(np.argmax(shut @ (shut.mean(0) - wide)))]
        return token_rows(dataset.audio_features, int(best))

    def hear(self, sound: np.ndarray | Iterable[np.ndarray], gate: float | None = hearing.GATE) -> hearing.Hearing:
        """Hears sound f32 [n] at 16 kHz, or pieces of it as they come, by the front end the head was trained on.

        Four frames of silence are heard before and after: networks know silence from pauses, and zero padding only
        from a handful of frames at the clip's ends. Raises UserError if that front end is not here.
        """
        return hearing.Hearing(sound, self.front_end, self.dataset.fps, gate)

    @functools.cached_property
    def front_end(self) -> hearing.FrontEnd:
        """What hears as the head was trained to. Raises UserError: it is not here, or hears in other shapes."""
        name, model = self.dataset.audio_name, self.speech_model
        if name in speech_models.BUILT_IN:
            if model is not None:
                raise UserError(f"--speech-model {model}: the head was trained on {name}; leave it out")
            return speech_models.front_end(name)
        if model is None:
            raise UserError(
                f"the head was trained on {name!r} features: give the folder of that model with --speech-model, or "
                "this sound's features with --features FILE.npy"
            )
        front = speech_models.front_end(model)
        if "@" in name and front.name != name:
            raise UserError(f"--speech-model {model}: is {front.name}, the head was trained on {name}; give that one")
        heard = front.encode(np.zeros(sum(front.live) * audio_io.HOP, np.float32))
        self.fitting(np.zeros((1, front.context, heard.shape[1])), f"--speech-model {model}")
        return front

    def listen(self, sound: np.ndarray) -> np.ndarray:
        """All audio windows f32 [L + 8, A, D] of a sound (`hear`), L frames that cover it, four before and after."""
        return self.fitting(np.stack([heard.window for heard in self.hear(sound)]), self.dataset.audio_name)

    def read_windows(self, path: str | Path, frames: int) -> np.ndarray:
        """Audio windows f32 [frames + 8, A, D] as `listen` returns them, from a file of features f32 [L, A, D]."""
        windows = self.fitting(read_array(Path(path)), str(path))
        if not 0 <= len(windows) - frames + LATE_FRAMES <= 2 * LATE_FRAMES:
            raise UserError(
                f"{path}: holds {len(windows)} windows and the sound lasts {frames} frames; extract it again"
            )
        windows = windows[np.minimum(np.arange(frames), len(windows) - 1)]
        return np.pad(windows, ((MARGIN, MARGIN), (0, 0), (0, 0)))  # as training pads the clip's ends

    def own_windows(self) -> np.ndarray:
        """The training clip's own audio windows, f32 [T + 8, A, D], as `listen` returns them: whatever their kind."""
        return np.pad(self.dataset.audio_features, ((MARGIN, MARGIN), (0, 0), (0, 0)))

    def fitting(self, windows: np.ndarray, name: str) -> np.ndarray:
        """The windows [L, A, D] themselves if the head's networks can take them, else UserError."""
        if windows.shape[1:] != self.spec.audio_shape:
            raise UserError(
                f"{name}: its audio features have shape {windows.shape[1:]} a frame and the head was trained on "
                f"{self.spec.audio_shape}; give features of the kind it was trained on"
            )
        return windows

    def speak(
        self,
        sound: str | Path | np.ndarray | Iterable[np.ndarray] | performance.Ear,
        control: Control | None = None,
        *,
        fps: float | None = None,
        background: np.ndarray | None = None,
        alpha: bool = False,
    ) -> Iterator[np.ndarray]:
        """Frames u8 [H, W, 3] of the head saying `sound`, each as soon as the sound that it needs is there.

        Args:
          sound: an audio file, samples f32 [n] at 16 kHz, pieces of them as they come (any iterator: a microphone, a
            synthesizer), windows f32 [L + 8, A, D], or what `hear` returned.
          control: pose, expression and the rest; by default the head follows the clip.
          fps: of the frames; default the clip's. Between the clip's frames everything is interpolated.
          background: u8 [H, W, 3] in place of the clip's.
          alpha: frames u8 [H, W, 4] without background, straight alpha.

        Everything but the sound is checked, and planned, before this returns. Raises UserError.
        """
        shown = self.perform(sound, control, fps=fps, background=background, alpha=alpha)
        return (frame.picture for frame in shown)

    def gaussians(self, regions: Sequence[str] | None = None, deltas: Mapping | None = None) -> types.Gaussians:
        """The living Gaussians of some regions (default all), as they were learnt or moved by `deltas`; on the host."""
        parts = []
        for name in regions or [region.name for region in self.spec.regions]:
            if self._alive is None:
                alive, still = slice(None), baking.raw_gaussians(self._params[name])
            else:
                alive, still = np.asarray(self._alive[name]), self._params[name]["gaussians"]
            parts.append(jax.tree.map(lambda x, a=alive: np.asarray(x)[a], moved(still, deltas and deltas[name])))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def pose_gaussians(self, sound: np.ndarray) -> Iterator[tuple[Callable, np.ndarray]]:
        """Per frame of a sound f32 [n] at 16 kHz: regions -> its moved Gaussians, and the camera f32 [4, 4]."""

        def keep(condition: types.Condition, viewmat: np.ndarray, _backdrop: np.ndarray) -> tuple:
            return condition, viewmat

        ear = self.hear(sound)
        plan = plan_of(self.dataset, Control(), ear.frames(self.dataset.fps))
        shown = performance.play(keep, self.dataset, ear, plan, self.rest, self.dataset.torso, self.dataset.fps)
        for frame in shown:
            condition, viewmat = frame.picture
            yield functools.partial(self._moved, condition), viewmat

    def _moved(self, condition: types.Condition, regions: Sequence[str] | None = None) -> types.Gaussians:
        return self.gaussians(regions, self._deltas(self._params, condition))

    def perform(
        self, sound, control: Control | None = None, *, fps: float | None = None, background: np.ndarray | None = None,
        alpha: bool = False,
    ) -> Iterator[performance.Shown]:  # fmt: skip
        """As `speak`, with what lies behind each frame."""
        dataset, control = self.dataset, control or Control()
        ear = self._ear(sound, control.gate)
        live = isinstance(ear, hearing.Hearing) and ear.live
        length = int(LIVE_SECONDS * dataset.fps) if live else ear.frames(dataset.fps)
        plan = plan_of(dataset, control, length)
        for note in plan.notes:
            log.warning("%s", note)
        unused = control.gate is None and control.gain == 1.0
        rest = np.zeros((TOKENS, *self.spec.audio_shape), np.float32) if unused else self.rest

        def draw(condition: types.Condition, viewmat: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
            if control.gain == 1.0:
                return self.render(condition, viewmat, backdrop)
            given = (self._params, self._alive, condition, rest, np.float32(control.gain), viewmat, backdrop)
            return np.asarray(self._louder(*given))

        behind = performance.backdrops(dataset, background, alpha)
        return performance.play(draw, dataset, ear, plan, rest, behind, fps or dataset.fps, live=live)

    def _ear(self, sound, gate: float | None) -> performance.Ear:
        if isinstance(sound, str | Path):
            sound = audio_io.load_audio(sound, whole=True)
        if isinstance(sound, np.ndarray) and sound.ndim == 3:
            return performance.Given(self.fitting(sound, "sound"), self.dataset.fps)
        return sound if hasattr(sound, "frames") else self.hear(sound, gate)


def moved(gaussians: types.Gaussians, deltas: types.Deltas | None) -> types.Gaussians:
    """Raw Gaussians with one frame's motion put into them."""
    if deltas is None:
        return gaussians
    changes = {
        "means": deltas.means, "quats": deltas.quats, "log_scales": deltas.log_scales,
        "logit_opacities": deltas.opacities, "sh": None if deltas.colors is None else deltas.colors[:, None]
        * (np.arange(gaussians.sh.shape[1]) == 0)[:, None],
    }  # fmt: skip
    return gaussians.replace(
        **{name: getattr(gaussians, name) + change for name, change in changes.items() if change is not None}
    )


def _dataset(path: str | Path, config: Mapping, spec: rendering.HeadSpec, head: str | Path) -> Dataset:
    """A dataset whose inputs fit a head's networks. Raises UserError."""
    dataset = open_dataset(path, config.get("audio_features"))
    if config.get("action_units") == "raw":  # a converted head
        dataset = Dataset(as_released(dataset.clip, talking_gaussian.UNITS))
    dataset = Dataset(expressions.prepared(dataset.clip, **config.get("expression") or {}))
    given = (dataset.audio_features.shape[1:], dataset.expression.shape[1])
    if given != (spec.audio_shape, spec.expression_dim):
        raise UserError(
            f"{dataset.path}: has audio windows {given[0]} and {given[1]} expression values, the head in {head} "
            f"was trained on {spec.audio_shape} and {spec.expression_dim}; give the dataset it was trained on"
        )
    return dataset


def _motion(region: Mapping, like: Mapping) -> dict:
    """A region's network parameters in the structure of `like`: a checkpoint's nested names are all strings."""

    def stored(path: tuple, _leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        node = region["motion"]
        for name in jax.tree_util.keystr(path, simple=True, separator="/").split("/"):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(stored, like)
