"""``sweep.halving``: the survivors end as they would have without it, packed and alone, in one go and after a kill."""

import json
import math

import pytest
from safetensors.torch import load_file

import loralab
from loralab.cli import main
from loralab.errors import Interrupted
from loralab.records import record
from loralab.scheduling.job import Job
from loralab.scheduling.session import Session
from loralab.training import checkpoint
from loralab.training.trial import Trial

FILE = """# @package _global_
sweep:
  tune: {optimizer.lr: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]}
  halving: {rungs: [0.25, 0.5], neighbours: 1}
  extend: 0
hydra:
  sweeper:
    params:
      seed: [0, 1]
"""


@pytest.fixture
def halved(tmp_path, monkeypatch, tiny_arguments, rows):
    """Runs the sweep in a folder of its name; returns (exit code, {(lr, seed): record})."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halved.yaml").write_text(FILE)
    words = [word for word in tiny_arguments if not word.startswith("trainer.max_steps")]
    words += [f"data.test={rows['pairs', 'train']}", "data.limit=4", "trainer.max_steps=4"]

    def run(name, *more):
        code = main.run(["sweep", "./halved.yaml", *words, f"hydra.sweep.dir={tmp_path / name}", *more])
        return code, stored(tmp_path / name)

    return run


def stored(folder):
    found = [record.read(place) for place in record.find(folder)]
    return {(one["config"]["optimizer"]["lr"], one["seed"]): one for one in found}


def weights(folder, one):
    return load_file(folder / one["trial"] / "adapter" / "adapter_model.safetensors")


def decisions(folder):
    return [{**one, "arm": None} for one in record.read_sweep(folder)["decisions"]]


def rows_of(place):
    """(step, names) of each row of metrics.jsonl."""
    rows = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [(row.pop("step"), *sorted(row)) for row in rows]


def assert_same(first, second, one, other):
    """Two folders' records of a sweep: the same trials ended, those that did not have the same adapters and scores."""
    assert first.keys() == second.keys()
    for key, left in first.items():
        right = second[key]
        assert (left["trial"], left["status"], left["metrics"]) == (right["trial"], right["status"], right["metrics"])
        assert left.get("pauses") == right.get("pauses")
        if left["status"] == "completed":
            own, others = weights(one, left), weights(other, right)
            assert all((own[name] == others[name]).all() for name in own)


def test_survivors_are_as_without_halving_packed_alone_and_after_a_kill(halved, tmp_path, monkeypatch, capsys):
    code, packed = halved("packed")
    assert code == 0
    said = capsys.readouterr().out
    assert "were ended early by sweep.halving" in " ".join(said.split())
    ended = {key for key, one in packed.items() if one["status"] == "pruned"}
    done = packed.keys() - ended
    assert {lr for lr, _ in ended}
    assert len({lr for lr, _ in done}) >= 2
    for key in ended:
        assert "of its steps" in packed[key]["stopped_early"]["why"]
        assert checkpoint.path(tmp_path / "packed" / packed[key]["trial"]).is_file()
    for key in done:
        assert [(one["until"], one["step"]) for one in packed[key]["pauses"]] == [(0.25, 1), (0.5, 2)]
        assert not any(word.startswith("trainer.until") for word in packed[key]["overrides"])
    sweep = record.read_sweep(tmp_path / "packed")
    assert {entry["status"] for entry in sweep["trials"]} == {"completed", "pruned"}
    assert [one.get("rung") for one in sweep["decisions"]] == [0.25, 0.5, None]
    best = min({lr for lr, _ in done}, key=lambda lr: sum(packed[lr, s]["metrics"]["val/loss"] for s in (0, 1)))
    (arm,) = json.loads((tmp_path / "packed" / "report" / "results.json").read_text())["arms"]
    assert arm["scores"] == [packed[best, seed]["metrics"]["test/loss"] for seed in (0, 1)]

    _, alone = halved("alone", "hydra.launcher.pack=off")
    assert_same(packed, alone, tmp_path / "packed", tmp_path / "alone")

    real, calls = Session.end_early, []

    def killed(self, ended):
        calls.append(ended)
        if len(calls) == 2:  # at the second rung, where trials have gone beyond the first
            assert ended
            raise Interrupted(15)
        real(self, ended)

    monkeypatch.setattr(Session, "end_early", killed)
    assert halved("killed")[0] == 143
    monkeypatch.setattr(Session, "end_early", real)
    # --failed leaves none of them out, since a rung compares all
    assert main.run(["sweep", "--resume", str(tmp_path / "killed"), "--failed"]) == 0
    assert_same(packed, stored(tmp_path / "killed"), tmp_path / "packed", tmp_path / "killed")
    assert decisions(tmp_path / "killed") == decisions(tmp_path / "packed")
    assert not list(tmp_path.glob("killed/*/*stale*"))  # a paused trial is not one whose test scores are missing
    for one in packed.values():
        assert rows_of(tmp_path / "killed" / one["trial"]) == rows_of(tmp_path / "packed" / one["trial"])

    _, whole = halved("packed", "sweep.halving=false")  # those that were ended go on from where they were
    assert {one["status"] for one in whole.values()} == {"completed"}
    _, full = halved("full", "sweep.halving=false")
    for key, one in whole.items():
        assert one["metrics"] == full[key]["metrics"]
        own, others = weights(tmp_path / "packed", one), weights(tmp_path / "full", full[key])
        assert all((own[name] == others[name]).all() for name in own)
    frame = loralab.results(tmp_path / "packed")
    assert len(frame) == 10


