"""Lightning's habits: its callbacks, what they log, its checkpoints and its Trainer's limits, alone and in packs."""

import json
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks import EarlyStopping as LightningsStopping

from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.memory.phases import PhaseMemory
from loralab.optim.optimizers import AdamW, Schedule
from loralab.running.runner import Runner, check_pack
from loralab.scheduling.members import alone
from loralab.training.checkpoint import Checkpoint
from loralab.training.early_stopping import EarlyStopping
from loralab.training.observer import is_pack_aware


class Logs(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.log("mine/step", float(trainer.global_step))
        self.log_dict({"mine/a": 1.0, "mine/b": 2.0})

    def on_validation_end(self, trainer, pl_module):
        assert "val/loss" in trainer.callback_metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def everything(make_spec):
    """One trial of four steps with all callbacks that may stand together."""
    callbacks = {
        "rate": LearningRateMonitor,
        "device": DeviceStatsMonitor,
        "timer": Timer,
        "mine": Logs,
        "best": partial(ModelCheckpoint, monitor="val/loss", filename="best"),
        "every": partial(ModelCheckpoint, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
    }
    spec = make_spec(
        "all", callbacks=callbacks, val_check_interval=2, accumulate_grad_batches=2, schedule=Schedule(kind="linear")
    )
    (record,) = Runner().run([spec])
    assert record["status"] == "completed", record["error"]
    return spec, record


def test_what_callbacks_log_is_one_row_a_step_at_the_step_that_was_made(everything):
    spec, _ = everything
    trained = [row for row in rows(spec.folder) if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert [row["mine/step"] for row in trained] == [1, 2, 3, 4]
    assert [row["lr-AdamW"] for row in trained] == [row["train/lr"] for row in trained]
    assert trained[0]["lr-AdamW"] > trained[-1]["lr-AdamW"]
    assert all(row["mine/b"] == 2.0 and "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in row for row in trained)


def test_modelcheckpoint_writes_what_trains_and_not_the_base(everything, weights):
    spec, record = everything
    folder = spec.folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", *(f"step={step}.ckpt" for step in range(1, 5))}
    last = torch.load(folder / "step=4.ckpt", weights_only=True)
    size = sum(tensor.numel() for tensor in last["state_dict"].values())
    assert size == record["adapter"]["trainable_parameters"]
    assert last["global_step"] == 4
    exported = sorted(float(tensor.double().norm()) for tensor in weights(spec.folder).values())
    kept = sorted(float(tensor.double().norm()) for tensor in last["state_dict"].values())
    assert kept == pytest.approx(exported, rel=1e-6)


def test_progress_bars_and_a_run_without_validations_work(make_spec, capfd):
    for kind in (RichProgressBar, TQDMProgressBar):
        spec = make_spec(kind.__name__, callbacks={"bar": kind, "best": partial(ModelCheckpoint, monitor="val/loss")})
        (record,) = Runner().run([spec])
        assert record["status"] == "completed", record["error"]
        assert len(list((spec.folder / "checkpoints").iterdir())) == 1
    assert "Epoch 0" in "".join(capfd.readouterr())


def test_a_pack_has_its_monitors_once_and_each_trial_its_own_rate(make_spec):
    shared = {"callbacks": {"rate": LearningRateMonitor, "timer": Timer}, "schedule": Schedule(kind="linear")}
    one = make_spec("one", optimizer=AdamW(lr=1e-2), **shared)
    two = make_spec("two", optimizer=AdamW(lr=1e-3, lr_ratio=4.0), seed=1, **shared)
    assert not alone(one)
    records = Runner().run([one, two])
    assert [record["pack"]["size"] for record in records] == [2, 2]
    solo = make_spec("solo", optimizer=AdamW(lr=1e-3, lr_ratio=4.0), seed=1, **shared)
    Runner().run([solo])
    assert [row["lr-AdamW"] for row in rows(one.folder) if "lr-AdamW" in row] == [
        row["train/lr"] for row in rows(one.folder) if "train/lr" in row
    ]
    groups = ("lr-AdamW/pg1", "lr-AdamW/pg2")
    assert [[row[key] for key in groups] for row in rows(two.folder) if "train/loss" in row] == [
        [row[key] for key in groups] for row in rows(solo.folder) if "train/loss" in row
    ]


@pytest.mark.parametrize(
    ("callback", "aware"),
    [(LearningRateMonitor(), True), (Timer(), True), (Logs(), False), (ModelCheckpoint(), False)],
)
def test_a_callback_that_looks_at_a_trial_makes_it_run_alone(callback, aware):
    assert is_pack_aware(callback) is aware
    derived = type("Derived", (type(callback),), {})
    assert not is_pack_aware(derived())


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "options", [{}, {"min_delta": 0.3}, {"stopping_threshold": 1.0}, {"divergence_threshold": 2.0}]
)
def test_the_trials_own_stop_decides_as_lightnings(mode, options):
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        values = (torch.rand(8, generator=generator) * 2.5).tolist()
        if torch.rand(1, generator=generator) < 0.2:
            values[3] = math.nan
        theirs = LightningsStopping("val/loss", mode=mode, patience=2, **options)
        ours = EarlyStopping(2, mode, check_finite=True, **options)
        for step, value in enumerate(values):
            stop, _ = theirs._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))
            assert ours.score(value, step) == stop == ours.stopped
            if stop:
                break


def test_each_trial_of_a_pack_ends_by_its_own_rule_as_it_does_alone(make_spec, weights):
    rule = EarlyStopping(1, "max", metric="val/loss", min_delta=0.25)  # ends where the loss falls

    def trials(prefix):
        return [
            make_spec(f"{prefix}0", max_steps=6, val_check_interval=1, stops=(rule,)),
            make_spec(f"{prefix}1", max_steps=6, val_check_interval=1, seed=1),
        ]

    packed, solo = trials("packed"), trials("solo")
    records = Runner().run(packed)
    alone_records = [Runner().run([spec])[0] for spec in solo]
    assert [record["time"]["steps"] for record in records] == [2, 6]
    assert records[0]["stopped_early"] == alone_records[0]["stopped_early"]
    assert records[0]["stopped_early"]["metric"] == "val/loss"
    assert records[0]["stopped_early"]["min_delta"] == 0.25
    for one, other in zip(packed, solo, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(weights(one.folder).values(), weights(other.folder).values(), strict=True)
        )


def test_a_timer_that_ends_a_run_is_named_in_the_record(make_spec):
    spec = make_spec(max_steps=5, decisive={"max_time": "00:00:00:00"})
    assert alone(spec) == "trainer.max_time would end all trials of a pass, by the time that they take together"
    with pytest.raises(ConfigError, match="cannot share a pass: trainer.max_time would end all"):
        check_pack([spec, make_spec("other", max_steps=5, decisive={"max_time": "00:00:00:00"})])
    (record,) = Runner().run([spec])
    assert record["status"] == "completed"
    assert record["time"]["steps"] < 5
    assert "max_time" in record["stopped_early"]["why"]


def test_the_best_state_is_exported_and_scored_and_the_last_lies_beside_it(make_spec, load_exported_loss):
    steps = {"max_steps": 6, "val_check_interval": 1, "keep_best": True}
    # the loss falls: by mode max the first state is the best
    trials = [make_spec(f"p{i}", seed=i, metric_mode=mode, **steps) for i, mode in enumerate(("max", "min"))]
    records = Runner().run(trials)
    for spec, record in zip(trials, records, strict=True):
        losses = {row["step"]: row["val/loss"] for row in rows(spec.folder) if "val/loss" in row}
        best = (max if spec.metric_mode == "max" else min)(losses, key=losses.get)
        assert record["best"]["step"] == best
        assert record["best"]["value"] == losses[best]
        assert record["best"]["last_value"] == record["metrics"]["val/loss"] == losses[6]
        assert load_exported_loss(spec, "adapter") == pytest.approx(losses[best], rel=1e-6)
        assert load_exported_loss(spec, record["best"]["last"]) == pytest.approx(losses[6], rel=1e-6)
        assert record["best"]["last"] == ("adapter" if best == 6 else "adapter_last")
    assert records[0]["best"]["step"] == 1


@pytest.fixture
def load_exported_loss(load_base):
    """val/loss of an exported adapter over the validation rows, by plain transformers and PEFT."""
    from peft import PeftModel

    from loralab.data.encoding import encode

    def score(spec, folder):
        base = load_base("llama")
        data = encode(spec.data.splits(), base.tokenizer, "causal_lm", spec.model.length)
        model = PeftModel.from_pretrained(base.model, spec.folder / folder)
        total = count = 0.0
        for row in data.validation:
            labels = torch.tensor([row.labels])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row.input_ids])).logits
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != -100).sum())
        return total / count

    return score


