"""The words of the command line, and what each command gives back."""

import io
import json
import logging
import os
import re
import resource
import shlex
import subprocess
import sys

import pytest

from loralab.cli import main
from loralab.records import record, schema
from loralab.training.module import FineTuner


def test_flags_may_stand_anywhere():
    words = main.parse(["--json", "count", "a=1", "--debug", "b=2"])
    assert (words.command, words.words) == (main.COMMANDS["count"], ["a=1", "b=2"])
    assert (words.json, words.debug, words.fresh) == (True, True, False)
    for given in (["--resume", "a b", "sweep", "--fresh"], ["sweep", "--fresh", "x=1", "--resume=a b"]):
        words = main.parse(given)
        assert (words.command.name, words.resume, words.fresh) == ("sweep", "a b", True)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["doctor", "-h"]])
def test_help_answers_in_half_a_second_and_imports_nothing_heavy(words):
    code = (
        f"import sys; from loralab.cli import main as cli; cli.run({words}); "
        "print(*(name in sys.modules for name in ('torch', 'hydra', 'rich', 'filelock')))"
    )
    best, out = 9.0, ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own CPU time: others may be busy too
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if best < 0.5:
            break
    assert out.splitlines()[-1] == "False False False False"
    assert f"loralab {words[0] if len(words) > 1 else 'train'}" in out
    assert best < 0.5


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--help"], 0), (["train", "--help"], 0), (["--version"], 0)])
def test_help_and_version_are_not_errors(words, code, capsys):
    assert main.run(words) == code
    assert "loralab" in capsys.readouterr().out


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_help_of_a_command_speaks_of_it(name, capsys):
    assert main.run([name, "--help"]) == 0
    text, command = capsys.readouterr().out, main.COMMANDS[name]
    assert text.startswith(f"usage: loralab {name}")
    assert all(flag.names[-1] in text for flag in command.flags)
    assert "writes: " in text
    assert 2 <= len(command.examples) <= 3
    for example in command.examples:
        parsed = main.parse(shlex.split(example)[1:])
        assert (example in text, parsed.command) == (True, command)


def test_the_list_of_commands_is_whole_and_as_wide_as_a_screen(capsys):
    assert main.run([]) == 0
    text = capsys.readouterr().out
    assert all(f"loralab {command.name}" in text and command.summary in text for command in main.COMMANDS.values())
    assert max(map(len, text.splitlines())) <= 120


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder of yaml files with an option that loralab's lack, in a folder with a space."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my conf"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "small.yaml").write_text("defaults: [lora]\nr: 3\n")
    return folder


@pytest.mark.parametrize("flags", [["-cd", "my conf"], ["--config-dir=my conf"]])
def test_a_folder_of_yaml_files_is_searched_by_trials_of_a_pack(tiny_arguments, own_folder, flags):
    words = [word for word in tiny_arguments if not word.startswith("adapter")]
    assert main.run(["train", *flags, "-m", *words, "adapter=small", "seed=0,1", "hydra.sweep.dir=s"]) == 0
    stored = [record.read(path.parent) for path in (own_folder.parent / "s").glob("*/result.json")]
    assert [one["config"]["adapter"]["r"] for one in stored] == [3, 3]


@pytest.mark.parametrize("command", ["plan", "count", "quantize", "train"])
def test_a_folder_of_yaml_files_is_searched_before_loralabs_by_commands_that_hydra_does_not_run(
    own_folder, capsys, command
):
    (own_folder / "quantization").mkdir()
    (own_folder / "quantization" / "nf4.yaml").write_text("defaults: [int8_absmax]\n")  # in the place of loralab's nf4
    words = {
        "plan": ["adapter=small", "plan.device=cpu", "--json"],
        "count": ["adapter=small", "quantization=nf4", "--json"],
        "quantize": ["quantization=nf4", "study.weights=gauss", "study.shape=[64,64]", "logger=none", "--json"],
        "train": ["--preview", "adapter=small", "data.limit=4"],
    }[command]
    assert main.run([command, "--config-dir", "my conf", *words]) == 0
    printed = capsys.readouterr().out
    if command == "count":
        assert main.run(["count", "adapter.r=3", "--json"]) == 0
        unquantized = json.loads(capsys.readouterr().out)
        assert json.loads(printed)["trainable_parameters"] == unquantized["trainable_parameters"]
    elif command == "quantize":
        assert list(json.loads(printed)["schemes"]) == ["int8_absmax"]
        schemes = ["~study.schemes", "+study.schemes={nf4: {}, fp4: {}}"]
        assert main.run(["quantize", "-cd", "my conf", *words[1:], *schemes]) == 0
        found = {name: row["settings"]["name"] for name, row in json.loads(capsys.readouterr().out)["schemes"].items()}
        assert found == {"nf4": "int8_absmax", "fp4": "fp4"}


@pytest.mark.parametrize("command", ["train", "plan", "count", "quantize"])
def test_a_folder_of_yaml_files_that_is_not_there_is_exit_2(own_folder, capsys, command):
    assert main.run([command, "-cd", "nowhere"]) == 2
    assert "--config-dir nowhere: there is no such folder" in capsys.readouterr().err


def test_another_primary_configuration_is_shown_by_its_name(capsys):
    assert main.run(["train", "-cn", "quantize", "--cfg", "job"]) == 0
    assert "study:" in capsys.readouterr().out
    assert main.run(["train", "--config-name=quantise", "--cfg", "job"]) == 2


