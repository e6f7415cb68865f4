"""DoRA over any base computes what PEFT does from the same tensors, and makes a layer's weight dense once a pass."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.adapters import dora
from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import DoRADelta, LoRA
from loralab.quantization.base import dense_weight

SPEC = LoRA(r=4, use_dora=True, bias="all")


def moved(adapter):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    return adapter


def logits(model, adapter, given):
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        return model.eval()(**given).logits


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "bert", "roberta", "t5", "bart"])
def test_peft_computes_the_same_from_its_files(load_any, dense_twin, fed, tmp_path, family, scheme):
    model = load_any(family, scheme)
    adapter = moved(attached(SPEC, model))
    ours = logits(model, adapter, fed(family))
    save(adapter, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense_twin(family, model), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**fed(family)).logits, ours, rtol=1e-5, atol=1e-5)
    adapter.detach()
    again = load(tmp_path / "adapter", model)
    torch.testing.assert_close(logits(model, again, fed(family)), ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_pefts_with_the_norm_held(load_any, fed, tmp_path, family):
    model, given = load_any(family), fed(family)
    adapter = moved(attached(LoRA(r=4, use_dora=True), model))
    save(adapter, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_any(family), tmp_path / "adapter", is_trainable=True).eval()
    with AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        model.eval()(**given).logits.logsumexp(-1).sum().backward()
    theirs(**given).logits.logsumexp(-1).sum().backward()
    parameters = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    seen = 0
    for name, delta in adapter.adapted():
        begin = f"base_model.model.{name}.lora_"
        for own, key in ((delta.lora_A, "A"), (delta.lora_B, "B"), (delta.lora_magnitude_vector, "magnitude_vector")):
            torch.testing.assert_close(own.grad, parameters[f"{begin}{key}.weight"].grad, rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == len(parameters)


def test_its_count_is_pefts(load_any):
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(load_any("llama"), config).get_nb_trainable_parameters()[0]
    spec = LoRA(r=4, use_dora=True, target_modules=["q_proj", "v_proj"])
    assert attached(spec, load_any("llama")).trainable_parameters() == theirs


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_it_is_the_papers_formula(load_any, scheme):
    model = load_any("phi", scheme)
    adapter = moved(attached(LoRA(r=4, use_dora=True), model))
    name, delta = next(iter(adapter.adapted()))
    layer = model.get_submodule(name)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(4))
    weight = dense_weight(layer).detach()
    whole = weight + delta.scaling * delta.lora_B @ delta.lora_A
    new = delta.lora_magnitude_vector[:, None] * whole / whole.norm(dim=1, keepdim=True)
    y = torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(delta(x, y, None), torch.nn.functional.linear(x, new, layer.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight + delta.delta_weight(), new, rtol=1e-5, atol=1e-6)


def test_a_packs_weight_is_made_dense_once_and_each_trial_is_as_alone(load_any, monkeypatch):
    model = load_any("llama", "nf4")
    adapters = [moved(attached(LoRA(r=r, use_dora=True, lora_dropout=0.3), model)) for r in (2, 4)]
    name, _ = next(iter(adapters[0].adapted()))
    one, other = (dict(adapter.adapted())[name] for adapter in adapters)
    layer, made = model.get_submodule(name), []
    monkeypatch.setattr(dora, "dense_weight", lambda given: (made.append(given), dense_weight(given))[1])
    x = torch.randn(6, 5, layer.in_features, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y = layer(x)
        together = DoRADelta.forward_grouped(x, y, [(0, 10, one, 3), (10, 30, other, 4)])
        assert made == [layer]
        assert torch.equal(together[:2], one(x[:2], y[:2], 3))
        assert torch.equal(together[2:], other(x[2:], y[2:], 4))


def test_a_row_without_length_stays_finite(load_any):
    model = load_any("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3].zero_()
    adapter = attached(LoRA(r=4, use_dora=True), model)
    assert torch.isfinite(logits(model, adapter, {"input_ids": torch.arange(8)[None].expand(2, -1)})).all()
