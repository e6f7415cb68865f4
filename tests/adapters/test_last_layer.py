"""Last-layer tuning trains the blocks that full fine-tuning would, with the same gradients, and no others."""

import pytest
import torch
from transformers import AlbertConfig, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, MixtralConfig

from loralab.adapters.attached import attached
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.last_layer import LastLayer, trained_leaves
from loralab.errors import ConfigError
from loralab.forward.prefix import Prefix

BLOCKS = {
    **{"gpt2": "transformer.h.1", "llama": "model.layers.1", "phi": "model.layers.1"},
    **{"roberta": "roberta.encoder.layer.1", "t5": "decoder.block.1", "bart": "model.decoder.layers.1"},
}


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "roberta", "t5", "bart"])
def test_its_gradients_are_those_of_full_fine_tuning(load_any, dense_twin, fed, family, scheme):
    model = load_any(family, scheme)
    dense = dense_twin(family, model)
    adapter = attached(LastLayer(), model)
    for name, module in adapter.saved_modules():
        dense.get_submodule(name).load_state_dict(module.state_dict())
    given = fed(family)
    with AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        model.eval()(**given).logits.logsumexp(-1).sum().backward()
    dense.requires_grad_(True).eval()(**given).logits.logsumexp(-1).sum().backward()
    seen = 0
    for name, delta in adapter.adapted():
        assert name.startswith(BLOCKS[family])
        for inside, parameter in delta.module.named_parameters():
            expected = dense.get_submodule(name).get_parameter(inside).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5, msg=f"{name}.{inside}")
            seen += parameter.numel()
    assert seen == sum(p.numel() for p in dense.get_submodule(BLOCKS[family]).parameters())


def test_gpt2_medium_has_the_papers_ft_top2():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert attached(LastLayer(layers=2), model).trainable_parameters() == 25_192_448


def test_a_norm_and_the_head_train_where_they_are_named(load_base):
    adapter = attached(LastLayer(modules_to_save=["ln_f"]), load_base("gpt2").model)
    assert [name for name, _ in adapter.saved_modules()] == ["transformer.ln_f"]


def test_no_block_is_a_linear_probe(load_any):
    adapter = attached(LastLayer(layers=0), load_any("distilbert"))
    assert not list(adapter.adapted())
    heads = dict(adapter.saved_modules())
    assert sorted(heads) == ["classifier", "pre_classifier"]
    assert adapter.trainable_parameters() == sum(p.numel() for head in heads.values() for p in head.parameters()) > 0


def test_blocks_below_are_shared(load_base):
    model = load_base("llama").model
    adapters = [attached(LastLayer(layers=n), model) for n in (1, 2)]
    assert Prefix(model, adapters).depths == [1, 0]


def test_more_blocks_than_there_are_is_refused(load_base):
    with pytest.raises(ConfigError, match="adapter.layers=3: LlamaForCausalLM has 2 blocks; valid: 0 to 2"):
        attached(LastLayer(layers=3), load_base().model)


def test_a_model_without_blocks_of_its_own_is_refused():
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AlbertConfig(vocab_size=100))
    with pytest.raises(ConfigError, match="AlbertForMaskedLM has no stack of blocks"):
        attached(LastLayer(), model)


def test_experts_are_refused_by_name():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"cannot train model.layers.1.mlp.(gate|experts)\."):
        trained_leaves(model, 1)
