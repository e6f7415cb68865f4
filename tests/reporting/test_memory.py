"""The memory section tells paged from unpaged, and says where the two are the same thing."""

import json

import pytest

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting import memory, spikes
from loralab.reporting.page import page

MIB = 2**20
NOTE = "optimizer=paged_adamw paged nothing: the largest tensor has 8,192 elements"


NAMES = ("all that the card has", "adamw_32bit", "paged_adamw")


@pytest.fixture
def paged_sweep(tmp_path, synthetic, write):
    """Four runs, two of them paged; the unpaged one of the spiky arm ran out of memory. ``predicted``: the spiky ones
    have what a card was predicted to need."""

    def build(paging: str, predicted: bool = False):
        root, trials = tmp_path / "paged", []
        for name in ("adamw_32bit", "paged_adamw"):
            for every in (None, 8):
                stored_trial = synthetic("nf4_double", 8, 0)
                asked = name.startswith("paged")
                on = asked and paging == "on"
                died = every is not None and not on
                stored_trial["trial"] = f"{name}-{every}"
                stored_trial["choices"]["optimizer"] = name
                stored_trial["config"]["memory"] = {"spiky_every": every}
                stored_trial["optimizer"] |= {
                    "name": name,
                    "paging": paging if asked else "off",
                    "note": NOTE if asked and not on else None,
                    "state_bytes": 4 * 2**20,
                    "eight_bit_bytes": 0,
                    "paged_fraction": 1.0 if on else 0.0,
                }
                stored_trial["memory"] |= {"by_phase": {"backward": 300 * 2**20}, "spike_count": 3 if every else 0}
                if predicted and every:
                    series = {"step": [1, 2, 3], "length": [64, 512, 64], "state_bytes": 0 if asked else 40 * MIB}
                    peaks = [(size + (0 if asked else 40)) * MIB for size in (100, 300, 120)]
                    series |= {"peak_bytes": peaks, "paged_bytes": 40 * MIB if asked else 0}
                    stored_trial["memory"]["predicted_on_card"] = series
                if died:
                    stored_trial.update(status="out_of_memory", metrics={}, error="no room")
                write(root / stored_trial["trial"], stored_trial)
                series = [{"step": step, "memory/backward_peak_gib": 0.25 + 0.01 * step} for step in range(1, 5)]
                (root / stored_trial["trial"] / "metrics.jsonl").write_text(
                    "".join(json.dumps(row) + "\n" for row in series)
                )
                trials.append(
                    {"trial": stored_trial["trial"], "folder": stored_trial["trial"], "status": stored_trial["status"]}
                )
        axes = {"optimizer": ["adamw_32bit", "paged_adamw"], "memory.spiky_every": [None, 8], "seed": [0]}
        record.write_sweep(root, {"name": "paged", "question": "?", "axes": axes, "trials": trials})
        return read_results(root)

    return build


def test_the_arms_are_on_one_axis_with_what_was_paged_and_who_died(paged_sweep):
    results = paged_sweep("on")
    section = memory.section(comparisons(results)[0])
    found, (figure,) = section.body, section.figures
    lines = {row["line"] for row in figure.spec["datasets"]["lines"]}
    assert len(lines) == 4
    assert {(row["group"], row["by"]) for row in figure.spec["datasets"]["lines"]} == {
        ("adamw_32bit", "not paged"),
        ("paged_adamw", "paged"),
    }
    assert "100%" in found
    assert "1 out of memory" in found
    assert "300.0" in found
    assert NOTE not in found
    assert "not applicable" not in found


def test_a_run_that_paged_nothing_is_named_with_the_reason(paged_sweep):
    results = paged_sweep("nothing")
    assert NOTE in page(results, comparisons(results)).text
    assert "trouble" in memory.section(comparisons(results)[0]).body


def test_where_nothing_can_page_the_panel_says_not_applicable(paged_sweep):
    results = paged_sweep("not applicable")
    assert "Paging is not applicable on this machine" in memory.section(comparisons(results)[0]).body


def test_without_a_card_the_picture_is_the_planners_and_says_so(paged_sweep):
    results = paged_sweep("not applicable", predicted=True)
    (figure,) = memory.section(comparisons(results)[0]).figures
    assert figure.title == "A long sentence arrives: memory by step, predicted"
    assert "not measured: no card has run it" in figure.caption
    assert figure.caption.endswith("Cross: out of memory (adamw_32bit).")
    rows = figure.spec["datasets"]["lines"]
    drawn = {
        name: [(row["step"], round(row["value"] * 1024)) for row in rows if row["group"] == name] for name in NAMES
    }
    # a card of 300 MiB and half of the state: the unpaged run needs all of it at the long batch, and ends there
    assert drawn["all that the card has"] == [(1, 320), (3, 320)]
    assert drawn["adamw_32bit"] == [(1, 140), (2, 340)]
    assert drawn["paged_adamw"] == [(1, 140), (2, 320), (3, 160)]
    assert [(end["group"], end["step"]) for end in figure.spec["datasets"]["ends"]] == [("adamw_32bit", 2)]
    assert page(results, comparisons(results)).text.count("A long sentence arrives") >= 1


def test_what_a_card_really_paged_is_drawn_as_it_was_measured(paged_sweep):
    results = paged_sweep("on", predicted=True)
    (figure,) = memory.section(comparisons(results)[0]).figures
    assert figure.title == "Memory by step, with and without paging"
    assert "redicted" not in figure.caption


def test_a_state_that_fits_stays_and_one_that_does_not_leaves_as_much_as_is_missing():
    series = {"step": [1, 2, 3], "peak_bytes": [50, 95, 130], "paged_bytes": 20}
    assert spikes.on_card(series, 100) == [(1, 70, False), (2, 100, False), (3, 130, True)]
    assert spikes.on_card({**series, "paged_bytes": 0}, 100) == [(1, 50, False), (2, 95, False), (3, 130, True)]
    assert spikes.capacity([50, 90], 20) == 100


def test_a_study_without_paging_has_no_such_section(synthetic_sweep):
    results = read_results(synthetic_sweep)
    assert memory.section(comparisons(results)[0]) is None
