"""``hydra/sweeper=optuna``: what is asked for, what is pruned, and that a search goes on where it was killed."""

import hashlib
import json
import math
import time

import optuna
import pytest
from omegaconf import OmegaConf

from loralab.cli import main
from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.errors import ConfigError
from loralab.planning.plan import estimate
from loralab.records import record
from loralab.scheduling.search import Search, Space

WORDS = ["optimizer.lr=tag(log, interval(1e-4, 1e-1))", "adapter.r=choice(1,4,16)", "seed=0,1", "data.limit=4"]


def search(folder, words=WORDS, n_trials=12, batch=4, sampler="tpe", **sweep):
    config = {"hydra": {"sweep": {"dir": str(folder)}}, "seed": 3, "metric_mode": "min", "sweep": sweep}
    return Search(Space(words), OmegaConf.create({**config, "trainer": {}, "callbacks": {}}), n_trials, batch, sampler)


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


def told(one, values, statuses=None):
    """A round: ``values`` by number of the point; what was asked for."""
    trials = one.ask()
    if statuses:
        by_words = {tuple(words[:-1] if "until" in words[-1] else words): statuses[n] for n, words in one.waiting}
        one.status = lambda words: by_words.get(tuple(words), "")
    one.tell(trials, [values[number] for number, _ in one.waiting])
    return trials


SPACE = WORDS[:2]
STATES = optuna.trial.TrialState


def test_what_diverges_or_needs_too_much_memory_is_infeasible_and_another_failure_says_nothing(tmp_path):
    one = search(tmp_path, words=SPACE, n_trials=4)
    statuses = {0: "completed", 1: "diverged", 2: "out_of_memory", 3: "failed"}
    told(one, {0: 1.0, 1: None, 2: None, 3: None}, statuses)
    found = one.study.trials
    assert [trial.state for trial in found] == [STATES.COMPLETE, STATES.PRUNED, STATES.PRUNED, STATES.FAIL]
    assert [trial.constraints for trial in found] == [{}, {"diverged": 1.0}, {"memory": 1.0}, {}]
    counts = one.about["search"]
    assert (counts["complete"], counts["infeasible"], counts["failed"], counts["pruned"]) == (1, 2, 1, 0)
    assert one.ask() == []


def test_a_score_that_is_not_known_prunes_no_point_and_fails_a_complete_one(tmp_path):
    one = search(tmp_path, words=SPACE, n_trials=2, batch=2, halving={"rungs": [0.5]})
    told(one, {0: math.nan, 1: 2.0})
    assert [trial.state for trial in one.study.trials] == [STATES.RUNNING, STATES.RUNNING]
    told(one, {0: math.nan, 1: 2.0})
    assert [trial.state for trial in one.study.trials] == [STATES.FAIL, STATES.COMPLETE]
    assert one.study.best_value == 2.0


def test_one_failed_seed_ends_the_others_of_its_point(tmp_path):
    one = search(tmp_path, n_trials=1, batch=1, halving={"rungs": [0.5]})
    trials = one.ask()
    one.tell(trials, [None, 1.0])
    assert set(one.ended.values()) == {"another seed of its point failed"}
    assert sorted(one.ended) == sorted(tuple(words[:-1]) for words in trials)


def excess_of(limit):
    """GiB above a budget, of ranks: 16 needs most."""

    def excess(words):
        return int(dict(word.split("=") for word in words)["adapter.r"]) - limit

    return excess


def test_a_point_above_the_memory_budget_is_told_as_infeasible_and_another_is_asked_instead(tmp_path):
    one = search(tmp_path, n_trials=12, batch=4)
    one.excess = excess_of(8)
    asked = run(one)
    assert [len(trials) for trials in asked] == [8, 8, 8]  # packs are full all the same
    assert not any("adapter.r=16" in words for trials in asked for words in trials)
    refused = [trial for trial in one.study.trials if trial.params["adapter.r"] == "16"]
    assert refused
    assert {trial.state for trial in refused} == {STATES.PRUNED}
    assert [trial.constraints["memory"] for trial in refused] == [8.0] * len(refused)
    about = one.about["search"]
    assert (about["points"], about["complete"], about["refused"]) == (
        12,
        12,
        [{"point": one.space.words(trial.params), "excess_gib": 8} for trial in refused],
    )
    again = search(tmp_path, n_trials=12, batch=4)
    again.excess = excess_of(8)
    assert again.ask() == []


