"""Who is compared with whom: one environment, one data set, one base, equal targets, shared seeds; and who is best."""

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


@pytest.fixture
def lab(tmp_path, make_trial):
    """Writes {(r, seed): loss} with what ``change`` does to a record; returns the folder."""
    synthetic, write = make_trial

    def build(losses, change=lambda made, r, seed: None, name="runs"):
        for (r, seed), loss in losses.items():
            made = synthetic("none", r, seed)
            made["metrics"] = {"val/loss": loss}
            made["trial"] = f"{name}-{r}-{seed}"
            change(made, r, seed)
            write(tmp_path / name / f"{r}-{seed}", made)
        return tmp_path

    return build


def said(done):
    """(name, text) of each of the report's four forms, blanks made one."""
    texts = {name: unescape(path.read_text()) for name, path in done.files.items() if name != "results.csv"}
    return {name: " ".join(text.split()) for name, text in {**texts, "terminal": done.table}.items()}


GRID = {(r, seed): 1.0 + 0.1 * seed + 0.01 * (r == 8) + 0.001 * seed * r for r in (2, 8) for seed in (0, 1, 2)}


def set_in(section, key, value):
    def change(made, r, seed):
        if seed == 2:
            target = made[section]
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
def test_trials_of_two_environments_share_no_mean_and_no_difference_and_are_named(lab, key, value, named):
    root = lab(GRID, set_in("environment", key, value))
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


@pytest.mark.parametrize(("key", "value"), [("python", "3.11.9"), ("git", "fff"), ("versions.wandb", "9.9")])
def test_what_moves_no_number_makes_no_environment(lab, key, value):
    root = lab(GRID, set_in("environment", key, value))
    assert [row.n for row in arms(read_results(root))] == [3, 3]


def test_another_device_is_another_environment(lab):
    def change(made, r, seed):
        if r == 8:
            made["memory"]["device"], made["environment"]["gpu"] = "cuda", "Synthetic Card"

    results = read_results(lab(GRID, change))
    assert results.axes["environment"] == [
        "cpu, no gpu, Synthetic CPU, 2 cores",
        "cuda, Synthetic Card, cpu not recorded",
    ]
    assert [row.difference for row in arms(results)] == [None, None]


def test_on_a_card_the_processor_and_its_threads_do_not_count(lab):
    def change(made, r, seed):
        made["memory"]["device"], made["environment"]["gpu"] = "cuda", "Synthetic Card"
        made["environment"].update(cpu=f"CPU {seed}", threads=seed + 1)

    assert [row.n for row in arms(read_results(lab(GRID, change)))] == [3, 3]


def test_a_trial_that_failed_or_is_missing_makes_no_environment(lab):
    def change(made, r, seed):
        if seed == 2:
            made.update(status="failed", metrics={}, error="x")
            made["environment"]["versions"] = {"torch": "1.0"}

    results = read_results(lab(GRID, change))
    assert "environment" not in results.axes
    assert len(arms(results)) == 2


def test_data_rewritten_between_two_runs_of_one_command_gives_two_tables_and_loses_nothing(lab):
    lab({(2, 0): 1.0}, name="before")

    def rewritten(made, r, seed):
        made["trial"] = "before-2-0"
        made["data"]["fingerprint"] = "e" * 64

    done = report(lab({(2, 0): 2.0}, rewritten, name="after"))
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
def test_a_new_arm_on_new_weights_is_not_compared_with_old_ones(lab, schema):
    def change(made, r, seed):
        made["schema"] = schema
        if r == 8:
            made["base"]["fingerprint"] = "0" * 16

    done = report(lab(GRID, change))
    result = json.loads(done.files["results.json"].read_text())
    assert [arm["difference"] for arm in result["arms"]] == [None, None]
    assert all("the base's weights changed between the runs" in text for text in said(done).values())


def test_bases_that_the_settings_name_are_arms_of_one_table(lab):
    def change(made, r, seed):
        made["config"]["model"]["name_or_path"] = f"base-{r}"
        made["base"]["fingerprint"] = f"{r}" * 16
        made["data"]["targets"] = "c" * 16

    (table,) = comparisons(read_results(lab(GRID, change)))
    assert [row.difference.n for row in table.arms if row.difference] == [3]


def test_sets_that_do_not_have_the_same_settings_keep_their_arms_names(lab):
    def change(made, r, seed):
        if r == 8:
            made["config"]["data"]["packages"] = ["none"]
            made["data"].update(name="python_source", fingerprint="e" * 16)
            made["choices"]["data"] = "python_source"

    parts = comparisons(read_results(lab(GRID, change)))
    assert [[row.values["data"] for row in comparison.arms] for comparison in parts] == [
        ["docstrings"],
        ["python_source"],
    ]


