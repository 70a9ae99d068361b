"""The alignment stage (FG Eq. 16): what learns in it and what does not, and that without weights it is left out."""

import dataclasses
import importlib.util
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lpips import random_judge
from test_sync import random_expert

from fg3dgs_jax.data import synthetic, weights
from fg3dgs_jax.data.dataset import open_dataset, snippet_starts
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.losses import sync, terms
from fg3dgs_jax.training import judges, loop, optim, stages
from fg3dgs_jax.training.step import make_step, see_frame, see_snippet

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def config():
    spec = importlib.util.spec_from_file_location("tiny", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config()
    found.update(schedule_scale=1.0)
    for name, count in {"static": 2, "motion": 3, "fusion": 4, "alignment": 5}.items():
        found.stages[name].update(steps=count)
        found.stages[name].densify.every = 0
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small random weights in files, as the config names them."""
    folder = tmp_path_factory.mktemp("weights")
    judge, expert = random_judge("alex"), random_expert()
    arrays = {f"linear{i}": value for i, value in enumerate(judge.linears)}
    for i, (kernel, bias) in enumerate(judge.convs):
        arrays |= {f"conv{i}.kernel": kernel, f"conv{i}.bias": bias}
    weights.save(folder / "lpips.safetensors", "lpips", arrays, {"net": "alex"})
    weights.save(folder / "sync.safetensors", "sync-expert", sync.flat(expert.state), {})
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_patches():
    """LPIPS in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "PATCHES", 1)
        patch.setattr(terms, "PATCH_EDGE", 32)
        yield


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 40, 64)
    found = config()
    found.judges.update(lpips=str(files / "lpips.safetensors"), sync=str(files / "sync.safetensors"))
    return loop.prepare(found, open_dataset(path), path.parent / "run")


def test_without_weights_the_stage_is_left_out_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        found = stages.stages(config())
    assert [(stage.name, stage.steps) for stage in found] == [("static", 2), ("motion", 3), ("fusion", 9)]
    assert "stage alignment is left out: no lip-sync weights are given (--config.judges.sync)" in caplog.text
    assert "stage fusion does without frame_lpips" in caplog.text and "--config.judges.lpips" in caplog.text
    assert "frame_lpips" not in found[-1].weights


def test_with_weights_it_follows_fusion(run):
    assert [(stage.name, stage.steps) for stage in run.stages][2:] == [("fusion", 4), ("alignment", 5)]
    last = run.stages[-1]
    assert last.frames == 5 and last.weights["sync"] == 0.03 and last.weights["frame_lpips"] == 0.5


