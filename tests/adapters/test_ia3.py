"""(IA)3 scales what the paper scales, and PEFT computes the same from its files."""

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.ia3 import IA3, IA3Delta
from loralab.errors import ArtifactError, ConfigError

SHAPE = {"num_hidden_layers": 28, "vocab_size": 128256, "num_attention_heads": 24, "num_key_value_heads": 8}
LLAMA_3B = LlamaConfig(hidden_size=3072, intermediate_size=8192, head_dim=128, **SHAPE)
FAMILIES = ["llama", "gpt2", "phi", "t5", "bart", "bert", "roberta", "distilbert", "opt", "gpt_neox"]


def moved(adapter):
    torch.manual_seed(2)
    with torch.no_grad():
        for _, delta in adapter.adapted():
            delta.ia3_l.add_(torch.randn_like(delta.ia3_l) / 4)
    return adapter


def logits(model, adapter, given):
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        return model.eval()(**given).logits


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_from_its_files(load_any, dense_twin, fed, tmp_path, family, scheme):
    model = load_any(family, scheme)
    adapter = moved(attached(IA3(), model))
    ours = logits(model, adapter, fed(family))
    save(adapter, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense_twin(family, model), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**fed(family)).logits, ours, rtol=1e-5, atol=1e-5)
    adapter.detach()
    again = load(tmp_path / "adapter", model)
    assert torch.equal(logits(model, again, fed(family)), ours)


def test_llama_has_pefts_count():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_3B)
    assert attached(IA3(), model).trainable_parameters() == 286_720


def test_gradients_are_pefts(load_any, fed):
    targets, entered = ["k_proj", "v_proj", "down_proj"], ["down_proj"]
    model, other = load_any("llama", "none"), load_any("llama", "none")
    adapter = attached(IA3(target_modules=targets, feedforward_modules=entered), model)
    theirs = get_peft_model(other, IA3Config(target_modules=targets, feedforward_modules=entered)).eval()
    with AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        model.eval()(**fed("llama")).logits.logsumexp(-1).sum().backward()
    theirs(**fed("llama")).logits.logsumexp(-1).sum().backward()
    parameters = dict(theirs.named_parameters())
    for name, delta in adapter.adapted():
        expected = parameters[f"base_model.model.{name}.ia3_l.default"].grad.flatten()
        torch.testing.assert_close(delta.ia3_l.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_is_multiplied_once_a_pass(load_any, fed):
    model = load_any("llama", "none")
    adapter = attached(IA3(), model)
    calls = []
    for name in adapter.layers():
        layer = model.get_submodule(name)
        layer.forward = lambda x, forward=layer.forward, name=name: (calls.append(name), forward(x))[1]
    logits(model, adapter, fed("llama"))
    assert sorted(calls) == sorted(adapter.layers())


def test_scales_of_a_stack_are_those_of_each_alone():
    deltas = [IA3Delta(4, entering) for entering in (True, False)]
    for number, delta in enumerate(deltas):
        torch.nn.init.normal_(delta.ia3_l, generator=torch.Generator().manual_seed(number))
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(9))
    together = IA3Delta.forward_grouped(x, x, [(0, 2, deltas[0], None), (2, 6, deltas[1], None)])
    assert torch.equal(together[:1], deltas[0](x[:1], x[:1], None))
    assert torch.equal(together[1:], deltas[1](x[1:], x[1:], None))


def test_files_of_another_base_are_refused(load_any, tmp_path):
    save(attached(IA3(), load_any("llama")), tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="do not agree in base_model.model.transformer.h.0"):
        load(tmp_path / "adapter", load_any("gpt2"))


def test_what_is_no_target_is_refused(load_any):
    with pytest.raises(ConfigError, match="feedforward_modules: model.layers.0.mlp.up_proj is none of"):
        attached(IA3(target_modules=["k_proj"], feedforward_modules=["up_proj"]), load_any("llama"))
    with pytest.raises(ConfigError, match="without adapter.target_modules"):
        IA3(feedforward_modules=["up_proj"])
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="adapter=ia3 does not know"):
        attached(IA3(), model)
