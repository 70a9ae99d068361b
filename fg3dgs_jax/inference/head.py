"""A trained head that renders: one frame, the held-out frames' way, or a whole speech."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fg3dgs_jax import types
from fg3dgs_jax.data import audio as audio_io
from fg3dgs_jax.data.clip import TOKENS
from fg3dgs_jax.data.clip import condition as condition_at
from fg3dgs_jax.data.dataset import Dataset, open_dataset
from fg3dgs_jax.data.legacy import LATE_FRAMES, read_array
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import paths
from fg3dgs_jax.inference.heldout import Render
from fg3dgs_jax.model import render as rendering
from fg3dgs_jax.model.hashgrid import GridSpec
from fg3dgs_jax.training import checkpoint

MARGIN = TOKENS // 2  # frames that a condition reaches before and after its own
MEAN_FRAMES = 200  # training frames behind the mean deltas of a frozen head


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

        `run` says where the head came from, for reports.
        """
        self.spec, self.dataset, self.run = spec, dataset, dict(run or {})
        self._params, self._alive = jax.device_put((dict(params), dict(alive)))
        graphs, _ = rendering.motion_structure(spec)
        options = options or rendering.RasterOptions()
        intrinsics, width, height = dataset.intrinsics, dataset.width, dataset.height

        def camera(viewmat: jax.Array) -> types.Camera:
            return types.Camera(viewmat, jnp.asarray(intrinsics), width, height)

        def frame(params, alive, condition, viewmat, backdrop):
            return rendering.render_frame(
                spec, graphs, params, alive, condition, camera(viewmat), backdrop, options=options
            )

        def posed(params, alive, deltas, viewmat, backdrop):
            return rendering.draw(spec, params, alive, deltas, camera(viewmat), backdrop, options=options)

        def deltas(params, condition):
            return {
                name: rendering.move(graph, params[name]["motion"], params[name]["gaussians"].means, condition)[0]
                for name, graph in graphs.items()
            }

        self._frame, self._posed, self._deltas = jax.jit(frame), jax.jit(posed), jax.jit(deltas)

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        data: str | Path | None = None,
        options: rendering.RasterOptions | None = None,
    ) -> "Head":
        """The head of a run's newest good checkpoint, with its dataset (or the folder `data` in its place).

        Raises UserError: no checkpoint, no dataset, or a dataset whose inputs do not fit the head's networks.
        """
        state, info = checkpoint.load_for_inference(workdir)
        spec = _spec(info["spec"])
        dataset = open_dataset(data or info["data"], info["config"].get("audio_features"))
        given = (dataset.audio_features.shape[1:], dataset.expression.shape[1])
        if given != (spec.audio_shape, spec.expression_dim):
            raise UserError(
                f"{dataset.path}: has audio windows {given[0]} and {given[1]} expression values, the head in {workdir} "
                f"was trained on {spec.audio_shape} and {spec.expression_dim}; give the dataset it was trained on"
            )
        _, motions = rendering.motion_structure(spec)
        params = {
            name: {"gaussians": types.Gaussians(**region["gaussians"]), "motion": _motion(region, motions[name])}
            for name, region in state["params"].items()
        }
        alive = {name: pool["alive"] for name, pool in state["pools"].items()}
        run = {"workdir": str(workdir), "step": int(state["step"]), "data": str(dataset.path)}
        run["trained_on_this_data"] = info["dataset"] == dataset.fingerprint
        return cls(spec, params, alive, dataset, run, options)

    def render(self, condition: types.Condition, viewmat: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
        """One frame on the host, u8 [H, W, 3]: viewmat f32 [4, 4], backdrop u8 [H, W, 3] of the dataset's size."""
        return np.asarray(self._frame(self._params, self._alive, condition, viewmat, backdrop))

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

    def listen(self, audio: np.ndarray) -> np.ndarray:
        """Audio windows f32 [L + 8, A, D] of sound f32 [n] at 16 kHz, by the front end that the head was trained on.

        L is the number of video frames that the sound lasts, rounded up. Four frames of silence are heard before and
        after: networks know silence from pauses, and zero padding only from a handful of frames at the clip's ends.
        Raises UserError if that front end needs something that is not here.
        """
        name, rate, margin = self.dataset.audio_name, audio_io.SAMPLE_RATE, MARGIN / self.dataset.fps
        length = round(audio_io.num_frames(audio, self.dataset.fps) / self.dataset.fps * rate)
        silence = round(margin * rate)
        padded = np.pad(audio, (silence, length - len(audio) + silence))
        try:
            windows = audio_io.features(name, padded, self.dataset.fps).values
        except UserError as error:
            raise UserError(
                f"the head was trained on {name!r} features, which are only read from files: give this sound's with "
                "--features FILE.npy, or train with --config.audio_features=logmel"
            ) from error
        return self.fitting(windows, name)

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

    def speak(self, windows: np.ndarray, start: int = 0) -> Iterator[np.ndarray]:
        """Frames u8 [H, W, 3], L of them, to audio windows f32 [L + 8, A, D] with four before and after (`listen`).

        Pose, expression and backdrop follow the clip from frame `start` on, back and forth (`paths.ping_pong`).
        """
        dataset, length = self.dataset, len(windows) - 2 * MARGIN
        ahead = paths.ping_pong(dataset.num_frames, length + MARGIN, start)
        before = np.minimum(np.abs(np.arange(start - MARGIN, start)), dataset.num_frames - 1)
        expression = paths.track_at(dataset.expression, np.concatenate([before, ahead]))
        viewmats = paths.viewmats_at(dataset.viewmats, ahead[:length])
        sources = paths.nearest(dataset.frame_ids, ahead[:length]).tolist()
        with ThreadPoolExecutor(1) as pool:  # the next backdrop is decoded while this frame renders
            waiting = pool.submit(dataset.pictures, sources[0])
            for i in range(length):
                backdrop = waiting.result().backdrop
                if i + 1 < length:
                    waiting = pool.submit(dataset.pictures, sources[i + 1])
                yield self.render(condition_at(windows, expression, i + MARGIN), viewmats[i], backdrop)


def _spec(stored: dict) -> rendering.HeadSpec:
    """A HeadSpec from `dataclasses.asdict` of one that has been through JSON."""
    regions = tuple(
        rendering.RegionSpec(**{**region, "grid": GridSpec(**region["grid"])}) for region in stored["regions"]
    )
    return rendering.HeadSpec(**{**stored, "regions": regions, "audio_shape": tuple(stored["audio_shape"])})


def _motion(region: Mapping, like: Mapping) -> dict:
    """A region's network parameters in the structure of `like`: a checkpoint's nested names are all strings."""

    def stored(path: tuple, _leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        node = region["motion"]
        for name in jax.tree_util.keystr(path, simple=True, separator="/").split("/"):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(stored, like)
