"""``hydra/sweeper=optuna``: what is asked for, what is pruned, and that a search goes on where it was killed."""

import math

import optuna
import pytest
from omegaconf import OmegaConf

from loralab.cli import main
from loralab.errors import ConfigError
from loralab.records import record
from loralab.scheduling.search import Search, Space

WORDS = ["optimizer.lr=tag(log, interval(1e-4, 1e-1))", "adapter.r=choice(1,4,16)", "seed=0,1", "data.limit=4"]


def search(folder, words=WORDS, n_trials=12, batch=4, **sweep):
    config = {"hydra": {"sweep": {"dir": str(folder)}}, "seed": 3, "metric_mode": "min", "sweep": sweep}
    return Search(Space(words), OmegaConf.create({**config, "trainer": {}, "callbacks": {}}), n_trials, batch)


def loss(words):
    """The least at lr = 1e-2 and r = 4; seeds differ by a constant."""
    given = dict(word.split("=") for word in words)
    return (math.log10(float(given["optimizer.lr"])) + 2) ** 2 + (given["adapter.r"] != "4") + 0.1 * int(given["seed"])


def run(one, rounds=None):
    """Rounds of asking and telling, at most so many; what was asked for in each."""
    asked = []
    while (rounds is None or len(asked) < rounds) and (trials := one.ask()):
        asked.append(trials)
        one.tell(trials, [loss(words) for words in trials])
    return asked


def test_each_point_is_run_over_every_seed_within_its_space_and_what_is_told_is_their_mean(tmp_path):
    one = search(tmp_path)
    asked = run(one)
    assert [len(trials) for trials in asked] == [8, 8, 8]
    for trials in asked:
        for first, second in zip(trials[::2], trials[1::2], strict=True):
            assert first[:-1] == second[:-1]
            assert (first[-1], second[-1]) == ("seed=0", "seed=1")
            assert first[0] == "data.limit=4"
            assert 1e-4 <= float(first[1].partition("=")[2]) <= 1e-1
            assert first[2] in ("adapter.r=1", "adapter.r=4", "adapter.r=16")
    means = [(loss(trials[i]) + loss(trials[i + 1])) / 2 for trials in asked for i in range(0, 8, 2)]
    assert [trial.value for trial in one.study.trials] == pytest.approx(means, rel=1e-12)
    assert one.tell([], [])[0]["value"] == pytest.approx(min(means), rel=1e-12)
    assert one.ask() == []


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_search_that_was_killed_asks_for_what_it_would_have_asked(tmp_path, rounds):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = run(search(tmp_path / "whole"))
    first = run(search(tmp_path / "parts"), rounds)
    asked_and_killed = search(tmp_path / "parts").ask()
    again = run(search(tmp_path / "parts"))
    assert again[0] == asked_and_killed == whole[rounds]
    assert [*first, *again] == whole


def test_a_point_with_a_failed_trial_has_no_value_and_the_search_goes_on(tmp_path):
    one = search(tmp_path, n_trials=4)
    trials = one.ask()
    one.tell(trials, [None, *(1.0 for _ in trials[1:])])
    states = optuna.trial.TrialState
    assert [trial.state for trial in one.study.trials] == [states.FAIL, *[states.COMPLETE] * 3]
    assert one.ask() == []


def test_points_worse_than_the_median_end_at_a_rung_and_the_others_go_on(tmp_path):
    one = search(tmp_path, n_trials=12, batch=6, halving={"rungs": [0.5]})
    ended, completed = 0, []
    while trials := one.ask():
        pausing = [words for words in trials if words[-1].endswith("trainer.until=0.5")]
        assert len(pausing) in (0, len(trials))
        one.tell(trials, [loss(words[:-1] if pausing else words) for words in trials])
        ended += len(one.ended)
        completed += [] if pausing else trials
    states = [trial.state for trial in one.study.trials]
    pruned = states.count(optuna.trial.TrialState.PRUNED)
    assert pruned
    assert ended == 2 * pruned
    assert len(completed) == 2 * (12 - pruned)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,1"], "has no space to search"),
        (["optimizer.lr=tag(log, interval(0.0, 1.0))"], "one on a log scale is above 0"),
        (["optimizer.lr=interval(1.0, 0.5)"], "an interval rises"),
    ],
)
def test_a_space_that_is_none_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        Space(words)


def test_an_interval_of_whole_numbers_gives_whole_numbers(tmp_path):
    one = search(tmp_path, words=["adapter.r=int(interval(1, 64))"])
    assert {int(words[0].partition("=")[2]) for words in one.ask()} <= set(range(1, 65))


def test_from_the_command_line_it_runs_skips_and_says_what_is_best(tmp_path, tiny_arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = ["optimizer.lr=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.n_trials=3", "hydra.sweeper.batch=2"]
    words = ["train", "-m", "hydra/launcher=packed", "hydra/sweeper=optuna", *tiny_arguments, "data.limit=4", *space]
    assert main.run([*words, "hydra.sweep.dir=s"]) == 0
    stored = [record.read(place) for place in record.find(tmp_path / "s")]
    assert len(stored) == 3
    decision = record.read_sweep(tmp_path / "s")["decisions"][-1]
    assert decision["value"] == pytest.approx(min(one["metrics"]["val/loss"] for one in stored), rel=1e-12)
    before = {place: (place / "result.json").stat().st_mtime_ns for place in record.find(tmp_path / "s")}
    assert main.run([*words, "hydra.sweep.dir=s", "hydra.sweeper.n_trials=4"]) == 0
    after = {place: (place / "result.json").stat().st_mtime_ns for place in record.find(tmp_path / "s")}
    assert after.items() >= before.items()
    assert len(after) == 4
    capsys.readouterr()
    assert main.run([*words, "hydra.sweep.dir=t", "+sweep.zip=[[a,b]]"]) == 2
    assert "hydra/sweeper=optuna does not know sweep.zip" in capsys.readouterr().err
