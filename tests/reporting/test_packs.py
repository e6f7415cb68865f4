"""Measured memory, time and speed carry their pack, and those of unlike passes are neither averaged nor compared."""

import json
from html import unescape

from loralab.analysis.arms import arms, comparisons
from loralab.analysis.results import read_results
from loralab.reporting.report import report
from loralab.reporting.table import columns

MIB = 2**20


def in_pack(stored_trial, size, index, pid=7, seconds=10.0):
    stored_trial["pack"].update(size=size, index=index)
    stored_trial.update(pid=pid, host="synthetic")
    stored_trial["time"].update(startup_s=2.0, train_s=seconds, tokens_per_s=330.0 + index)
    stored_trial["memory"].update(measured_peak_bytes=71 * MIB, predicted_peak_bytes=80 * MIB, alone_peak_bytes=None)


def written(tmp_path, synthetic, write, trials):
    """(r, seed, size or 1, pid) each."""
    for index, (r, seed, size, pid) in enumerate(trials):
        stored_trial = synthetic("none", r, seed)
        if size > 1:
            in_pack(stored_trial, size, index, pid)
        stored_trial["memory"]["alone_peak_bytes"] = (10 + r) * MIB
        write(tmp_path / f"{r}-{seed}-{pid}", stored_trial)
    return read_results(tmp_path)


def texts(results, title):
    (comparison,) = comparisons(results)
    column = next((column for column in columns(comparison) if column.title == title), None)
    return [(column.text(arm), column.number(arm)) for arm in comparison.arms] if column else None


def test_a_packs_figures_are_named_as_its_own_and_sort_nowhere(tmp_path, synthetic, write):
    results = written(tmp_path, synthetic, write, [(2, 0, 2, 7), (8, 0, 2, 7)])
    assert texts(results, "peak memory") == [("71.0 MiB (pack of 2)", None)] * 2
    assert texts(results, "train s") == [("10.0 (pack of 2)", None)] * 2
    assert texts(results, "tokens/s") == [("661 (pack of 2)", None)] * 2  # 330 + 331


def test_what_compares_is_the_predicted_peak_of_a_trial_alone(tmp_path, synthetic, write):
    results = written(tmp_path, synthetic, write, [(2, 0, 2, 7), (8, 0, 2, 7), (4, 0, 1, 9)])
    assert texts(results, "peak alone") == [(f"{10 + r}.0 MiB", (10.0 + r) * MIB) for r in (2, 4, 8)]
    done = report(tmp_path)
    arms = json.loads(done.files["results.json"].read_text())["arms"]
    assert [arm["alone_peak_bytes"] for arm in arms] == [(10 + r) * MIB for r in (2, 4, 8)]
    assert [arm["pack_size"] for arm in arms] == [2, 1, 2]
    for text in (done.index.read_text(), done.files["report.md"].read_text(), done.table):
        assert "compare with no other row" in " ".join(unescape(text).split())
        assert "the same in each" not in text


def test_a_row_of_packed_and_single_trials_has_no_average(tmp_path, synthetic, write):
    results = written(tmp_path, synthetic, write, [(2, 0, 2, 7), (8, 0, 2, 7), (2, 1, 1, 8)])
    mixed, packed = arms(results)
    assert mixed.pack_size is None
    assert mixed.speed is None
    assert mixed.measured("time.train_s") is None
    assert mixed.measured("memory.measured_peak_bytes", largest=True) is None
    assert packed.speed == 661.0
    assert texts(results, "tokens/s")[0] == ("-", None)


def test_a_row_over_two_packs_has_no_average_either(tmp_path, synthetic, write):
    results = written(tmp_path, synthetic, write, [(2, 0, 2, 7), (8, 0, 2, 7), (2, 1, 2, 8), (8, 1, 2, 8)])
    assert all(row.pack_size is None and row.speed is None for row in arms(results))
    assert texts(results, "tokens/s") is None


def test_the_speed_of_a_pack_with_a_missing_member_is_not_guessed(tmp_path, synthetic, write):
    results = written(tmp_path, synthetic, write, [(2, 0, 3, 7), (8, 0, 3, 7)])
    assert all(row.speed is None for row in arms(results))


def test_single_trials_are_averaged_and_sorted(tmp_path, synthetic, write):
    results = written(tmp_path, synthetic, write, [(2, 0, 1, 7), (2, 1, 1, 8)])
    (row,) = arms(results)
    rates = [trial.record["time"]["tokens_per_s"] for trial in row.trials]
    assert row.speed == sum(rates) / 2
    assert texts(results, "tokens/s") == [(f"{sum(rates) / 2:,.0f}", sum(rates) / 2)]


def test_an_old_record_of_a_pack_has_no_peak_of_its_own(tmp_path, synthetic, write):
    solo, packed = synthetic("none", 2, 0), synthetic("none", 8, 0)
    in_pack(packed, 2, 0)
    write(tmp_path / "solo", solo)
    write(tmp_path / "packed", packed)
    results = read_results(tmp_path)
    assert texts(results, "peak alone") == [("200.3 MiB", 210_000_000.0), ("-", None)]


def test_bits_over_all_weights_stand_beside_the_quantized_ones_where_they_differ(tmp_path, synthetic, write):
    for scheme, overall in (("none", 32.0), ("nf4_double", 31.0)):
        stored_trial = synthetic(scheme, 2, 0)
        stored_trial["base"]["bits_per_parameter_overall"] = overall
        write(tmp_path / scheme, stored_trial)
    results = read_results(tmp_path)
    assert sorted(text for text, _ in texts(results, "bits overall")) == ["31.000", "32.000"]
    stored_trial["base"]["bits_per_parameter_overall"] = 4.13
    write(tmp_path / scheme, stored_trial)
    assert texts(read_results(tmp_path), "bits overall") is None


def test_with_several_threads_a_packed_trials_command_does_not_promise_its_bits(tmp_path, synthetic, write):
    for threads, expected in ((2, True), (1, False)):
        for index, r in enumerate((2, 8)):
            stored_trial = synthetic("none", r, 0)
            in_pack(stored_trial, 2, index)
            stored_trial["environment"]["threads"] = threads
            write(tmp_path / str(r), stored_trial)
        assert ("the same bits with one thread only" in report(tmp_path).table) == expected