SMALL = ("seed=0", "sweep.tune={optimizer.lr:[1e-4,1e-2,1e-1]}")


def test_rungs_that_are_one_step_and_fresh_trials_are_trained_once(halved, tmp_path, monkeypatch):
    steps, real = [], Trial.finish_step

    def counted(trial):
        steps.append((trial.spec.id, trial.step))
        real(trial)

    monkeypatch.setattr(Trial, "finish_step", counted)
    small = (*SMALL, "trainer.max_steps=2", "sweep.halving={rungs:[0.125,0.25,0.5],neighbours:0}")
    _, first = halved("few", *small)
    assert [one.get("rung") for one in record.read_sweep(tmp_path / "few")["decisions"]] == [0.125, 0.25, 0.5, None]
    before, made, place = decisions(tmp_path / "few"), sorted(steps), tmp_path / "few"
    for one in first.values():
        own = rows_of(place / one["trial"])
        assert len(own) == len(set(own))
    assert {one["status"] for one in first.values()} == {"completed", "pruned"}
    done = next(one for one in first.values() if one["status"] == "completed")
    assert [(one["until"], one["step"]) for one in done["pauses"]] == [(0.125, 1), (0.25, 1), (0.5, 1)]
    steps.clear()
    halved("few", *small)
    assert (decisions(place), steps) == (before, [])
    halved("few", *small, "--fresh")
    assert (decisions(place), sorted(steps)) == (before, made)
    assert len(steps) == len(set(steps))


def test_a_value_that_is_completed_keeps_its_score_where_a_wider_grid_would_have_ended_it(halved, tmp_path):
    halved("wider", "seed=0", "sweep.tune={optimizer.lr:[1e-5,1e-4]}", "sweep.halving={rungs:[0.5]}")
    wider = ("seed=0", "sweep.tune={optimizer.lr:[1e-1,1e-2,1e-3,1e-5,1e-4]}")
    _, found = halved("wider", *wider, "sweep.halving={rungs:[0.5],neighbours:0}")
    *_, at_rung, last = record.read_sweep(tmp_path / "wider")["decisions"]
    completed = {lr: one["metrics"]["val/loss"] for (lr, _), one in found.items() if one["status"] == "completed"}
    assert at_rung["ended"] == ["optimizer.lr=0.1"]
    assert {float(name.partition("=")[2]): mean for name, mean in last["means"].items()} == completed
    assert {1e-5, 1e-4} < completed.keys()
    halved("wider", *wider, "sweep.halving=false")  # one decision on an arm, whatever words the sweep was called with
    (decision,) = record.read_sweep(tmp_path / "wider")["decisions"]
    assert len(decision["means"]) == 5


def test_a_pause_that_was_passed_without_a_score_is_unknown_not_failed(tmp_path):
    content = {"metric": "val/loss", "trainer": {"until": 0.25}}
    job = Job(content, tmp_path, [], {})
    pause = {"until": 0.25, "step": 2, "of": 4, "metrics": {}}
    assert math.isnan(job.value({"status": "interrupted", "pauses": [pause], "metrics": {}}))
    assert job.value({"status": "diverged", "pauses": [], "metrics": {}}) is None
    assert job.value({"status": "interrupted", "pauses": [{**pause, "metrics": {"val/loss": 2.5}}]}) == 2.5


def test_a_trainer_of_ones_own_without_todays_settings_is_halved(halved, tmp_path, capsys):
    (tmp_path / "conf" / "trainer").mkdir(parents=True)
    own = "_target_: loralab.training.trainer.TrainerSpec\naccelerator: cpu\nmax_steps: 4\n"
    (tmp_path / "conf" / "trainer" / "mine.yaml").write_text(own)
    words = ("trainer=mine", "--config-dir", str(tmp_path / "conf"), *SMALL)
    code, found = halved("own", *words, "sweep.halving={rungs:[0.5],neighbours:0}", "hydra/launcher=basic")
    assert code == 0
    assert sorted(one["status"] for one in found.values()) == ["completed", "completed", "pruned"]
    assert all("test/loss" in one["metrics"] for one in found.values() if one["status"] == "completed")
    assert not any("trainer.until" in word for one in found.values() for word in one["overrides"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sweep.halving=yes", "sweep.halving='yes' is no group of settings"),
        ("sweep.halving.rungs=[0.5,0.25]", "do not rise"),
        ("+sweep.halving.eta=2", "sweep.halving"),
        ("sweep.tune=null", "there is no sweep.tune"),
        ("trainer.patience=2 trainer.val_check_interval=1", "both end trials early"),
    ],
)
def test_what_cannot_be_halved_is_refused_before_anything_is_written(halved, tmp_path, capsys, word, said):
    code, written = halved("refused", *word.split())
    assert (code, written) == (2, {})
    assert said in " ".join(capsys.readouterr().err.split())