def test_a_budget_that_no_point_fits_is_refused_with_what_is_lacking(tmp_path):
    one = search(tmp_path, n_trials=5)
    one.excess = excess_of(0)
    with pytest.raises(ConfigError, match="no point of the search fits: 5 points were predicted to need more memory"):
        one.ask()


@pytest.mark.parametrize("statuses", [("completed",), ("completed", "diverged", "failed")])
def test_points_are_those_of_optuna_itself(tmp_path, statuses):
    """Asked of a study in memory by Optuna's own calls, a batch before any of it is told."""
    one = search(tmp_path, words=SPACE, n_trials=24, batch=8)
    asked = []
    while one.ask():
        fates = {number: statuses[number % len(statuses)] for number, _ in one.waiting}
        values = {n: loss([*w, "seed=0"]) if fates[n] == "completed" else None for n, w in one.waiting}
        asked += told(one, values, fates)
    plain = optuna.create_study()
    expected = []
    for first in range(0, 24, 8):
        batch = []
        for number in range(first, first + 8):
            seed = int.from_bytes(hashlib.sha256(f"3 {number}".encode()).digest()[:4])
            plain.sampler = optuna.samplers.TPESampler(
                n_startup_trials=8, multivariate=True, constant_liar=True, seed=seed
            )
            batch.append(plain.ask(one.space.distributions))
        for trial in batch:
            words = [
                f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in trial.params.items()
            ]
            expected.append(words)
            fate = statuses[trial.number % len(statuses)]
            if fate == "completed":
                plain.tell(trial, loss([*words, "seed=0"]))
            elif fate == "diverged":
                trial.set_constraint("diverged", 1.0)
                plain.tell(trial, state=STATES.PRUNED)
            else:
                plain.tell(trial, state=STATES.FAIL)
    assert asked == expected


def test_random_points_are_drawn_within_the_space_and_begin_as_those_of_the_estimator(tmp_path):
    for name in ("tpe", "random"):
        (tmp_path / name).mkdir()
    by_tpe = run(search(tmp_path / "tpe", n_trials=16, batch=8))
    drawn = run(search(tmp_path / "random", n_trials=16, batch=8, sampler="random"))
    assert drawn[0] == by_tpe[0]
    assert drawn[1] != by_tpe[1]
    with pytest.raises(ConfigError, match="hydra.sweeper.sampler='grid' is unknown; .*valid: random, tpe"):
        search(tmp_path, sampler="grid")


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        (
            ["optimizer.lr=tag(log, interval(1e-4, 1))", *WORDS[1:]],
            {},
            "optimizer.lr was 0.0001 to 0.1 .log. and is 0.0001 to 1 .log.",
        ),
        (["adapter.r=choice(1,4)", *WORDS[:1], *WORDS[2:]], {}, "adapter.r was 1, 4, 16 and is 1, 4"),
        ([*WORDS[:1], *WORDS[2:]], {}, "adapter.r was 1, 4, 16 and is not searched"),
        ([*WORDS[:2], "seed=0,1,2", WORDS[3]], {}, "seeds was seed=0, seed=1 and is seed=0, seed=1, seed=2"),
        (WORDS, {"trainer": {"max_steps": 7}}, "trainer.max_steps was not set and is 7"),
    ],
)
def test_another_question_in_the_same_folder_is_refused_and_explained(tmp_path, words, config, said):
    run(search(tmp_path), 1)
    before = (tmp_path / "optuna.journal").read_bytes()
    other = search(tmp_path, words, n_trials=99)
    other.master = OmegaConf.merge(other.master, config)
    with pytest.raises(ConfigError, match=f"holds a search that asks something else.*{said}.*sweep --resume"):
        other.check_begun()
    assert (tmp_path / "optuna.journal").read_bytes() == before
    search(tmp_path, n_trials=99).check_begun()  # more of the same
    other.fresh = True
    other.check_begun()
    assert len(other.ask()) == 4 * max(1, len(other.space.seeds))
    assert (tmp_path / "optuna.stale.journal").read_bytes() == before


def test_a_journal_that_was_cut_short_and_a_lock_that_was_left_stop_no_search(tmp_path):
    whole = search(tmp_path)
    run(whole, 1)
    with (tmp_path / "optuna.journal").open("ab") as file:
        file.write(b'{"op_code": 4, "worker')
    (tmp_path / "optuna.journal.lock").symlink_to("optuna.journal")
    begun = time.monotonic()
    again = search(tmp_path)
    assert len(run(again)) == 2
    assert time.monotonic() - begun < 20  # Optuna waits 30 s for such a lock
    assert len(again.study.trials) == 12


