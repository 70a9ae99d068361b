"""Every program of training and synthesis lowers for CUDA on a machine without one, and calls only what CUDA has."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rasterizer_scenes import cuda_targets, random_cotangents, random_scene
from test_lpips import random_judge
from test_sync import random_expert

from fg3dgs_jax import cli, native
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset, snippet_starts
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.model import bake, hashgrid, hashgrid_native
from fg3dgs_jax.rasterizer import ffi
from fg3dgs_jax.training import loop
from fg3dgs_jax.training.step import make_densify, make_step

CONFIGS = {
    "fg3dgs.py": ("static", "motion", "fusion", "alignment"),
    "talking_gaussian.py:released": ("static", "motion", "fusion"),
}
STEP = {"fg3dgs_rasterize_forward", "fg3dgs_rasterize_backward"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 40, 64)
    return open_dataset(path)


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """A config's run with small pools and judges of random weights, and the shapes of its state."""

    @functools.cache
    def run(name):
        config = cli.load_config(str(Path(__file__).parents[1] / "configs" / name))
        for region in config.regions.values():
            region.update(points=100, capacity=128)
        judges = {"lpips": random_judge("alex"), "sync": random_expert()}
        config.judges.sync = "present"  # the stages ask for the name only
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.judges, "load", lambda config: judges)
            config.judges.lpips = "present"
            found = loop.prepare(config, dataset, tmp_path_factory.mktemp("run"))
        return found, jax.eval_shape(lambda: loop.first_state(found))

    return run


def called(function, *shapes) -> set[str]:
    """The project's native calls in a jitted function's program for CUDA."""
    text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return set(re.findall(r"custom_call @(fg3dgs_\w+)", text))


@pytest.mark.parametrize(("config", "stage"), [(name, stage) for name in CONFIGS for stage in CONFIGS[name]])
def test_a_step_lowers(runs, config, stage):
    """Loss, gradients, optimizer and all; then the stage's densification."""
    run, state = runs(config)
    assert tuple(stage.name for stage in run.stages) == CONFIGS[config]
    plan = loop.plan(run, next(found for found in run.stages if found.name == stage), None)
    data = run.dataset
    seen = data.frame(int(data.train_ids[0]))
    if plan.stage.frames > 1:
        seen = data.snippet(int(snippet_starts(data.train_ids, plan.stage.frames)[0]), plan.stage.frames)
    found = called(make_step(plan), state, seen, run.judges)
    assert STEP <= found <= cuda_targets()
    if plan.stage.densify:
        assert called(make_densify(plan), state) <= cuda_targets()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("baked", [False, True])
def test_a_frame_lowers(runs, config, baked):
    """Sound to picture, over a picture and over one with holes; the same with a gain on the motion."""
    run, state = runs(config)
    regions = [region.name for region in run.spec.regions]
    alive = None if baked else {name: np.ones(128, bool) for name in regions}
    shapes = bake.structure(run.spec, dict.fromkeys(regions, 50)) if baked else {k: state.params[k] for k in regions}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    head, data = Head(run.spec, params, alive, run.dataset), run.dataset
    condition = clips.condition(data.audio_features, data.expression, 9)
    for channels in (3, 4):
        backdrop = np.zeros((data.height, data.width, channels), np.uint8)
        found = called(head._frame, params, alive, condition, data.viewmats[9], backdrop)
        assert "fg3dgs_rasterize_forward" in found and found <= cuda_targets()
    found = called(head._louder, params, alive, condition, condition.audio, np.float32(1.5), data.viewmats[9], backdrop)
    assert "fg3dgs_rasterize_forward" in found and found <= cuda_targets()


@pytest.mark.skipif(not native.has_cuda(), reason="built without CUDA kernels: build with FG3DGS_CUDA=1 and nvcc")
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_handlers_take_what_they_are_called_with(monkeypatch, deterministic):
    """Called on the CPU, each lacks its stream and nothing else: before a handler runs, XLA names every operand, result
    and attribute that does not fit it."""
    for name, platform, handler in native.binary().registrations():
        if platform == "CUDA":
            jax.ffi.register_ffi_target(f"{name}_as_on_cuda", handler, platform="cpu")
    plain = native.call
    monkeypatch.setattr(native, "call", lambda name, *args, **options: plain(f"{name}_as_on_cuda", *args, **options))
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *operands, cuda=None, default=None, **others: (cuda or default)(*operands)
    )
    spec = hashgrid.GridSpec(levels=2, min_resolution=4, max_resolution=8)
    tables, positions, weights = jnp.zeros((3, spec.starts[-1])), jnp.zeros((3, 9)), jnp.zeros((3, 2, 9))
    options, ticket = ffi.Options(70, 50, 0.01, 7, deterministic), jnp.zeros((), jnp.int32)
    for sh in (0, 4):
        operands = tuple(map(jnp.asarray, random_scene(5, sh=sh)))
        images = random_cotangents()
        for call in (
            lambda operands=operands: ffi.forward(operands, options),
            lambda operands=operands, images=images: ffi.backward(operands, options, images, images, ticket),
            lambda: hashgrid_native.encode(tables, positions, spec),
            lambda: hashgrid_native.backward_tables(positions, weights, spec),
            lambda: hashgrid_native.backward_positions(tables, positions, weights, spec),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"bad operands at: 0\)") as caught:
                jax.block_until_ready(jax.jit(call)())
            assert "stream" in str(caught.value)
