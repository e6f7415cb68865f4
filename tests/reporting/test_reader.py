"""What a reader concludes from a report: what differs from the baseline, what was asked, what could not be read."""

import json
import math
import re
import shutil
from html import unescape

import pytest
from scipy import stats
from stored import figure_of

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.cli import main
from loralab.records import record
from loralab.reporting.listing import listing, render
from loralab.reporting.provenance import held_fixed, question
from loralab.reporting.report import report
from loralab.reporting.text import terminal

FIXED = "lora_alpha / r = 2, so the update's scale stays put when r moves; one learning rate for every r"


@pytest.fixture
def runs(tmp_path, synthetic, write):
    """Writes a trial of each (r, lr, seed) with the loss given; returns the folder."""

    def make(losses, **sweep):
        trials = []
        for (r, lr, seed), loss in losses.items():
            stored_trial = synthetic("none", r, seed)
            stored_trial["config"]["optimizer"]["lr"] = lr
            stored_trial["overrides"] += [f"optimizer.lr={lr}"]
            stored_trial["metrics"] = {"val/loss": loss}
            stored_trial["status"] = "failed" if math.isnan(loss) else "completed"
            name = f"{r}-{lr}-{seed}"
            write(tmp_path / "s" / name, stored_trial)
            trials.append({"trial": stored_trial["trial"], "folder": name})
        if sweep:
            record.write_sweep(tmp_path / "s", {"name": "s", "trials": trials, **sweep})
        return tmp_path / "s"

    return make


def flat(text):
    return unescape(" ".join(re.sub(r"<[^>]*>", "", text).split()))


def forms(done):
    return [flat(done.table), *(flat(done.files[name].read_text()) for name in ("index.html", "report.md"))]


SEEDS = range(3)
WORSE = {(2, 0.1, seed): 2.0 + seed for seed in SEEDS} | {(4, 0.1, seed): 2.5 + seed + seed / 99 for seed in SEEDS}
TWINS = {(r, 0.1, seed): 1.0 + seed + (seed - 1) * r / 999 for r in (8, 16) for seed in SEEDS}


def test_rows_that_differ_from_the_baseline_are_counted_and_marked_where_no_row_is_the_best(runs):
    done = report(runs(WORSE | TWINS))
    for text in forms(done):
        assert "the leading rows are not told apart by their intervals" in text
        level = "at 98.33%, 95% for all 3 paired differences together"
        assert f"against the baseline, 3 of 3 rows differ {level}: 2 better, 1 worse" in text
        assert f"! marks a difference whose interval excludes 0 {level}" in text
    assert sum("] !" in line for line in done.table.splitlines()) == 3
    arms = json.loads(done.files["results.json"].read_text())["arms"]
    assert [arm["against_baseline"] for arm in arms] == [None, "worse", "better", "better"]


@pytest.mark.parametrize(("p", "told"), [(0.012, True), (0.02, False)])  # of 0.05 / 3
def test_a_mark_in_the_table_and_the_answer_above_it_never_disagree(runs, p, told):
    """Three rows beside the baseline, one of which has the p-value: each is held to one level for all three."""
    offset = stats.t.isf(p / 2, 2) / 3**0.5  # of gaps with standard deviation 1
    gaps = {8: (offset - 1, offset, offset + 1), 16: (-1.0, 0.0, 1.0), 32: (1.0, -1.0, 0.0)}
    base = {(2, 0.1, seed): 2.0 for seed in SEEDS}
    done = report(runs(base | {(r, 0.1, s): 2.0 + gap for r, by_seed in gaps.items() for s, gap in enumerate(by_seed)}))
    content = json.loads(done.files["results.json"].read_text())
    arm = next(arm for arm in content["arms"] if arm["values"]["adapter.r"] == "8")
    assert arm["difference"]["p"] == pytest.approx(p, rel=1e-6)
    assert arm["difference"]["low"] > 0  # its own 95% interval excludes 0 either way
    assert (arm["against_baseline"] == "worse") == told
    assert ("] !" in done.table) == told
    assert ("8 (+" in content["answer"]) == told
    assert "95% for all 3 paired differences together" in content["answer"]


def test_one_seed_a_row_has_no_intervals_and_says_so(runs):
    for text in forms(report(runs({(2, 0.1, 0): 2.0, (8, 0.1, 0): 1.0}))):
        assert "with one seed a row, no difference can be told from chance" in text
        assert "single best row" not in text


def test_cells_that_were_never_asked_for_are_not_missing(runs):
    asked = {(2, 0.1, 0): 2.0, (4, 0.1, 0): 2.0, (8, 0.2, 0): 1.0}
    assert "no completed trial" not in report(runs(asked)).index.read_text()
    lost = report(runs(asked | {(8, 0.1, 0): float("nan")})).index.read_text()
    assert "1 of 4 rows has no completed trial" in lost


AXES = {"adapter.r": ["2", "8"], "optimizer.lr": ["0.1", "0.2"], "seed": ["0"]}
OF_RANK = {"question": "Does r matter?", "fixed": FIXED, "overrides": ["+sweeps=rank"]}