def test_the_best_state_survives_a_kill(make_spec, break_off, weights):

    def trial(name):
        callbacks = {"checkpoint": lambda: Checkpoint(None, 1)}
        return make_spec(
            name, max_steps=6, val_check_interval=1, keep_best=True, metric_mode="max", callbacks=callbacks,
            adapter=LoRA(r=2),
        )  # fmt: skip

    whole, again = trial("whole"), trial("again")
    (expected,) = Runner().run([whole])
    break_off([again], step=4)
    (done,) = Runner().run([again])
    assert done["resumed_from"] == 4
    assert done["best"] == expected["best"]
    assert done["best"]["step"] < 4
    assert all(torch.equal(a, weights(again.folder)[name]) for name, a in weights(whole.folder).items())


def test_a_limited_validation_says_so_and_has_other_targets(make_spec):
    part = make_spec("part", decisive={"limit_val_batches": 2}, max_steps=1)
    whole = make_spec("whole", max_steps=1)
    one, other = Runner().run([part])[0], Runner().run([whole])[0]
    assert one["data"]["limited"] == {"validation": [4, 7]}
    assert other["data"]["limited"] is None
    assert one["data"]["rows"]["validation"] == 4
    assert one["data"]["targets"] != other["data"]["targets"]
    assert one["data"]["fingerprint"] == other["data"]["fingerprint"]
    assert one["metrics"]["val/loss"] != other["metrics"]["val/loss"]