def test_hydras_own_help_is_hydras(capsys):
    assert main.run(["train", "--hydra-help"]) == 0
    assert "Hydra" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("loralab ", {"train", "doctor"}, {"--json"}),
        ("loralab tr", {"train"}, set()),
        ("loralab count --", {"--json", "--debug", "--budget"}, {"--fresh", "-m"}),
        ("loralab train adapter=", {"adapter=lora", "adapter=full"}, {"train"}),
        ("loralab train --fresh -m optimizer.l", {"optimizer.lr="}, set()),
        ("/usr/bin/loralab plan model=tiny quantization=nf", {"quantization=nf4"}, set()),
        ("loralab sweep ", {"rank", "paper/qlora_table2"}, set()),
        ("loralab sweep rank trainer.max", {"trainer.max_steps="}, {"rank"}),
        ("loralab report ", set(), {"rank", "train"}),
    ],
)
def test_a_shell_completes_commands_flags_sweeps_and_settings(monkeypatch, capsys, line, some, none):
    monkeypatch.setenv("COMP_LINE", line)
    assert main.run(["-sc", "query=bash"]) == 0
    answer = set(capsys.readouterr().out.split())
    assert (some <= answer, answer & none) == (True, set())


def test_the_script_of_the_completion_is_hydras(capsys):
    assert main.run(["-sc", "install=bash"]) == 0
    assert "hydra_bash_completion loralab" in capsys.readouterr().out
    assert main.run(["--shell-completion", "install=tcsh"]) == 2
    assert "valid: install=bash" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("command", ["doctor", "count", "plan"])
def test_a_terminal_gets_colours_and_a_pipe_none(monkeypatch, capsys, command):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = [command, *([] if command == "doctor" else ["plan.device=cpu", "logger=none"])]
    assert main.run(words) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert all(line == line.rstrip() for line in plain.splitlines())
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    assert main.run(words) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    assert max(map(len, text.splitlines())) <= 60
    assert ("\x1b" in screen.getvalue()) == (command != "count")


def test_a_run_folder_holds_what_the_contract_lists(tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", *tiny_arguments, "hydra.run.dir='a run'"]) == 0
    folder = tmp_path / "a run"
    names = {path.name for path in folder.iterdir()}
    assert {"result.json", "metrics.jsonl", "config.yaml", "adapter", "train.log"} <= names
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_spec.json"}
    assert {p.name for p in (folder / "adapter").iterdir()} == files
    stored = record.read(folder)
    assert (stored["status"], stored["time"]["steps"], stored["config"]["adapter"]["r"]) == ("completed", 2, 2)
    assert all(record.blank("x")[section].keys() <= stored[section].keys() for section in schema.KEYS)


def test_preview_shows_rows_and_leaves_nothing_behind(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", "--preview", *tiny_arguments]) == 0
    out = capsys.readouterr().out
    assert "training row 1" in out
    assert "prompt" in out
    assert "target" in out
    assert main.run(["train", "-m", "--preview", *tiny_arguments, "adapter.r=2,4"]) == 0
    assert capsys.readouterr().out.startswith("2 trials in runs/")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["5x", "0", "-3", "1e5", ""])
def test_a_budget_that_is_no_number_is_refused(word, capsys):
    assert main.run(["count", f"--budget={word}"]) == 2
    assert "--budget" in capsys.readouterr().err


def test_count_finds_the_rank_of_a_budget(tiny_arguments, capsys):
    words = [word for word in tiny_arguments if not word.startswith(("hydra", "logger", "adapter.r="))]
    assert main.run(["count", *words, "adapter.r=5", "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert main.run(["count", *words, "--json", "--budget", str(wanted["adapter_parameters"])]) == 0
    assert json.loads(capsys.readouterr().out) == {"adapter.r": 5, **wanted}


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


def test_ls_lists_one_folder(capsys):
    assert main.run(["ls", "a", "b"]) == 2
    assert "ls lists one folder and was given 2" in capsys.readouterr().err


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


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_a_fault_of_our_own_in_a_trial_says_where_with_debug_and_how_to_see_it_without(
    tiny_arguments, tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.setattr(logging.getLogger("loralab.running.runner"), "level", logging.NOTSET)  # as it was, afterwards

    def broken(self, batches, index):
        raise RuntimeError("a fault in training_step")

    monkeypatch.setattr(FineTuner, "training_step", broken)
    assert main.run(["train", *tiny_arguments, f"hydra.run.dir={tmp_path}", *flags]) == 1
    shown = "".join(capsys.readouterr())
    assert "a fault in training_step" in shown
    assert ("in broken" in shown) == bool(flags)
    assert (main.OWN_FAULT in shown) != bool(flags)


def test_a_wrong_value_is_refused_without_transformers(tmp_path):
    code = (
        "import sys; from loralab.cli import main; codes = [main.run(['train', word]) for word in sys.argv[1:]];"
        "print(codes, {'transformers', 'lightning'} & set(sys.modules))"
    )
    called = [sys.executable, "-c", code, "adapter.r=-1", "optimizer.lr=-1"]
    done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[2, 2] set()\n"
    assert all(name in done.stderr for name in ("adapter.r", "optimizer.lr"))
