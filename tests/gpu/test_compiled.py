"""model.compile and quantization.dequantize=auto on a card. No card has run these yet."""

from dataclasses import replace

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.planning.resident import dense_bytes
from loralab.quantization.four_bit import FourBit
from loralab.quantization.linear import resident_bytes
from loralab.running.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def run(make_spec, make_model, make_data, name, size, how, checkpointing=False, runner=None):
    """The records of ``size`` trials of eight steps on ragged rows, and their specs."""
    model = make_model(max_length=128, gradient_checkpointing=checkpointing)
    specs = [
        make_spec(f"{name}{i}", seed=i, model=replace(model, compile=how), adapter=LoRA(r=8), quantization=FourBit(),
                  data=make_data("ragged", batch_size=2), max_steps=8, accelerator="gpu", precision="bf16-mixed")
        for i in range(size)
    ]  # fmt: skip
    records = (runner or Runner()).run(specs)
    assert [one["status"] for one in records] == ["completed"] * size, records[0]["error"]
    return specs, records


@pytest.mark.parametrize("how", ["blocks", "graphs"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_learn_as_eager_ones_do(make_spec, make_model, make_data, curve, how, size, checkpointing):
    eager, _ = run(make_spec, make_model, make_data, "eager", size, "none", checkpointing)
    whole, _ = run(make_spec, make_model, make_data, "whole", size, how, checkpointing)
    for one, other in zip(whole, eager, strict=True):  # bfloat16 has 8 bits of mantissa
        assert curve(one.folder) == pytest.approx(curve(other.folder), rel=2e-2)


def test_a_small_base_is_kept_dense_on_the_card(make_spec, make_model, make_data):
    runner = Runner()
    specs, (record,) = run(make_spec, make_model, make_data, "trial", 1, "none", runner=runner)
    base = runner.inputs._base.model
    assert record["base"]["dequantize"] == "resident"
    assert resident_bytes(base) == dense_bytes(specs[0], "cuda")
    assert all(buffer.is_cuda for buffer in base.buffers())
