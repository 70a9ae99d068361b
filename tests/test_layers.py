"""Imports point one way, read from the source: types, errors <- rasterizer, losses, data <- model <- training <- ...

Whoever needs a new arrow changes the table here, and says why in review.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fg3dgs_jax

ROOT = Path(fg3dgs_jax.__file__).parent
BASE = {"types", "errors", "files", "native"}
COMMANDS = {path.stem for path in ROOT.glob("*.py") if "def main(" in path.read_text()}
ROOMS = {
    "types": set(),
    "errors": set(),
    "files": {"errors"},
    "native": {"errors"},
    "rasterizer": BASE,
    "losses": BASE,
    "data": BASE,
    "model": BASE | {"rasterizer"},
    "training": BASE | {"model", "losses", "data"},
    "inference": BASE | {"model", "losses", "data", "training.checkpoint"},
    "cli": {"errors", "training.signals"},
}
BINDING = "native.py"
# What works on plain arguments can be tested, compiled and sharded anywhere.
PLAIN_ROOMS = ("rasterizer", "model", "losses")
WORLD = {
    "argparse",
    "absl",
    "ml_collections",
    "pathlib",
    "io",
    "json",
    "socket",
    "urllib",
    "http",
    "requests",
    "shutil",
}


def modules() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(name: str) -> Iterator[str]:
    """Dotted names of everything that a module imports, inside functions too; relative imports made absolute."""
    package = ["fg3dgs_jax", *Path(name).parent.parts]
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name):
    room = room_of(name)
    if room == "__init__":
        allowed = set()
    elif room in COMMANDS:
        allowed = set(ROOMS)  # everything, and never another command
    else:
        assert room in ROOMS, f"{name}: a new room needs a row in ROOMS"
        allowed = ROOMS[room] | {room}
    for target in imports(name):
        inner = target.removeprefix("fg3dgs_jax.")
        if inner == target or inner == "__version__":
            continue
        parts = inner.split(".")
        assert allowed & {parts[0], ".".join(parts[:2])}, f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in modules() if name != BINDING])
def test_one_module_loads_the_binary(name):
    strings = [node.value for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Constant)]
    assert not any("fg3dgs_jax._native" in str(text) for text in [*strings, *imports(name)])


@pytest.mark.parametrize("name", [name for name in modules() if room_of(name) in PLAIN_ROOMS])
def test_plain_rooms_see_no_config_file_or_network(name):
    seen = {target.split(".")[0] for target in imports(name)} & WORLD
    assert not seen, f"{name} imports {seen}"


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    loaded = run("import sys, fg3dgs_jax; print(*sys.modules)").split()
    assert not {"jax", "jaxlib", "flax", "cv2", "av", "fg3dgs_jax.rasterizer"} & set(loaded)
    assert not any("_native" in name for name in loaded)


def test_core_needs_no_extra_and_loads_no_binary():
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules()]
    names = ["fg3dgs_jax" if name == "__init__" else f"fg3dgs_jax.{name}" for name in names]
    extras = ("mediapipe", "torch", "transformers", "pytest", "hypothesis")
    script = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in {names!r}:
    importlib.import_module(name)
assert "fg3dgs_jax._native" not in sys.modules
"""
    run(script)


@pytest.mark.parametrize("name", modules())
def test_sizes(name):
    # Long files and functions are where the field's code becomes unreadable.
    text = (ROOT / name).read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60 + len((ast.get_docstring(node) or "").splitlines()), f"{name}: {node.name} has {lines}"


def test_the_rules_notice():
    assert list(imports("training/loop.py")) != [] and "train" in COMMANDS
    assert room_of("model/render.py") == "model" and room_of("cli.py") == "cli"
