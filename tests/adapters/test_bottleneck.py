"""Bottleneck adapters are put where the papers put them, with the papers' counts, and compute their formula."""

from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModel, GPT2Config, MixtralConfig, RobertaConfig

from loralab.adapters import dropout
from loralab.adapters.attached import attached
from loralab.adapters.bottleneck import Bottleneck, BottleneckDelta
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.errors import ConfigError

GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
GPT3 = GPT2Config(n_embd=12288, n_layer=96, n_head=96)
ROBERTA = {"intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 50265}
ROBERTA_LARGE = RobertaConfig(hidden_size=1024, num_hidden_layers=24, **ROBERTA)
FAMILIES = {  # {family: (blocks, the first output of attention, the first of an MLP)}
    "llama": (2, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"),
    "mistral": (2, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"),
    "qwen2": (2, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"),
    "phi": (2, "model.layers.0.self_attn.dense", "model.layers.0.mlp.fc2"),
    "gpt2": (2, "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"),
    "gpt_neo": (2, "transformer.h.0.attn.attention.out_proj", "transformer.h.0.mlp.c_proj"),
    "gptj": (2, "transformer.h.0.attn.out_proj", "transformer.h.0.mlp.fc_out"),
    "gpt_neox": (2, "gpt_neox.layers.0.attention.dense", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
    "bloom": (2, "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h"),
    "falcon": (2, "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h"),
    "opt": (2, "model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.fc2"),
    "bert": (2, "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense"),
    "electra": (2, "electra.encoder.layer.0.attention.output.dense", "electra.encoder.layer.0.output.dense"),
    "roberta": (2, "roberta.encoder.layer.0.attention.output.dense", "roberta.encoder.layer.0.output.dense"),
    "distilbert": (2, "distilbert.transformer.layer.0.attention.out_lin", "distilbert.transformer.layer.0.ffn.lin2"),
    "t5": (4, "encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo"),
    "bart": (4, "model.encoder.layers.0.self_attn.out_proj", "model.encoder.layers.0.fc2"),
}


@pytest.mark.parametrize(
    ("config", "variant", "size", "count"),
    [
        (GPT3, "houlsby", 1, 7_078_080),
        pytest.param(GPT3, "houlsby", 4, 21_234_432, marks=pytest.mark.slow),
        pytest.param(GPT3, "houlsby", 8, 40_109_568, marks=pytest.mark.slow),
        pytest.param(GPT3, "houlsby", 16, 77_859_840, marks=pytest.mark.slow),
        pytest.param(GPT3, "houlsby", 64, 304_361_472, marks=pytest.mark.slow),
        (GPT2_MEDIUM, "adapterl", 6, 368_784),
        (GPT2_MEDIUM, "adapterl", 224, 11_089_152),
        (GPT2_LARGE, "adapterl", 8, 875_808),
        (GPT2_LARGE, "adapterl", 248, 23_002_848),
        (ROBERTA_LARGE, "houlsby", 8, 835_968),
        (ROBERTA_LARGE, "houlsby", 64, 6_343_680),
        (ROBERTA_LARGE, "pfeiffer", 64, 6_343_680 // 2),
    ],
)
def test_counts_are_the_papers(config, variant, size, count):
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    adapter = attached(Bottleneck(variant=variant, bottleneck_size=size), model)
    assert sum(p.numel() for _, delta in adapter.adapted() for p in delta.parameters()) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architectures_own_projections_are_found_and_all_are_trained(load_any, fed, family):
    blocks, attention, mlp = FAMILIES[family]
    for variant, first in (("houlsby", [attention, mlp]), ("pfeiffer", [mlp]), ("adapterl", [mlp])):
        model = load_any(family)
        adapter = attached(Bottleneck(variant=variant, bottleneck_size=4), model)
        names = [name for name, _ in adapter.adapted()]
        assert set(first) < set(names)
        assert len(names) == len(first) * blocks
        with AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
            model(**fed(family)).logits.logsumexp(-1).sum().backward()
        assert all(delta.up.weight.grad.abs().sum() > 0 for _, delta in adapter.adapted())
        adapter.detach()


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["gpt2", "roberta", "t5"])
@pytest.mark.parametrize("variant", ["houlsby", "adapterl"])
def test_it_computes_the_papers_formula(load_any, fed, family, scheme, variant):
    """Beside modules of plain torch put behind the same layers by hooks of torch's own."""
    model = load_any(family, scheme)
    adapter = attached(Bottleneck(variant=variant, bottleneck_size=4, non_linearity="gelu"), model)
    torch.manual_seed(5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        ours = model.eval()(**fed(family)).logits
    adapter.detach()
    for name, delta in adapter.adapted():
        norm = [torch.nn.LayerNorm(delta.up.out_features)] if variant == "adapterl" else []
        down, up = torch.nn.Linear(delta.up.out_features, 4), torch.nn.Linear(4, delta.up.out_features)
        body = torch.nn.Sequential(*norm, down, torch.nn.GELU(), up)
        for part, given in ((down, delta.down), (up, delta.up), *[(one, delta.norm) for one in norm]):
            part.load_state_dict(given.state_dict())
        model.get_submodule(name).register_forward_hook(lambda _, args, y, body=body: y + body(y))
    for name, module in adapter.saved_modules():
        model.get_submodule(name).load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours, model(**fed(family)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.2), (0.5, 1.0)])
def test_the_adapters_of_a_stack_are_those_of_each_alone(monkeypatch, card, rates):
    if card:  # which draws the masks of a stack together
        monkeypatch.setattr(dropout, "COUNTED", {"cpu"})
    deltas = [BottleneckDelta(8, 3, "tanh", dropout=rate) for rate in rates]
    torch.manual_seed(1)
    y = torch.randn(6, 5, 8)
    for delta in deltas:
        for parameter in delta.parameters():
            torch.nn.init.normal_(parameter)
    together = BottleneckDelta.forward_grouped(y, y, [(0, 10, deltas[0], 3), (10, 30, deltas[1], 4)])
    assert torch.equal(together[:2], deltas[0](y[:2], y[:2], 3))
    assert torch.equal(together[2:], deltas[1](y[2:], y[2:], 4))
    assert torch.equal(together[2:], deltas[1](y[2:], y[2:], 5)) == (rates[1] == 1.0)
    dropped = together[2:] == y[2:]
    assert abs(float(dropped.float().mean()) - rates[1]) < 0.12


def test_a_card_draws_the_masks_of_a_stack_once(monkeypatch):
    """Of any number of trials, whatever their rates."""
    monkeypatch.setattr(dropout, "COUNTED", {"cpu"})
    monkeypatch.setattr(dropout, "kept", kept := Mock(wraps=dropout.kept))
    deltas = [BottleneckDelta(8, 3, dropout=0.1 * i) for i in range(5)]
    y = torch.randn(5, 4, 8)
    for key, times in ((1, 1), (None, 0)):
        kept.reset_mock()
        BottleneckDelta.forward_grouped(y, y, [(4 * i, 4 * i + 4, delta, key) for i, delta in enumerate(deltas)])
        assert kept.call_count == times


def test_unknown_names_are_refused_until_targets_are_given():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(ConfigError, match="adapter=bottleneck does not know .* of MixtralModel .*target_modules"):
        attached(Bottleneck(), model)
    named = attached(Bottleneck(target_modules=["o_proj"]), model)
    assert [name for name, _ in named.adapted()] == [f"layers.{i}.self_attn.o_proj" for i in range(2)]
