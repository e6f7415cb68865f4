"""Where results are read late, as on a card, a run is the same as where they are read in their step."""

import json
import signal
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from loralab import signals
from loralab.adapters.lora import LoRA
from loralab.errors import Interrupted
from loralab.memory.phases import PhaseMemory
from loralab.optim.foreign import AnyOptimizer
from loralab.optim.optimizers import AdamW
from loralab.running.runner import Runner
from loralab.training import checkpoint, step_results
from loralab.training.checkpoint import Checkpoint
from loralab.training.module import FineTuner
from loralab.training.progress import ProgressLines
from loralab.training.trial import Trial

TIMED = ("time/", "memory/")


@pytest.fixture
def late(monkeypatch):
    """A stand-in for a card, whose values nobody has before they are asked for; gives what happens, in its order."""
    happened, losses = [], FineTuner.losses

    def passed(self, batches, training):
        happened.append("pass" if training else "validation")
        return losses(self, batches, training)

    def received(tensor):
        copy = tensor.clone()
        return lambda: happened.append("read") or copy

    def begin():
        monkeypatch.setattr(step_results, "LATE", {"cpu"})
        monkeypatch.setattr(step_results, "received", received)
        monkeypatch.setattr(FineTuner, "losses", passed)
        return happened

    return begin


def of_run(spec, weights):
    """What a run leaves, but for times and memory."""
    rows = [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]
    sound = (spec.folder / "adapter").exists()
    return rows, {k: v.tolist() for k, v in weights(spec.folder).items()} if sound else None


def of_record(record):
    counted = {key: record["time"][key] for key in ("steps", "tokens")}
    return record["status"], record["error"], record["metrics"], counted, record["optimizer"]["state_bytes"]


