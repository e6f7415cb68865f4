"""``loralab init``: what it writes runs as it lies; it overwrites nothing."""

import json
import sys
from pathlib import Path

import pytest
from forked import Forked

from loralab.cli import main
from loralab.cli.init import TEMPLATE
from loralab.records import record

SHORT = ["trainer.max_steps=5", "data.rows=16", "plan.record=false"]


def test_a_folder_that_holds_something_is_refused_and_stays_as_it_was(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    before = sorted(tmp_path.rglob("*"))
    for words, said in (
        ([str(tmp_path)], "is not empty: it holds file, notes.txt; valid: a folder that is new or empty"),
        ([str(tmp_path / "file")], "is a file; valid: a folder that is new or empty"),
        ([], "needs one folder"),
        (["a", "b"], "needs one folder"),
    ):
        assert main.run(["init", *words]) == 2
        assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_disk(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.run(["init", str(tmp_path / "file" / "lab")]) == 7
    assert "cannot be written" in capsys.readouterr().err


def in_a_process(lab, function, path=()):
    """What ``function`` writes in a process of its own in the folder ``lab`` that imports from ``path`` and what is
    installed; it has to end well."""

    def alone():
        sys.path[:] = [*map(str, path), *(entry for entry in sys.path if entry and not Path(entry, "lab.py").exists())]
        sys.modules.pop("lab", None)  # the tests' own
        sys.stdout = sys.stderr
        return int(function())

    said = lab / "said"
    code = Forked(alone, env={"WANDB_MODE": "disabled"}, cwd=lab, stderr=said).wait(180)
    assert code == 0, said.read_text()
    return said.read_text()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a place") / "my lab"
    assert main.run(["init", str(folder)]) == 0
    return folder


def test_it_writes_the_template_and_says_what_is_next(tmp_path, capsys):
    assert main.run(["init", str(tmp_path)]) == 0  # it is empty
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        path.relative_to(TEMPLATE) for path in TEMPLATE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path("lab.py"), Path("README.md"), Path("sweeps/first.yaml"), Path("tests/test_lab.py")} <= written
    said = capsys.readouterr().out
    assert f"cd {tmp_path}\n  loralab sweep first\n  python -m pytest" in said


def test_its_sweep_runs_as_it_lies(lab):
    """The names of its own classes, from a process that is given no path."""
    in_a_process(lab, lambda: main.run(["sweep", "first", *SHORT]))
    stored = [record.read(place) for place in record.find(lab / "runs" / "first")]
    assert {one["status"] for one in stored} == {"completed"}
    assert {(one["choices"]["adapter"], one["choices"]["quantization"], one["seed"]) for one in stored} == {
        (adapter, scheme, seed) for adapter in ("lora", "scaled") for scheme in ("none", "uniform") for seed in (0, 1)
    }
    assert {one["pack"]["size"] for one in stored} == {4}  # its classes say that they may share a pass
    for one in stored:
        logged = (lab / "runs/first" / one["trial"] / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in logged]
        assert [row["step"] for row in rows if "own/adapter_norm" in row] == [5]
        assert one["metrics"]["val/token_error"] == pytest.approx(1 - one["metrics"]["val/token_accuracy"], abs=1e-6)
        assert {"sweeps/first.yaml", "conf/experiment/sums.yaml", "conf/data/sums.yaml"} <= set(one["code"]["files"])
        assert list(one["code"]["sources"]) == ["lab"]  # also where it is the data set and the metric alone
    uniform = next(one for one in stored if one["choices"]["quantization"] == "uniform")
    none = next(one for one in stored if one["choices"]["quantization"] == "none")
    layers = none["base"]["quantized_parameters"], uniform["base"]["quantized_parameters"]
    assert layers[0] == 0 < layers[1]
    assert 8 < uniform["base"]["bits_per_parameter"] < 8.2
    assert (lab / "runs/first/report/index.html").is_file()


def test_its_tests_pass_as_they_lie(lab):
    said = in_a_process(lab, lambda: pytest.main(["-q", "-p", "no:cacheprovider"]), path=[lab])
    assert "8 passed" in said
