"""A paper's claims against our arms, in results.json, in Markdown, on the terminal and on the page."""

import json
from html import unescape

import pandas as pd
import pytest

from loralab.records import record
from loralab.reporting.report import report

LOSSES = {"none": [1.0, 2.0, 3.0], "int8_absmax": [1.5, 2.51, 3.49], "nf4_double": [1.51, 2.49, 3.5]}


def test_estimate_interval_and_p_are_those_of_the_paired_t(paper):
    done = report(paper(LOSSES, ["none <= nf4_double"]))
    (claim,) = json.loads(done.files["results.json"].read_text())["claims"]
    kept = {"claim", "verdict", "why", "estimate", "interval", "p", "seeds"}
    added = {"p_permutation", "p_holm", "interval_bootstrap", "seeds_needed", "metric", "where", "source"}
    assert set(claim) == kept | added
    # gaps -0.51, -0.49, -0.50: mean -0.5, standard error 0.01 / sqrt(3), t = -86.6 with 2 degrees of freedom
    reach = 4.30265 * 0.01 / 3**0.5
    assert claim["estimate"] == pytest.approx(-0.5)
    assert claim["interval"] == pytest.approx([-0.5 - reach, -0.5 + reach], rel=1e-5)
    t2 = 0.5**2 / (0.01**2 / 3)
    assert claim["p"] == pytest.approx(1 - (t2 / (t2 + 2)) ** 0.5, rel=1e-6)  # the closed form for 2 degrees
    assert claim["seeds"] == ["0", "1", "2"]
    assert claim["p_permutation"] == 2 / 2**3  # three gaps of one sign: one flip of eight, and its mirror
    assert (claim["p_holm"], claim["seeds_needed"], claim["interval_bootstrap"]) == (claim["p"], None, None)


def test_a_verdict_its_numbers_and_its_source_stand_in_every_form(paper):
    claims = [
        {"claim": "none = nf4_double within 0.6", "source": "table 2"},
        "int8_absmax <= nf4_double",
        {"claim": "nf4_double = 4.127 within 0.001", "metric": "base.bits_per_parameter"},
        "nf4_double is best",
    ]
    done = report(paper(LOSSES, claims))
    found = json.loads(done.files["results.json"].read_text())["claims"]
    assert [claim["verdict"] for claim in found] == ["holds", "cannot tell", "holds", "cannot tell"]
    for text in (done.index.read_text(), done.files["report.md"].read_text(), done.table):
        flat = " ".join(unescape(text).split())
        assert "Claim none = nf4_double within 0.6: holds; 2.0000 against 2.5000 here" in flat
        assert "by Holm for 2 claims, sign flips p = 0.12" in flat
        assert "Source: table 2." in flat
        assert "an interval that holds 0; more than 10,000 seeds are needed" in flat
        assert "Claim nf4_double = 4.127 within 0.001 [base.bits_per_parameter]: holds; 4.1270 here" in flat
        assert "Claim nf4_double is best: cannot tell; the claim 'nf4_double is best' has no form that is known" in flat


def test_a_published_value_that_is_not_confirmed_says_so(paper):
    root = paper(LOSSES, ["none <= nf4_double"])
    sweep = record.read_sweep(root)
    sweep["paper"]["marks"] = {"none": "confirmed", "nf4_double": "unconfirmed"}
    record.write_sweep(root, sweep)
    done = report(root)
    arms = json.loads(done.files["results.json"].read_text())["arms"]
    assert [arm["published_mark"] for arm in arms] == ["confirmed", None, "unconfirmed"]
    for text in (done.index.read_text(), done.files["report.md"].read_text(), done.table):
        assert "20 against 31.07 (unconfirmed) published" in " ".join(unescape(text).split())


def test_shares_of_the_variance_stand_in_every_form_where_a_design_is_complete(write_runs):
    def two_rates(trial, r, seed):
        trial["config"]["optimizer"]["lr"] = 0.1 if seed < 3 else 0.2
        trial["config"]["seed"] = trial["seed"] = seed % 3

    losses = {(r, seed): 0.1 * r + 0.01 * seed for r in (2, 4) for seed in range(6)}
    done = report(write_runs(losses, two_rates))
    (found,) = json.loads(done.files["results.json"].read_text())["effects"]
    assert [part["axes"] for part in found["parts"]] == [["r"], ["lr"], ["r", "lr"]]
    assert sum(part["share"] for part in found["parts"]) + found["seeds"] == pytest.approx(1)
    assert found["importance"][0]["axis"] == "r"
    for text in (done.index.read_text(), done.files["report.md"].read_text(), done.table):
        assert "Shares of the variance of val/loss: r 97%, lr 2%" in " ".join(unescape(text).split())


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


def about(root, **changes):
    """The sweep with other words on its paper."""
    sweep = record.read_sweep(root)
    sweep["paper"] |= changes
    record.write_sweep(root, sweep)
    return report(root)


@pytest.mark.parametrize("words", [{"metric": "val/loss"}, {"metric": "loss", "model": "tiny"}])
def test_by_the_same_metric_the_difference_to_the_published_value_is_shown(paper, words):
    done = about(paper(LOSSES, []), **words)
    arms = json.loads(done.files["results.json"].read_text())["arms"]
    means = pd.read_csv(done.files["results.csv"]).groupby("quantization", sort=False)["val/loss"].mean()
    expected = [means[name] - value for name, value in (("none", 20.0), ("int8_absmax", 29.48), ("nf4_double", 31.07))]
    assert [arm["difference_to_published"] for arm in arms] == pytest.approx(expected)
    for text in (done.index.read_text(), done.files["report.md"].read_text()):
        assert all(f"{gap:+.4f}" in text for gap in expected)
        assert "Another model" not in text
        assert "vs published: our mean less the published value, by the same metric" in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            {},
            "Another model and other data; no difference is taken, since sweep.paper.metric does not say that they are",
        ),
        ({"metric": "val/loss", "columns": ["a", "b"]}, "the published values have several columns"),
        (
            {"metric": "val/loss", "model": "gpt3"},
            "Another model; no difference is taken, since they are of gpt3, ours",
        ),
    ],
)
def test_of_another_metric_or_model_there_is_no_difference_but_the_reason(paper, words, reason):
    done = about(paper(LOSSES, []), **words)
    arms = json.loads(done.files["results.json"].read_text())["arms"]
    assert [arm["difference_to_published"] for arm in arms] == [None] * 3
    for text in (done.index.read_text(), done.files["report.md"].read_text(), done.table):
        assert reason in " ".join(text.split())
        assert "vs published" not in text


@pytest.mark.parametrize("claims", ["none <= nf4_double", ["none <= nf4_double"]])
def test_a_sweep_file_may_name_one_claim_and_odd_values_are_left_out(paper, claims):
    root = paper(LOSSES, claims)
    sweep = record.read_sweep(root)
    sweep["paper"]["published"] = {"none": 20.0, "nf4_double": ["not printed", 31.07]}
    record.write_sweep(root, sweep)
    result = json.loads(report(root).files["results.json"].read_text())
    assert [claim["verdict"] for claim in result["claims"]] == ["holds"]
    assert [arm["published"] for arm in result["arms"]] == [[20.0], [], [31.07]]
