"""A paper's claims against our arms: holds, does not hold, cannot tell, not comparable."""

import pytest

from loralab.analysis.arms import comparisons
from loralab.analysis.claims import verdicts
from loralab.analysis.results import read_results
from loralab.records import record

LOSSES = {"none": [1.0, 2.0, 3.0], "int8_absmax": [1.5, 2.51, 3.49], "nf4_double": [1.51, 2.49, 3.5]}


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ("none <= nf4_double", "holds"),
        ("nf4_double >= none", "holds"),
        ("nf4_double <= none", "does not hold"),
        ("int8_absmax <= nf4_double", "cannot tell"),
        ("none <= fp4", "not comparable"),
        ("r has no effect", "cannot tell"),
    ],
)
def test_the_paired_interval_decides(paper, claim, verdict):
    results = read_results(paper(LOSSES, [claim]))
    (found,) = verdicts(results, comparisons(results))
    assert (found.claim, found.verdict) == (claim, verdict)


def test_arms_over_other_targets_or_in_other_environments_are_not_comparable(paper):
    def other_targets(stored_trial):
        stored_trial["data"]["targets"] = ("a" if stored_trial["choices"]["quantization"] == "none" else "b") * 16

    def other_torch(stored_trial):
        stored_trial["environment"]["versions"]["torch"] = (
            "2.12" if stored_trial["choices"]["quantization"] == "none" else "2.13"
        )

    for change in (other_targets, other_torch):
        results = read_results(paper(LOSSES, ["none <= nf4_double"], change))
        (found,) = verdicts(results, comparisons(results))
        assert found.verdict == "not comparable"
        assert found.estimate is None


def test_a_second_axis_gives_a_verdict_for_each_of_its_values(tmp_path, synthetic, write):
    for scheme in ("none", "nf4_double"):
        for r in (2, 8):
            for seed in (0, 1, 2):
                stored_trial = synthetic(scheme, r, seed)
                write(tmp_path / stored_trial["trial"], stored_trial)
    axes = {"quantization": ["none", "nf4_double"], "adapter.r": [2, 8]}
    trials = [{"trial": path.name, "folder": path.name} for path in record.find(tmp_path)]
    record.write_sweep(tmp_path, {"name": "p", "axes": axes, "trials": trials, "claims": ["none <= nf4_double"]})
    results = read_results(tmp_path)
    assert [one.claim for one in verdicts(results, comparisons(results))] == [
        "none <= nf4_double (r = 2)",
        "none <= nf4_double (r = 8)",
    ]
