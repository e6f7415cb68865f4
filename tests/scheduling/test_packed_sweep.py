"""A packed sweep gives what the same trials give alone, whatever happens to one of them."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from loralab.cli import main
from loralab.config.build import trial_spec
from loralab.planning.plan import estimate
from loralab.records import record
from loralab.training.module import FineTuner

FAST = ["hydra/launcher=packed", "data.limit=6", "trainer.max_steps=3"]
PACKED = ["hydra.launcher.token_budget=100000"]


@pytest.fixture
def sweep(tiny_arguments, tmp_path, monkeypatch):
    """Runs ``train -m`` into a folder below tmp_path; returns (exit code, records by trial)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        kept = [word for word in tiny_arguments if not word.startswith("trainer.max_steps")]
        code = main.run(["train", "-m", *kept, *FAST, f"hydra.sweep.dir={name}", *words])
        found = map(record.read, record.find(tmp_path / name))
        return code, {one["trial"]: one for one in found}

    return run


def sizes(records):
    return sorted(one["pack"]["size"] for one in records.values())


AXES = ["adapter.r=2,3", "seed=0,1", "optimizer.lr=1e-2,1e-3"]


@pytest.mark.parametrize(("quantization", "axes"), [("none", AXES), ("nf4", AXES[:2])], ids=["none", "nf4"])
def test_packed_trials_have_the_metrics_and_adapters_they_have_alone(sweep, weights, tmp_path, quantization, axes):
    count = 2 ** len(axes)
    code, packed = sweep("packed", *axes, *PACKED, f"quantization={quantization}")
    assert code == 0
    assert sizes(packed) == [count] * count
    _, alone = sweep("alone", *axes, "hydra.launcher.pack=off", f"quantization={quantization}")
    assert sizes(alone) == [1] * count
    assert packed.keys() == alone.keys()
    for trial in packed:
        assert packed[trial]["metrics"] == alone[trial]["metrics"]  # rows of one length: padded alike
        ours, theirs = weights(tmp_path / "packed" / trial), weights(tmp_path / "alone" / trial)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_small_budget_and_trials_that_differ_in_kind_make_several_packs(sweep):
    _, records = sweep("s", "seed=0,1,2,3", "trainer.accumulate_grad_batches=1,2", "hydra.launcher.token_budget=110")
    assert sizes(records) == [2] * 8  # rows of 24 bytes and an end, two of them a pass: 50 tokens
    _, records = sweep("t", "seed=0,1", "hydra.launcher.token_budget=49")
    assert sizes(records) == [1, 1]


def test_one_wrong_trial_fails_alone_and_the_others_are_packed(sweep, capsys):
    code, records = sweep("s", "adapter.r=2,0,3", *PACKED)
    assert code == 2
    assert sorted((one["status"], one["pack"]["size"] or 0) for one in records.values()) == [
        *(("completed", 2), ("completed", 2), ("failed", 0))
    ]


def test_what_is_wrong_only_once_the_base_is_there_costs_the_others_nothing(sweep, capsys):
    code, records = sweep("s", "adapter.target_modules=[q_proj],[nope],[v_proj]", *PACKED)
    assert code == 2
    assert sorted(one["status"] for one in records.values()) == ["completed", "completed", "failed"]
    assert "3 trials do not run together" in capsys.readouterr().err


def test_a_pack_that_does_not_fit_into_memory_is_halved(sweep, monkeypatch, capsys):
    real = FineTuner.training_step

    def step(self, batches, index):
        if len(self.trials) > 2:
            raise torch.OutOfMemoryError("no room for so many")
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", step)
    code, records = sweep("s", "seed=0,1,2,3,4", *PACKED)
    assert code == 0
    assert sizes(records) == [1, 2, 2, 2, 2]
    assert "5 trials do not run together: out of memory" in capsys.readouterr().err


def test_a_diverging_member_leaves_the_others_as_they_are_alone(sweep):
    code, packed = sweep("packed", "optimizer.lr=1e-3,1e30,1e-2", "trainer.gradient_clip_val=null", *PACKED)
    assert code == 5
    _, alone = sweep("alone", "optimizer.lr=1e-3,1e-2", "trainer.gradient_clip_val=null", "hydra.launcher.pack=off")
    assert sorted(one["status"] for one in packed.values()) == ["completed", "completed", "diverged"]
    assert all(packed[trial]["metrics"] == one["metrics"] for trial, one in alone.items())


