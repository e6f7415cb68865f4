"""The Trainer's spec refuses nonsense, and Lightning gets optimizer steps where it counts passes."""

import math

import pytest
import torch

from loralab.errors import ConfigError
from loralab.training.trainer import TrainerSpec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "trainer.max_steps must be at least 0"),
        ({"accumulate_grad_batches": -1}, "trainer.accumulate_grad_batches"),
        ({"val_check_interval": 0}, "trainer.val_check_interval"),
        ({"log_every_n_steps": 0}, "trainer.log_every_n_steps"),
        ({"gradient_clip_val": 0.0}, "trainer.gradient_clip_val"),
        ({"gradient_clip_val": math.nan}, "trainer.gradient_clip_val"),
        ({"precision": "bf16-mix"}, "did you mean bf16-mixed"),
        ({"accelerator": "gpus"}, "did you mean gpu"),
    ],
)
def test_values_out_of_range_are_refused_with_their_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainerSpec(**changes)


def test_auto_takes_what_the_machine_has(monkeypatch):
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert TrainerSpec(accelerator="auto").device == device
        assert TrainerSpec(accelerator="cpu").device == "cpu"


def test_a_validation_interval_counts_optimizer_steps():
    trainer = TrainerSpec(accelerator="cpu", val_check_interval=3, accumulate_grad_batches=4).build([], progress=False)
    assert trainer.val_check_interval == 12
    assert trainer.accumulate_grad_batches == 4


def test_lightning_keeps_no_logger_and_no_checkpoint_of_its_own():
    trainer = TrainerSpec(accelerator="cpu").build([], progress=False)
    assert trainer.logger is None
    assert not trainer.checkpoint_callbacks
