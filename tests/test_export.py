"""Gaussians in .ply files, read by another program where it is installed and by a few lines here where not."""

import json

import numpy as np
import pytest
from test_head import commands, folder, head, run_folder  # noqa: F401  (the tiny head and its dataset)

from fg3dgs_jax import cli, export, types
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import ply


def read_by_hand(path) -> np.ndarray:
    """A structured array of a binary .ply's vertices."""
    data = path.read_bytes()
    header, body = data.split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    count = int(next(line for line in lines if line.startswith("element vertex")).split()[-1])
    names = [line.split()[-1] for line in lines if line.startswith("property float")]
    rows = np.frombuffer(body, [(name, "<f4") for name in names])
    assert len(rows) == count and lines[:2] == ["ply", "format binary_little_endian 1.0"]
    return rows


def gaussians(degree: int, count: int = 5) -> types.Gaussians:
    rng = np.random.default_rng(degree)
    shapes = {"means": (count, 3), "quats": (count, 4), "log_scales": (count, 3), "logit_opacities": (count,)}
    draw = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return types.Gaussians(**draw, sh=rng.normal(size=(count, (degree + 1) ** 2, 3)).astype(np.float32))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_fields_are_those_of_3dgs_in_their_order(degree, tmp_path):
    one = gaussians(degree)
    assert ply.write(tmp_path / "a.ply", one, ("made by a test",)) == 5
    rows = read_by_hand(tmp_path / "a.ply")
    rest = 3 * ((degree + 1) ** 2 - 1)
    assert rows.dtype.names == (
        "x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(rest)),
        "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
    )  # fmt: skip
    np.testing.assert_array_equal(rows["y"], one.means[:, 1])
    np.testing.assert_array_equal(rows["f_dc_2"], one.sh[:, 0, 2])
    if degree:  # 3DGS: all of red, then all of green, then all of blue
        np.testing.assert_array_equal(rows["f_rest_0"], one.sh[:, 1, 0])
        np.testing.assert_array_equal(rows[f"f_rest_{rest // 3}"], one.sh[:, 1, 1])
        np.testing.assert_array_equal(rows[f"f_rest_{rest - 1}"], one.sh[:, -1, 2])
    np.testing.assert_array_equal(rows["opacity"], one.logit_opacities)
    np.testing.assert_array_equal(rows["scale_1"], one.log_scales[:, 1])
    length = np.sqrt(sum(rows[f"rot_{i}"] ** 2 for i in range(4)))
    np.testing.assert_allclose(length, 1, atol=1e-6)
    assert (np.sign(rows["rot_0"]) == np.sign(one.quats[:, 0])).all()  # w first


def test_an_independent_reader_opens_it(tmp_path):
    plyfile = pytest.importorskip("plyfile", reason="plyfile is not installed (CONTRIBUTING.md, parity tests)")
    one = gaussians(2)
    ply.write(tmp_path / "a.ply", one)
    vertex = plyfile.PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    assert len(vertex) == 5 and len(vertex.properties) == 17 + 24
    np.testing.assert_array_equal(np.stack([vertex[name] for name in "xyz"], -1), one.means)
    np.testing.assert_array_equal(vertex["opacity"], one.logit_opacities)


def test_values_that_are_not_finite_are_refused(tmp_path):
    bad = gaussians(0)
    bad.means[2, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        ply.write(tmp_path / "a.ply", bad)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_learnt_head_and_the_frames_of_a_speech(commands, tmp_path, capsys):  # noqa: F811
    head = commands  # noqa: F811
    run = ["--workdir=run", f"--out={tmp_path / 'head.ply'}"]
    assert cli.exit_code(export.main, run) == 0, capsys.readouterr().err
    rows = read_by_hand(tmp_path / "head.ply")
    assert len(rows) == 40  # 20 living Gaussians of each region; dead slots stay out
    assert cli.exit_code(export.main, [*run[:1], f"--out={tmp_path / 'eyes.ply'}", "--region=eyes"]) == 0
    eyes = read_by_hand(tmp_path / "eyes.ply")
    np.testing.assert_array_equal(eyes, rows[20:])
    speech = ["--workdir=run", f"--audio={head.dataset.audio_path}", f"--out={tmp_path / 'frames'}", "--every=5"]
    assert cli.exit_code(export.main, [*speech, "--frames=3"]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [
        "000000.ply", "000005.ply", "000010.ply", "cameras.json"]  # fmt: skip
    cameras = json.loads((tmp_path / "frames" / "cameras.json").read_text())
    assert [frame["frame"] for frame in cameras["frames"]] == [0, 5, 10]
    np.testing.assert_allclose(cameras["frames"][1]["viewmat"], head.dataset.viewmats[5], atol=1e-6)
    # Frame 5 moved by the deltas that render it.
    moved = read_by_hand(tmp_path / "frames" / "000005.ply")
    assert np.abs(moved["x"] - rows["x"]).max() > 1e-4
    np.testing.assert_array_equal(moved["opacity"], rows["opacity"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=a.obj"], "end in .safetensors or .ply"),
        (["--out=nowhere/a.ply"], "folder that you may write to"),
        (["--out=a.ply", "--region=nose"], "this head has mouth, eyes"),
        (["--out=a", "--audio=none.wav"], "none.wav"),
        (["--out=.", "--audio=none.wav"], "is there already"),
        (["--out=a", "--audio=none.wav", "--every=0"], "whole numbers"),
    ],
)
def test_bad_input_is_one_sentence(commands, tmp_path, monkeypatch, capsys, flags, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert cli.exit_code(export.main, ["--workdir=run", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
