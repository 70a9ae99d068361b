"""benchmarks/gpu.py has one chance on a borrowed machine: whatever fails there must take nothing else with it."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Stands in for every program that the script starts; FAIL names one that fails, HANG one that never ends.
PROGRAM = """#!{python}
import json, os, sys, time
said = " ".join(sys.argv)
if os.environ.get("HANG") and os.environ["HANG"] in said:
    if os.fork():
        os.wait()
    time.sleep(60)
if "--query-gpu" in said:
    print("NVIDIA Test, 580.1, 9.0, 1000 MiB")
if "gpu_smoke.cu" in said:
    os.symlink(__file__, sys.argv[-1])
if said.endswith("smoke"):
    print("smoke: ok")
if "gpu_measure" in said:
    case = sys.argv[sys.argv.index("--cases") + 1]
    rows = [{{"n": case, "rival": "--no-gsplat" not in said}}]
    open(sys.argv[sys.argv.index("--out") + 1], "w").write(json.dumps({{"machine": {{}}, "rows": rows}}))
failing = os.environ.get("FAIL")
print("so it went")
sys.exit(bool(failing and failing in said))
"""


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The script, every program of which is the one above."""
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    for name in ("nvidia-smi", "nvcc", "compute-sanitizer"):
        (tmp_path / name).symlink_to(program)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "CASES", ("1x2", "3x4"))
    return module


def run(gpu, tmp_path, monkeypatch, *flags):
    """The exit code, and what the file says."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *flags])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code, json.loads(out.read_text())


def test_all_steps_are_taken_and_written(gpu, tmp_path, monkeypatch):
    code, found = run(gpu, tmp_path, monkeypatch, "--wheels", str(tmp_path))
    assert code == 0 and all(step["status"] == "ok" for step in found["steps"].values())
    steps = ["device", "wheels", "build", "pytest -m gpu", "smoke: compile", "smoke: run"]
    steps += [*(f"sanitizer: {tool}" for tool in gpu.TOOLS), "gsplat", "measure 1x2", "measure 3x4"]
    assert list(found["steps"]) == steps
    assert found["measured"] == [{"n": "1x2", "rival": True}, {"n": "3x4", "rival": True}]
    assert found["device"]["capability"] == "9.0"


@pytest.mark.parametrize(
    ("failing", "step", "lost"),
    [
        ("setup.py", "build", ["pytest -m gpu", "measure 1x2", "measure 3x4"]),
        ("-m pytest", "pytest -m gpu", []),
        ("gpu_smoke.cu", "smoke: compile", ["smoke: run", *(f"sanitizer: {t}" for t in ("memcheck", "racecheck"))]),
        ("racecheck", "sanitizer: racecheck", []),
        ("gsplat.cuda", "gsplat", []),
        ("1x2", "measure 1x2", []),
    ],
)
def test_a_step_that_fails_is_named_and_costs_no_other(gpu, tmp_path, monkeypatch, failing, step, lost):
    monkeypatch.setenv("FAIL", failing)
    code, found = run(gpu, tmp_path, monkeypatch)
    assert code == 1 and found["steps"][step]["status"] != "ok" and "so it went" in found["steps"][step]["end"]
    assert all(name not in found["steps"] for name in lost)
    others = {name: entry for name, entry in found["steps"].items() if name != step}
    assert all(entry["status"] == "ok" for entry in others.values())
    if not lost:  # what was measured before a failure counts too
        assert [row["n"] for row in found["measured"]] == ["1x2", "3x4"]
        assert found["measured"][0]["rival"] == (step != "gsplat")


def test_a_step_that_hangs_is_ended_with_its_children(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("HANG", "1x2")
    monkeypatch.setattr(gpu, "CASE_LIMIT", 1.0)
    begin = time.monotonic()
    code, found = run(gpu, tmp_path, monkeypatch)
    assert code == 1 and time.monotonic() - begin < 30
    assert found["steps"]["measure 1x2"]["status"] == "cut off after 1 s"
    assert [row["n"] for row in found["measured"]] == ["3x4"]


def test_time_is_kept(gpu, tmp_path, monkeypatch):
    """Scenes for which no time is left are said so; so is a program that is not there."""
    (tmp_path / "compute-sanitizer").unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    code, found = run(gpu, tmp_path, monkeypatch, "--seconds", "9")
    assert code == 1 and found["steps"]["measure 1x2"]["status"] == "no time left" and not found["measured"]
    assert found["steps"]["sanitizer: memcheck"]["status"] != "ok"
    (tmp_path / "nvidia-smi").unlink()
    code, _ = run(gpu, tmp_path, monkeypatch)
    assert "no CUDA device" in str(code)


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch):
    """And nothing is timed that does not agree with the CPU."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = importlib.import_module("gpu_measure")

    def fails(*args):
        raise AssertionError("so it went")

    monkeypatch.setattr(measure, "assert_cpu_parity", fails)
    monkeypatch.setattr(measure, "time_ours", fails)
    monkeypatch.setattr(measure, "time_gsplat", fails)
    monkeypatch.setattr(measure, "time_head", lambda n, size: {"step_call_ms": n / size})
    out = tmp_path / "rows.json"
    argv = ["gpu_measure.py", "--any-device", "--cases", "30x16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="1"):
        measure.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row.pop("failed")) == {"parity with the CPU", "gsplat"}  # the rasterizer was not even tried
    assert row == {"n": 30, "size": 16, "step_call_ms": 1.875, "peak_mb": 0}
    monkeypatch.setattr(measure, "assert_cpu_parity", lambda *scene: {"cpu_difference": 1e-7})
    monkeypatch.setattr(measure, "time_ours", lambda *scene: {"forward_call_ms": 1.0})
    monkeypatch.setattr(sys, "argv", [*argv, "--no-gsplat"])
    with pytest.raises(SystemExit, match="0"):
        measure.main()


def test_differences_are_judged_one_by_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    agree = importlib.import_module("gpu_measure").agree
    assert agree(lambda name: 1e-3, color=([1.0, 2.0], [1.0, 2.0]))["color"] == 0
    with pytest.raises(AssertionError, match=r"alpha is 1\.00e-01 apart"):
        agree(lambda name: 0.05, color=([1.0], [1.0]), alpha=([1.1], [1.0]))
    with pytest.raises(AssertionError, match="color is nan apart"):
        agree(lambda name: 1.0, color=([float("nan")], [1.0]))
