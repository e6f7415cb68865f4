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


@pytest.fixture
def card(monkeypatch):
    """Gives torch cards of these compute capabilities; none: no card."""

    def give(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return give


@pytest.mark.parametrize(
    ("capabilities", "on_card"),
    [((), "bf16-mixed"), (((9, 0),), "bf16-mixed"), (((7, 5),), "32-true"), (((8, 0), (7, 5)), "32-true")],
)
def test_auto_precision_is_bf16_mixed_on_a_card_that_has_it(card, capabilities, on_card):
    card(*capabilities)
    assert TrainerSpec().precision_on("cuda") == on_card
    assert TrainerSpec().precision_on("cpu") == "32-true"
    assert {TrainerSpec(precision="bf16-true").precision_on(device) for device in ("cpu", "cuda")} == {"bf16-true"}


@pytest.mark.parametrize("capabilities", [(), ((7, 5),)])
def test_tf32_is_refused_where_no_product_would_be_in_it(card, capabilities):
    card(*capabilities)
    with pytest.raises(ConfigError, match="trainer.precision=tf32 needs a GPU of compute capability 8.0 or more"):
        TrainerSpec(precision="tf32").check_precision()
    card((8, 6))
    TrainerSpec(precision="tf32").check_precision()


@pytest.mark.parametrize(("precision", "within"), [("tf32", "high"), ("32-true", "highest"), ("auto", "highest")])
def test_float32_products_on_a_card_are_tf32_only_where_it_is_asked_for(card, precision, within):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        card((9, 0))
        with TrainerSpec(precision=precision).settings_restored():
            assert torch.get_float32_matmul_precision() == within
        assert torch.get_float32_matmul_precision() == "medium"
        card()
        with TrainerSpec().settings_restored():
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_validation_interval_counts_optimizer_steps():
    trainer = TrainerSpec(accelerator="cpu", val_check_interval=3, accumulate_grad_batches=4).build([], progress=False)
    assert trainer.val_check_interval == 12
    assert trainer.accumulate_grad_batches == 4


def test_lightning_keeps_no_logger_and_no_checkpoint_of_its_own():
    trainer = TrainerSpec(accelerator="cpu").build([], progress=False)
    assert trainer.logger is None
    assert not trainer.checkpoint_callbacks