@pytest.mark.slow  # a minute of compiling networks and their gradients
def test_one_step_moves_the_networks_of_mouth_and_face_and_the_colours_and_nothing_else(run):
    """All four losses; each term's own gradient is finite, and not zero exactly where the stage lets it train."""
    stage = run.stages[-1]
    plan, state = loop.plan(run, stage, None), loop.first_state(run)
    # Networks start near zero motion; a little of it, so that every leaf takes part.
    key = jax.random.key(0)
    params = dict(state.params)
    for region in ("mouth", "face"):
        shaken = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(key, x.shape), params[region]["motion"])
        params[region] = {**params[region], "motion": shaken}
    state = state.replace(params=params, step=jnp.asarray(stage.start, jnp.int32))
    snippet = run.dataset.snippet(int(snippet_starts(run.dataset.train_ids, 5)[0]), 5)
    offsets = {name: jnp.zeros((pool.alive.shape[0], 2)) for name, pool in state.pools.items()}

    @jax.jit
    @jax.grad
    def gradient(params, weights):
        weighed = plan.replace(stage=dataclasses.replace(stage, weights=weights))
        return see_snippet(weighed, optim.freeze(params, plan.rates), offsets, state, snippet, run.judges)[0]

    before = jax.tree.map(np.array, state.params)
    moved_state, values = make_step(plan)(jax.tree.map(jnp.array, state), snippet, run.judges)
    values = {name: values[name] for name in plan.term_names[:-1]}
    assert set(values) == {"frame_l1", "frame_dssim", "frame_lpips", "sync"}
    for term in values:
        assert np.isfinite(float(values[term])) and float(values[term]) > 0
        one = {name: jnp.float32(name == term) for name in values}
        flat, _ = jax.tree_util.tree_flatten_with_path(gradient(params, one))
        sizes = {optim._name(path): float(jnp.abs(leaf).max()) for path, leaf in flat}
        assert all(np.isfinite(size) for size in sizes.values())
        learns = {name for name, size in sizes.items() if size > 0}
        ours = ("mouth/motion/", "face/motion/")  # the face's moves the lips
        allowed = {name for name in sizes if name.endswith("gaussians/sh") or name.startswith(ours)}
        assert learns <= allowed, term
        kernels = {f"{network}deform/layer0/kernel" for network in ours}
        assert {"face/gaussians/sh", "mouth/gaussians/sh", *kernels} <= learns, term
    assert int(moved_state.trouble) == 0
    pairs = zip(*(jax.tree_util.tree_flatten_with_path(p)[0] for p in (before, moved_state.params)), strict=True)
    moved = {optim._name(path) for (path, a), (_, b) in pairs if not np.array_equal(a, b)}
    assert (
        moved <= allowed
        and "face/gaussians/sh" in moved
        and all(any(n.startswith(f"{network}grid") for n in moved) for network in ours)
    )


@pytest.mark.slow  # a minute of compiling networks and their gradients
def test_a_window_is_the_mean_of_its_frames_and_the_term_of_all(run):
    plan, state = loop.plan(run, run.stages[-1], None), loop.first_state(run)
    snippet = run.dataset.snippet(int(snippet_starts(run.dataset.train_ids, 5)[0]), 5)
    offsets = {name: jnp.zeros((pool.alive.shape[0], 2)) for name, pool in state.pools.items()}
    loss, seen = jax.jit(lambda: see_snippet(plan, state.params, offsets, state, snippet, run.judges))()
    one = jax.jit(lambda frame: see_frame(plan, state.params, offsets, state, frame, run.judges))
    singles = [one(jax.tree.map(lambda x, i=i: x[i], snippet.frames)) for i in range(5)]
    pictures = jnp.stack([single[2] for single in singles])
    lips = sync.loss(run.judges["sync"], pictures, snippet.face_boxes, snippet.mel)
    # Two compilations of the same sums.
    np.testing.assert_allclose(loss, np.mean([s[0] for s in singles]) + 0.03 * lips, rtol=1e-4)
    np.testing.assert_allclose(seen.terms["sync"], lips, rtol=1e-3)


def test_clips_that_cannot_give_windows_are_refused(run, files, tmp_path):
    stage = run.stages[-1]

    class Clip:
        path, fps, train_ids = "clip", 30.0, np.arange(50)

    with pytest.raises(UserError, match="clip: has 30 frames a second"):
        loop._check_frames(Clip, stage)
    Clip.fps, Clip.train_ids = 25.0, np.arange(0, 50, 2)
    with pytest.raises(UserError, match="nowhere are 5 training frames in a row"):
        loop._check_frames(Clip, stage)
    assert snippet_starts(np.array([0, 1, 2, 3, 4, 5, 9, 10]), 5).tolist() == [0, 1]
    with pytest.raises(UserError, match=r"--config\.judges\.sync: .*lpips\.safetensors holds lpips weights"):
        judges.load_sync(str(files / "lpips.safetensors"), "--config.judges.sync")
    weights.save(tmp_path / "x.safetensors", "sync-expert", {"face.0.conv.kernel": np.zeros((7, 7, 15, 2))}, {})
    with pytest.raises(UserError, match=r"--config\.judges\.sync: .*x\.safetensors does not fit \(audio"):
        judges.load_sync(str(tmp_path / "x.safetensors"), "--config.judges.sync")
