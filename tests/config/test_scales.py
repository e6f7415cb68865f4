"""``scale=`` chooses between the scales of one sweep file, and is no part of what a trial is."""

from pathlib import Path

import pytest

from loralab.cli import main
from loralab.cli.main import parse
from loralab.cli.sweep import begun_in, sweep_arguments
from loralab.config import sweep_files
from loralab.config.build import trial_id
from loralab.config.compose import compose, plain, sweep_axes
from loralab.records import record
from loralab.scheduling.sweep_file import calls_of

FILE = """# @package _global_
defaults:
  - override /schedule: linear
sweep:
  question: Does it matter?
  fixed: all else
  claims: [2 <= 1]
adapter:
  lora_alpha: ${loralab.mul:2,${adapter.r}}
scales:
  mini:
    trainer: {max_steps: 2}
    hydra: {sweeper: {params: {adapter.r: [1, 2], seed: [0]}}}
  paper:
    defaults:
      - override /model: roberta_large
      - override /quantization: nf4
    sweep: {fixed: nothing, claims: [0.1 <= 0]}
    model: {max_length: 128}
    adapter: {target_modules: [query, value]}
    hydra: {sweeper: {params: {adapter.lora_dropout: [0.0, 0.1], adapter.r: [4, 8, 16]}}}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "own.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sweeps" / "own.yaml"


def test_each_scale_has_its_axes_groups_and_settings_over_the_files_own(file):
    mini = plain(compose(["+sweeps=own", "adapter.r=2"]))
    paper = plain(compose(["+sweeps=own@paper", "adapter.r=2"]))
    assert (mini["schedule"]["kind"], paper["schedule"]["kind"]) == ("linear", "linear")
    assert (mini["adapter"]["lora_alpha"], paper["adapter"]["lora_alpha"]) == (4, 4)
    assert (mini["model"]["name_or_path"], paper["model"]["name_or_path"]) == ("loralab/tiny", "roberta-large")
    assert (paper["quantization"]["quant_type"], paper["model"]["max_length"]) == ("nf4", 128)
    assert paper["adapter"]["target_modules"] == ["query", "value"]
    assert (mini["trainer"]["max_steps"], paper["trainer"]["max_steps"]) == (2, 200)
    assert (mini["sweep"]["scale"], mini["sweep"]["claims"]) == ("mini", ["2 <= 1"])
    assert (paper["sweep"]["scale"], paper["sweep"]["claims"], paper["sweep"]["fixed"]) == (
        "paper",
        ["0.1 <= 0"],
        "nothing",
    )
    assert not {"scale", "scales"} & {*mini, *paper}
    assert sweep_files.axes(file) == {"adapter.r": "1,2", "seed": "0"}
    assert sweep_files.axes(file, "paper") == {"adapter.lora_dropout": "0.0,0.1", "adapter.r": "4,8,16"}
    assert (sweep_axes("own"), sweep_axes("own@paper")) == (
        ["adapter.r", "seed"],
        ["adapter.lora_dropout", "adapter.r"],
    )


def test_the_word_becomes_part_of_the_choice_and_mini_needs_none(file):
    assert sweep_arguments("own", ["seed=1"])[0] == "+sweeps=own"
    assert sweep_arguments("own", ["scale=mini"])[0] == "+sweeps=own@mini"
    words = sweep_arguments("own", ["scale=paper", "adapter.r=3"])
    assert words[0] == "+sweeps=own@paper"
    assert words[-2:] == ["adapter.lora_dropout=0.0,0.1", "adapter.r=3"]
    assert sweep_arguments("own@mini", ["scale=paper"])[0] == "+sweeps=own@paper"


def test_a_scale_is_no_part_of_a_trial(file):
    named, unnamed = (trial_id(compose([word, "adapter.r=2"])) for word in ("+sweeps=own@mini", "+sweeps=own"))
    same = ["schedule=linear", "adapter.r=2", "adapter.lora_alpha=4", "trainer.max_steps=2"]
    assert named == unnamed == trial_id(compose(same))
    assert trial_id(compose(["+sweeps=own@paper", "adapter.r=2"])) != named


def test_each_scale_has_a_folder_of_its_own(file):
    folders = [sweep_files.load(file, scale).hydra.sweep.dir for scale in (None, "mini", "paper")]
    assert folders == ["runs/own", "runs/own", "runs/own-paper"]


def test_a_begun_sweep_goes_on_at_its_scale(file):
    folder = file.parents[1] / "runs" / "own-paper"
    record.write_sweep(
        folder, {"trials": [], "overrides": ["+sweeps=own@paper", "adapter.r=4,8"], "cwd": str(Path.cwd())}
    )
    (call,) = calls_of(record.read_sweep(folder))
    words = begun_in(folder, call, parse(["sweep", "--resume", str(folder)]), [])
    assert words[:2] == ["+sweeps=own@paper", "adapter.r=4,8"]
    assert plain(compose(["+sweeps=own@paper", "adapter.r=4"]))["sweep"]["scale"] == "paper"


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_a_preview_runs_nothing(file, scale, capsys):
    assert main.run(["sweep", "own", f"scale={scale}", "--preview"]) == 0
    out = capsys.readouterr().out
    assert out.startswith({"mini": "2 trials in runs/own:", "paper": "6 trials in runs/own-paper:"}[scale])
    assert not (file.parents[1] / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["own", "scale=big"], "scale=big is none of sweeps/own.yaml; valid: mini, paper"),
        (["own", "scale=papr"], "did you mean paper?"),
        (["own", "scale="], "scale= is none of"),
        (["rank", "scale=mini"], "has no scales; valid: the sweep without it"),
    ],
)
def test_a_wrong_scale_is_one_paragraph(file, words, said, capsys):
    assert main.run(["sweep", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not (file.parents[1] / "runs").exists()


@pytest.mark.parametrize("scales", ["[mini]", "{}", "{mini: 3}", "3"])
def test_scales_that_are_none_are_refused(file, scales, capsys):
    file.write_text(f"sweep: {{question: Why}}\nscales: {scales}\n")
    assert main.run(["sweep", "own"]) == 2
    assert "is no group of scales" in capsys.readouterr().err
