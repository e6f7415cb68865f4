"""Two sweeps held against each other: rows of equal values, what else differs, and what does not compare."""

import json
from html import unescape

import pandas as pd
import pytest
from grids import write_grid
from scipy import stats
from stored import bare, figure_of

from loralab.cli import main
from loralab.reporting import between

AXES = {"adapter.r": [2, 8], "adapter.lora_alpha": [4, 16, 64]}


def changed(root, change):
    """The sweep with what ``change`` does to each of its records."""
    for path in root.glob("*/result.json"):
        stored = json.loads(path.read_text())
        change(stored)
        path.write_text(json.dumps(stored))
    return root


def worse(stored):
    """A made-up effect that grows with the seed."""
    stored["metrics"]["val/loss"] += 0.1 + 0.01 * stored["seed"]


@pytest.fixture
def two(tmp_path, synthetic):
    """Sweeps of the same axes, B worse, with a row that A has not, and without a row that A has."""
    one = write_grid(tmp_path / "one", synthetic, AXES, seeds=(0, 1, 2))
    other = {**AXES, "adapter.lora_alpha": [16, 64, 256]}
    return one, changed(write_grid(tmp_path / "other", synthetic, other, seeds=(1, 2, 3)), worse)


def table(root):
    """A row for each record."""
    records = [json.loads(path.read_text()) for path in sorted(root.glob("*/result.json"))]
    flat = pd.json_normalize([one["config"] for one in records])[["adapter.r", "adapter.lora_alpha", "optimizer.lr"]]
    return flat.assign(seed=[one["seed"] for one in records], **pd.DataFrame([one["metrics"] for one in records]))


def said(done):
    """The terminal's table, Markdown and page, blanks made one."""
    texts = [done.table, *(unescape(done.files[name].read_text()) for name in ("compare.md", "index.html"))]
    return [" ".join(text.split()) for text in texts]


def test_a_row_is_paired_by_its_values_and_its_difference_over_the_shared_seeds_is_scipys(two):
    done = between.report(*two)
    frames = [table(root) for root in two]
    keys = ["adapter.r", "adapter.lora_alpha"]
    merged = frames[0].merge(frames[1], on=[*keys, "seed"], suffixes=("_a", "_b"))
    result = json.loads(done.files["compare.json"].read_text())
    assert len(result["rows"]) == merged.groupby(keys).ngroups == 4
    for row, (_, group) in zip(result["rows"], merged.groupby(keys), strict=True):
        values = row["A"]["values"]
        assert [float(values[key]) for key in keys] == list(group[keys].iloc[0])
        test = stats.ttest_rel(group["val/loss_b"], group["val/loss_a"])
        low, high = test.confidence_interval(0.95)
        difference = row["difference"]
        assert difference["seeds"] == ["1", "2"]
        assert difference["mean"] == pytest.approx((group["val/loss_b"] - group["val/loss_a"]).mean())
        assert (difference["low"], difference["high"]) == (pytest.approx(low), pytest.approx(high))
        assert difference["p"] == pytest.approx(test.pvalue)
        assert all(f"{difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}]" in text for text in said(done))
    assert [(side, result[side]["without_partner"]) for side in "AB"] == [
        ("A", ["r = 2, lora_alpha = 4", "r = 8, lora_alpha = 4"]),
        ("B", ["r = 2, lora_alpha = 256", "r = 8, lora_alpha = 256"]),
    ]
    assert all("2 rows of A have no partner: r = 2, lora_alpha = 4" in text for text in said(done))
    drawn = figure_of(done.index.read_text(), "differences")["spec"]["datasets"]["rows"]
    assert [row["value"] for row in drawn] == [row["difference"]["mean"] for row in result["rows"]]
    assert done.index == two[0] / "report" / "compare_other" / "index.html"


@pytest.mark.parametrize(("seeds", "told"), [(2, 0), (5, 6)])
def test_an_effect_counts_where_its_interval_excludes_0_beside_all_others(tmp_path, synthetic, seeds, told):
    one = write_grid(tmp_path / "one", synthetic, AXES, seeds=range(seeds))
    other = changed(write_grid(tmp_path / "other", synthetic, AXES, seeds=range(seeds)), worse)
    done = between.report(one, other)
    rows = json.loads(done.files["compare.json"].read_text())["rows"]
    gaps = [0.1 + 0.01 * seed for seed in range(seeds)]
    p = stats.ttest_1samp(gaps, 0).pvalue
    assert p < 0.05
    assert (p < 0.05 / 6) == bool(told)
    assert [row["verdict"] for row in rows] == ["worse" if told else None] * 6
    assert all(row["difference"]["mean"] == pytest.approx(sum(gaps) / seeds) for row in rows)
    assert all(row["difference"]["p"] == pytest.approx(p) for row in rows)
    assert all(f"in none of 6 rows, worse in {told or 'none'}, at 99.17%" in text for text in said(done)[:2])


def test_versions_and_settings_that_differ_are_told_with_how_many_trials_have_which(two):
    def newer(stored):
        stored["environment"]["versions"] |= {
            "loralab": "0.2.0",
            **({"torch": "2.14.0"} if stored["seed"] == 3 else {}),
        }
        stored["config"]["optimizer"]["weight_decay"] = 0.5

    done = between.report(two[0], changed(two[1], newer))
    for text in said(done):
        assert "MADE WITH DIFFERENT VERSIONS OR HARDWARE" in text
        assert "A: 18 completed trials with loralab not recorded, torch 2.13.0" in text
        assert "12 completed trials with loralab 0.2.0, torch 2.13.0" in text
        assert "6 completed trials with loralab 0.2.0, torch 2.14.0" in text
        assert "Settings that differ: optimizer.weight_decay = null in A, 0.5 in B" in text


