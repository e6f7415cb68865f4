"""Who is compared with whom: one environment, one data set, one base, equal targets, shared seeds; and who is best."""

import pytest

from loralab.analysis.arms import arms, comparisons
from loralab.analysis.comparable import apart, comparable
from loralab.analysis.paired import t_quantile
from loralab.analysis.results import read_results

GRID = {(r, seed): 1.0 + 0.1 * seed + 0.01 * (r == 8) + 0.001 * seed * r for r in (2, 8) for seed in (0, 1, 2)}


def set_in(section, key, value):
    def change(trial, r, seed):
        if seed == 2:
            target = trial[section]
            for part in key.split(".")[:-1]:
                target = target[part]
            target[key.split(".")[-1]] = value

    return change


def cut_at(targets, truncated=20):
    def change(trial, r, seed):
        trial["config"]["model"]["max_length"] = 16 if r == 2 else 64
        trial["data"].update(targets=targets.get(r), truncated=truncated)

    return change


@pytest.mark.parametrize(("key", "value"), [("python", "3.11.9"), ("git", "fff"), ("versions.wandb", "9.9")])
def test_what_moves_no_number_makes_no_environment(write_runs, key, value):
    root = write_runs(GRID, set_in("environment", key, value))
    assert [row.n for row in arms(read_results(root))] == [3, 3]


def test_another_device_is_another_environment(write_runs):
    def change(trial, r, seed):
        if r == 8:
            trial["memory"]["device"], trial["environment"]["gpu"] = "cuda", "Synthetic Card"

    results = read_results(write_runs(GRID, change))
    assert results.axes["environment"] == [
        "cpu, no gpu, Synthetic CPU, 2 cores",
        "cuda, Synthetic Card, cpu not recorded",
    ]
    assert [row.difference for row in arms(results)] == [None, None]


def test_on_a_card_the_processor_and_its_threads_do_not_count(write_runs):
    def change(trial, r, seed):
        trial["memory"]["device"], trial["environment"]["gpu"] = "cuda", "Synthetic Card"
        trial["environment"].update(cpu=f"CPU {seed}", threads=seed + 1)

    assert [row.n for row in arms(read_results(write_runs(GRID, change)))] == [3, 3]


def test_a_trial_that_failed_or_is_missing_makes_no_environment(write_runs):
    def change(trial, r, seed):
        if seed == 2:
            trial.update(status="failed", metrics={}, error="x")
            trial["environment"]["versions"] = {"torch": "1.0"}

    results = read_results(write_runs(GRID, change))
    assert "environment" not in results.axes
    assert len(arms(results)) == 2


def test_bases_that_the_settings_name_are_arms_of_one_table(write_runs):
    def change(trial, r, seed):
        trial["config"]["model"]["name_or_path"] = f"base-{r}"
        trial["base"]["fingerprint"] = f"{r}" * 16
        trial["data"]["targets"] = "c" * 16

    (table,) = comparisons(read_results(write_runs(GRID, change)))
    assert [row.difference.n for row in table.arms if row.difference] == [3]


def test_sets_that_do_not_have_the_same_settings_keep_their_arms_names(write_runs):
    def change(trial, r, seed):
        if r == 8:
            trial["config"]["data"]["packages"] = ["none"]
            trial["data"].update(name="python_source", fingerprint="e" * 16)
            trial["choices"]["data"] = "python_source"

    parts = comparisons(read_results(write_runs(GRID, change)))
    assert [[row.values["data"] for row in comparison.arms] for comparison in parts] == [
        ["docstrings"],
        ["python_source"],
    ]


def test_prompts_cut_differently_over_equal_targets_compare(write_runs):
    (table,) = comparisons(read_results(write_runs(GRID, cut_at({2: "a" * 16, 8: "a" * 16}))))
    assert [row.difference.n for row in table.arms if row.difference] == [3]


@pytest.mark.parametrize(("truncated", "expected"), [(20, 2), (0, 1)])
def test_without_a_fingerprint_of_the_targets_only_uncut_rows_are_known_to_compare(write_runs, truncated, expected):
    assert len(comparisons(read_results(write_runs(GRID, cut_at({}, truncated))))) == expected


def test_classes_are_the_same_targets_however_the_texts_are_cut(write_runs):
    def change(trial, r, seed):
        cut_at({})(trial, r, seed)
        trial["config"]["model"]["task"] = "sequence_classification"

    assert len(comparisons(read_results(write_runs(GRID, change)))) == 1


def test_an_old_record_joins_new_ones_over_the_same_rows(write_runs):
    root = write_runs(GRID, lambda trial, r, seed: trial["data"].update(targets="c" * 16 if seed else None))
    assert [row.n for row in arms(read_results(root))] == [3, 3]
    assert len(comparisons(read_results(root))) == 1


def test_two_arms_better_than_all_others_but_not_than_each_other_are_no_winner(write_runs):
    losses = {(r, seed): 2.0 + seed for r in (2,) for seed in range(3)}
    losses |= {(8, seed): 1.0 + seed + 0.01 * seed for seed in range(3)}
    losses |= {(16, seed): 1.01 + seed - 0.002 * seed for seed in range(3)}
    found = arms(read_results(write_runs(losses)))
    assert all(row.difference.interval[1] < 0 for row in found if row.difference)
    assert not any(row.best for row in found)


def test_an_untrained_baseline_leaves_a_trained_arms_seeds_their_interval(write_runs):
    losses = {(2, seed): 5.0 for seed in range(3)} | {(8, seed): 4.0 + 0.01 * seed for seed in range(3)}
    second = arms(read_results(write_runs(losses)))[1]
    assert (second.difference.n, second.difference.mean) == (3, pytest.approx(-0.99))
    assert second.difference.reach == pytest.approx(t_quantile(2) * 0.01 / 3**0.5)


@pytest.mark.parametrize(("metric", "tables"), [("val/bleu", 2), ("val/exact_match", 1), ("val/loss", 1)])
def test_scores_of_texts_are_compared_where_they_are_counted_alike(write_runs, metric, tables):
    def change(trial, r, seed):
        trial["config"].update(metric=metric, metric_mode="min" if metric == "val/loss" else "max")
        trial["config"]["data"]["generate_rows"] = 5
        trial["metrics"][metric] = trial["metrics"]["val/loss"]
        trial["data"]["bleu"] = "13a" if r == 2 else "zh"

    sets = comparable(read_results(write_runs(GRID, change)))
    assert len(sets) == tables
    assert tables == 1 or "words as in data.bleu=13a | 5 generated rows, words as in data.bleu=zh" in apart(sets)


def test_scores_of_other_numbers_of_generated_rows_are_not_compared(write_runs):
    def change(trial, r, seed):
        trial["config"].update(metric="val/rouge_l", metric_mode="max")
        trial["config"]["data"]["generate_rows"] = r
        trial["metrics"]["val/rouge_l"] = 0.5

    sets = comparable(read_results(write_runs(GRID, change)))
    assert "over 2 generated rows, words as in data.rouge=published | 8 generated rows" in apart(sets)
