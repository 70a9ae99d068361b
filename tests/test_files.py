"""Files appear when complete and leave nothing when not."""

import pytest

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.files import replacing


def test_a_file_appears_when_its_block_ends(tmp_path):
    with replacing(tmp_path / "a.npz") as partial:
        partial.write_text("new")
        assert partial.suffix == ".npz" and not (tmp_path / "a.npz").exists()
    assert (tmp_path / "a.npz").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_block_leaves_what_was_there_before(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(UserError, match=r"a.json: cannot be written"), replacing(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    for folder in ("nowhere", "a.json"):  # absent, or a file
        path = tmp_path / folder / "b.json"
        with pytest.raises(UserError, match=r"b.json: cannot be written"), replacing(path) as partial:
            partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