def test_training_files_rewritten_under_the_same_targets_are_told_by_their_bytes(lab):
    def change(made, r, seed):
        made["config"]["data"].update(train="a.jsonl", validation="b.jsonl", prompt="{a}" + " " * r)
        made["data"].update(targets="c" * 16, fingerprint=f"{r}" * 16, source="1" * 16 if r == 2 else "2" * 16)

    assert len(comparisons(read_results(lab(GRID, change)))) == 2
    assert "the data files changed between the runs" in report(lab(GRID, change)).table.replace("\n  ", " ")


def cut_at(targets, truncated=20):
    def change(made, r, seed):
        made["config"]["model"]["max_length"] = 16 if r == 2 else 64
        made["data"].update(targets=targets.get(r), truncated=truncated)

    return change


def test_losses_over_targets_that_were_cut_differently_stand_in_two_tables_with_the_reason(lab):
    done = report(lab(GRID, cut_at({2: "a" * 16, 8: "b" * 16})))
    result = json.loads(done.files["results.json"].read_text())
    assert [arm["difference"] for arm in result["arms"]] == [None, None]
    for name, text in said(done).items():
        assert "other target tokens, cut at model.max_length = 16 | 64" in text, name


def test_prompts_cut_differently_over_equal_targets_compare(lab):
    (table,) = comparisons(read_results(lab(GRID, cut_at({2: "a" * 16, 8: "a" * 16}))))
    assert [row.difference.n for row in table.arms if row.difference] == [3]


@pytest.mark.parametrize(("truncated", "expected"), [(20, 2), (0, 1)])
def test_without_a_fingerprint_of_the_targets_only_uncut_rows_are_known_to_compare(lab, truncated, expected):
    assert len(comparisons(read_results(lab(GRID, cut_at({}, truncated))))) == expected


def test_classes_are_the_same_targets_however_the_texts_are_cut(lab):
    def change(made, r, seed):
        cut_at({})(made, r, seed)
        made["config"]["model"]["task"] = "sequence_classification"

    assert len(comparisons(read_results(lab(GRID, change)))) == 1


def test_an_old_record_joins_new_ones_over_the_same_rows(lab):
    root = lab(GRID, lambda made, r, seed: made["data"].update(targets="c" * 16 if seed else None))
    assert [row.n for row in arms(read_results(root))] == [3, 3]
    assert len(comparisons(read_results(root))) == 1


def test_the_lowest_mean_is_no_winner_where_its_interval_holds_0(lab):
    losses = {(2, 0): 1.0, (2, 1): 1.2, (8, 0): 0.999, (8, 1): 1.2002}
    done = report(lab(losses))
    page = done.index.read_text()
    assert 'class="pill"' not in page
    assert "no single best row" in page
    assert all(
        "o single best row: the leading rows are not told apart by their intervals" in text
        for text in said(done).values()
    )
    assert "*" not in done.table


def test_a_missing_seed_gives_no_arm_the_star_by_its_mean(lab):
    """r = 8 lacks the seed on which every arm is bad: the least mean, and worse than the other on each shared seed."""
    losses = {(2, 0): 1.0, (2, 1): 1.02, (2, 2): 3.0, (8, 0): 1.11, (8, 1): 1.13}
    done = report(lab(losses))
    result = json.loads(done.files["results.json"].read_text())
    worse = result["arms"][1]
    assert worse["mean"] < result["arms"][0]["mean"]
    assert (worse["difference"]["mean"], worse["difference"]["seeds"]) == (pytest.approx(0.11), ["0", "1"])
    assert not worse["best"]
    assert all("The rows are over different seeds" in text for text in said(done).values())


def test_the_best_arm_is_separated_from_every_other_by_bonferronis_intervals(lab):
    gaps = {8: [-0.5, -0.52, -0.48], 16: [-0.2, -0.21, -0.22]}
    losses = {(2, seed): 2.0 + seed for seed in range(3)}
    losses |= {(r, seed): 2.0 + seed + gap for r, found in gaps.items() for seed, gap in enumerate(found)}
    root = lab(losses)
    found = arms(read_results(root))
    assert [row.best for row in found] == [False, True, False]
    to_second = [a - b for a, b in zip(gaps[8], gaps[16], strict=True)]
    reach = t_quantile(2, 0.975) * statistics.stdev(to_second) / 3**0.5
    assert statistics.fmean(to_second) + reach < 0
    assert all("97.5%" in text for text in said(report(root)).values())


