"""Who is in a pack changes between fits: out of memory divides it, and no finished step is lost or made twice."""

import json
from collections import Counter
from importlib import import_module

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.optim.optimizers import AdamW, Schedule
from loralab.records import record
from loralab.running.runner import Runner
from loralab.training.module import FineTuner

OOM = torch.OutOfMemoryError("no room for so many")


@pytest.fixture
def four(make_spec, make_data):
    """Four trials of six steps of two passes, unlike in all they may be unlike in."""

    def make(prefix, optimizer="adamw", flat=False, **changes):
        shared = {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 2, **changes}
        return [
            make_spec(
                f"{prefix}{index}",
                seed=index,
                adapter=LoRA(r=4 * (index + 1), lora_dropout=0.1 * index),
                optimizer=AdamW(name=optimizer, lr=1e-2 / (index + 1), weight_decay=0.1 * index, flat=flat),
                schedule=Schedule(kind="linear", warmup_steps=index),
                gradient_clip_val=[None, 0.05, 0.5, 1.0][index],
                data=make_data(batch_size=1 + index % 2),
                **shared,
            )
            for index in range(4)
        ]

    return make


@pytest.fixture
def passes(monkeypatch):
    """Counts (trial, step, pass) of every training pass that came back, and raises what ``fails`` asks for."""
    counted, real = Counter(), FineTuner.training_step

    def install(fails):
        def step(self, batches, index):
            before = [(self.trials[i].spec.id, self.trials[i].step, own["micro"]) for i, own in batches.items()]
            if fails(self.trials, before):
                raise OOM
            out = real(self, batches, index)
            counted.update(before)
            return out

        monkeypatch.setattr(FineTuner, "training_step", step)
        return counted

    return install


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(ours, theirs, records, expected, weights):
    assert [one["status"] for one in (*records, *expected)] == ["completed"] * (2 * len(ours)), records[0]["error"]
    for a, b, one, other in zip(ours, theirs, records, expected, strict=True):
        assert one["metrics"] == other["metrics"]
        assert one["time"]["tokens"] == other["time"]["tokens"]
        assert one["time"]["steps"] == other["time"]["steps"]
        assert rows(a.folder) == rows(b.folder)
        left, right = weights(a.folder), weights(b.folder)
        assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize(
    ("optimizer", "flat"),
    [
        ("adamw", False),
        ("adamw_8bit", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("adamw", True), ("adamw_8bit", False))),
    ],
)
def test_out_of_memory_halves_a_pack_and_no_finished_step_is_lost_or_made_twice(
    four, passes, weights, caplog, optimizer, flat
):
    whole = four("whole", optimizer, flat)
    expected = Runner().run(whole)
    # in the second pass of the third step, when half of its gradient is there
    counted = passes(lambda trials, now: len(trials) == 4 and now[0][1:] == (2, 1))
    halved = four("halved", optimizer, flat)
    records = Runner().run(halved)
    assert_equal(halved, whole, records, expected, weights)
    again = {f"{spec.id}": [n for (t, s, _), n in counted.items() if t == spec.id and s != 2] for spec in halved}
    assert all(set(counts) == {1} for counts in again.values())
    assert {n for (_, step, micro), n in counted.items() if (step, micro) == (2, 1)} == {1}
    assert [one["pack"] for one in records] == [{"size": 2, "index": i % 2, "halved": [4]} for i in range(4)]
    assert "4 trials do not run together: out of memory" in caplog.text
    assert "from step 2 they go on in 2 + 2" in caplog.text


def test_a_trial_that_alone_is_too_large_is_told_so_and_the_others_go_on(four, passes, weights):
    whole = four("whole")
    expected = Runner().run(whole)
    passes(lambda trials, now: any(name == "halved1" and step == 3 for name, step, _ in now))
    halved = four("halved")
    records = Runner().run(halved)
    assert (records[1]["status"], records[1]["exit_code"]) == ("out_of_memory", 6), records[1]["error"]
    assert records[1]["time"]["steps"] == 3
    assert records[1]["pack"] == {"size": 1, "index": 0, "halved": [4, 2]}, [(r["error"], r["pack"]) for r in records]
    assert not (halved[1].folder / "adapter").exists()
    assert record.read(halved[1].folder)["status"] == "out_of_memory"
    rest = [0, 2, 3]
    pick = lambda found: [found[i] for i in rest]  # noqa: E731
    assert_equal(pick(halved), pick(whole), pick(records), pick(expected), weights)


@pytest.mark.parametrize("when", [4, 6], ids=["between", "final"])
def test_out_of_memory_in_a_validation_repeats_no_step_and_no_row(four, passes, weights, monkeypatch, when):
    whole = four("whole")
    expected = Runner().run(whole)
    counted, real = passes(lambda trials, now: False), FineTuner.validation_step

    def step(self, batches, index):
        if len(self.trials) > 1 and self.trials[0].step == when and index == 1:
            raise OOM
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "validation_step", step)
    halved = four("halved")
    records = Runner().run(halved)
    assert_equal(halved, whole, records, expected, weights)
    assert set(counted.values()) == {1}
    assert [one["pack"] for one in records] == [{"size": 1, "index": 0, "halved": [4, 2]}] * 4


@pytest.mark.parametrize("step", [0, 3])
def test_a_trial_whose_update_is_cut_short_starts_anew_and_the_others_do_not(
    four, passes, weights, monkeypatch, caplog, step
):
    whole = four("whole")
    expected = Runner().run(whole)
    counted = passes(lambda trials, now: False)
    module = import_module("torch.optim.adam")
    real = module.adam
    calls = []

    def cut(parameters, *others, **options):
        calls.append(len(parameters))
        if len(calls) == 4 * step + 3:  # of the third trial only the first half of the parameters moves
            some = [one[: len(one) // 2] for one in others]
            real(parameters[: len(parameters) // 2], *some, **options)
            raise OOM
        real(parameters, *others, **options)

    monkeypatch.setattr(module, "adam", cut)
    halved = four("halved")
    records = Runner().run(halved)
    assert_equal(halved, whole, records, expected, weights)
    assert "their update was cut short" in caplog.text
    made = {name: sum(n for (trial, *_), n in counted.items() if trial == name) for name in ("halved2", "halved3")}
    assert made == {"halved2": 2 * (6 + step + 1), "halved3": 2 * (6 + 1)}


def test_a_trials_state_goes_through_a_file(four, passes, tmp_path, monkeypatch):
    """What a checkpoint would hold: adapter, optimizer, step and tokens, all of plain tensors and numbers."""
    seen = []
    real = FineTuner.configure_optimizers

    def spy(self):
        seen.extend(trial.state_dict() for trial in self.trials if trial.step)
        return real(self)

    monkeypatch.setattr(FineTuner, "configure_optimizers", spy)
    passes(lambda trials, now: len(trials) == 4 and now[0][1] == 2)
    Runner().run(four("halved", "adamw_8bit"))
    torch.save(seen, tmp_path / "states.pt")
    loaded = torch.load(tmp_path / "states.pt", weights_only=True)
    assert [state["step"] for state in loaded] == [2] * 4
    assert all(int(own["step"]) == 2 for state in loaded for own in state["optimizer"].values())
    assert all(len(state["optimizer"]) == len(state["adapter"]) for state in loaded)
