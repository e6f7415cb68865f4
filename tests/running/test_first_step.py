"""What the first step finds out before a night is lost: a base that changes, a graph that is cut."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from loralab.adapters.base import Adapter
from loralab.adapters.lora import LoRA
from loralab.models import loading
from loralab.quantization.four_bit import FourBit
from loralab.running.runner import Runner
from loralab.training import unchanged


@dataclass(frozen=True)
class Writes(LoRA):
    """Adds to a frozen weight in place."""

    makes = Adapter

    def attach(self, model, seed=0):
        adapter = super().attach(model, seed)

        def write(*_):
            model.get_parameter("model.norm.weight").data[:1] += 1  # which autograd does not notice

        model.model.norm.register_forward_hook(write)
        return adapter


@pytest.mark.parametrize("quantization", [None, FourBit()])
def test_a_base_that_the_first_step_changes_is_refused(make_spec, quantization):
    changes = {} if quantization is None else {"quantization": quantization}
    (record,) = Runner().run([make_spec(adapter=Writes(r=2), max_steps=2, **changes)])
    assert (record["status"], record["exit_code"]) == ("failed", 2)
    assert "the first step changed 1 tensors of the frozen base (model.norm.weight)" in record["error"]


def test_a_sound_run_changes_no_bit_of_its_base(make_spec, load_base):
    base = load_base("gpt2", "nf4")
    before = unchanged.bits(base.model, set())
    assert sum(name.endswith(".codes") for name in before) == 8
    assert unchanged.changed(before, unchanged.bits(base.model, set())) == []
    (record,) = Runner().run([make_spec(family="gpt2", quantization=FourBit(), max_steps=2)])
    assert record["status"] == "completed", record["error"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_one_flipped_bit_is_seen(dtype):
    layer = nn.Module()
    layer.register_buffer("held", torch.arange(64, dtype=torch.float32).to(dtype))
    layer.register_buffer("passing", torch.zeros(2), persistent=False)
    before = unchanged.bits(layer, set())
    assert list(before) == ["held"]
    layer.held.view(torch.uint8)[5] ^= 1
    assert unchanged.changed(before, unchanged.bits(layer, set())) == ["held"]


def test_checkpointing_that_cuts_the_graph_is_refused_and_not_a_warning(make_spec, make_model, monkeypatch):
    whole = loading.prepare

    def prepare(spec, model):
        whole(spec, model)
        block = model.model.layers[0].mlp
        forward = block.forward
        block.forward = lambda hidden: forward(hidden).detach()  # as a checkpoint whose inputs take no gradient

    monkeypatch.setattr(loading, "prepare", prepare)
    adapter = LoRA(r=2, target_modules=["up_proj"])
    changes = {"model": make_model(gradient_checkpointing=True), "adapter": adapter, "max_steps": 2}
    (record,) = Runner().run([make_spec(**changes)])
    assert (record["status"], record["exit_code"]) == ("failed", 2)
    assert "model.gradient_checkpointing=true: no gradient reached 2 of the adapter's 4 parameters" in record["error"]
