"""``sweep.tune``: every arm at every value, beyond the edge of the grid, decided on validation and scored on test."""

import json
import statistics

import pandas as pd
import pytest

import loralab
from loralab.cli import main
from loralab.records import record

FILE = """# @package _global_
sweep:
  tune: {optimizer.lr: [1e-4, 1e-3]}
  extend: 1
hydra:
  sweeper:
    params:
      adapter.r: 1,2
      seed: [0, 1]
"""


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_arguments, rows):
    """The words of a sweep file of the current folder that tunes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.yaml").write_text(FILE)
    words = [word for word in tiny_arguments if not word.startswith("adapter.r")]
    return ["sweep", "./tuned.yaml", *words, f"data.test={rows['pairs', 'train']}", "data.limit=4"]


def chosen(frame, r, metric):
    """{seed: metric} of an arm at the value whose mean val/loss is least, by pandas alone."""
    arm = frame[frame["adapter.r"] == r]
    best = arm.groupby("optimizer.lr")["val/loss"].mean().idxmin()
    return best, arm[arm["optimizer.lr"] == best].sort_values("seed")[metric].tolist()


def test_each_arm_is_chosen_by_validation_reported_on_test_and_a_second_call_runs_nothing(here, tmp_path, capsys):
    assert main.run(here) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "tuned"
    frame = loralab.results(folder)
    summary = loralab.summary(folder)
    assert list(summary["metric"]) == ["test/loss"] * 2
    for r, (_, row) in zip((1, 2), summary.iterrows(), strict=True):
        rate, scores = chosen(frame, r, "test/loss")
        assert rate == 0.01  # the losses of this model fall up to the end of the grid and beyond
        assert row["scores"] == scores
        assert row["mean"] == pytest.approx(statistics.fmean(scores), rel=1e-12)
    assert sorted(frame["optimizer.lr"].unique()) == [1e-4, 1e-3, 1e-2]
    assert len(frame) == 2 * 2 * 3
    assert "0.01 (greatest)" in said
    assert "their best may lie beyond" in " ".join(said.split())
    decisions = record.read_sweep(folder)["decisions"]
    assert [(one["chosen"], one["next"]) for one in decisions] == [
        *[("optimizer.lr=0.001", ["optimizer.lr=0.01"])] * 2,
        *[("optimizer.lr=0.01", [])] * 2,
    ]
    means = frame[frame["adapter.r"] == 2].groupby("optimizer.lr")["val/loss"].mean()
    assert list(decisions[-1]["means"].values()) == pytest.approx(list(means), rel=1e-12)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert main.run(here) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == before
    capsys.readouterr()
    lost = frame[(frame["adapter.r"] == 1) & (frame["optimizer.lr"] == 0.01)].iloc[0]
    (folder / lost["folder"] / "result.json").unlink()
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    assert capsys.readouterr().err.count("finished before") == 11
    assert record.read_sweep(folder)["decisions"] == decisions
    again = pd.read_csv(folder / "report" / "results.csv")
    assert sorted(again["test/loss"]) == sorted(frame["test/loss"])
    trials = json.loads((folder / "report" / "results.json").read_text())["trials"]
    assert len(trials) == 12


def test_a_preview_shows_arms_scales_and_rates_and_writes_nothing(here, tmp_path, capsys):
    assert main.run([*here, "--preview"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 trials in runs/tuned: 2 arms; lr tuned for each arm.")
    first, second = (line.split() for line in lines[-2:])
    assert first == ["1", "0.0001", "0.001", "16", "0.0016", "0.016", "0", "1", "2", "4"]
    assert second == ["2", "0.0001", "0.001", "8", "0.0008", "0.008", "0", "1", "2", "4"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("+sweep.compare=[optimizer.lr]", "optimizer.lr stands in both sweep.compare and sweep.tune"),
        ("+sweep.compare=[adapter.x]", "sweep.compare names adapter.x, which is no axis of this sweep"),
        ("+sweep.compare=adapter.r", "is no list of axes"),
        ("optimizer.lr=1e-3,2e-3", "optimizer.lr is both given and tuned"),
        ("sweep.tune={optimizer.lr:[1e-3]}", "sweep.tune.optimizer.lr has fewer than two values"),
        ("sweep.tune={optimizer.lr:[1e-3,0.001]}", "fewer than two values"),
        ("sweep.extend=-1", "sweep.extend=-1 is no number of values"),
        ("trainer.test=false", "trainer.test=false: sweep.tune chooses"),
        ("metric=train/loss", "metric"),
        ("metric=test/loss", "metric='test/loss' is not measured by this run"),
        ("hydra/sweeper=basic", "hydra/sweeper=basic does not know sweep.tune"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_written(here, tmp_path, capsys, word, said):
    assert main.run([*here, word]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("runs/*/*/result.json"))


@pytest.mark.parametrize(
    ("split", "said"),
    [(None, "the test split of pairs_train.jsonl is empty"), ("validation", "is its validation split")],
)
def test_without_a_test_split_of_its_own_nothing_is_trained(here, tmp_path, capsys, rows, split, said):
    assert main.run([*here, f"data.test={rows['pairs', split] if split else 'null'}"]) == 3
    assert said in capsys.readouterr().err
    assert {record.read(path.parent)["status"] for path in tmp_path.glob("runs/*/*/result.json")} <= {"failed"}
