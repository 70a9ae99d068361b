"""`python -m fg3dgs_jax.train` from nothing to a video that speaks."""

import json
from pathlib import Path

from fg3dgs_jax import train
from fg3dgs_jax.data import video

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def test_the_command_leaves_scores_and_a_video(tmp_path, capsys):
    steps = [
        f"--config.stages.{name}.steps={count}"
        for name, count in (("static", 2), ("motion", 3), ("fusion", 2), ("alignment", 0))
    ]
    flags = [f"--config={TINY}", f"--workdir={tmp_path}", "--config.schedule_scale=1.0", "--config.synthetic.frames=25"]
    assert train.main([*flags, *steps]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["summary"]["psnr"] > 0
    assert video.probe(tmp_path / "result.mp4").num_frames == 25
    for name in ("heldout.mp4", "heldout.jpg", "heldout.npz", "metrics.jsonl"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert "result.mp4" in capsys.readouterr().out
