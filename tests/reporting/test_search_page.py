"""The report of a search: points best first, the best so far, what ending early saved; nothing is compared."""

import json
import random

import pytest
from stored import figure_of

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting.report import report

COUNT, RUNG, STEPS = 20, 15, 60


def write_search(root, synthetic, mode="min"):
    """A made-up search of 20 points, of which every fourth ended early and one diverged; the scores, in order."""
    trials, scores = [], []
    for number in range(COUNT):
        noise = random.Random(number)
        lr, r = 10 ** noise.uniform(-4, -1), noise.choice([2, 8])
        stored = synthetic("none", r, 0)
        stored["config"]["optimizer"]["lr"], stored["config"]["metric_mode"] = lr, mode
        score = noise.uniform(2, 4)
        stored.update(trial=f"t{number:02}", metrics={"val/loss": score, "test/loss": score + 0.1})
        if number % 4 == 3:
            pause = {"until": 0.25, "step": RUNG, "of": STEPS, "metrics": {"val/loss": score}}
            stored.update(status="pruned", metrics={}, pauses=[pause])
            stored["stopped_early"] = {"step": RUNG, "metric": None, "best": None, "why": "worse than the median"}
        if number == 5:
            stored.update(status="diverged", metrics={}, error="the loss is not finite")
        scores.append(score if stored["status"] == "completed" else None)
        record.write(root / stored["trial"], stored)
        trials.append({"trial": stored["trial"], "folder": stored["trial"], "status": stored["status"]})
    space = {
        "optimizer.lr": {"low": 1e-4, "high": 0.1, "log": True, "whole": False},
        "adapter.r": {"choices": ["2", "8"]},
    }
    about = {"sampler": "tpe", "n_trials": COUNT, "batch": 4, "space": space, "points": COUNT, "complete": 14}
    about |= {"pruned": 5, "infeasible": 1, "failed": 0, "refused": [{"point": ["adapter.r=8"], "excess_gib": 1.5}]}
    about["importance"] = {"optimizer.lr": 0.75, "adapter.r": 0.25}
    axes = {"optimizer.lr": [], "adapter.r": ["2", "8"]}
    record.write_sweep(root, {"name": "found", "question": "?", "axes": axes, "trials": trials, "search": about})
    return scores


@pytest.mark.parametrize(("mode", "better"), [("min", min), ("max", max)])
def test_the_best_so_far_the_order_and_the_steps_are_those_of_the_records(tmp_path, synthetic, mode, better):
    scores = write_search(tmp_path / "s", synthetic, mode)
    done = report(tmp_path / "s")
    known = [score for score in scores if score is not None]
    stored = json.loads(done.files["results.json"].read_text())
    assert [arm["mean"] for arm in stored["arms"] if arm["mean"] is not None] == sorted(known, reverse=mode == "max")
    assert stored["answer"].startswith("Of 14 completed points of 20 the best by val/loss is lr = ")
    assert (
        f": {better(known):.4f} (test/loss {better(known) + 0.1:.4f}); it was point {scores.index(better(known)) + 1}."
        in stored["answer"]
    )
    assert (stored["search"]["steps"], stored["search"]["steps_without_pruning"]) == (14 * STEPS + 5 * RUNG, 19 * STEPS)
    page = done.index.read_text()
    drawn = figure_of(page, "search")["spec"]["datasets"]
    expected, best = [], None
    for number, score in enumerate(scores, 1):
        best = score if best is None else best if score is None else better(best, score)
        expected.append({"number": number, "best": best})
    assert drawn["best"] == expected
    assert {row["number"]: row["value"] for row in drawn["points"] if row["state"] == "completed"} == {
        number: score for number, score in enumerate(scores, 1) if score is not None
    }
    assert sum(row["state"] == "ended early" for row in drawn["points"]) == 5


def test_points_are_ranked_and_nothing_of_them_is_compared(tmp_path, synthetic):
    write_search(tmp_path / "s", synthetic)
    results = read_results(tmp_path / "s")
    (comparison,) = comparisons(results)
    assert not any(arm.baseline or arm.best or arm.difference for arm in comparison.arms)
    done = report(tmp_path / "s")
    text = " ".join(done.table.split())
    for said in (
        "A search by tpe, 4 points at a time: 20 of 20 points were asked for (14 complete, 5 ended early, 1 diverged",
        "1 more points were predicted to need up to 1.5 GiB too much, and were not trained",
        "By ending points early 915 of 1,140 trial-steps were made, 20% fewer",
        "What the best points differ in from all of them (PED-ANOVA): lr 75%, r 25%",
    ):
        assert said in text
    for unsaid in ("baseline", "No single best row", "cannot be told apart"):
        assert unsaid not in text
    names = {figure.name for figure in done.figures}
    assert {"search", "search_lr", "search_r", "search_importance"} <= names
    assert not names & {"metric", "differences", "heat"}
