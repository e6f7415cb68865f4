"""The words of the command line, and what each command gives back."""

import json
import os
import resource
import subprocess
import sys

import pytest

from loralab.cli import main
from loralab.records import record


def test_flags_may_stand_anywhere():
    words = main.parse(["--json", "count", "a=1", "--debug", "b=2"])
    assert (words.command, words.words) == (main.COMMANDS["count"], ["a=1", "b=2"])
    assert (words.json, words.debug, words.fresh) == (True, True, False)
    for given in (["--resume", "a b", "sweep", "--fresh"], ["sweep", "--fresh", "x=1", "--resume=a b"]):
        words = main.parse(given)
        assert (words.command.name, words.resume, words.fresh) == ("sweep", "a b", True)


def test_help_answers_in_half_a_second_and_imports_nothing_heavy():
    code = (
        "import sys; from loralab.cli import main as cli; cli.run(['--help']); "
        "print('torch' in sys.modules, 'hydra' in sys.modules)"
    )
    best, out = 9.0, ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own CPU time: others may be busy too
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert out.splitlines()[-1] == "False False"
    assert "loralab train" in out
    assert best < 0.5


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--help"], 0), (["train", "--help"], 0), (["--version"], 0)])
def test_help_and_version_are_not_errors(words, code, capsys):
    assert main.run(words) == code
    assert "loralab" in capsys.readouterr().out


def test_a_run_folder_holds_what_the_contract_lists(tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", *tiny_arguments, "hydra.run.dir='a run'"]) == 0
    folder = tmp_path / "a run"
    names = {path.name for path in folder.iterdir()}
    assert {"result.json", "metrics.jsonl", "config.yaml", "adapter", "train.log"} <= names
    files = {"adapter_config.json", "adapter_model.safetensors", "adapter_spec.json"}
    assert {p.name for p in (folder / "adapter").iterdir()} == files
    stored = record.read(folder)
    assert (stored["status"], stored["time"]["steps"], stored["config"]["adapter"]["r"]) == ("completed", 2, 2)
    assert all(record.blank("x")[section].keys() <= stored[section].keys() for section in record.SECTIONS)


def test_preview_shows_rows_and_leaves_nothing_behind(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", "--preview", *tiny_arguments]) == 0
    out = capsys.readouterr().out
    assert "training row 1" in out
    assert "prompt" in out
    assert "target" in out
    assert not list(tmp_path.iterdir())


def test_count_gives_one_json_object_that_agrees_with_a_run(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*tiny_arguments, "quantization=nf4"]
    assert main.run(["count", *words, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert main.run(["train", *words, "hydra.run.dir=run"]) == 0
    stored = record.read(tmp_path / "run")
    assert counted["trainable_parameters"] == stored["adapter"]["trainable_parameters"]
    assert counted["quantized_parameters"] == stored["base"]["quantized_parameters"]
    assert counted["total_parameters"] >= stored["base"]["parameters"]


def test_cfg_job_prints_the_configuration_and_runs_nothing(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", *tiny_arguments, "--cfg", "job"]) == 0
    assert "max_steps: 2" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def shown(text):
    return [line for line in text.splitlines() if line.startswith(("r:", "seed:"))]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_cfg_job_of_many_trials_prints_the_firsts_configuration(tiny_arguments, tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny_arguments if not word.startswith("adapter.r=")]
    assert main.run(["train", *words, flag, "adapter.r=2,4", "seed=5,6", "--cfg", "job", "-p", "adapter"]) == 0
    said = capsys.readouterr()
    assert shown(said.out) == ["r: 2"]
    assert "adapter.r=2 seed=5" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--cfg", "job"], ["-c", "job"], ["--info", "config"]])
def test_hydra_shows_what_a_sweep_file_is_made_of(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main.run(["sweep", "quickstart", *words]) == 0
    assert "max_steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["plan", "count", "report", "ls", "doctor", "quantize"])
def test_hydras_flags_are_refused_by_commands_that_do_not_run_through_it(command, capsys):
    assert main.run([command, "--cfg", "job"]) == 2
    assert f"loralab {command} has no --cfg; valid: loralab train, loralab sweep" in capsys.readouterr().err


EVERY = 'lr=0.001,r=8 it\'s "q" (x) [y] {z} d$x~\u00e9\u65e5#&;\\'


@pytest.mark.parametrize(
    "name", [EVERY, *(pytest.param(each, marks=pytest.mark.slow) for each in ("lr=0.001,r=8", "it's {z}", "d$\u65e5"))]
)
def test_folders_and_files_may_have_any_name(tiny_arguments, tmp_path, monkeypatch, rows, name):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / f"{name}.jsonl"
    copy.write_bytes(rows["pairs", "train"].read_bytes())
    words = [word for word in tiny_arguments if not word.startswith("data.train=")]
    words.append(f"data.train={copy.name}")
    assert main.run(["train", *words, f"hydra.run.dir=runs/{name}"]) == 0
    assert record.read(tmp_path / "runs" / name)["config"]["data"]["train"] == copy.name
    assert main.run(["train", "-m", *words, "seed=0,1", f"hydra.sweep.dir=sweeps/{name}"]) == 0
    for stored in (tmp_path / "sweeps" / name).glob("*/result.json"):
        stored.unlink()
    assert main.run(["sweep", "--resume", f"sweeps/{name}"]) == 0
    assert len(list((tmp_path / "sweeps" / name).glob("*/result.json"))) == 2
    assert main.run(["report", f"sweeps/{name}"]) == 0


@pytest.mark.slow
def test_the_same_trial_runs_twice_to_the_same_numbers_in_two_processes(tiny_arguments, tmp_path):
    curves = []
    for name in ("one", "two"):
        words = [sys.executable, "-m", "loralab.cli.main", "train", *tiny_arguments, f"hydra.run.dir={name}"]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=quiet, check=False)
        assert done.returncode == 0, done.stderr
        curves.append((tmp_path / name / "metrics.jsonl").read_text())
    assert curves[0] == curves[1]
