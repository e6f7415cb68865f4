"""README.md: its figures lie in blocks that a script measures and writes, each with date, machine and versions."""

import argparse
import datetime
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from loralab.cli import main
from loralab.records import record

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / ".github" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block(name):
    (found,) = re.findall(rf"<!-- figures:{name} -->\n(.*?)<!-- /figures:{name} -->", README, re.DOTALL)
    return found


@pytest.mark.parametrize("name", ["quickstart", "memory", "quantize", "speed", "decision"])
def test_every_block_of_figures_says_when_where_and_with_which_versions(name):
    assert re.search(r"\d+ [A-Z][a-z]+ 20\d\d, .+ x \d+, .*torch \d+\.\d+", block(name))


def test_the_script_fills_every_block_of_the_readme(figures):
    names = set(re.findall(r"<!-- figures:(\w+) -->", README))
    assert names == {"quickstart", "memory", "plans", "quantize", "speed", "decision"}
    text = figures.fill(README, dict.fromkeys(names, "new"))
    assert text.count("-->\nnew\n<!--") == len(names)


def test_filling_touches_the_named_block_alone(figures):
    text = "a\n<!-- figures:one -->\nold\n<!-- /figures:one -->\nb\n<!-- figures:two -->\nkept\n<!-- /figures:two -->\n"
    assert figures.fill(text, {"one": r"\1 new"}) == text.replace("old", r"\1 new")


def test_a_block_that_is_not_there_is_an_error(figures):
    with pytest.raises(ValueError, match="figures:nowhere"):
        figures.fill(README, {"nowhere": ""})


def test_the_stamp_names_machine_threads_and_versions(figures):
    machine = {"cpu": "EPYC x 2", "gpu": None, "threads": 2, "versions": {"torch": "2.13.0", "wandb": "0.31.0"}}
    assert figures.stamp(machine, datetime.date(2026, 11, 2)) == "2 November 2026, EPYC x 2, 2 threads, torch 2.13.0"


def test_memory_counts_each_measurement_once(figures):
    def one(predicted, measured):
        memory = {"predicted_peak_bytes": predicted, "measured_peak_bytes": measured}
        return {"memory": memory, "environment": {"cpu": "c", "versions": {}}}

    said = figures.memory([one(100, 100), one(100, 100), one(110, 100), one(None, 5)])
    assert "2 passes: 1.000 to 1.100" in said


def test_ratios_leave_out_loralab_itself_and_name_what_failed(figures):
    row = {"what": "step", "unit": "ms", "quartiles": [1.0, 3.0], "measurements": 5}
    rows = [
        {**row, "name": "loralab", "ratio": 1.0},
        {**row, "name": "PEFT", "ratio": 0.97, "loss_difference": {"first": 0.0, "largest": 2e-6}},
        {**row, "name": "other", "ratio": None},
    ]
    said = figures.ratios({"parts": {"step": {"rows": rows, "error": "no room"}}})
    assert "| step | PEFT | 0.97 | 1 to 3 ms | 5 times |" in said
    assert "at most: PEFT 2.0e-06." in said
    assert "Not measured: step: no room" in said
    assert "| loralab |" not in said
    assert "other" not in said


def test_a_decision_says_how_many_trials_were_measured_and_whether_the_rates_are_the_full_grid_s(figures, tmp_path):
    row = {"what": "4 arms x 500 steps", "steps": 500, "trials": 96, "measured_trials": 96}
    ours = {**row, "name": "loralab", "median": 377.8, "ratio": 1.0, "same_rates": 3, "arms": 4, "trained_steps": 23604}
    peer = {**row, "name": "PEFT", "median": 1692.0, "ratio": 4.479, "measured_trials": 2, "computed": True}
    found = {
        "cpu": "c",
        "threads": 2,
        "versions": {},
        "dtype": "float32",
        "parts": {"decision": {"rows": [peer, ours]}},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    ((name, said),) = figures.decision(argparse.Namespace(bench=str(path), quick=False))
    assert name == "decision"
    assert "| 4 arms x 500 steps | PEFT | 1692 | 4.48 | 2 of 96 trials |" in said
    assert "| 4 arms x 500 steps | loralab | 378 | 1.00 | whole |" in said
    assert "500 steps: 3 of 4 arms have the rate that the full grid chose, after 23,604 trial-steps." in said


def test_the_study_s_rows_are_chosen_by_their_whole_names(figures):
    table = "about\n\nscheme  loss\n------\nnf4  1\nnf4_double  2\n------\nint8 3"
    assert figures.chosen(table, ("scheme", "nf4")) == "about\n\nscheme  loss\n------\nnf4  1\n------"


@pytest.mark.parametrize("group", ["adapter", "quantization", "optimizer", "data", "method"])
def test_the_table_of_groups_names_every_option(group):
    *_, row = re.findall(rf"^\| `\+?{group}` \|(.*)\|$", README, re.MULTILINE)  # after that of sweeps
    options = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    named = set(re.findall(r"`([\w/]+)`", row))
    named |= {f"{name}_tensor" for name in named} if group == "quantization" else set()
    assert options <= named


def test_the_lab_of_the_readme_does_what_its_commands_say(tmp_path, monkeypatch, capsys):
    """Each with fewer steps; its sweep and its tests as they lie: tests/cli/test_init.py."""
    section = README.partition("## Extending it")[2]
    commands, sweep = re.search(r"```console\n(.*?)```.*?```yaml\n(.*?)```", section, re.DOTALL).groups()
    short = ["trainer.max_steps=1", "data.rows=8", "logger=none", "plan.record=false", "callbacks=none"]
    done = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "lab.py").exists()])
    monkeypatch.setitem(sys.modules, "lab", None)  # the tests' own, which is back afterwards
    del sys.modules["lab"]
    for line in commands.splitlines():
        program, *words = shlex.split(line, comments=True)
        done.append(program)
        if program == "cd":
            monkeypatch.chdir(words[0])
            Path("my_sweep.yaml").write_text(sweep)
        elif program == "loralab":
            assert main.run([*words, *(short if words[0] in ("train", "sweep") else [])]) == 0, capsys.readouterr().err
        else:
            assert words == ["-m", "pytest"]
    assert done == ["loralab", "cd", *["loralab"] * 4, "python"]
    mine = [record.read(place) for place in record.find(Path("runs/my_sweep"))]
    targets = [one["config"]["adapter"]["target_modules"] for one in mine if one["seed"] == 1]
    assert sorted(targets, key=str) == [["q_proj", "v_proj"], ["q_proj"], "all-linear"]
    assert {one["choices"]["quantization"] for one in mine} == {"uniform"}
