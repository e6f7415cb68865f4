"""``sweep.subspace`` computes the directions of every trial and pair of a sweep, and the report has them."""

import json

import pytest

from loralab.analysis import subspace_runs
from loralab.cli import main
from loralab.records import record


@pytest.fixture
def sweep(tiny_arguments, tmp_path, monkeypatch):
    """Runs the shipped sweep on a small random base; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    arguments = [word for word in tiny_arguments if not word.startswith("adapter.r=")]

    def run(*words):
        settings = ["data.limit=6", f"hydra.sweep.dir={tmp_path / 's'}"]
        return main.run(["sweep", "subspace", *arguments, *settings, *words])

    return run


def read(folder):
    """results.json, and {(r, seed): run folder}."""
    trials = {}
    for place in record.find(folder):
        config = record.read(place)["config"]
        trials[config["adapter"]["r"], config["seed"]] = place
    return json.loads((folder / "report" / "results.json").read_text()), trials


def test_trials_and_pairs_are_computed_once_and_again_where_a_trial_is_another(sweep, tmp_path, capsys):
    words = ("adapter.r=1,4", "seed=0,1")
    assert sweep(*words) == 0
    results, trials = read(tmp_path / "s")
    found = results["subspace"]
    assert len(found["trials"]) == 4
    names = {json.loads((place / "result.json").read_text())["trial"]: key for key, place in trials.items()}
    pairs = {(names[one], names[two]): pair["differ_in"] for pair in found["pairs"] for one, two in [pair["trials"]]}
    assert pairs == {
        **{((1, seed), (4, seed)): "rank" for seed in (0, 1)},
        ((1, 0), (4, 1)): "rank and seed",
        **{((r, 0), (r, 1)): "seed" for r in (1, 4)},
    }
    # independent of the tables: the files of the two seeds of r = 4
    other = json.loads((trials[4, 1] / "result.json").read_text())["trial"]
    pair = json.loads((trials[4, 0] / f"subspace_{other}.json").read_text())
    phi = [one["A"]["phi"][3][3] for one in pair["layers"].values()]
    ranks = [
        one["effective_rank"]
        for seed in (0, 1)
        for one in json.loads((trials[4, seed] / "subspace.json").read_text())["layers"].values()
    ]
    out, page = capsys.readouterr().out, (tmp_path / "s" / "report" / "report.md").read_text()
    line = next(line for line in out.splitlines() if line.startswith("r=4 other seed: A "))
    assert f"{sum(phi) / len(phi):.3f} ({4 / 64:.3f})" in line
    lines = [line.split() for line in out.splitlines() if line.startswith("r=4 ")]
    assert lines[0][3] == f"{sum(ranks) / len(ranks):.2f}"
    assert "| r=1 in 4 other seed: A | q_proj | " in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/subspace*.json")}
    assert len(before) == 4 + 5
    assert sweep(*words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/subspace*.json")} == before
    changed = trials[1, 0] / "result.json"
    changed.write_text(changed.read_text() + "\n")
    assert main.run(["report", str(tmp_path / "s")]) == 0
    results, _ = read(tmp_path / "s")
    assert (len(results["subspace"]["trials"]), len(results["subspace"]["pairs"])) == (3, 2)
    assert sweep(*words) == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    assert sum(after[path] != before[path] for path in before) == 1 + 3
    assert len(read(tmp_path / "s")[0]["subspace"]["pairs"]) == 5


def test_what_fails_afterwards_is_a_warning_and_the_report_is_there(sweep, tmp_path, monkeypatch, capsys):
    def fails(*given):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(subspace_runs, "measure", fails)
    assert sweep("adapter.r=1", "seed=0,1", "trainer.max_steps=1") == 0
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("RuntimeError: no such luck") == 2
    results, _ = read(tmp_path / "s")
    assert [trial["status"] for trial in results["trials"]] == ["completed"] * 2
    assert (len(results["subspace"]["trials"]), len(results["subspace"]["pairs"])) == (0, 1)


@pytest.mark.parametrize("word", ["sweep.subspace=4", "sweep.subspace=[q_proj]"])
def test_another_answer_than_yes_or_no_is_refused_before_anything_runs(sweep, tmp_path, word, capsys):
    assert sweep(word, "seed=0,1") == 2
    assert "is no answer; valid: true, false" in capsys.readouterr().err
    assert not (tmp_path / "s" / "sweep.json").exists()


def test_a_sweep_that_asks_for_none_has_none(sweep, tmp_path):
    assert sweep("sweep.subspace=false", "adapter.r=1", "seed=0,1", "trainer.max_steps=1") == 0
    assert "subspace" not in read(tmp_path / "s")[0]
    assert not list(tmp_path.rglob("subspace.json"))
