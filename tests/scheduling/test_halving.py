"""``sweep.halving``: the survivors end as they would have without it, packed and alone, in one go and after a kill."""

import json

import pytest
from safetensors.torch import load_file

import loralab
from loralab.cli import main
from loralab.errors import Interrupted
from loralab.records import record
from loralab.scheduling.session import Session
from loralab.training import checkpoint

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

    def killed(self, words, why):
        calls.append(words)
        if len(calls) == 2:
            raise Interrupted(15)
        real(self, words, why)

    monkeypatch.setattr(Session, "end_early", killed)
    assert halved("killed")[0] == 143
    monkeypatch.setattr(Session, "end_early", real)
    assert main.run(["sweep", "--resume", str(tmp_path / "killed")]) == 0
    assert_same(packed, stored(tmp_path / "killed"), tmp_path / "packed", tmp_path / "killed")

    _, whole = halved("packed", "sweep.halving=false")  # those that were ended go on from where they were
    assert {one["status"] for one in whole.values()} == {"completed"}
    _, full = halved("full", "sweep.halving=false")
    for key, one in whole.items():
        assert one["metrics"] == full[key]["metrics"]
        own, others = weights(tmp_path / "packed", one), weights(tmp_path / "full", full[key])
        assert all((own[name] == others[name]).all() for name in own)
    frame = loralab.results(tmp_path / "packed")
    assert len(frame) == 10


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
