"""Lightning's callbacks and its Trainer's arguments on the command line: what passes, and what is refused, and why."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import compose, plain
from loralab.config.words import TRAINER
from loralab.errors import ConfigError
from loralab.training.arguments import FIXED, PASSED
from loralab.training.trainer import TrainerSpec

CALLBACK = "+callbacks.x._target_=lightning.pytorch.callbacks."


def of(*words):
    return trial_id(compose(list(words)))


def built(*words):
    return trial_spec(compose(list(words)), Path())


def test_every_argument_of_the_trainer_is_decided():
    own = {one.name for one in fields(TrainerSpec)}
    assert set(inspect.signature(Trainer).parameters) == (own & set(inspect.signature(Trainer).parameters)) | TRAINER
    assert set(PASSED) | set(FIXED) == TRAINER


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+trainer.max_epoch=3"], "trainer.max_epoch is no argument of Lightning's Trainer; did you mean max_epochs"),
        (["trainer.max_time=bad"], "trainer.max_time must be a time"),
        (["trainer.max_time={minutes:0}"], "trainer.max_time must be a time"),
        (["logger=[csv,tensorboard]"], "a list of options merges their settings into one class"),
        (["quantization=[none,nf4]"], "valid: one option in one run, or -m quantization=A,B"),
        (["trainer.max_epochs=0"], "trainer.max_epochs must be at least 1"),
        (["trainer.devices=2"], "one device"),
        (["trainer.devices=0", "trainer.strategy=ddp"], "a number of processes, or auto"),
        (["trainer.strategy=deepspeed"], "trainer.strategy='deepspeed' is unknown"),
        (["trainer.num_nodes=2"], "on one machine"),
        (["trainer.accelerator=mps"], "kernels for the CPU and for CUDA"),
        (["trainer.precision=64"], "adapters are float32"),
        (["trainer.inference_mode=true"], "later training steps"),
        (["trainer.barebones=true"], "what the record is made of"),
        (["trainer.enable_checkpointing=true"], "ModelCheckpoint"),
        (["trainer.reload_dataloaders_every_n_epochs=1"], "seed and the step"),
        (["trainer.plugins=[x]"], "trainer.precision"),
        (["+trainer.logger=true"], "group of its own"),
        (["trainer.limit_val_batches=0"], "trainer.limit_val_batches must be a number of batches"),
        (["trainer.profiler=fast"], "trainer.profiler='fast' is unknown"),
        (["trainer.keep_best=true"], "needs trainer.val_check_interval"),
        (["trainer.val_check_interval=2", "trainer.check_val_every_n_epoch=1"], "both say when to validate"),
        ([CALLBACK + "LearningRateMonitor", "+callbacks.x.intervall=1"], "callbacks.x.intervall is not an option of"),
        ([CALLBACK + "GradientAccumulationScheduler"], "target tokens of the whole step"),
        ([CALLBACK + "StochasticWeightAveraging"], "copies the whole module"),
        ([CALLBACK + "EarlyStopping"], "callbacks.x.monitor is missing"),
        ([CALLBACK + "EarlyStopping", "+callbacks.x.monitor=val/loss"], "needs trainer.val_check_interval"),
        (
            [CALLBACK + "EarlyStopping", "+callbacks.x.monitor=val/los", "trainer.val_check_interval=1"],
            "measured by no",
        ),
        ([CALLBACK + "ModelCheckpoint", "+callbacks.x.mode=best"], "callbacks.x: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_break_a_promise_is_refused_with_the_reason(words, message):
    with pytest.raises(ConfigError, match=message) as refused:
        built(*words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.profiler=simple", "trainer.num_sanity_val_steps=2", "trainer.detect_anomaly=true"],
        ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=true", "trainer.devices=1"],
        ["trainer.limit_val_batches=1.0", "trainer.gradient_clip_algorithm=norm", "trainer.strategy=auto"],
        [CALLBACK + "LearningRateMonitor"],
    ],
)
def test_what_changes_no_result_changes_no_id(words):
    assert of(*words) == of()


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_epochs=1"],
        ["trainer.limit_val_batches=1"],
        ["trainer.overfit_batches=1"],
        ["trainer.fast_dev_run=true"],
        ["trainer.gradient_clip_algorithm=value"],
        ["trainer.deterministic=true"],
        [CALLBACK + "EarlyStopping", "+callbacks.x.monitor=val/loss", "trainer.val_check_interval=1"],
        ["trainer.keep_best=true", "trainer.val_check_interval=1"],
    ],
)
def test_what_can_change_a_result_is_part_of_the_id(words):
    rest = [word for word in words if "val_check_interval" in word]
    assert of(*words) != of(*rest)
    assert of(*words) == built(*words).id


def test_a_callback_of_ones_own_is_part_of_the_id_unless_it_only_looks_on(tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Rate(Callback):\n    def __init__(self, factor=1.0): self.factor = factor\n"
        "class Looks(Callback):\n    pack_aware = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rate = "+callbacks.x._target_=own_callbacks.Rate"
    assert (
        len(
            {
                of(),
                of(rate),
                of(rate, "+callbacks.x.factor=2"),
                of(CALLBACK + "Timer", "+callbacks.x.duration=00:00:00:09"),
            }
        )
        == 4
    )
    assert of(rate) == of(rate.replace(".x.", ".y."))
    assert of("+callbacks.x._target_=own_callbacks.Looks") == of(CALLBACK + "Timer") == of()
    assert list(built(rate).sources()) == ["own_callbacks"]
    assert built("+callbacks.x._target_=own_callbacks.Looks").sources() == {}


def test_short_names_of_a_precision_are_the_full_ones():
    assert built("trainer.precision=bf16").trainer.precision == "bf16-mixed"
    assert of("trainer.precision=32") == of("trainer.precision=32-true")


def test_epochs_stand_in_for_the_default_number_of_steps_and_beside_one_that_is_given():
    assert built("trainer.max_epochs=2").trainer.max_steps == 2**31 - 1
    assert built("trainer.max_epochs=2", "trainer.max_steps=7").trainer.max_steps == 7
    assert built("trainer.max_epochs=null").trainer.max_steps == 200


def test_two_hundred_steps_of_a_files_own_are_kept_beside_its_epochs(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/both.yaml").write_text("# @package _global_\ntrainer: {max_epochs: 30, max_steps: 200}\n")
    composed = compose(["+experiment=both"], config_dir=str(tmp_path))
    assert plain(composed)["trainer"]["max_steps"] == 200


def test_trials_share_a_pack_where_their_one_trainer_can_be_the_same():
    assert built("trainer.max_epochs=1").pack_key == built("trainer.max_epochs=2").pack_key
    assert built("trainer.profiler=simple").pack_key != built().pack_key
    assert built(CALLBACK + "Timer").pack_key != built().pack_key


def test_early_stopping_becomes_the_trials_own_rule():
    words = ["+callbacks.x.monitor=val/token_accuracy", "+callbacks.x.mode=max", "+callbacks.x.min_delta=0.1"]
    spec = built(CALLBACK + "EarlyStopping", *words, "+callbacks.x.patience=2", "trainer.val_check_interval=1")
    (rule,) = spec.stops
    assert "x" not in spec.callbacks
    assert (rule.metric, rule.mode, rule.patience, rule.min_delta) == ("val/token_accuracy", "max", 2, 0.1)
