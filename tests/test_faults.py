"""Every fault of .github/FAULTS.md has a test, and no file of a user's is read in a way that could run code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from loralab.errors import ArtifactError
from loralab.records import record

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SRC = ROOT / "src"
ROWS = [line.strip("| \n").split(" | ") for line in (ROOT / ".github" / "FAULTS.md").read_text().splitlines()]
FAULTS = [row for row in ROWS if row[0].isdigit()]


@cache
def names(path):
    tree = ast.parse((TESTS / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_faults_are_numbered_without_a_gap():
    assert [int(row[0]) for row in FAULTS] == list(range(1, len(FAULTS) + 1))
    assert len(FAULTS) >= 45


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[0])
def test_a_fault_says_what_happens_and_names_tests_that_there_are(row):
    assert len(row) == 4, row
    assert all(cell.strip() for cell in row)
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])
    assert named
    assert [f"{path}::{name}" for path, name in named if name not in names(path)] == []


@cache
def nodes():
    """(file, node) of each import and each call of the whole package."""
    files = {str(path.relative_to(SRC)): ast.walk(ast.parse(path.read_text())) for path in sorted(SRC.rglob("*.py"))}
    return [
        (file, node) for file, tree in files.items() for node in tree if isinstance(node, ast.Call | ast.ImportFrom)
    ]


def calls(owner, function):
    """(file, call) of each call of ``owner.function`` in the package."""
    found = [(file, node) for file, node in nodes() if isinstance(getattr(node, "func", None), ast.Attribute)]
    return [(file, node) for file, node in found if _named(node.func) == (owner, function)]


def _named(attribute):
    return getattr(attribute.value, "id", None), attribute.attr


def imported(module):
    """(file, names) of each ``from module import ...`` in the package, which ``calls`` would not see."""
    found = [(file, node) for file, node in nodes() if isinstance(node, ast.ImportFrom) and node.module == module]
    return [(file, {alias.name for alias in node.names}) for file, node in found]


IN_MEMORY = {"loralab/scheduling/composing.py"}  # unpickles what this process has pickled itself


def test_torch_load_reads_tensors_only_and_nothing_of_the_users_is_unpickled():
    loads = calls("torch", "load")
    assert len(loads) >= 3
    for place, call in loads:
        given = {word.arg: word.value for word in call.keywords}
        only = given.get("weights_only")
        assert isinstance(only, ast.Constant), place
        assert only.value is True, place
    pickled = [place for function in ("load", "loads", "Unpickler") for place, _ in calls("pickle", function)]
    assert set(pickled) <= IN_MEMORY
    assert not [place for place, _ in [*calls("joblib", "load"), *calls("dill", "load"), *calls("yaml", "load")]]
    for module in ("torch", "pickle"):
        assert not [file for file, taken in imported(module) if taken & {"load", "loads", "Unpickler"}]
    for owner in ("np", "numpy"):
        assert not [place for place, call in calls(owner, "load") if call.keywords]  # allow_pickle is false by default


def test_the_code_of_a_model_is_not_run_by_default():
    options = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))]
    assert len(options) > 10
    assert {option.get("trust_remote_code", False) for option in options} == {False}
    from loralab.models.pretrained import Pretrained

    assert Pretrained.trust_remote_code is False


def test_a_record_of_a_newer_version_is_refused(tmp_path):
    record.write(tmp_path, {**record.blank("t"), "schema": record.SCHEMA + 1})
    with pytest.raises(ArtifactError, match="schema 3 is newer than this loralab, which reads up to 2; upgrade"):
        record.read(tmp_path)
