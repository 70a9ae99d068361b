"""A baked head shows what the head itself shows, in every kind of motion, from files that stand alone.

The heads are tiny and their networks are filled with noise, so that they move, turn and scale.
"""

import json
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_head import commands, folder, frame, head, run_folder  # noqa: F401  (the tiny head and its dataset)

from fg3dgs_jax import cli, evaluate, export, synthesize
from fg3dgs_jax.data import clip as clips
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import baked as files
from fg3dgs_jax.inference.control import Control
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.model import bake, deltas, gaussians, render
from fg3dgs_jax.model.hashgrid import GridSpec
from fg3dgs_jax.model.talking_gaussian import FACE_GRID, MOUTH_GRID
from fg3dgs_jax.types import Camera, Condition

SIZE = 48
GRID = GridSpec(levels=3, min_resolution=4, max_resolution=8, log2_table=8, bound=0.2)
HEADS = {
    "fg": (("face", "face"), ("mouth", "cross_audio"), ("eyes", "cross_expression")),
    "tg": (("face", "face"), ("mouth", "mouth_mlp")),
    "released": (("face", "released_face"), ("mouth", "released_mouth")),
    "ablations": (
        ("face", "face", (*deltas.DEFORMATION, "opacities", "colors")),
        ("mouth", "mouth_mlp", ("opacities", "colors")),
        ("eyes", "eyes_mlp", ()),
        ("lips", "cross_audio", deltas.DEFORMATION),
    ),
}
GRIDS = {"released_face": FACE_GRID, "released_mouth": MOUTH_GRID}


def make(kinds, degree=1, seed=0, components=0):
    """(spec, params, alive) of a head of such kinds, with dead, faint and broken Gaussians in it."""
    rng = np.random.default_rng(seed)
    regions = tuple(render.RegionSpec(name, kind, GRIDS.get(kind, GRID), *more) for name, kind, *more in kinds)
    spec = render.HeadSpec(regions, (4, 3), 6, degree, components)
    _, motions = render.motion_structure(spec)
    params, alive = {}, {}
    for i, region in enumerate(regions):
        shape, pool = gaussians.init(jax.random.key(i), 70, 60, 0.15, degree)
        shape = jax.tree.map(lambda x: np.array(x), shape).replace(
            quats=rng.normal(size=(70, 4)).astype(np.float32),
            log_scales=rng.uniform(-4.5, -3, (70, 3)).astype(np.float32),
            logit_opacities=rng.uniform(-4, 4, 70).astype(np.float32),
            sh=rng.normal(size=shape.sh.shape).astype(np.float32),
        )
        shape.logit_opacities[3] = -6.0  # 1/400
        shape.means[5, 1] = np.nan
        motion = jax.tree.map(
            lambda x: rng.normal(0, 1.5 / np.sqrt(max(1, np.prod(x.shape[:-1]))), x.shape).astype(np.float32),
            motions[region.name],
        )
        if "raw_scales" in motion:
            motion["raw_scales"] = rng.uniform(-5, -3, (70, 3)).astype(np.float32)
            shape = shape.replace(log_scales=np.log(np.logaddexp(motion["raw_scales"], 0)).astype(np.float32))
        params[region.name] = {"gaussians": shape, "motion": motion}
        alive[region.name] = np.asarray(pool.alive)
    return spec, params, alive


def conditions(spec, count=3):
    rng = np.random.default_rng(7)
    for _ in range(count):
        audio, expression = rng.normal(size=(8, *spec.audio_shape)), rng.random((8, spec.expression_dim))
        yield Condition(audio.astype(np.float32), expression.astype(np.float32))


