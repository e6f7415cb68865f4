"""A card, and a bitsandbytes without a binary for it: one paragraph, whoever needs its kernels."""

import bitsandbytes
import pytest
import torch

from loralab.cli import doctor
from loralab.errors import ConfigError
from loralab.optim.optimizers import AdamW
from loralab.quantization import kernels
from loralab.quantization.four_bit import FourBit

SAYS = "it has no binary for CUDA 13.0, which this torch is built for"


@pytest.fixture
def card(monkeypatch):
    """torch that sees a card; the binary that bitsandbytes has loaded here is the one for CPUs."""
    assert not bitsandbytes.cextension.lib.compiled_with_cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_quantized_layer_says_what_is_missing_and_what_does_not_need_it(card):
    with pytest.raises(ConfigError) as raised:
        FourBit().convert(torch.nn.Linear(64, 64, bias=False))
    assert SAYS in str(raised.value)
    assert "valid: pip install bitsandbytes, or quantization=none or int8_absmax" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_so_does_an_optimizer(card):
    with pytest.raises(ConfigError, match=f"optimizer: bitsandbytes is missing or broken.*{SAYS}"):
        AdamW("adamw_8bit").build([{"params": [torch.nn.Parameter(torch.zeros(4))]}])


def test_the_doctor_finds_it(card):
    found = doctor.bitsandbytes()
    assert (found["status"], SAYS in found["detail"]) == ("fail", True)
    assert "quantization=none" in found["fix"]


def test_with_its_binary_nothing_is_asked_of_the_card(monkeypatch):
    monkeypatch.setattr(bitsandbytes.cextension.lib.__class__, "compiled_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked at every use"))
    assert kernels.import_bitsandbytes() is bitsandbytes