def test_two_arms_better_than_all_others_but_not_than_each_other_are_no_winner(lab):
    losses = {(r, seed): 2.0 + seed for r in (2,) for seed in range(3)}
    losses |= {(8, seed): 1.0 + seed + 0.01 * seed for seed in range(3)}
    losses |= {(16, seed): 1.01 + seed - 0.002 * seed for seed in range(3)}
    found = arms(read_results(lab(losses)))
    assert all(row.difference.interval[1] < 0 for row in found if row.difference)
    assert not any(row.best for row in found)


def test_seeds_that_change_nothing_are_one_measurement(lab):
    def untrained(made, r, seed):
        made["time"]["steps"] = 0

    done = report(lab({(r, seed): 20.0 + r for r in (2, 8) for seed in range(3)}, untrained))
    first, second = json.loads(done.files["results.json"].read_text())["arms"]
    assert (first["n"], first["std"], first["best"], second["best"]) == (1, None, False, False)
    assert second["difference"]["mean"] == 6.0
    assert (second["difference"]["low"], second["difference"]["high"], second["difference"]["n"]) == (None, None, 1)
    assert "+6.0000 [" not in done.table
    assert "3 ok, one score (n = 1)" in done.table
    assert all("every seed gives the very same val/loss (nothing was trained)" in text for text in said(done).values())
    assert "standard deviation" not in done.index.read_text().partition("<body>")[2].partition("<footer>")[0]


def test_an_untrained_baseline_leaves_a_trained_arms_seeds_their_interval(lab):
    losses = {(2, seed): 5.0 for seed in range(3)} | {(8, seed): 4.0 + 0.01 * seed for seed in range(3)}
    second = arms(read_results(lab(losses)))[1]
    assert (second.difference.n, second.difference.mean) == (3, pytest.approx(-0.99))
    assert second.difference.reach == pytest.approx(t_quantile(2) * 0.01 / 3**0.5)


def test_early_stops_are_told_in_every_form_with_steps_and_reason(lab):
    def patience(made, r, seed):
        made["config"]["trainer"]["patience"] = 2
        if (r, seed) in ((8, 0), (8, 1)):
            made["time"]["steps"] = 20 + seed
            made["stopped_early"] = {"step": 20 + seed, "metric": "val/loss", "best": 0.9876}

    done = report(lab(GRID, patience))
    reason = "stopped early at step 20 of 60: val/loss was not better than 0.9876"
    for name, text in said(done).items():
        assert reason in text, name
        assert "2 of 6 trials stopped early by trainer.patience = 2" in text, name
        assert "1 rows average trials of different numbers of steps" in text, name
        assert name == "results.json" or "20 to 60 (2 of 3 stopped early)" in text, name
    lines = {line["folder"]: line for line in csv.DictReader(done.files["results.csv"].read_text().splitlines())}
    assert (lines["8-0"]["time.steps"], lines["8-0"]["ended"]) == ("20", reason)
    assert (lines["2-0"]["time.steps"], lines["2-0"]["ended"]) == ("60", "max_steps")
    arm = json.loads(done.files["results.json"].read_text())["arms"][1]
    assert (arm["steps"], arm["stopped_early"]) == ([20, 21, 60], 2)


def test_where_all_made_their_steps_no_column_says_so(lab):
    assert "steps" not in report(lab(GRID)).table


def test_a_repetition_with_another_score_is_named(lab):
    lab({(2, 0): 1.0}, name="one")
    done = report(lab({(2, 0): 1.5}, lambda made, r, seed: made.update(trial="one-2-0"), name="two"))
    assert all("are one trial, yet val/loss is" in text for text in said(done).values())


def test_a_stale_record_is_no_result(lab, make_trial):
    root = lab(GRID)
    stale = root / "runs" / "2-0" / "result.stale.json"
    stale.write_text((root / "runs" / "2-0" / "result.json").read_text().replace('"val/loss": 1.0', '"val/loss": 77.0'))
    (root / "gone").mkdir()
    (root / "gone" / "result.stale.json").write_text(stale.read_text())
    done = report(root)
    assert len(read_results(root).trials) == 6
    assert sorted(entry["name"] for entry in listing(root)) == [f"{r}-{seed}" for r in (2, 8) for seed in (0, 1, 2)]
    assert all("77.0" not in path.read_text() for path in done.files.values())
