"""Every form of a report says who is compared with whom, who is best, and why that cannot be told."""

import csv
import json
import statistics
from html import unescape

import pytest

from loralab.analysis.arms import arms, comparisons
from loralab.analysis.paired import t_quantile
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting.listing import listing
from loralab.reporting.report import report


def said(done):
    """(name, text) of each of the report's four forms, blanks made one."""
    texts = {name: unescape(path.read_text()) for name, path in done.files.items() if name != "results.csv"}
    return {name: " ".join(text.split()) for name, text in {**texts, "terminal": done.table}.items()}


GRID = {(r, seed): 1.0 + 0.1 * seed + 0.01 * (r == 8) + 0.001 * seed * r for r in (2, 8) for seed in (0, 1, 2)}


def set_in(section, key, value):
    def change(trial, r, seed):
        if seed == 2:
            target = trial[section]
            for part in key.split(".")[:-1]:
                target = target[part]
            target[key.split(".")[-1]] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("versions.torch", "2.12.0", "torch 2.12.0"),
        ("versions.bitsandbytes", "0.49.0", "bitsandbytes 0.49.0"),
        ("cpu", "Another CPU, 2 cores", "Another CPU, 2 cores"),
        ("threads", 4, "threads 4"),
    ],
)
def test_trials_of_two_environments_share_no_mean_and_no_difference_and_are_named(write_runs, key, value, named):
    root = write_runs(GRID, set_in("environment", key, value))
    done = report(root)
    result = json.loads(done.files["results.json"].read_text())
    assert [arm["n"] for arm in result["arms"]] == [2, 1, 2, 1]
    assert [arm["baseline"] for arm in result["arms"]] == [True, True, False, False]
    differences = [arm["difference"]["seeds"] for arm in result["arms"] if arm["difference"]]
    assert differences == [["0", "1"], ["2"]]
    assert not any(arm["best"] for arm in result["arms"])
    for name, text in said(done).items():
        assert named in text, name
        assert "2 environments" in text, name


@pytest.mark.parametrize(("asked", "environments"), [("auto", 2), ("bf16-mixed", 1)])
def test_what_auto_precision_came_to_is_part_of_the_environment_and_a_given_one_a_setting(
    write_runs, asked, environments
):
    """A record that does not say it, of seeds 0 and 1 here, is of a time when auto was float32."""

    def change(trial, r, seed):
        trial["config"].setdefault("trainer", {})["precision"] = asked
        if seed == 2:
            trial["base"]["precision"] = "bf16-mixed"

    done = report(write_runs(GRID, change))
    result = json.loads(done.files["results.json"].read_text())
    assert [arm["n"] for arm in result["arms"]] == ([2, 1, 2, 1] if environments == 2 else [3, 3])
    for name, text in said(done).items():
        assert ("precision bf16-mixed" in text) == (environments == 2), name


def test_data_rewritten_between_two_runs_of_one_command_gives_two_tables_and_loses_nothing(write_runs):
    write_runs({(2, 0): 1.0}, name="before")

    def rewritten(trial, r, seed):
        trial["trial"] = "before-2-0"
        trial["data"]["fingerprint"] = "e" * 64

    done = report(write_runs({(2, 0): 2.0}, rewritten, name="after"))
    result = json.loads(done.files["results.json"].read_text())
    assert sorted(arm["mean"] for arm in result["arms"]) == [1.0, 2.0]
    assert len(result["trials"]) == 2
    lines = list(csv.DictReader(done.files["results.csv"].read_text().splitlines()))
    assert sorted((line["val/loss"], line["data.fingerprint"][0]) for line in lines) == [("1.0", "d"), ("2.0", "e")]
    assert "repeated" not in done.table
    for name, text in said(done).items():
        assert "the data changed between the runs, though the settings are the same" in text, name
        assert "d" * 64 in text, name
        assert "e" * 64 in text, name


@pytest.mark.parametrize("schema", sorted({1, record.SCHEMA}))
def test_a_new_arm_on_new_weights_is_not_compared_with_old_ones(write_runs, schema):
    def change(trial, r, seed):
        trial["schema"] = schema
        if r == 8:
            trial["base"]["fingerprint"] = "0" * 16

    done = report(write_runs(GRID, change))
    result = json.loads(done.files["results.json"].read_text())
    assert [arm["difference"] for arm in result["arms"]] == [None, None]
    assert all("the base's weights changed between the runs" in text for text in said(done).values())


def test_training_files_rewritten_under_the_same_targets_are_told_by_their_bytes(write_runs):
    def change(trial, r, seed):
        trial["config"]["data"].update(train="a.jsonl", validation="b.jsonl", prompt="{a}" + " " * r)
        trial["data"].update(targets="c" * 16, fingerprint=f"{r}" * 16, source="1" * 16 if r == 2 else "2" * 16)

    assert len(comparisons(read_results(write_runs(GRID, change)))) == 2
    assert "the data files changed between the runs" in report(write_runs(GRID, change)).table.replace("\n  ", " ")


def cut_at(targets, truncated=20):
    def change(trial, r, seed):
        trial["config"]["model"]["max_length"] = 16 if r == 2 else 64
        trial["data"].update(targets=targets.get(r), truncated=truncated)

    return change


def test_losses_over_targets_that_were_cut_differently_stand_in_two_tables_with_the_reason(write_runs):
    done = report(write_runs(GRID, cut_at({2: "a" * 16, 8: "b" * 16})))
    result = json.loads(done.files["results.json"].read_text())
    assert [arm["difference"] for arm in result["arms"]] == [None, None]
    for name, text in said(done).items():
        assert "other target tokens, cut at model.max_length = 16 | 64" in text, name


