"""What a paper and its code disagree about stands in the report of the sweep that it concerns."""

import json

import pytest

from loralab.analysis.disagreements import DISAGREEMENTS
from loralab.records import record
from loralab.reporting.report import report


@pytest.fixture
def page(tmp_path, synthetic, write):
    """Writes a sweep with ``paper`` and its report; returns report.md on one line."""

    def written(paper):
        write(tmp_path / "a", synthetic("none", 2, 0))
        trials = [{"trial": synthetic("none", 2, 0)["trial"], "folder": "a", "status": "completed"}]
        record.write_sweep(tmp_path, {"name": "s", "question": "Why?", "axes": {}, "trials": trials, "paper": paper})
        report(tmp_path)
        return " ".join((tmp_path / "report" / "report.md").read_text().split())

    return written


def test_the_report_says_both_sides_and_which_one_the_sweep_follows(page):
    said = page({"disagreements": {"roberta_base_alpha": "paper", "guanaco_dropout": "both"}})
    assert "table 9: lora_alpha = 8; official code or count: lora_alpha = 16" in said
    assert "roberta_base_*.sh). This sweep follows: paper" in said.replace("\\", "")
    assert "This sweep follows: both" in said


@pytest.mark.parametrize("named", [None, {}, {"nothing_known": "paper"}, ["roberta_base_alpha"]])
def test_nothing_is_said_where_none_is_named(page, named):
    assert "disagree" not in page({"disagreements": named})


def test_the_list_has_those_of_both_papers_with_a_place_for_each():
    assert len(DISAGREEMENTS) >= 13
    assert all(one.paper.startswith(("LoRA (arXiv", "QLoRA (arXiv")) for one in DISAGREEMENTS.values())
    assert all(one.code and one.where for one in DISAGREEMENTS.values())
    json.dumps({key: vars(one) for key, one in DISAGREEMENTS.items()})
