"""The cost of arms whose trials ran alone: step time, the predicted peak by kind, bytes on disk."""

import json

import pytest

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting import cost
from loralab.reporting.report import report

MIB = 2**20
KINDS = {"base": 10, "constants": 1, "adapter": 2, "gradients": 3, "optimizer": 4, "activations": 5, "logits": 6}


@pytest.fixture
def sweep(tmp_path, synthetic, write):
    """Builds a sweep of two ranks and two seeds; ``pack``: how many trials ran together."""

    def build(pack: int = 1):
        root, trials = tmp_path / f"pack{pack}", []
        for index, (r, seed) in enumerate([(8, 0), (8, 1), (16, 0), (16, 1)]):
            stored = synthetic("none", r, seed)
            split = {kind: size * MIB * (1 + seed) for kind, size in {**KINDS, "transient": 7}.items()}
            stored["memory"].update(predicted_by_kind=split, predicted_peak_bytes=sum(split.values()))
            stored["time"].update(steps=10, tokens=2000, tokens_per_s=400.0)
            stored["pack"].update(size=pack, index=index % pack)
            write(root / stored["trial"], stored)
            trials.append({"trial": stored["trial"], "folder": stored["trial"], "status": "completed"})
        axes = {"adapter.r": [8, 16], "seed": [0, 1]}
        record.write_sweep(root, {"name": "cost", "question": "?", "axes": axes, "trials": trials})
        return root

    return build


def test_the_kinds_of_the_seed_with_the_highest_peak_are_shown_and_add_up_to_it(sweep):
    root = sweep()
    comparison = comparisons(read_results(root))[0]
    titles, rows = cost.table(comparison)
    assert titles == ["r", "step s", "peak", "base", "trained", "gradients", "state", "activations", "adapter file"]
    assert rows[0] == ["8", "0.500", "76.0 MiB", "22.0 MiB", "4.0 MiB", "6.0 MiB", "8.0 MiB", "36.0 MiB", "0.2 MiB"]
    written = report(root)
    arm = json.loads(written.files["results.json"].read_text())["arms"][0]
    assert arm["step_s"] == 2000 / 10 / 400
    assert arm["predicted_by_kind"]["peak"] == sum(arm["predicted_by_kind"].values()) / 2 == 76 * MIB
    assert arm["adapter_bytes"] == 6144 * 8 * 4
    for name in ("index.html", "report.md"):
        assert "22.0 MiB" in written.files[name].read_text()
    assert "22.0 MiB" in written.table


def test_a_pack_has_no_cost_of_one_trial(sweep):
    root = sweep(pack=4)
    comparison = comparisons(read_results(root))[0]
    assert cost.table(comparison)[1] == []
    assert cost.section(comparison) is None
    assert cost.step_seconds(comparison.arms[0]) is None


def test_records_without_kinds_have_no_cost(synthetic_sweep):
    comparison = comparisons(read_results(synthetic_sweep))[0]
    assert cost.table(comparison)[1] == []
