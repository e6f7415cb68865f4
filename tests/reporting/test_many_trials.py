"""A report of many trials reads each section that they share once, and draws no more lines than can be told apart."""

import json
import sys
from collections import Counter

import pytest

import loralab
from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.reporting import curves, page
from loralab.reporting import report as reporting

RATES = [round(1e-4 * 1.2**step, 8) for step in range(30)]
LINES, TOLD = 20, 8


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory, synthetic):
    """(folder of a learning rate a trial, of the same with 2 seeds)."""
    root, trials = tmp_path_factory.mktemp("many"), []
    for seed in (0, 1):
        for lr in RATES:
            trial = synthetic("none", 2, seed)
            trial["trial"] = f"{lr}-{seed}"
            trial["config"]["optimizer"]["lr"] = lr
            trial["metrics"]["val/loss"] += lr
            folder = root / "two" / trial["trial"]
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(trial))
            rows = [{"step": step, "train/loss": 3 - step * lr, "val/loss": 3.0} for step in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            trials.append({"trial": trial["trial"], "folder": f"../two/{folder.name}", "status": "completed"})
    for name, listed in (("one", trials[: len(RATES)]), ("two", trials)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "sweep.json").write_text(json.dumps({"axes": {"optimizer.lr": RATES}, "trials": listed}))
    return root / "one", root / "two"


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """As many lines as are told apart, for a sweep of 30 rows."""
    monkeypatch.setattr(curves, "MOST_LINES", LINES)
    monkeypatch.setattr(curves, "MOST_TOLD", TOLD)


def calls(folder):
    """How often functions of loralab of each name are called for the report of ``folder``."""
    counts, source = Counter(), loralab.__path__[0]

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(source):
            counts[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        reporting.report(folder)
    finally:
        sys.setprofile(None)
    return counts


def test_the_work_for_a_further_trial_is_bounded(sweeps, monkeypatch):
    monkeypatch.setattr(reporting, "drawn", lambda spec, kind: b"")
    monkeypatch.setattr(page, "bundle", lambda: "")
    one, two = map(calls, sweeps)
    further = {name: (two[name] - one[name]) / len(RATES) for name in two}
    most = {"read": 1, "identity": 1, "canonical": 30, "_settled": 10, "flatten": 8, "brief": 5, "lookup": 150}
    assert {name: further[name] for name in most if further[name] > most[name]} == {}
    assert sum(further.values()) < 1600


def test_of_many_groups_some_are_drawn_and_the_caption_says_so(sweeps):
    (comparison,) = comparisons(read_results(sweeps[1]))
    groups = {f"lr = {arm.values['optimizer.lr']}": [arm] for arm in comparison.arms}
    figure = next(iter(curves.figures(comparison, groups, None, [""])))
    lines = figure.store["metrics"]["train/loss"]["means"]
    drawn = [line["group"] for line in lines]
    assert len(drawn) == len(set(drawn)) == TOLD
    assert [drawn[0], drawn[-1]] == [next(iter(groups)), list(groups)[-1]]
    assert drawn == [name for name in groups if name in drawn]
    assert figure.legends[0].names == drawn
    assert f"Drawn are {TOLD} of {len(RATES)} values of the legend, evenly spaced among them." in figure.caption
    assert f"{2 * TOLD} of {2 * len(RATES)} runs" in figure.caption
    few = dict(list(groups.items())[:LINES])
    figure = next(iter(curves.figures(comparison, few, None, [""])))
    assert "Drawn are" not in figure.caption
    assert len(figure.store["metrics"]["train/loss"]["means"]) == LINES
