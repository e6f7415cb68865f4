"""``sweep.d90`` asks for trials between the ends of its bracket, and the report says where it ended."""

import json

import pytest

from loralab.cli import main
from loralab.records import record

STEPS = 4


@pytest.fixture
def search(tiny_arguments, tmp_path, monkeypatch):
    """Runs the shipped sweep on a small random base; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    arguments = [word for word in tiny_arguments if not word.startswith(("adapter.r", "trainer.max_steps"))]

    def run(*words):
        settings = [f"trainer.max_steps={STEPS}", "data.limit=6", "seed=0", f"hydra.sweep.dir={tmp_path / 's'}"]
        return main.run(["sweep", "intrinsic_dimension", *arguments, *settings, *words])

    return run


def losses(folder):
    """{full, base or a dimension: validation loss}."""
    found = {}
    for place in record.find(folder):
        stored = record.read(place)
        assert stored["status"] == "completed", stored["error"]
        trained = "full" if stored["config"]["trainer"]["max_steps"] == STEPS else "base"
        role = stored["config"]["adapter"].get("dimension", trained)
        assert role not in found
        found[role] = stored["metrics"]["val/loss"]
    return found


def test_it_closes_in_on_the_smallest_dimension_and_a_second_call_runs_nothing(search, tmp_path, capsys):
    words = ("sweep.d90.ladder=[2,2000]", "sweep.d90.share=0.5", "sweep.d90.within=6")
    assert search(*words) == 0
    scores = losses(tmp_path / "s")
    threshold = scores["base"] - 0.5 * (scores["base"] - scores["full"])
    dimensions = sorted(role for role in scores if isinstance(role, int))
    reaching = [dimension for dimension in dimensions if scores[dimension] <= threshold]
    (answer,) = json.loads((tmp_path / "s" / "report" / "results.json").read_text())["d90"]
    assert answer["d"] == min(reaching)
    assert answer["low"] == max(dimension for dimension in dimensions if dimension < min(reaching))
    assert answer["threshold"] == pytest.approx(threshold, rel=1e-12)
    assert answer["d"] <= 6 * answer["low"]
    assert len(dimensions) > 2
    assert round((2 * 2000) ** 0.5) in dimensions
    assert f"d50 (adapter.dimension): {answer['d']}; {answer['low']} falls short" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/result.json")}
    assert search(*words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/result.json")} == before
    gone = next(path for path in before if record.read(path.parent)["config"]["adapter"].get("dimension") == 63)
    gone.unlink()
    assert main.run(["sweep", "--resume", str(tmp_path / "s")]) == 0
    assert losses(tmp_path / "s").keys() == scores.keys()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("sweep.d90.ladder=[0]", "sweep.d90.ladder"),
        ("+sweep.d90.ldder=[1]", "did you mean ladder"),
        ("sweep.d90=4", "sweep.d90=4 is no group of settings"),
        ("+method=lora", "sweep.d90.reference=+method=full is an override of none of the 1 trials"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(search, tmp_path, capsys, word, says):
    assert search(word) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "s" / "sweep.json").exists()
