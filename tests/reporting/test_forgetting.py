"""Learning against forgetting: a mark for each row, a ring for each seed, no data set beside another."""

import csv
import statistics

import pytest

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.reporting import figures
from loralab.reporting.report import report


@pytest.fixture
def forgetful(synthetic, write, tmp_path):
    """A sweep of two ranks and two seeds that was scored on the data sets ``of``, by rank; null: it was not."""

    def build(of=("source", "source")):
        for r, name in zip((2, 8), of, strict=True):
            for seed in (0, 1):
                trial = synthetic("none", r, seed)
                if name:
                    trial["metrics"] |= {"forgetting/loss": 3.0 + r + seed, "forgetting/increase": 0.1 * r + seed}
                    trial["data"]["forgetting"] = {"name": name, "targets": f"of {name}", "rows": 5}
                write(tmp_path / f"{r}-{seed}", trial)
        return tmp_path

    return build


def drawn(folder):
    (comparison,) = comparisons(read_results(folder))
    found = figures.figures(comparison)
    return {one.name: one for one in found if one.name.startswith("forgetting")}, comparison


def test_a_mark_is_the_mean_of_a_row_and_a_ring_one_seed(forgetful):
    found, comparison = drawn(forgetful())
    rows = found["forgetting"].spec["datasets"]
    for row, arm in zip(rows["means"], comparison.arms, strict=True):
        r = 8 if arm.values["adapter.r"] == "8" else 2
        assert row["y"] == pytest.approx(0.1 * r + 0.5)
        assert row["x"] == statistics.fmean(arm.scores)
    assert sorted(row["y"] for row in rows["seeds"]) == pytest.approx([0.2, 0.8, 1.2, 1.8])
    assert "the loss on source" in found["forgetting"].caption
    assert "n = 2 seeds" in found["forgetting"].caption


def test_two_data_sets_are_two_figures_and_a_row_without_scores_is_in_none(forgetful):
    found, _ = drawn(forgetful(("source", "chat")))
    assert [len(one.spec["datasets"]["means"]) for one in found.values()] == [1, 1]
    assert found["forgetting_2"].title == "Learning against forgetting (chat)"
    assert len(drawn(forgetful(("source", None)))[0]["forgetting"].spec["datasets"]["means"]) == 1
    assert not drawn(forgetful((None, None)))[0]


def test_the_page_has_the_figure_and_the_csv_its_columns(forgetful):
    done = report(forgetful())
    assert "Learning against forgetting" in done.index.read_text()
    with done.files["results.csv"].open() as file:
        assert {row["forgetting/increase"] for row in csv.DictReader(file)} == {"0.2", "1.2", "0.8", "1.8"}