def test_what_the_sweep_file_holds_fixed_is_not_said_of_an_axis_of_this_run(runs):
    losses = {(r, lr, 0): r * lr for r in (2, 8) for lr in (0.1, 0.2)}
    results = read_results(runs(losses, axes=AXES, **OF_RANK))
    assert held_fixed(results)[0] == "lora_alpha / r = 2, so the update's scale stays put when r moves"
    assert question(results) == "Does r matter? (Varied here too: optimizer.lr.)"


def test_a_question_about_an_axis_that_does_not_move_is_not_asked(runs):
    axes = {**AXES, "adapter.r": ["2"]}
    done = report(runs({(2, lr, 0): lr for lr in (0.1, 0.2)}, axes=axes, **OF_RANK))
    for text in forms(done):
        assert "What does optimizer.lr do?" in text
        assert "Does r matter?" not in text
        assert "one learning rate for every r" not in text


def test_the_question_stays_where_its_axis_moves(runs):
    results = read_results(runs({(r, 0.1, 0): r for r in (2, 8)}, axes={**AXES, "optimizer.lr": ["0.1"]}, **OF_RANK))
    assert question(results) == "Does r matter?"
    assert held_fixed(results)[0] == FIXED


def damage(folder, keys, value):
    stored = json.loads((folder / record.RESULT).read_text())
    holder = stored
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    (folder / record.RESULT).write_text(json.dumps(stored))


PARTS = [["config", "adapter", "r"], ["config", "model"], ["config"], ["metrics"], ["choices"], ["pid"]]
PARTS += [["choices", "model"], ["data", "fingerprint"], ["base", "fingerprint"], ["config", "metric"]]


@pytest.mark.parametrize("keys", PARTS, ids=".".join)
def test_a_damaged_record_is_a_damaged_row_and_hides_no_other(runs, keys, capsys):
    root = runs({(2, 0.1, 0): 2.0, (8, 0.1, 0): 1.0})
    damage(root / "8-0.1-0", keys, [1, [2]])
    for folder in (root, root.parent):
        assert main.run(["report", str(folder)]) == 0
        trials = json.loads((folder / "report" / "results.json").read_text())["trials"]
        assert sorted(one["status"] for one in trials) == ["completed", "damaged"]
        assert ".".join(keys) in next(one["error"] for one in trials if one["status"] == "damaged")
    assert capsys.readouterr().err == ""


def test_a_task_that_is_no_text_is_shown_as_it_is(runs):
    root = runs({(2, 0.1, 0): 2.0, (8, 0.1, 0): 1.0})
    damage(root / "8-0.1-0", ["config", "model", "task"], True)
    assert report(root).index.is_file()


def test_true_is_no_number(runs):
    root = runs({(2, 0.1, seed): 3.0 for seed in (0, 1)})
    damage(root / "2-0.1-1", ["metrics", "val/loss"], True)
    result = json.loads(report(root).files["results.json"].read_text())
    assert (result["arms"][0]["mean"], result["arms"][0]["scores"]) == (3.0, [3.0])
    assert result["trials"][1]["status"] == "without_result"


@pytest.mark.parametrize("text", ["{", "[]", '{"trials": 5}', '{"question": [1]}'])
def test_a_damaged_list_of_trials_is_said_and_the_records_are_reported(runs, text):
    root = runs({(2, 0.1, 0): 2.0, (8, 0.1, 0): 1.0})
    (root / record.SWEEP).write_text(text)
    assert all("sweep.json cannot be read" in form for form in forms(report(root)))
    (entry,) = listing(root.parent)
    assert entry["statuses"] == {"completed": 2}
    assert "sweep.json" in render([entry])


def test_every_number_of_bits_is_labelled(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    for folder in (tmp_path / "s").glob("int8_absmax*"):
        stored = record.read(folder)
        stored["base"]["bits_per_parameter"] = 4.254
        record.write(folder, stored)
    drawn = figure_of(report(tmp_path / "s").index.read_text(), "quality_against_bits")
    assert {row["x"] for row in drawn["spec"]["datasets"]["means"]} == {"4.127", "4.254", "32"}


def test_a_legend_of_numbers_names_their_axis(runs):
    page = report(runs({(r, lr, 0): r * lr for r in (2, 8) for lr in (0.2, 0.1)})).index.read_text()
    (legend,) = figure_of(page, "metric")["legends"]
    assert legend["names"] == ["lr = 0.1", "lr = 0.2"]


def test_a_wide_table_tells_that_it_scrolls_and_says_what_a_column_is(runs):
    page = report(runs(WORSE)).index.read_text()
    assert "more columns to the right" in page
    assert re.search(r'<th title="[^"]*can be smaller than peak alone', page)
    assert "without steps whose memory was profiled" in page


def test_pack_sizes_are_explained_only_where_they_are_shown(runs):
    root = runs(WORSE)
    for folder in sorted(root.glob("*-*-*")):
        stored = record.read(folder)
        stored["pack"]["size"], stored["time"]["train_s"] = 6, 9.0
        record.write(folder, stored)
    done = report(root)
    results = read_results(root)
    for width, shown in ((200, True), (70, False)):
        table = terminal(results, comparisons(results), width)
        assert ("(pack of 6)" in table) == ("(pack of N)" in table) == shown
    assert "(pack of 6)" in flat(done.index.read_text())
    assert "(pack of N)" in flat(done.index.read_text())