def camera(angle=0.1):
    viewmat = np.eye(4, dtype=np.float32)
    viewmat[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    viewmat[2, 3] = 0.6
    return Camera(jnp.asarray(viewmat), jnp.asarray([70.0, 70.0, SIZE / 2, SIZE / 2]), SIZE, SIZE)


@pytest.fixture(scope="module", params=HEADS)
def pair(request):
    """(spec, params, alive, baked form, both ways to move, compiled) of a head."""
    spec, params, alive = make(HEADS[request.param], degree=2, components=2 if request.param == "ablations" else 0)
    graphs, _ = render.motion_structure(spec)

    def own(params, given):
        return {
            name: render.move(graph, params[name]["motion"], jnp.asarray(params[name]["gaussians"].means), given)[0]
            for name, graph in graphs.items()
        }

    return spec, params, alive, bake.bake(spec, params, alive), jax.jit(own), jax.jit(partial(bake.move, spec))


def test_a_baked_head_moves_as_the_head(pair):
    spec, params, alive, baked, own, move = pair
    for given in conditions(spec):
        wanted, moved = own(params, given), move(baked, given)
        for name, region in baked.items():
            brightens = wanted[name].opacities is not None
            kept = bake._kept(params[name]["gaussians"], alive[name], 0.0 if brightens else bake.MIN_OPACITY)
            # 60 alive, one not a number, one too faint unless motion brings it out
            assert len(kept) == len(region.opacities) == (59 if brightens else 58)
            for field in ("means", "quats", "log_scales", "opacities", "colors"):
                want, got = getattr(wanted[name], field), getattr(moved[name], field)
                assert (want is None) == (got is None)
                if want is not None:
                    want = np.asarray(want)[kept]
                    # Sums of up to 100 float32 products in another order.
                    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
                    assert np.abs(want).max() > 1e-4 or (field, name) == ("means", "mouth")  # of appearance alone


@pytest.mark.parametrize("channels", [3, 4])
def test_a_baked_head_shows_the_same_pictures(pair, channels):
    spec, params, alive, baked, own, move = pair
    own_picture = jax.jit(lambda params, deltas, behind: render.draw(spec, params, alive, deltas, camera(), behind))
    picture = jax.jit(lambda baked, deltas, behind: bake.draw(spec, baked, deltas, camera(), behind))
    backdrop = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, channels), np.uint8)
    for given in conditions(spec):
        want = np.asarray(own_picture(params, own(params, given), backdrop))
        difference = np.abs(want.astype(int) - picture(baked, move(baked, given), backdrop))
        if channels == 4:  # colours where there is next to nothing are next to arbitrary
            difference = difference[want[..., 3] > 25]
        assert difference.max() <= bake.TOLERANCE and (difference > 1).mean() < 1e-3
        assert (want != backdrop).mean() > 0.1


def test_a_region_that_shows_nothing_is_refused():
    spec, params, alive = make(HEADS["tg"])
    with pytest.raises(ValueError, match="mouth shows no Gaussian"):
        bake.bake(spec, params, {**alive, "mouth": np.zeros(70, bool)})


def test_morton_order_keeps_neighbours_together():
    points = np.random.default_rng(0).random((4096, 3)).astype(np.float32)
    order = bake.morton_order(points)
    assert (np.sort(order) == np.arange(4096)).all()
    steps = np.linalg.norm(np.diff(points[order], axis=0), axis=1)
    assert np.median(steps) < 0.15 * np.median(np.linalg.norm(np.diff(points, axis=0), axis=1))
    assert len(bake.morton_order(np.zeros((3, 3), np.float32))) == 3


@pytest.fixture(scope="module")
def stored(run_folder, tmp_path_factory):  # noqa: F811
    """The tiny head's two files."""
    path = tmp_path_factory.mktemp("baked") / "anna.safetensors"
    files.write(path, Head.load(run_folder))
    return path


