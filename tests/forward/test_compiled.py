"""A packed block over a quantized base is one graph for torch.compile, with the numbers that it has without."""

import pytest
import torch

from loralab.adapters import fused
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA


@pytest.mark.slow  # the import of the compiler
@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["part by part", "together, as on a card"])
def test_a_packed_block_is_traced_whole_and_its_gradients_are_eagers_to_the_bit(load_base, monkeypatch, devices):
    monkeypatch.setattr(fused, "TOGETHER", devices)
    model = load_base("llama", "nf4").model
    adapters = [LoRA(r=r, modules_to_save=[]).attach(model, seed=r) for r in (2, 4, 4)]
    for adapter in adapters:
        for _, delta in adapter.adapted():
            torch.nn.init.normal_(delta.lora_B, std=0.02)
    block, places = model.model.layers[0], torch.arange(16)[None]
    x = torch.randn(3, 16, model.config.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    given = {"position_ids": places, "position_embeddings": model.model.rotary_emb(x, places)}
    parameters = [p for a in adapters for name, p in a.named_parameters() if "layers/0/" in name]
    assert len(parameters) == 3 * 2 * 7

    def computed(forward):
        AdapterHooks.of(model).begin_pass(tuple(BatchSlice(adapter, 1) for adapter in adapters))
        out = forward(x, **given)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), [x, *parameters])]

    eager = computed(block)
    whole = computed(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, whole, strict=True))
    assert all(bool(one.abs().max() > 0) for one in eager)
