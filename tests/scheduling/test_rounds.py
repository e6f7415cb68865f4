"""The sweeper from the command line: sweep.json, tables and lists of trials that lack an axis, words of Hydra's own."""

import json
import shutil

import pytest

import loralab
from loralab.cli import main
from loralab.cli.sweep import sweep_arguments
from loralab.config.compose import compose
from loralab.records import record
from loralab.scheduling.rounds import of_axes

FILE = """# @package _global_
sweep:
  name: both
  question: Do they move?
  zip: [[adapter.r, optimizer.lr]]
  when:
    quantization.double_quant: {quantization: [nf4]}
hydra:
  sweep: {dir: runs/both}
  sweeper:
    params:
      quantization: none,nf4
      quantization.double_quant: true,false
      adapter.r: [2, 4]
      optimizer.lr: 1e-3,2e-3
"""
ARMS = [("none", None), ("nf4", True), ("nf4", False)]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_arguments):
    """The words of a sweep whose axes are a file's, in a folder that is searched."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "sweeps").mkdir(parents=True)
    (tmp_path / "mine" / "sweeps" / "both.yaml").write_text(FILE)
    words = [word for word in tiny_arguments if not word.startswith("adapter.r")]
    return ["--config-dir", "mine", *words, "+sweeps=both", "data.limit=4"]


def test_zip_and_when_of_a_file_are_in_sweep_json_records_report_and_list(here, tmp_path, capsys):
    assert main.run(["train", "-m", *here]) == 0
    capsys.readouterr()
    folder = tmp_path / "runs" / "both"
    sweep = record.read_sweep(folder)
    assert sweep["axes"] == {
        **{"quantization": ["none", "nf4"], "quantization.double_quant": ["True", "False"]},
        **{"adapter.r": ["2", "4"], "optimizer.lr": ["0.001", "0.002"]},
    }
    assert list(sweep["axes"]) == ["quantization", "quantization.double_quant", "adapter.r", "optimizer.lr"]
    assert sweep["zip"] == [["adapter.r", "optimizer.lr"]]
    stored = [record.read(folder / entry["folder"]) for entry in sweep["trials"]]
    keys = ("adapter.r", "optimizer.lr")
    losses = {}
    for one in stored:
        config, scheme = one["config"], one["choices"]["quantization"]
        place = (scheme, config["quantization"].get("double_quant"), config["adapter"]["r"], config["optimizer"]["lr"])
        losses[place] = one["metrics"]["val/loss"]
    assert losses.keys() == {(*arm, *pair) for arm in ARMS for pair in ((2, 1e-3), (4, 2e-3))}
    frame = loralab.results(folder)
    assert set(zip(*(frame[key] for key in keys), strict=True)) == {(2, 1e-3), (4, 2e-3)}
    report = json.loads((folder / "report" / "results.json").read_text())
    first = ("none", None, 2, 1e-3)
    against = {  # like with like: only what moves together, or is not there, differs beside the one axis
        ("none", None, 4, 2e-3): first,
        ("nf4", True, 2, 1e-3): first,
        ("nf4", True, 4, 2e-3): ("none", None, 4, 2e-3),
        ("nf4", False, 2, 1e-3): ("nf4", True, 2, 1e-3),
        ("nf4", False, 4, 2e-3): ("nf4", True, 4, 2e-3),
    }
    for arm in report["arms"]:
        scheme, double, r, lr = (arm["values"][axis] for axis in sweep["axes"])
        place = (scheme, json.loads({"-": "null"}.get(double, double)), int(r), float(lr))
        assert (arm["n"], arm["mean"]) == (1, losses[place])
        assert arm["baseline"] == (place == first)
        if place != first:
            wanted = losses[place] - losses[against.pop(place)]
            assert arm["difference"]["mean"] == pytest.approx(wanted, abs=1e-12)
    assert not against
    assert main.run(["ls", "runs/both"]) == 0
    assert "quantization=none double_quant=-" in " ".join(capsys.readouterr().out.split())
    # a second call runs nothing; one that is lost is found by what it was called with
    gone = next(entry for entry in sweep["trials"] if "quantization=none" in entry["overrides"])
    shutil.rmtree(folder / gone["folder"])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert main.run(["report", "runs/both"]) == 0
    report = json.loads((folder / "report" / "results.json").read_text())
    assert sorted(len(arm["trials"]) for arm in report["arms"]) == [1] * 6
    assert main.run(["sweep", "--resume", "runs/both"]) == 0
    assert (folder / gone["folder"] / "result.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_cfg_shows_the_first_trial_without_an_axis_that_it_lacks(here, capsys):
    words = [word for word in here if word not in ("--config-dir", "mine", "+sweeps=both")]
    zipped = ["adapter.r=2,4", "optimizer.lr=1,2", "+sweep.zip=[adapter.r,optimizer.lr]"]
    left_out = "+sweep.when={quantization.double_quant:{quantization:nf4}}"
    axes = ["quantization=none,nf4", "quantization.double_quant=true,false", *zipped, left_out]
    assert main.run(["train", "-m", *words, *axes, "--cfg", "job", "-p", "quantization"]) == 0
    out, err = capsys.readouterr()
    assert "double_quant" not in out
    assert "the first trial's: quantization=none adapter.r=2 optimizer.lr=1\n" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+sweep.zip=[[adapter.r,seed]]"], "adapter.r has 2, seed has 3 values"),
        (["+sweep.zip=[[adapter.r,sed]]"], "did you mean seed?"),
        (["+sweep.when={adapter.r:{seed:7}}"], "which is so in no trial"),
        (["+sweep.when={adapter.r:{seed:1},seed:{adapter.r:2}}"], "is circular"),
        (["optimizer.lr=interval(0,1)"], "an interval has no values"),
        (["+sweep.zip=[adapter.r,seed]", "hydra/sweeper=basic"], "hydra/sweeper=basic does not know sweep.zip; valid"),
        (["+sweep=3"], "sweep=3 is no group of settings"),
    ],
)
def test_what_cannot_be_swept_ends_with_2_before_anything_is_written(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", "-m", "adapter.r=2,4", "seed=0,1,2", "hydra.sweep.dir=s", *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("sweep.json"))


def test_hydras_own_sweeper_and_launcher_take_over_where_words_or_a_file_name_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "sweeps").mkdir(parents=True)
    (tmp_path / "mine" / "sweeps" / "plain.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/sweeper: basic\n  - override /hydra/launcher: basic\n"
    )
    chosen = {}
    for name, words in (
        ("words", ["hydra/sweeper=basic"]),
        ("file", ["--config-dir", "mine", "+sweeps=plain"]),
        ("", []),
    ):
        assert main.run(["train", "-m", *words, "--cfg", "hydra", "-p", "hydra.runtime.choices"]) == 0
        lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
        chosen[name] = (lines["hydra/sweeper"], lines["hydra/launcher"])
    assert chosen == {"words": ("basic", "packed"), "file": ("basic", "basic"), "": ("loralab", "packed")}


def test_a_sweep_file_may_be_narrowed_to_where_its_condition_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(
        "# @package _global_\nsweep:\n  when: {quantization.double_quant: {quantization: nf4}}\n"
        "hydra: {sweeper: {params: {quantization: [none, nf4], quantization.double_quant: [true, false]}}}\n"
    )
    words = sweep_arguments("mine", ["quantization=none"])
    found = of_axes(compose(["+sweep.when={quantization.double_quant:{quantization:nf4}}"]), words)
    assert [[word for word in trial if word.startswith("quant")] for trial in found] == [["quantization=none"]]


def test_a_condition_decides_before_the_configuration_is_composed():
    """Composed with the axis that is left out, quantization=none would be refused: it has no such key."""
    master = compose(["+sweep.when={quantization.double_quant:{quantization:nf4}}"])
    found = of_axes(master, ["quantization=none,nf4", "quantization.double_quant=true"])
    assert found == [["quantization=none"], ["quantization=nf4", "quantization.double_quant=True"]]
    for words in found:
        assert compose(words).quantization