def test_files_stand_alone_and_load_at_once(head, stored, tmp_path):  # noqa: F811
    for ending in files.ENDINGS:
        os.link(stored.with_suffix(ending), tmp_path / f"moved{ending}")
    start = time.process_time()
    loaded = Head.load(tmp_path / "moved.json")
    assert time.process_time() - start < 5  # a second on a quiet machine: benchmarks/synthesize.py measures it
    assert loaded.spec == head.spec and loaded.run["step"] == 7 and loaded.run["baked"].endswith("moved.json")
    assert loaded.dataset.path == tmp_path / "moved.safetensors"
    for index in (0, 3, 40):
        difference = np.abs(loaded.render(*frame(head, index)).astype(int) - head.render(*frame(head, index)))
        assert difference.max() <= bake.TOLERANCE
        np.testing.assert_array_equal(
            clips.over(loaded.dataset.torso(index), loaded.dataset.background), head.dataset.pictures(index).backdrop
        )
    np.testing.assert_array_equal(loaded.rest, head.rest)
    with pytest.raises(UserError, match="--data DIR"):
        loaded.dataset.pictures(3)


@pytest.mark.parametrize(
    "control",
    [Control(), Control("idle", "still", gain=1.5), Control("still", sliders={"AU45": 1.0}, start=20, gate=None)],
)
def test_a_baked_head_speaks_under_the_same_control(head, stored, control):  # noqa: F811
    sound = (0.1 * np.random.default_rng(0).standard_normal(6 * 640)).astype(np.float32)
    loaded = Head.load(stored)
    for kwargs in ({}, {"alpha": True}, {"fps": 40.0}):
        pairs = list(zip(head.speak(sound, control, **kwargs), loaded.speak(sound, control, **kwargs), strict=True))
        assert len(pairs) == (10 if "fps" in kwargs else 6)
        for own, baked in pairs:
            seen = own[..., 3] > 25 if "alpha" in kwargs else np.ones(own.shape[:2], bool)
            assert np.abs(own.astype(int) - baked)[seen].max() <= bake.TOLERANCE