def test_a_sweep_with_a_fixed_value_is_held_against_the_rows_that_have_it(tmp_path, synthetic):
    one = write_grid(tmp_path / "one", synthetic, AXES)
    other = write_grid(tmp_path / "other", synthetic, {"adapter.r": [2, 8]})  # its lora_alpha is 16
    rows = json.loads(between.report(one, other).files["compare.json"].read_text())["rows"]
    assert [row["A"]["values"]["adapter.lora_alpha"] for row in rows] == ["16", "16"]


def test_rows_of_tuned_sweeps_are_each_at_their_own_best_value(tmp_path, synthetic):
    axes = {"adapter.r": [2, 8], "optimizer.lr": [1e-3, 1e-2, 1e-1]}
    one = write_grid(tmp_path / "one", synthetic, axes, tune=["optimizer.lr"])
    other = changed(write_grid(tmp_path / "other", synthetic, axes, tune=["optimizer.lr"]), reverse)
    done = between.report(one, other)
    result = json.loads(done.files["compare.json"].read_text())
    assert (result["metric"], result["matched_by"]) == ("test/loss", ["adapter.r"])
    for side, root in zip("AB", (one, other), strict=True):
        means = table(root).groupby(["adapter.r", "optimizer.lr"])[["val/loss", "test/loss"]].mean()
        chosen = means.groupby("adapter.r")["val/loss"].idxmin()
        expected = [means.loc[place, "test/loss"] for place in chosen]
        assert [row[side]["mean"] for row in result["rows"]] == pytest.approx(expected)
    assert all("lr A" in text and "lr B" in text for text in said(done))


def reverse(stored):
    stored["metrics"] = {key: 4 - value for key, value in stored["metrics"].items()}


def data(stored):
    stored["data"]["fingerprint"] = "0" * 16


def base(stored):
    stored["base"]["fingerprint"] = "1" * 16


def metric(stored):
    stored["config"] |= {"metric": "val/perplexity"}
    stored["metrics"] |= {"val/perplexity": 9.0}


def values(stored):
    stored["config"]["adapter"]["r"] *= 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (data, "the data changed between the runs, though the settings are the same (fingerprints dddd"),
        (base, "the base's weights changed between the runs, though the settings are the same (fingerprints ffff"),
        (metric, "they are scored by val/loss (lower is better) and val/perplexity (lower is better)"),
        (values, "on r, lora_alpha; "),
    ],
)
def test_what_does_not_compare_is_refused_in_one_paragraph_and_nothing_is_written(
    tmp_path, synthetic, capsys, change, told
):
    one = write_grid(tmp_path / "one", synthetic, AXES, seeds=(0,))
    other = changed(write_grid(tmp_path / "other", synthetic, AXES, seeds=(0,)), change)
    assert main.run(["report", str(one), str(other)]) == 4
    error = capsys.readouterr().err
    assert told in error
    assert str(one) in error
    assert str(other) in error
    assert len(error.strip().splitlines()) == 1
    assert not (one / "report").exists()


@pytest.mark.parametrize(("names", "code", "told"), [
    (["one", "gone"], 4, "gone: no such folder"),
    (["one", "one"], 4, "are one folder"),
    (["one", "one", "one"], 2, "or two sweeps to compare"),
    (["--watch", "one", "two"], 2, "are of one sweep; without them, two are compared"),
])  # fmt: skip
def test_folders_that_are_no_two_sweeps_are_refused(tmp_path, synthetic, monkeypatch, capsys, names, code, told):
    write_grid(tmp_path / "one", synthetic, AXES, seeds=(0,))
    monkeypatch.chdir(tmp_path)
    assert main.run(["report", *names]) == code
    assert told in capsys.readouterr().err


def test_test_scores_over_other_data_are_refused_though_validation_is_the_same(tmp_path, synthetic, capsys):
    axes = {"adapter.r": [2, 8], "optimizer.lr": [1e-3, 1e-2]}

    def same_targets(stored):
        stored["data"]["targets"] = "7" * 16

    def other_rows(stored):
        same_targets(stored)
        stored["data"]["fingerprint"] = "0" * 16
        stored["config"]["data"]["limit"] = 100

    one = changed(write_grid(tmp_path / "one", synthetic, axes, tune=["optimizer.lr"]), same_targets)
    other = changed(write_grid(tmp_path / "other", synthetic, axes, tune=["optimizer.lr"]), other_rows)
    assert main.run(["report", str(one), str(other)]) == 4
    assert "test/loss is of the rows of a test split, and the data differ" in capsys.readouterr().err


def test_a_single_seed_is_no_finding_and_names_end_no_script(tmp_path, synthetic):
    evil = "</script><script>alert(1)</script>"
    axes = {"adapter.target_modules": [evil, "v_proj"]}
    one, other = (write_grid(tmp_path / name, synthetic, axes, seeds=(0,)) for name in ("one", "<b>other"))
    done = between.report(one, other)
    page = done.index.read_text()
    assert "<script>alert" not in page
    assert "<b>other" not in bare(page)
    assert all("of one seed or of one value, is no finding" in text for text in said(done))