def test_the_lowest_mean_is_no_winner_where_its_interval_holds_0(write_runs):
    losses = {(2, 0): 1.0, (2, 1): 1.2, (8, 0): 0.999, (8, 1): 1.2002}
    done = report(write_runs(losses))
    page = done.index.read_text()
    assert 'class="pill"' not in page
    assert "no single best row" in page
    assert all(
        "o single best row: the leading rows are not told apart by their intervals" in text
        for text in said(done).values()
    )
    assert "*" not in done.table


def test_a_missing_seed_gives_no_arm_the_star_by_its_mean(write_runs):
    """r = 8 lacks the seed on which every arm is bad: the least mean, and worse than the other on each shared seed."""
    losses = {(2, 0): 1.0, (2, 1): 1.02, (2, 2): 3.0, (8, 0): 1.11, (8, 1): 1.13}
    done = report(write_runs(losses))
    result = json.loads(done.files["results.json"].read_text())
    worse = result["arms"][1]
    assert worse["mean"] < result["arms"][0]["mean"]
    assert (worse["difference"]["mean"], worse["difference"]["seeds"]) == (pytest.approx(0.11), ["0", "1"])
    assert not worse["best"]
    assert all("The rows are over different seeds" in text for text in said(done).values())


def test_the_best_arm_is_separated_from_every_other_by_bonferronis_intervals(write_runs):
    gaps = {8: [-0.5, -0.52, -0.48], 16: [-0.2, -0.21, -0.22]}
    losses = {(2, seed): 2.0 + seed for seed in range(3)}
    losses |= {(r, seed): 2.0 + seed + gap for r, found in gaps.items() for seed, gap in enumerate(found)}
    root = write_runs(losses)
    found = arms(read_results(root))
    assert [row.best for row in found] == [False, True, False]
    to_second = [a - b for a, b in zip(gaps[8], gaps[16], strict=True)]
    reach = t_quantile(2, 0.975) * statistics.stdev(to_second) / 3**0.5
    assert statistics.fmean(to_second) + reach < 0
    assert all("97.5%" in text for text in said(report(root)).values())


def test_seeds_that_change_nothing_are_one_measurement(write_runs):
    def untrained(trial, r, seed):
        trial["time"]["steps"] = 0

    done = report(write_runs({(r, seed): 20.0 + r for r in (2, 8) for seed in range(3)}, untrained))
    first, second = json.loads(done.files["results.json"].read_text())["arms"]
    assert (first["n"], first["std"], first["best"], second["best"]) == (1, None, False, False)
    assert second["difference"]["mean"] == 6.0
    assert (second["difference"]["low"], second["difference"]["high"], second["difference"]["n"]) == (None, None, 1)
    assert "+6.0000 [" not in done.table
    assert "3 ok, one score (n = 1)" in done.table
    assert all("every seed gives the very same val/loss (nothing was trained)" in text for text in said(done).values())
    assert "standard deviation" not in done.index.read_text().partition("<body>")[2].partition("<footer>")[0]


def test_early_stops_are_told_in_every_form_with_steps_and_reason(write_runs):
    def patience(trial, r, seed):
        trial["config"]["trainer"]["patience"] = 2
        if (r, seed) in ((8, 0), (8, 1)):
            trial["time"]["steps"] = 20 + seed
            trial["stopped_early"] = {"step": 20 + seed, "metric": "val/loss", "best": 0.9876}

    done = report(write_runs(GRID, patience))
    reason = "stopped early at step 20 of 60: val/loss was not better than 0.9876"
    for name, text in said(done).items():
        assert reason in text, name
        assert "2 of 6 trials stopped early by trainer.patience = 2" in text, name
        assert "1 row averages trials of different numbers of steps" in text, name
        assert name == "results.json" or "20 to 60 (2 of 3 stopped early)" in text, name
    lines = {line["folder"]: line for line in csv.DictReader(done.files["results.csv"].read_text().splitlines())}
    assert (lines["8-0"]["time.steps"], lines["8-0"]["ended"]) == ("20", reason)
    assert (lines["2-0"]["time.steps"], lines["2-0"]["ended"]) == ("60", "max_steps")
    arm = json.loads(done.files["results.json"].read_text())["arms"][1]
    assert (arm["steps"], arm["stopped_early"]) == ([20, 21, 60], 2)


def test_where_all_made_their_steps_no_column_says_so(write_runs):
    assert "steps" not in report(write_runs(GRID)).table


def test_a_repetition_with_another_score_is_named(write_runs):
    write_runs({(2, 0): 1.0}, name="one")
    done = report(write_runs({(2, 0): 1.5}, lambda trial, r, seed: trial.update(trial="one-2-0"), name="two"))
    assert all("are one trial, yet val/loss is" in text for text in said(done).values())


def test_a_stale_record_is_no_result(write_runs, synthetic, write):
    root = write_runs(GRID)
    stale = root / "runs" / "2-0" / "result.stale.json"
    stale.write_text((root / "runs" / "2-0" / "result.json").read_text().replace('"val/loss": 1.0', '"val/loss": 77.0'))
    (root / "gone").mkdir()
    (root / "gone" / "result.stale.json").write_text(stale.read_text())
    done = report(root)
    assert len(read_results(root).trials) == 6
    assert sorted(entry["name"] for entry in listing(root)) == [f"{r}-{seed}" for r in (2, 8) for seed in (0, 1, 2)]
    assert all("77.0" not in path.read_text() for path in done.files.values())
