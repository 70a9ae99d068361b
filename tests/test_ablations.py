"""Each row of the ablation tables changes what it claims and nothing else; the benchmark that trains them adds up."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fg3dgs_jax import cli
from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference.head import moved
from fg3dgs_jax.losses import terms
from fg3dgs_jax.model import deltas as delta_lib
from fg3dgs_jax.model import gaussians as pool_lib
from fg3dgs_jax.model import motion
from fg3dgs_jax.model.hashgrid import GridSpec
from fg3dgs_jax.training import checkpoint, loop
from fg3dgs_jax.training.step import make_step
from fg3dgs_jax.types import Condition, Deltas, Label

ROOT = Path(__file__).parents[1]
GRID = GridSpec(levels=2, min_resolution=4, max_resolution=8, log2_table=8, bound=0.15)


def load(name):
    return cli.load_config(f"{ROOT}/configs/ablations.py:{name}")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("ablations_benchmark", ROOT / "benchmarks" / "ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "data"
    synthetic.make(path, 25, 64)
    return open_dataset(path)


def differences(a, b, name=""):
    """Dotted names of the fields in which two configs differ."""
    left, right = (dict(cli.field_names(config)) for config in (a, b))
    return {key for key in left.keys() | right.keys() if left.get(key, "absent") != right.get(key, "absent")}


@pytest.mark.parametrize(
    ("name", "base", "changes"),
    [
        ("tg_no_sampling", "tg", ("stages.static.curricula", "stages.motion.curricula")),
        ("tg_deformation_whole", "tg_no_sampling", ("layers", "regions.face.exclude")),
        (
            "tg_appearance",
            "tg_no_sampling",
            ("regions.face.predicts", "regions.mouth.predicts", "stages.motion.weights"),
        ),
        ("tg_appearance_whole", "tg_deformation_whole", ("regions.face.predicts", "stages.motion.weights")),
        ("tg_alpha", "tg", ("regions.face.predicts", "regions.mouth.predicts", "stages.motion.weights")),
        ("tg_alpha_rgb", "tg_alpha", ("regions.face.predicts", "regions.mouth.predicts")),
        ("tg_no_landmarks", "tg", ("stages.motion.weights",)),
        ("fg_no_landmarks", "fg", ("stages.motion.weights",)),
        ("fg_no_fad", "fg", ("layers", "regions.face.exclude")),
        ("fg_no_fam", "fg", ("regions.mouth.motion", "regions.eyes.motion")),
        ("fg_no_hrpa", "fg", ("schedule", "stages.fusion.steps")),
        (
            "fg_lips_in_mouth",
            "fg",
            ("regions.face.exclude", "regions.mouth.include", "stages.alignment.only"),
        ),
        ("fg_high_all", "fg", ("regions.mouth.predicts", "regions.eyes.predicts")),
        (
            "fg_relocation",
            "fg",
            tuple(f"stages.{s}.{f}" for s in ("static", "motion") for f in ("densify.kind", "weights")),
        ),
    ],
)
def test_a_row_changes_these_fields_alone(name, base, changes):
    found = differences(load(name), load(base))
    assert found and all(any(field.startswith(change) for change in changes) for field in found), found
    assert all(any(field.startswith(change) for field in found) for change in changes), found


def test_the_full_rows_are_the_papers_configs():
    for name, file in (("tg", "talking_gaussian"), ("fg", "fg3dgs")):
        assert not differences(load(name), cli.load_config(f"{ROOT}/configs/{file}.py"))
    with pytest.raises(UserError, match="no ablation 'nothing'"):
        load("nothing")


def prepared(name, dataset, workdir):
    config = load(name)
    for region in config.regions.values():
        region.update(points=60, capacity=128)
        region.grid.update(levels=2, min_resolution=8, max_resolution=16, log2_table=10)
    return loop.prepare(config, dataset, workdir)


def test_regions_see_the_pixels_they_should(dataset, tmp_path):
    whole = prepared("tg_deformation_whole", dataset, tmp_path)
    assert not whole.tasks["face"].exclude and whole.tasks["face"].include == Label.HEAD
    no_fad = prepared("fg_no_fad", dataset, tmp_path)
    assert list(no_fad.tasks) == ["face", "mouth"] and not no_fad.tasks["face"].exclude & Label.EYES
    assert prepared("fg", dataset, tmp_path).tasks["face"].exclude & Label.EYES
    for name, steps in (("fg_no_hrpa", 10_000), ("fg", 10_000)):  # without sync weights they are the same
        assert prepared(name, dataset, tmp_path).stages[-1].steps == steps


def two_steps(name, dataset, workdir):
    """The motion stage of a row, two steps of it: state before and after."""
    run = prepared(name, dataset, workdir)
    state = loop.first_state(run)
    before = jax.tree.map(np.array, state.params)
    step = make_step(loop.plan(run, run.stages[1], None))
    for index in dataset.train_ids[:2]:
        state, metrics = step(state, dataset.frame(int(index)))
    assert int(state.trouble) == 0 and np.isfinite(float(metrics["loss"]))
    return before, jax.tree.map(np.array, state.params), metrics


STRUCTURES = ("tg_deformation_whole", "tg_appearance", "tg_alpha_rgb", "fg_no_fad", "fg_no_fam", "fg_high_all")


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_row_traces(name, dataset, tmp_path):
    """Shapes and terms of what is built differently fit together; nothing is compiled."""
    run = prepared(name, dataset, tmp_path)
    state, frame = jax.eval_shape(lambda: loop.first_state(run)), dataset.frame(int(dataset.train_ids[0]))
    after, metrics = jax.eval_shape(make_step(loop.plan(run, run.stages[1], None)), state, frame)
    assert jax.tree.structure(after) == jax.tree.structure(state) and "loss" in metrics
    width = state.params["face"]["motion"]["deform"]["layer2"]["kernel"].shape[1]
    assert width == {"tg_appearance": 4, "tg_alpha_rgb": 14}.get(name, 10)
    if name == "fg_high_all":
        assert all(state.params[r]["motion"]["deform"]["layer0"]["kernel"].shape[1] == 10 for r in ("mouth", "eyes"))


def learns(name, dataset, workdir):
    before, after, metrics = two_steps(name, dataset, workdir)
    for region, params in after.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(params["motion"])[0]:
            assert np.isfinite(leaf).all()
            if "deform" in jax.tree_util.keystr(path):
                old = before[region]["motion"]
                for part in path:
                    old = old[part.key]
                assert not np.array_equal(old, leaf), (region, path)
    return metrics


def test_appearance_alone_learns(dataset, tmp_path):
    metrics = learns("tg_appearance_whole", dataset, tmp_path)
    assert float(metrics["face/delta_means"]) == 0.0
    assert float(metrics["face/delta_opacities"]) > 0.0 and float(metrics["face/delta_colors"]) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tg", *STRUCTURES, "tg_no_sampling", "tg_alpha", "fg", "fg_no_hrpa"])
def test_every_row_learns(name, dataset, tmp_path):
    learns(name, dataset, tmp_path)


@pytest.mark.parametrize(("kind", "predicts"), [
    ("face", ("opacities", "colors")), ("mouth_mlp", ("means", "opacities", "colors")),
    ("cross_expression", delta_lib.DEFORMATION), ("eyes_mlp", ()),
])  # fmt: skip
def test_a_network_predicts_what_it_is_asked_for(kind, predicts):
    def create():
        return motion.create(kind, GRID, (16, 3), 4, rngs=nnx.Rngs(0), predicts=predicts)

    graph, _ = nnx.split(nnx.eval_shape(create))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create())))()
    rng = np.random.default_rng(0)
    means = jnp.asarray(rng.uniform(-0.1, 0.1, (9, 3)), jnp.float32)
    condition = Condition(
        jnp.asarray(rng.random((8, 16, 3)), jnp.float32), jnp.asarray(rng.random((8, 4)), jnp.float32)
    )

    @jax.jit
    @jax.grad
    def slope(params, name):
        found, _ = nnx.merge(graph, params)(means, condition)
        return sum((i + 1) * jnp.abs(getattr(found, n)).sum() for i, n in enumerate(predicts or ("means",))) + 0 * name

    found, _ = jax.jit(lambda params: nnx.merge(graph, params)(means, condition))(params)
    shapes = {"means": (9, 3), "quats": (9, 4), "log_scales": (9, 3), "opacities": (9,), "colors": (9, 3)}
    for name, shape in shapes.items():
        value = getattr(found, name)
        if name in (predicts or ("means",)):
            assert value.shape == shape and np.any(np.asarray(value) != 0)
        else:  # means stay, as zeros
            assert value is None or (name == "means" and not np.any(np.asarray(value)))
    grads = slope(params, 0.0)["deform"]
    last = max(grads)
    assert np.all(np.any(np.asarray(grads[last]["kernel"]) != 0, axis=0)), "an output that nothing reaches"


def test_opacity_and_colour_reach_the_picture():
    points = np.random.default_rng(0).uniform(-0.1, 0.1, (8, 3)).astype(np.float32)
    gaussians, pool = pool_lib.from_points(points, np.full((8, 3), 0.5, np.float32), 10, 1)
    change = Deltas(jnp.zeros((10, 3)), opacities=jnp.full(10, 2.0), colors=jnp.ones((10, 3)))
    _, _, _, opacities, sh = pool_lib.activate(gaussians, jnp.asarray(pool.alive), change)
    usual = float(jax.nn.sigmoid(np.log(1 / 9) + 2.0))  # they start at 0.1
    np.testing.assert_allclose(opacities, [usual] * 8 + [0.0] * 2, rtol=1e-5)  # dead slots stay dead; float32
    np.testing.assert_allclose(sh[:, 0] - gaussians.sh[:, 0], 1.0, atol=1e-6)
    assert not np.any(np.asarray(sh[:, 1:]))
    exported = moved(gaussians, change)
    np.testing.assert_allclose(exported.sh, sh, atol=1e-6)
    np.testing.assert_allclose(exported.logit_opacities[:8], np.log(1 / 9) + 2.0, rtol=1e-5)


def test_penalties_of_one_number_a_gaussian():
    view = terms.RegionView(*[None] * 6, Deltas(jnp.zeros((4, 3)), opacities=jnp.asarray([1.0, -3.0, 9.0, 9.0])),
                            jnp.asarray([True, True, False, False]), {})  # fmt: skip
    assert float(terms.REGION_TERMS["delta_opacities"](view)) == 2.0
    assert float(terms.REGION_TERMS["delta_colors"](view)) == 0.0


@pytest.mark.parametrize("wrong", [("means", "colour"), ("means", "means")])
def test_a_wrong_prediction_is_refused(wrong, dataset, tmp_path):
    config = load("fg")
    config.regions.mouth.predicts = wrong
    with pytest.raises(UserError, match=r"regions\.mouth\.predicts: '(colour|means)'"):
        loop.prepare(config, dataset, tmp_path)


# The benchmark. Nothing is trained: the two commands that it runs are replaced by what they leave behind.


def report(offset, seed=0, count=24):
    rng = np.random.default_rng(seed)
    truth = 7.0 + np.sin(np.arange(count))
    frames = [
        {"id": 100 + i, "psnr_head": 26.0 + offset + 0.1 * rng.standard_normal(), "lmd": None,
         "lip_opening": truth[i] * (1.0 + offset) + 0.5 * rng.standard_normal(), "lip_opening_truth": truth[i]}
        for i in range(count)
    ]  # fmt: skip
    head = float(np.mean([frame["psnr_head"] for frame in frames]))
    tables = {"held-out frames": {"rows": {"ours": {"aue_lower": 0.5}}}}
    return {"summary": {"psnr_head": head, "lip_opening_r": 0.9}, "frames": frames, "tables": tables}


def test_means_and_paired_differences(benchmark):
    ours, other = [report(0.5, 1), report(0.5, 2)], [report(0.0, 3), report(0.0, 4)]
    table = benchmark.summary(ours)
    assert abs(table["psnr_head"]["mean"] - 26.5) < 0.1 and table["psnr_head"]["sd"] < 0.2
    assert table["aue_lower"]["mean"] == 0.5 and "lmd" not in table
    found = benchmark.compare(ours, other)
    assert abs(found["psnr_head"]["mean"] - 0.5) < 0.1 and found["psnr_head"]["low"] > 0.3
    assert found["lip_opening_r"]["low"] < found["lip_opening_r"]["mean"] < found["lip_opening_r"]["high"]
    assert "lmd" not in found
    text = benchmark.to_markdown("pairs", {"fg against tg": found}, benchmark.with_interval)
    assert "| fg against tg | **+0.5" in text


def test_rows_are_compared_with_what_they_should_be(benchmark):
    offsets = {"fg": 1.0, "fg +poses": 4.0, "fg_no_fad": 0.0, "tg": 0.6, "tg +poses": 3.0}
    found = {name: [report(offset, i)] for i, (name, offset) in enumerate(offsets.items())}
    rows = {name: (name, [], name) for name in ("fg", "fg_no_fad", "tg")}
    pairs = benchmark.comparisons(found, rows, {"anchor": report(-1.0, 9)})
    expected = {"fg_no_fad against fg": -1.0, "fg against tg": 0.4, "fg +poses against tg +poses": 1.0,
                "fg +poses against fg": 3.0, "tg +poses against tg": 2.4}  # fmt: skip
    expected |= {f"{name} against anchor": offset + 1.0 for name, offset in offsets.items()}
    assert pairs.keys() == expected.keys()
    for name, difference in expected.items():
        assert abs(pairs[name]["psnr_head"]["mean"] - difference) < 0.1, name  # 24 frames, noise of 0.14 each


def run_benchmark(benchmark, monkeypatch, tmp_path, *more):
    """Runs it with commands that leave what they would; returns the commands."""
    ran = []

    def command(module, arguments, log):
        ran.append((module, arguments))
        if module == "train":
            workdir = Path(next(a for a in arguments if a.startswith("--workdir=")).removeprefix("--workdir="))
            workdir.mkdir(parents=True, exist_ok=True)
            lines = [
                {"stage": s, "steps_per_second": v} for s, v in (("static", None), ("static", 10.0), ("motion", 20.0))
            ]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            workdir = Path(arguments[arguments.index("--workdir") + 1])
            (workdir / "evaluation.json").write_text(json.dumps(report(0.0, len(ran))))

    monkeypatch.setattr(benchmark, "_command", command)
    flags = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert benchmark.main([*flags, *more]) == 0
    return ran


@pytest.fixture
def clip(dataset, tmp_path):
    (tmp_path / "data").symlink_to(dataset.path)
    return dataset


def test_finished_runs_are_not_trained_again(benchmark, monkeypatch, tmp_path, clip, capsys):
    more = ("--only", "fg,bigger", "--variant", "bigger=fg,regions.face.capacity=99", "--seeds", "0,1",
            "--schedule-scale", "0.2")  # fmt: skip
    ran = run_benchmark(benchmark, monkeypatch, tmp_path, *more)
    assert [module for module, _ in ran] == ["train", "evaluate"] * 4
    assert all(any("ablations.py:fg" in a for a in arguments) for module, arguments in ran if module == "train")
    assert ["--config.regions.face.capacity=99" in arguments for _, arguments in ran[::2]] == [False, False, True, True]
    assert not run_benchmark(benchmark, monkeypatch, tmp_path, *more)
    written = json.loads((tmp_path / "results" / "ablations.json").read_text())
    assert set(written["differences"]) == {"bigger against fg"} and written["scales"] == {"fg": 0.2, "bigger": 0.2}
    assert "bigger: fg, regions.face.capacity=99" in capsys.readouterr().out
    with pytest.raises(UserError, match="another command"):
        run_benchmark(benchmark, monkeypatch, tmp_path, *more[:-1], "0.3")


def test_rows_continue_from_one_checkpoint(benchmark, monkeypatch, tmp_path, clip):
    """The same head at the same step under another seed, hearing the same; and `evaluate` is given the judges."""
    heard = tmp_path / "heard.npy"
    np.save(heard, np.random.default_rng(0).normal(size=(clip.num_frames, 4, 5)).astype(np.float32))
    tiny = [f"--config={ROOT}/configs/tiny.py", f"--config.data={clip.path}", f"--config.audio_features={heard}"]
    clip = open_dataset(clip.path, str(heard))
    config, _ = cli.parse_train([*tiny, f"--workdir={tmp_path / 'first'}"], "")
    run = loop.prepare(config, clip, tmp_path / "first")
    state = loop.first_state(run)
    start = checkpoint.save(run.workdir, 5, state.replace(step=jnp.int32(5)), loop.info_of(run))
    benchmark.branch.begin(start, [*tiny, "--config.seed=1"], tmp_path / "second")
    again, _ = cli.parse_train([*tiny, "--config.seed=1", f"--workdir={tmp_path / 'second'}"], "")
    expect = loop.info_of(loop.prepare(again, clip, tmp_path / "second"))
    kept, step, _ = checkpoint.restore_latest(tmp_path / "second", state, expect=expect)
    assert step == kept.step == 5 and not np.array_equal(kept.key, state.key)
    jax.tree.map(
        np.testing.assert_array_equal, (kept.params, kept.opt, kept.pools), (state.params, state.opt, state.pools)
    )

    begun = []
    monkeypatch.setattr(benchmark.branch, "begin", lambda folder, arguments, workdir: begun.append(workdir.name))
    more = ("--only", "fg", "--seeds", "0,1", "--schedule-scale", "0.2", "--score", "sync=x.st", "--start", str(start))
    ran = run_benchmark(benchmark, monkeypatch, tmp_path, *more)
    assert begun == ["fg-0", "fg-1"] and [("--sync=x.st" in arguments) for _, arguments in ran] == [False, True] * 2
    with pytest.raises(UserError, match="another command"):
        run_benchmark(benchmark, monkeypatch, tmp_path, *more[:-2])
    with pytest.raises(UserError, match="--start nowhere"):
        run_benchmark(benchmark, monkeypatch, tmp_path, *more[:-1], "nowhere")


def test_a_budget_is_turned_into_steps(benchmark, monkeypatch, tmp_path, clip):
    ran = run_benchmark(benchmark, monkeypatch, tmp_path, "--only", "tg", "--seeds", "0", "--budget-minutes", "11")
    scales = [a.split("=")[1] for _, arguments in ran for a in arguments if "schedule_scale" in a]
    # ten minutes are left beside the overhead; 3,000 steps at 10 a second and 47,000 at 20 take 2,650 seconds
    assert [float(x) for x in scales] == [0.02, pytest.approx(600 / 2650, rel=1e-2)]


def test_an_anchor_is_scored_on_the_same_frames(benchmark, monkeypatch, tmp_path, clip):
    ids = clip.test_ids
    truth = np.stack([clip.pictures(int(i)).image for i in ids])
    np.savez(tmp_path / "anchor.npz", ids=ids, gt=truth, pred=truth // 2, pred_static=truth // 3)
    found = benchmark.anchors(tmp_path / "anchor.npz", clip, None, benchmark.make(tmp_path / "kept"))
    assert set(found) == {"anchor", "anchor, static"}
    assert found["anchor"]["summary"]["psnr_head"] > found["anchor, static"]["summary"]["psnr_head"]
    assert [frame["id"] for frame in found["anchor"]["frames"]] == ids.tolist()
    np.savez(tmp_path / "other.npz", ids=ids, gt=255 - truth, pred=truth)
    with pytest.raises(UserError, match="other frames"):
        benchmark.anchors(tmp_path / "other.npz", clip, None, tmp_path / "kept")
    np.savez(tmp_path / "wrong.npz", ids=ids + 1000, pred=truth)
    with pytest.raises(UserError, match="among the held-out frames"):
        benchmark.anchors(tmp_path / "wrong.npz", clip, None, tmp_path / "kept")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--only", "fgg"), "--only fgg"),
        (("--variant", "x=nothing"), "--variant x=nothing"),
        (("--variant", "fg=tg,seed=1"), "--variant fg=tg"),
    ],
)
def test_wrong_rows_are_refused(benchmark, tmp_path, more, message):
    flags = ["--data", "x", "--runs", str(tmp_path), "--schedule-scale", "0.1", *more]
    with pytest.raises(UserError, match=message):
        benchmark.rows_of(benchmark.flags_of(flags))
