"""BitFit trains every bias, as a difference that is nothing at first."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, RobertaConfig

from loralab.adapters.attached import attached
from loralab.adapters.biases import BiasDelta, ChannelBiasDelta
from loralab.adapters.bitfit import BitFit
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.errors import ConfigError


def plain(model, given):
    with torch.no_grad():
        return model.eval()(**given).logits


def adapted(base, adapter, given):
    with torch.no_grad(), AdapterHooks.of(base.model).batch(BatchSlice(adapter, 2)):
        return base.model.eval()(**given).logits


@pytest.mark.parametrize("scheme", ["none", "nf4"])
@pytest.mark.parametrize("family", ["gpt2", "phi", "roberta", "distilbert"])
def test_it_computes_what_the_base_with_those_biases_does(load_base, inputs, family, scheme):
    base, other = load_base(family, scheme), load_base(family, scheme)
    adapter = attached(BitFit(), base.model)
    names = [name for name, _ in adapter.adapted()]
    everywhere = {name for name, _ in other.model.named_parameters() if name.endswith("bias")}
    saved = tuple(f"{name}." for name, _ in adapter.saved_modules())
    assert {f"{name}.bias" for name in names} == {name for name in everywhere if not name.startswith(saved or "/")}
    with torch.no_grad():
        for number, (name, delta) in enumerate(adapter.adapted()):
            shift = torch.randn(delta.bias_delta.shape, generator=torch.Generator().manual_seed(number)) / 10
            delta.bias_delta.copy_(shift)
            other.model.get_submodule(name).bias.add_(shift)
        for name, module in adapter.saved_modules():  # a new head is drawn for each trial
            other.model.get_submodule(name).load_state_dict(module.state_dict())
    given = inputs()
    torch.testing.assert_close(adapted(base, adapter, given), plain(other.model, given), rtol=1e-5, atol=1e-5)


def test_roberta_base_has_the_papers_biases():
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(RobertaConfig(vocab_size=50265))
    adapter = attached(BitFit(modules_to_save=["classifier"]), model)
    trained = sum(p.numel() for _, delta in adapter.adapted() for p in delta.parameters())
    assert trained == 102_144  # 0.1M in the LoRA paper's table 2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_base_without_biases_is_refused(load_base, family):
    with pytest.raises(ConfigError, match="adapter=bitfit would train nothing"):
        attached(BitFit(), load_base(family).model)


def test_a_head_alone_is_no_bitfit(load_base):
    base = load_base("llama", task="sequence_classification")
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification has no biases, so score alone"):
        attached(BitFit(), base.model)


def test_biases_of_a_stack_are_those_of_each_alone():
    deltas = [BiasDelta(torch.zeros(5)) for _ in range(2)]
    for number, delta in enumerate(deltas):
        torch.nn.init.normal_(delta.bias_delta, generator=torch.Generator().manual_seed(number))
    y = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(9))
    together = BiasDelta.forward_grouped(y, y, [(0, 6, deltas[0], None), (9, 18, deltas[1], None)])
    assert torch.equal(together[:2], deltas[0](y, y[:2], None))
    assert torch.equal(together[2], y[2])  # between them nobody's
    assert torch.equal(together[3:], deltas[1](y, y[3:], None))


def test_a_convolutions_bias_is_its_channels():
    layer = torch.nn.Conv1d(4, 6, 3)
    delta, x = ChannelBiasDelta(layer.bias), torch.randn(2, 4, 8)
    torch.nn.init.normal_(delta.bias_delta)
    expected = torch.nn.functional.conv1d(x, layer.weight, layer.bias + delta.bias_delta)
    torch.testing.assert_close(delta(x, layer(x), None), expected)
