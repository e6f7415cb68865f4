"""LoRA-FA: LoRA's formula and LoRA's draw, of which B alone trains, and the backward pass needs no input of a layer."""

import pytest
import torch
from safetensors.torch import load_file

from loralab.adapters import peft
from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.files import WEIGHTS
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA, LoRADelta
from loralab.adapters.lora_fa import LoRAFA, LoRAFADelta
from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.errors import ConfigError
from loralab.planning.count import count

IN, OUT, R = 7, 5, 3


def moved_pair():
    """Deltas of LoRA and of LoRA-FA with the same A and the same B, which is not zero."""
    pair = LoRADelta(IN, OUT, R, scaling=2.0), LoRAFADelta(IN, OUT, R, scaling=2.0)
    b = torch.randn(OUT, R)
    for delta in pair:
        delta.draw("kaiming", torch.Generator().manual_seed(0))
        delta.lora_B.data.copy_(b)
    return pair


def test_a_layer_and_the_gradients_of_b_and_x_are_loras():
    grads, weight = [], torch.randn(2, 4, OUT)
    given, y = torch.randn(2, 4, IN), torch.randn(2, 4, OUT)
    for delta in moved_pair():
        x = given.clone().requires_grad_()
        out = delta(x, y, None)
        torch.testing.assert_close(out, y + given @ delta.delta_weight().T)
        (out * weight).sum().backward()
        grads.append((delta.lora_B.grad, x.grad))
    torch.testing.assert_close(*grads)


def test_the_backward_pass_keeps_a_x_in_place_of_x():
    widths = []
    for delta in moved_pair():
        kept = []
        x = torch.randn(2, 4, IN, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            delta(x, torch.zeros(2, 4, OUT), None)
        parts = [tensor.untyped_storage()._cdata for tensor in (delta.lora_A, delta.lora_B)]
        widths.append({t.shape[-1] for t in kept if t.untyped_storage()._cdata not in parts})
    assert IN in widths[0]
    assert widths[1] == {R}


def test_a_is_loras_draw_and_only_b_trains(load_base, inputs):
    model, lora = load_base("llama").model, attached(LoRA(r=4), load_base("llama").model, seed=3)
    adapter = attached(LoRAFA(r=4), model, seed=3)
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"lora_B"}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for step in range(2):
        with AdapterHooks.of(model).batch(BatchSlice(adapter, 2, key=step)):
            model(**inputs()).logits.logsumexp(-1).sum().backward()
        optimizer.step()
    for (name, delta), (other, drawn) in zip(adapter.adapted(), lora.adapted(), strict=True):
        assert name == other
        assert torch.equal(delta.lora_A, drawn.lora_A)
        assert delta.lora_B.all()


@pytest.mark.parametrize("r", [1, 8])
def test_the_shipped_base_trains_r_numbers_for_each_output_of_its_linear_layers(r):
    config = plain(compose([f"adapter.r={r}", "adapter=lora_fa"]))
    model, quantization, adapter = (build(config[group], group) for group in ("model", "quantization", "adapter"))
    shape = model.architecture()
    outputs = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim  # q, k, v
    outputs += shape.hidden_size + 2 * shape.intermediate_size + shape.hidden_size  # o; gate, up, down
    assert count(model, quantization, adapter)["trainable_parameters"] == r * shape.num_hidden_layers * outputs


def test_its_files_hold_a_for_peft_and_bring_it_to_an_adapter_of_another_seed(load_base, tmp_path):
    adapter = attached(LoRAFA(r=4), load_base("llama").model, seed=3)
    save(adapter, tmp_path / "adapter", seed=4)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    again = dict(load(tmp_path / "adapter", load_base("llama").model).adapted())
    for name, delta in adapter.adapted():
        assert torch.equal(stored[peft.lora_keys(name)[0]], delta.lora_A)
        assert torch.equal(again[name].lora_A, delta.lora_A)


def test_an_update_that_its_files_have_no_place_for_is_refused(load_base):
    class More(LoRAFA):
        def attach(self, model, seed=0):
            adapter = super().attach(model, seed)
            adapter.add("lm_head", LoRADelta(64, 258, 2, 1.0))
            return adapter

    with pytest.raises(ConfigError, match="would leave out LoRADelta of lm_head"):
        attached(More(), load_base("llama").model)