def test_a_sanity_check_and_a_profiler_change_no_bit(make_spec, curve):
    plain = make_spec("plain", val_check_interval=2)
    passed = {"num_sanity_val_steps": 2, "profiler": "simple", "detect_anomaly": True}
    other = make_spec("other", val_check_interval=2, passed=passed, decisive={"deterministic": True})
    Runner().run([plain])
    (record,) = Runner().run([other])
    assert record["status"] == "completed"
    for key in ("train/loss", "val/loss"):
        assert curve(plain.folder, key) == curve(other.folder, key)
    assert "optimizer_step" in (other.folder / "fit-profile.txt").read_text()
    assert not torch.are_deterministic_algorithms_enabled()


def test_values_are_clipped_one_by_one_where_asked(make_spec, weights):
    clipped = make_spec("value", max_steps=1, gradient_clip_val=1e-9, decisive={"gradient_clip_algorithm": "value"})
    normed = make_spec("norm", max_steps=1, gradient_clip_val=1e-9)
    for spec in (clipped, normed):
        assert Runner().run([spec])[0]["status"] == "completed"
    one, other = weights(clipped.folder), weights(normed.folder)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_report_says_which_scores_are_of_a_part_and_what_an_adapter_holds(synthetic_results):
    text = "\n".join(synthetic_results)
    assert "Scores of 1 of 1 trials are over a part of a split, by a limit of the trainer: the first 4 of 7" in text
    assert (
        "holds the state with the best val/loss of all validations, and test scores are of it: step 3 (2.5000)" in text
    )
    assert "1 of 1 trials stopped early; " in text


@pytest.fixture
def synthetic_results(tmp_path, synthetic, write):
    """The notes of a report on one made-up trial."""
    from loralab.analysis.arms import comparisons
    from loralab.analysis.results import read_results
    from loralab.reporting.notes import notes

    trial = synthetic("none", 2, 0)
    trial["data"]["limited"] = {"validation": [4, 7]}
    trial["best"] = {"metric": "val/loss", "step": 3, "value": 2.5}
    trial["stopped_early"] = {"step": 4, "metric": None, "best": None, "why": "trainer.max_time ended the training"}
    write(tmp_path / "a", trial)
    return [note for comparison in comparisons(read_results(tmp_path)) for note in notes(comparison)]


def test_a_trial_that_has_ended_is_given_no_row_of_what_its_pack_goes_on_with(make_spec):
    class Own(Callback):
        pack_aware = True

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.log("own/batch", float(batch_idx))

    callbacks = {"rate": LearningRateMonitor, "own": Own, "memory": partial(PhaseMemory, every_n_steps=1)}
    specs = [make_spec(f"of {steps}", callbacks=callbacks, max_steps=steps) for steps in (1, 3)]
    records = Runner().run(specs)
    assert [record["pack"]["size"] for record in records] == [2, 2]
    for spec, steps in zip(specs, (1, 3), strict=True):
        written = [(key, row["step"]) for row in rows(spec.folder) for key in row if key != "step"]
        assert len(written) == len(set(written))
        assert [row["own/batch"] for row in rows(spec.folder) if "own/batch" in row] == list(map(float, range(steps)))