def test_a_step_is_read_in_the_pass_after_it_and_before_a_validation(make_spec, late):
    happened = late()
    (done,) = Runner().run([make_spec(max_steps=5, val_check_interval=3, log_every_n_steps=1)])
    assert done["status"] == "completed", done["error"]
    validation = ["validation"] * happened.count("validation")
    half = validation[: len(validation) // 2]
    early = ["pass", "pass", "read", "pass", "read", "read", *half]
    assert happened == [*early, "pass", "pass", "read", "read", *half]


def test_who_looks_at_a_step_waits_for_it(make_spec, late):
    watching = {
        "memory": lambda: PhaseMemory(every_n_steps=2, profiled_step=None),
        "checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=3),
        "progress": lambda: ProgressLines(1e6),
    }
    happened = late()
    (done,) = Runner().run([make_spec(max_steps=6, callbacks=watching)])
    assert done["status"] == "completed", done["error"]
    training = [what for what in happened if what != "validation"]
    reads = [training[:at].count("pass") for at, what in enumerate(training) if what == "read"]
    assert reads == [2, 2, 3, 4, 6, 6]  # steps 1 and 5 alone in the pass after theirs


@pytest.mark.parametrize("micros", [1, 2])
def test_a_pack_whose_trials_end_apart_leaves_the_same(make_spec, make_data, late, weights, micros):
    """One diverges on the way, one has fewer steps, one stops early, one goes to the end."""

    def four(prefix):
        changes = [
            {"optimizer": AdamW(lr=1e30)},
            {"max_steps": 5},
            {"patience": 1, "metric_mode": "max", "adapter": LoRA(r=2)},
            {"adapter": LoRA(r=8, lora_dropout=0.1)},
        ]
        shared = {"max_steps": 9, "val_check_interval": 2, "log_every_n_steps": 1, "accumulate_grad_batches": micros}
        shared |= {"data": make_data(batch_size=2), "callbacks": {"memory": PhaseMemory}}
        return [make_spec(f"{prefix}{i}", seed=i, **{**shared, **own}) for i, own in enumerate(changes)]

    early, later = four("early"), four("late")
    expected = [of_record(one) for one in Runner().run(early)]
    assert [one[0] for one in expected] == ["diverged", "completed", "completed", "completed"]
    assert len({one[3]["steps"] for one in expected}) == 4
    late()
    assert [of_record(one) for one in Runner().run(later)] == expected
    for one, other in zip(early, later, strict=True):
        assert of_run(one, weights) == of_run(other, weights)


@pytest.mark.parametrize("break_it", ["loss", "gradient"])
def test_a_trial_that_fails_has_not_made_its_step(make_spec, late, monkeypatch, break_it):
    """Its update was made before the host knew; the record and the checkpoint are of the step before."""
    happened = late()
    taken = step_results.StepResults.take

    def broken(self, of_norms, norms, skips):
        if self.trials[1].step == 2 and self.trials[1].failure is None:
            if break_it == "loss":
                self._of_passes = [(i, loss * float("nan") if i else loss) for i, loss in self._of_passes]
            else:
                norms = norms.clone()
                norms[1] = 0.0
        taken(self, of_norms, norms, skips)

    monkeypatch.setattr(step_results.StepResults, "take", broken)
    callbacks = {"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=2)}
    specs = [make_spec(name, max_steps=6, callbacks=callbacks, log_every_n_steps=1) for name in ("sound", "broken")]
    sound, failed = Runner().run(specs)
    assert (sound["status"], sound["time"]["steps"]) == ("completed", 6)
    assert (failed["status"], failed["time"]["steps"]) == ("diverged", 2)
    said = "training loss is not finite" if break_it == "loss" else "gradient is exactly zero"
    assert f"{said} at step 3" in failed["error"]
    rows = [json.loads(line) for line in (specs[1].folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    state = torch.load(checkpoint.path(specs[1].folder), weights_only=True)
    assert state["step"] == 2
    assert happened.count("read") == 6


def test_out_of_memory_keeps_the_step_that_was_not_read(make_spec, late, monkeypatch, curve, weights):
    def two(prefix):
        return [make_spec(f"{prefix}{i}", seed=i, max_steps=5, log_every_n_steps=1) for i in range(2)]

    whole, divided = two("whole"), two("divided")
    Runner().run(whole)
    late()
    real = FineTuner.losses

    def full(self, batches, training):
        if training and len(batches) == 2 and self.trials[0].step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batches, training)

    monkeypatch.setattr(FineTuner, "losses", full)
    records = Runner().run(divided)
    assert [(one["status"], one["pack"]["size"]) for one in records] == [("completed", 1)] * 2
    for one, other in zip(whole, divided, strict=True):
        assert curve(one.folder) == curve(other.folder)
        assert all(torch.equal(value, weights(other.folder)[key]) for key, value in weights(one.folder).items())


@pytest.mark.parametrize("place", ["before the read", "within the read"])
def test_an_interruption_keeps_the_step_that_was_not_read(make_spec, late, monkeypatch, handlers, place):
    late()
    spec = make_spec(max_steps=5, callbacks={"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=100)})
    patched = (FineTuner, "losses") if place == "before the read" else (step_results.Unread, "judged")
    real = getattr(*patched)
    calls = Mock()

    def interrupted(*given, **named):
        calls()
        if calls.call_count == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **named)

    monkeypatch.setattr(*patched, interrupted)
    signals.listen()
    with pytest.raises(Interrupted):
        Runner().run([spec])
    state = torch.load(checkpoint.path(spec.folder), weights_only=True)
    made = 2 if place == "before the read" else 3
    assert state["step"] == made
    assert {int(moments["step"]) for moments in state["optimizer"].values()} == {made}


def test_it_is_not_late_where_a_callback_of_the_users_own_looks_at_each_step(make_spec, late):
    from lightning.pytorch import Callback

    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((pl_module.trials[0].step, float(trainer.callback_metrics["loss"])))

    happened = late()
    Runner().run([make_spec(max_steps=3, callbacks={"looks": Looks})])
    assert "read" not in happened
    assert [step for step, _ in seen] == [1, 2, 3]


def test_it_is_not_late_where_autograd_raises_at_what_is_not_finite(make_spec, late):
    happened, spec = late(), make_spec(max_steps=3)
    trainer = replace(spec.trainer, passed={"detect_anomaly": True})
    (done,) = Runner().run([replace(spec, trainer=trainer)])
    assert done["status"] == "completed", done["error"]
    assert "pass" in happened
    assert "read" not in happened


@pytest.mark.parametrize("reads", ["early", "late"])
def test_a_trial_that_fails_in_a_step_whose_update_ran_out_of_memory_has_diverged(make_spec, late, monkeypatch, reads):
    happened = late() if reads == "late" else []
    taken, clipping = step_results.StepResults.take, FineTuner.configure_gradient_clipping

    def broken(self, of_norms, norms, skips):
        self._of_passes = [
            (i, loss * float("nan") if self.trials[0].step == 2 else loss) for i, loss in self._of_passes
        ]
        taken(self, of_norms, norms, skips)

    def full(self, *given, **named):
        clipping(self, *given, **named)
        if self.trials[0].step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_results.StepResults, "take", broken)
    monkeypatch.setattr(FineTuner, "configure_gradient_clipping", full)
    (failed,) = Runner().run([make_spec(max_steps=4)])
    assert (failed["status"], failed["time"]["steps"]) == ("diverged", 2)
    assert "the training loss is not finite at step 3" in failed["error"]
    assert happened.count("read") == (3 if reads == "late" else 0)


@pytest.mark.parametrize("place", ["finish_step", "log"])
@pytest.mark.parametrize("reads", ["early", "late"])
def test_a_step_whose_counting_is_cut_short_is_in_no_checkpoint(
    make_spec, late, monkeypatch, handlers, curve, weights, reads, place
):
    """By a second signal, which does not wait; also where no state of the optimizer says its step."""
    sgd = AnyOptimizer(target="torch.optim.SGD", lr=1e-2, arguments={"momentum": 0.9})
    shared = {"max_steps": 3, "val_check_interval": 2, "log_every_n_steps": 1, "optimizer": sgd}
    shared["callbacks"] = {"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=100)}
    whole, cut = make_spec("whole", **shared), make_spec("cut", **shared)
    Runner().run([whole])
    if reads == "late":
        late()
    real = getattr(Trial, place)

    def twice(self, *given):
        if self.step == (1 if place == "finish_step" else 2):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        real(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Trial, place, twice)
        signals.listen()
        with pytest.raises(Interrupted):
            Runner().run([cut])
    assert not checkpoint.path(cut.folder).exists()
    (done,) = Runner().run([cut])
    assert done["status"] == "completed", done["error"]
    assert curve(cut.folder) == curve(whole.folder)
    assert all(torch.equal(value, weights(cut.folder)[key]) for key, value in weights(whole.folder).items())
