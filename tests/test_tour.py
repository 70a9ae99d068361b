"""The walk from clip to talking head writes its pages whole, for any head."""

import re

import cv2
from test_head import commands, folder, head, run_folder  # noqa: F401  (the tiny head and its dataset)

from fg3dgs_jax import cli, tour


def test_every_stage_has_its_picture(commands, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "tour"
    assert cli.exit_code(tour.main, ["--workdir=run", f"--out={out}"]) == 0, capsys.readouterr().err
    text = (out / "tour.md").read_text()
    shown = re.findall(r"\]\((\w+\.jpg)\)", text)
    assert len(shown) == len(tour.TEXT) and {path.name for path in out.glob("*.jpg")} == {*shown, "all.jpg"}
    assert all(cv2.imread(str(out / name)) is not None for name in shown)
    assert cli.exit_code(tour.main, ["--workdir=run", f"--out={out}"]) == 2
    assert "is there already" in capsys.readouterr().err