def test_a_point_whose_asking_was_cut_short_is_asked_to_its_end(tmp_path):
    one = search(tmp_path)
    one.ask()
    journal = tmp_path / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(place for place, line in enumerate(lines) if b'"param_name"' in line)
    journal.write_bytes(b"".join(lines[:last]))
    asked = search(tmp_path).ask()
    assert len(asked) == 8
    assert all(len(words) == 4 for words in asked)


def test_a_preview_asks_what_would_be_asked_and_writes_nothing(tmp_path):
    one = search(tmp_path / "none")
    one.previews = True
    first = one.ask()
    assert not (tmp_path / "none").exists()
    assert one.spoken.startswith("A search of 12 points by tpe, 4 at a time, over optimizer.lr: 0.0001 to 0.1 (log);")
    assert run(search(tmp_path), 1)[0] == first
    before = (tmp_path / "optuna.journal").read_bytes()
    later = search(tmp_path)
    later.previews = True
    second = later.ask()
    assert "; 4 are told," in later.spoken
    assert (tmp_path / "optuna.journal").read_bytes() == before
    assert search(tmp_path).ask() == second


def test_what_failed_may_be_run_again_and_counts_then(tmp_path):
    one = search(tmp_path, n_trials=4)
    trials = one.ask()
    one.tell(trials, [None, 1.0, *(5.0 for _ in trials[2:])])
    again = search(tmp_path, n_trials=4)
    again.failed = True
    asked = again.ask()
    assert asked == trials[:2]
    again.tell(asked, [1.0, 2.0])
    assert again.ask() == []
    assert again.study.best_value == 1.5
    assert again.about["search"]["points"] == 4
    once_more = search(tmp_path, n_trials=4)
    once_more.failed = True
    assert once_more.ask() == []


@pytest.fixture
def command(tiny_arguments, tmp_path, monkeypatch):
    """Runs ``train -m hydra/sweeper=optuna`` into the folder s; the exit code."""
    monkeypatch.chdir(tmp_path)
    words = ["hydra/launcher=packed", "hydra/sweeper=optuna", *tiny_arguments, "data.limit=4", "hydra.sweep.dir=s"]
    return lambda *more: main.run(["train", "-m", *words, *more])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter.rank=choice(2,4)"], "adapter.rank is not an option"),
        (["optimizer.lr=interval(-0.1,0.1)"], "optimizer.lr"),
        (["adapter.r=interval(1,8)"], "adapter.r"),
        (["adapter=choice(lora,nothing)"], "there is no such option"),
        (["optimizer.lr=interval(0.1,0.2)", "hydra.sweeper.sampler=grid"], "hydra.sweeper.sampler='grid' is unknown"),
    ],
)
def test_a_space_that_no_trial_can_have_is_refused_before_anything_is_written(command, tmp_path, capsys, words, said):
    assert command(*words) == 2
    text = capsys.readouterr().err
    assert said in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_points_above_the_memory_budget_are_not_trained(command, tmp_path, capsys, tiny_arguments):
    kept = [word for word in tiny_arguments if not word.startswith("adapter.r")]
    specs = [trial_spec(compose([*kept, f"adapter.r={r}"]), tmp_path) for r in (2, 64)]
    budget = sum(estimate([one], "cpu", length=25) for one in specs) / 2 / 2**30
    space = ["adapter.r=choice(2,64)", "optimizer.lr=interval(1e-3,1e-2)"]
    words = [*space, "hydra.sweeper.n_trials=4", "hydra.sweeper.batch=2", f"hydra.launcher.memory_budget={budget}"]
    assert command(*words) == 0
    assert "not trained, predicted to need" in capsys.readouterr().err
    stored = [record.read(place) for place in record.find(tmp_path / "s")]
    assert [one["config"]["adapter"]["r"] for one in stored] == [2] * 4
    about = record.read_sweep(tmp_path / "s")["search"]
    assert (about["points"], about["complete"]) == (4, 4)
    assert about["refused"]
    assert all(one["point"][0] == "adapter.r=64" and one["excess_gib"] > 0 for one in about["refused"])
    report = json.loads((tmp_path / "s" / "report" / "results.json").read_text())
    assert any("were predicted to need up to" in note for note in report["notes"])


def test_the_command_lines_preview_of_a_search_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run(["sweep", "search_example", "--preview"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A search of 24 points by tpe, 8 at a time, pruned below the median at 0.25, 0.5, over" in text
    assert "8 trials in runs/search_example: 8 arms" in text
    assert not (tmp_path / "runs").exists()
