"""A paper's claims against our arms, in results.json, in Markdown, on the terminal and on the page."""

import json
from html import unescape

import pytest

from loralab.records import record
from loralab.reporting.report import report

LOSSES = {"none": [1.0, 2.0, 3.0], "int8_absmax": [1.5, 2.51, 3.49], "nf4_double": [1.51, 2.49, 3.5]}


def test_estimate_interval_and_p_are_those_of_the_paired_t(paper):
    done = report(paper(LOSSES, ["none <= nf4_double"]))
    (claim,) = json.loads(done.files["results.json"].read_text())["claims"]
    assert set(claim) >= {"claim", "verdict", "why", "estimate", "interval", "p", "seeds"}
    # gaps -0.51, -0.49, -0.50: mean -0.5, standard error 0.01 / sqrt(3), t = -86.6 with 2 degrees of freedom
    reach = 4.30265 * 0.01 / 3**0.5
    assert claim["estimate"] == pytest.approx(-0.5)
    assert claim["interval"] == pytest.approx([-0.5 - reach, -0.5 + reach], rel=1e-5)
    t2 = 0.5**2 / (0.01**2 / 3)
    assert claim["p"] == pytest.approx(1 - (t2 / (t2 + 2)) ** 0.5, rel=1e-6)  # the closed form for 2 degrees
    assert claim["seeds"] == ["0", "1", "2"]


def test_an_order_that_contradicts_the_published_one_is_called_so_in_every_form(paper):
    losses = {"int8_absmax": [22.64] * 3, "nf4_double": [22.00] * 3}
    done = report(paper(losses, ["int8_absmax <= nf4_double"]))
    (claim,) = json.loads(done.files["results.json"].read_text())["claims"]
    assert (claim["verdict"], claim["interval"], claim["p"]) == ("cannot tell", None, None)
    assert claim["estimate"] == pytest.approx(0.64)
    forms = [path.read_text() for name, path in done.files.items() if name != "results.csv"]
    for text in [*forms, done.table]:
        flat = " ".join(unescape(text).split())
        assert "22.6400 against 22.0000 here, 29.48 against 31.07 published" in flat
        assert "the other way round than published" in flat
        assert "3 seeds give one score: there is no interval" in flat


def test_published_values_stand_beside_ours_in_every_form(paper):
    done = report(paper(LOSSES, []))
    arms = json.loads(done.files["results.json"].read_text())["arms"]
    assert [arm["published"] for arm in arms] == [[20.0], [29.48], [31.07]]
    for text in (done.index.read_text(), done.files["report.md"].read_text(), done.table):
        assert "31.07" in text
        assert "Another model and other data" in " ".join(text.split())


@pytest.mark.parametrize("claims", ["none <= nf4_double", ["none <= nf4_double"]])
def test_a_sweep_file_may_name_one_claim_and_odd_values_are_left_out(paper, claims):
    root = paper(LOSSES, claims)
    sweep = record.read_sweep(root)
    sweep["paper"]["published"] = {"none": 20.0, "nf4_double": ["not printed", 31.07]}
    record.write_sweep(root, sweep)
    result = json.loads(report(root).files["results.json"].read_text())
    assert [claim["verdict"] for claim in result["claims"]] == ["holds"]
    assert [arm["published"] for arm in result["arms"]] == [[20.0], [], [31.07]]
