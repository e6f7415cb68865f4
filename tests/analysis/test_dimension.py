"""The report of a sweep that searches an intrinsic dimension: one answer for the trials that belong together. The
losses are made up."""

import json

import pytest

from loralab.analysis.dimension import answers, sentences
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting.report import report

D90 = {"ladder": [10, 1000], "within": 4.0}
LOSSES = {"base": (4.0, 4.2), "full": (3.0, 3.2), 10: (3.9, 4.1), 100: (3.3, 3.1), 1000: (2.9, 3.3)}


@pytest.fixture
def searched(tmp_path, synthetic, write):
    """A sweep of LOSSES by role and seed; ``settings``: overrides of the trials, each a whole search."""

    def build(settings=((),), d90=D90, losses=LOSSES):
        trials = []
        for number, words in enumerate(settings):
            for role, values in losses.items():
                for seed, loss in enumerate(values):
                    trial = {**synthetic("none", 2, seed), "metrics": {"val/loss": loss + number}}
                    trial["trial"] = f"{number}-{role}-{seed}"
                    adapter = {"dimension": role} if isinstance(role, int) else {}
                    trial["config"]["adapter"] = {"_target_": f"x.{'Intrinsic' if adapter else 'Full'}", **adapter}
                    trial["config"]["optimizer"]["lr"] = 0.1 + number
                    trial["config"]["trainer"]["max_steps"] = 0 if role == "base" else 60
                    method = [f"+method={'intrinsic' if adapter else 'full'}", f"seed={seed}"]
                    own = [f"adapter.dimension={role}"] if adapter else ["trainer.max_steps=0"] * (role == "base")
                    trial["overrides"] = [*words, *method, *own]
                    write(tmp_path / trial["trial"], trial)
                    trials.append({"trial": trial["trial"], "folder": trial["trial"]})
        axes = {"+method": ["full", "intrinsic"], "seed": [0, 1]}
        record.write_sweep(tmp_path, {"name": "d", "axes": axes, "trials": trials, **({"d90": d90} if d90 else {})})
        return tmp_path

    return build


def test_the_page_the_table_and_the_json_have_the_answer(searched):
    folder = searched()
    written = report(folder)
    # means: 4.1 untrained, 3.1 trained; 90% of the improvement is 3.2: of 10 it is 4.0, of 100 3.2, of 1000 3.1
    sentence = (
        "d90 (adapter.dimension): 100; 10 falls short (90% of the improvement by +method=full is 3.2000: 4.1000 "
        "untrained, 3.1000 trained; mean over seeds 0, 1)"
    )
    (answer,) = json.loads((folder / "report" / "results.json").read_text())["d90"]
    assert (answer["low"], answer["d"], answer["seeds"]) == (10, 100, ["0", "1"])
    assert answer["tried"] == {"10": 4.0, "100": pytest.approx(3.2), "1000": pytest.approx(3.1)}
    assert answer["threshold"] == pytest.approx(3.2)
    assert sentence in (folder / "report" / "report.md").read_text()
    assert sentence in (folder / "report" / "index.html").read_text()
    assert "d90 (adapter.dimension): 100; 10 falls short" in written.table


def test_trials_of_two_settings_have_an_answer_each(searched):
    results = read_results(searched([("optimizer.lr=0.1",), ("optimizer.lr=1.1",)]))
    assert [(setting, one.high, round(one.full, 9)) for setting, one in answers(results).items()] == [
        ("optimizer.lr=0.1", 100, 3.1),
        ("optimizer.lr=1.1", 100, 4.1),
    ]
    assert sentences(results)[1].startswith("optimizer.lr=1.1: d90 (adapter.dimension): 100")


@pytest.mark.parametrize("d90", [None, {"ladder": "later"}])
def test_a_sweep_that_asks_for_none_or_for_what_this_version_does_not_know_has_none(searched, d90):
    folder = searched(d90=d90)
    report(folder)
    assert "d90" not in json.loads((folder / "report" / "results.json").read_text())
