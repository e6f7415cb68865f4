"""The house: imports point down, libraries stay behind their fences, functions fit on a screen."""

import ast
from pathlib import Path

import pytest

import loralab

SRC = Path(loralab.__file__).parent
PLUGIN = SRC.parent / "hydra_plugins"
FLOORS = [
    {"errors", "quick_imports"},
    {"spec", "signals"},
    {"records", "numerics", "memory"},
    {"quantization", "data"},
    {"adapters", "optim"},
    {"forward"},
    {"models"},
    {"training"},
    {"planning"},
    {"running"},
    {"config"},
    {"artifacts"},
    {"scheduling", "analysis"},
    {"reporting", "hydra_plugins"},
    {"bench"},
    {"cli"},
    {"api"},
]
FENCES = {
    "bitsandbytes": {"quantization", "optim", "bench"},
    "wandb": {"records", "reporting"},
    "hydra": {"config", "cli", "scheduling", "hydra_plugins"},
    "omegaconf": {"config", "cli", "scheduling", "hydra_plugins"},
    "peft": {"bench"},
    "rich": {"cli", "reporting", "training"},
    "filelock": {"records"},
    "optuna": {"scheduling", "hydra_plugins"},
    "submitit": {"scheduling", "hydra_plugins"},
    "ray": {"scheduling", "hydra_plugins"},
    "altair": {"reporting", "api"},
    "vl_convert": {"reporting"},
    "pandas": {"analysis", "reporting", "api"},
    "scipy": {"analysis"},
    "jinja2": {"data", "reporting"},
    "pydantic": {"spec", "adapters", "data", "records"},
}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TEMPLATE = SRC / "template"  # what `loralab init` writes is the user's, and on no floor
FILES = sorted(path for folder in (SRC, PLUGIN) for path in folder.rglob("*.py") if TEMPLATE not in path.parents)


def room(path):
    if PLUGIN in path.parents:
        return "hydra_plugins"
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC.parent)))
def test_imports_point_down(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "loralab" and rest:
            there = rest.split(".")[0]
            if there in ("__version__", here):
                continue
            assert FLOOR[there] < FLOOR[here], f"{path.name} ({here}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC.parent)))
def test_libraries_stay_behind_their_fences(path):
    used = {name.split(".")[0] for name in imports(path)}
    for library, rooms in FENCES.items():
        assert library not in used or room(path) in rooms, f"{library} in {path}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC.parent)))
def test_a_file_says_what_it_is_and_a_function_fits_on_a_screen(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"
    assert path.name not in ("utils.py", "helpers.py", "common.py")
    assert len(path.read_text().splitlines()) <= 350
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC.parent)))
def test_nothing_prints_but_the_command_line(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = any(isinstance(called, ast.Name) and called.id == "print" for called in calls)
    assert not prints or room(path) == "cli", f"{path} prints"
