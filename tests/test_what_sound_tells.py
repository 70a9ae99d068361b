"""The benchmark that asks what a clip's sound tells of its lips finds it, and finds nothing where there is none."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data import synthetic
from fg3dgs_jax.data.clip import MOUTH_POINTS, Clip
from fg3dgs_jax.data.dataset import Dataset
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.model.cameras import project

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
T, INTRINSICS = 160, np.array([300.0, 300.0, 64.0, 64.0], np.float32)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("what_sound_tells", BENCHMARKS / "what_sound_tells.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def clip():
    """A turning head whose lower lip falls with the first of three numbers heard, as (dataset, windows)."""
    rng = np.random.default_rng(0)
    heard = rng.standard_normal((T, 1, 3))
    viewmats = np.tile(np.diag([1.0, -1.0, -1.0, 1.0]), (T, 1, 1))
    viewmats[:, :3, :3] = Rotation.from_rotvec(0.1 * rng.standard_normal((T, 3))).as_matrix() @ viewmats[:, :3, :3]
    viewmats[:, 2, 3] = 1.0
    face = rng.uniform(-0.1, 0.1, (68, 3))
    face[MOUTH_POINTS][[14, 18]] = [[0.0, 0.0, 0.1], [0.0, -0.04, 0.1]]  # a mouth that is open at rest, by 13 pixels
    landmarks = project(face, viewmats, INTRINSICS)
    landmarks[:, MOUTH_POINTS][:, 18, 1] += 3.0 * np.tanh(heard[:, 0, 0])
    used = {"intrinsics": INTRINSICS, "viewmats": viewmats, "landmarks": landmarks.astype(np.float32)}
    return Dataset(
        Clip(**{**dict.fromkeys(f.name for f in dataclasses.fields(Clip)), "width": 128, "height": 128, **used})
    ), heard


@pytest.mark.parametrize("components", [0, 3])
def test_what_lips_owe_to_the_sound_is_told(script, clip, components):
    dataset, heard = clip
    parts = [(np.arange(120), np.arange(120, T))]
    found = script.score(heard, dataset, components, parts)
    # 120 frames of three numbers, two of which tell nothing, bend a ridge regression's guess a little
    assert found["lip_opening_r"] > 0.9 and found["lmd"] < 0.6 * found["lmd_still"]
    deaf = script.score(np.random.default_rng(1).permutation(heard), dataset, components, parts)
    assert abs(deaf["lip_opening_r"]) < 0.5 and deaf["lmd"] > 0.9 * deaf["lmd_still"]


@pytest.mark.parametrize(("argv", "message"), [
    (["--data", "nowhere"], "nowhere"),
    (["--data", "FOLDER", "--components", "100000"], "--components 100000"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_sentence(script, argv, message, tmp_path):
    folder = tmp_path / "data"
    synthetic.make(folder, 40, 64)
    with pytest.raises(UserError, match=message):
        script.main([str(folder) if word == "FOLDER" else word for word in argv])
    assert script.main(["--data", str(folder), "--components", "4"]) == 0