def test_the_commands_take_both_forms(run_folder, folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "anna.safetensors"
    assert cli.exit_code(export.main, [f"--workdir={run_folder}", f"--out={out}"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "anna.json" in said and "20 Gaussians of mouth" in said
    sound = ["--audio", str(folder / "audio.wav")]
    for form, name in ((run_folder, "own"), (out, "baked")):
        flags = [f"--workdir={form}", *sound, f"--out={tmp_path / name}", "--expression=blinks", "--set=AU01=0.4"]
        # This clip names its blink AU45.
        assert cli.exit_code(synthesize.main, flags) == 0, capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "baked").iterdir()) and "000043.png" in names
    picture = [clips.read_picture(tmp_path / form / "000007.png", 4) for form in ("own", "baked")]
    solid = picture[0][..., 3] > 25
    assert np.abs(picture[0].astype(int) - picture[1])[solid].max() <= bake.TOLERANCE
    assert cli.exit_code(export.main, [f"--workdir={out}", f"--out={tmp_path / 'a.ply'}"]) == 0
    assert cli.exit_code(evaluate.main, [f"--workdir={out}", f"--out={tmp_path / 'scores'}"]) == 2
    assert "give the dataset with --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=a.safetensors", "--region=mouth"], "leave out --audio and --region"),
        (["--out=a.json", "--audio=x.wav"], "leave out --audio and --region"),
        (["--out=nowhere/a.safetensors"], "folder that you may write to"),
        (["--workdir=b.json", "--out=a.safetensors"], "is baked already"),
        (["--workdir=b.json", "--out=a.ply"], "copy both"),
    ],
)
def test_bad_flags_are_one_sentence(commands, tmp_path, monkeypatch, capsys, flags, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    if said == "copy both":
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert cli.exit_code(export.main, ["--workdir=run", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def changed(name, change):
    """A change of one array that keeps the files consistent with each other."""

    def apply(arrays, facts):
        arrays[name] = change(arrays[name])
        facts["sha256"] = None

    return apply


def described(*path, value):
    """A change of one entry of the .json."""

    def apply(_arrays, facts):
        for key in path[:-1]:
            facts = facts[key]
        facts[path[-1]] = value

    return apply


HOSTILE = {
    "another kind of file": described("format", value="fg3dgs_jax.weights"),
    "another version": described("version", value=9),
    "flipped": lambda arrays, _: arrays["model/eyes/rows/queries"].__setitem__((0, 0), 9.0),
    "not finite": changed("model/eyes/means", lambda x: x * np.nan),
    "short": changed("model/mouth/rows/queries", lambda x: x[:, 1:]),
    "other type": changed("model/mouth/rows/queries", lambda x: x.astype(np.float64)),
    "no Gaussians of a region": lambda arrays, _: arrays.pop("model/mouth/opacities"),
    "huge grid": described("spec", "regions", 0, "grid", "levels", value=10**9),
    "huge table": described("spec", "regions", 0, "grid", "log2_table", value=62),
    "huge window": described("spec", "audio_shape", value=[10**6, 10**6]),
    "text for a number": described("spec", "expression_dim", value="2"),
    "unknown network": described("spec", "regions", 0, "motion", value="dance"),
    "unknown field": described("spec", "secret", value=1),
    "no spec": described("spec", value=None),
    "other size": described("clip", "width", value=64),
    "absurd rate": described("clip", "fps", value=-1.0),
    "frames outside": changed("clip/frame_ids", lambda x: x + 1000),
    "one torso missing": changed("torso_ends", lambda x: x[1:]),
    "torso beyond the end": changed("torso_ends", lambda x: x + 10**12),
    "no rest": changed("clip/rest", lambda x: x[:2]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_foreign_or_hostile_file_is_one_sentence(stored, tmp_path, change):
    arrays, facts = load_file(stored), json.loads(stored.with_suffix(".json").read_text())
    arrays = {name: value.copy() for name, value in arrays.items()}
    change(arrays, facts)
    if facts["sha256"] is None:
        facts["sha256"] = files.weights.digest({k: v for k, v in arrays.items() if not k.startswith("torso")})
    path = tmp_path / "bad.safetensors"
    save_file(arrays, path)
    path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="damaged or no baked head") as error:
        Head.load(path)
    assert "\n" not in str(error.value) and "bad.safetensors" in str(error.value)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1], ids=str)
def test_a_cut_file_is_one_sentence(stored, tmp_path, cut):
    for ending in files.ENDINGS:
        data = stored.with_suffix(ending).read_bytes()
        for other in files.ENDINGS:
            (tmp_path / f"a{other}").write_bytes(stored.with_suffix(other).read_bytes())
        (tmp_path / f"a{ending}").write_bytes(data[:cut])
        if ending == ".json" and cut == -1:
            continue  # the line break after the last bracket
        with pytest.raises(UserError, match="damaged or no baked head"):
            Head.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged or no baked head"):
        Head.load(tmp_path / "a.json")


def test_a_torso_layer_is_checked_when_it_is_read(stored, tmp_path):
    arrays = load_file(stored)
    path = tmp_path / "bad.safetensors"
    path.with_suffix(".json").write_text(stored.with_suffix(".json").read_text())
    for change in (lambda x: x[::-1].copy(), lambda x: np.zeros_like(x)):
        save_file({**arrays, "torso": change(arrays["torso"])}, path)
        with pytest.raises(UserError, match="torso of frame 0"):
            Head.load(path).dataset.torso(0)
    save_file({**arrays, "torso_rows": arrays["torso_rows"] + 1000}, path)
    with pytest.raises(UserError, match="torso of frame 0 has another size"):
        Head.load(path).dataset.torso(0)


def test_laying_a_layer_over_a_background_divides_exactly():
    """Every pair of alpha and colour, over the ends and the middle of the background's range."""
    alpha, colour = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    layer = np.stack([colour] * 3 + [alpha], -1).astype(np.uint8)
    for level in (0, 1, 100, 254, 255):
        background = np.full((256, 256, 3), level, np.uint8)
        want = (colour * alpha + level * (255 - alpha) + 127) // 255
        np.testing.assert_array_equal(clips.over(layer, background)[..., 1], want)