def test_finished_members_are_skipped_and_the_rest_is_packed(sweep):
    _, before = sweep("s", "seed=0,1", *PACKED)
    _, after = sweep("s", "seed=0,1,2,3", *PACKED)
    assert {trial: after[trial] for trial in before} == before
    assert sizes(after) == [2, 2, 2, 2]


def test_llm_int8_with_outliers_runs_alone(sweep):
    _, records = sweep("s", "seed=0,1", "quantization=llm_int8", *PACKED)
    assert sizes(records) == [1, 1]


def need(records, trials):
    """Bytes that ``trials`` of a finished sweep are expected to take in one pass."""
    specs = [trial_spec(OmegaConf.create(records[trial]["config"]), Path()) for trial in trials]
    return estimate(specs, "cpu", length=25)  # rows of 24 bytes and an end


def test_a_memory_budget_sizes_the_packs_and_their_predicted_peak_stays_under_it(sweep):
    words = ["adapter.r=2,64,3", "plan.record=true", *PACKED]
    _, whole = sweep("whole", *words)
    assert sizes(whole) == [3] * 3
    two = max(need(whole, [t for t in whole if t != out]) for out in whole) / 2**30
    budget = max(two, *(one["memory"]["predicted_peak_bytes"] / 2**30 * 0.9 for one in whole.values()))
    assert need(whole, list(whole)) / 2**30 > budget
    code, records = sweep("s", *words, f"hydra.launcher.memory_budget={budget}")
    assert code == 0
    assert sizes(records) == [1, 2, 2]
    assert all(one["memory"]["predicted_peak_bytes"] <= budget * 2**30 for one in records.values())


def test_a_trial_that_exceeds_the_memory_budget_alone_is_refused_and_the_others_run(sweep, capsys):
    _, whole = sweep("whole", "adapter.r=2,64,3", "hydra.launcher.pack=off")
    alone = {one["config"]["adapter"]["r"]: need(whole, [trial]) for trial, one in whole.items()}
    budget = (alone[64] + max(alone[2], alone[3])) / 2 / 2**30
    code, records = sweep("s", "adapter.r=2,64,3", f"hydra.launcher.memory_budget={budget}", *PACKED)
    assert code == 2
    found = {one["config"]["adapter"]["r"]: one for one in records.values()}
    assert [found[r]["status"] for r in (2, 64, 3)] == ["completed", "failed", "completed"]
    assert "hydra.launcher.memory_budget=" in found[64]["error"]
    assert "predicted to need alone" in found[64]["error"]
    assert found[64]["time"]["steps"] is None
    code, records = sweep("one", "adapter.r=64", "hydra.launcher.memory_budget=0.0001", "hydra.launcher.pack=off")
    assert (code, [one["status"] for one in records.values()]) == (2, ["failed"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=range(0,0)"], "the sweep has no trial"),
        (["seed=0,1", "seed=2,3"], "seed=0,1 and seed=2,3 contradict each other"),
        (["adapter.r=2,4", "adapter.r=8"], "adapter.r=2,4 and adapter.r=8 contradict each other"),
    ],
)
def test_zero_or_contradictory_trials_are_exit_2(sweep, capsys, words, message):
    assert sweep("s", *words) == (2, {})
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra.launcher.pack=sometimes", "hydra.launcher.pack='sometimes' is unknown"),
        ("hydra.launcher.token_budget=0", "hydra.launcher.token_budget must be at least 1 token"),
        ("hydra.launcher.memory_budget=0", "hydra.launcher.memory_budget must be a positive number of GiB"),
        ("hydra.launcher.memory_budget=-1", "hydra.launcher.memory_budget must be a positive number of GiB"),
        ("hydra.launcher.tokn_budget=1", "hydra.launcher.tokn_budget is not an option"),
    ],
)
def test_a_wrong_policy_is_exit_2(sweep, capsys, word, message):
    code, records = sweep("s", "seed=0,1", word)
    assert (code, records) == (2, {})
    assert message in capsys.readouterr().err
