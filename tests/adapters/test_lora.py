"""LoRA begins as the base, trains only its own parameters, and adapts the layers that were asked for."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import RobertaConfig, RobertaForCausalLM

from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA, LoRADelta
from loralab.errors import ConfigError

EVERY = ["llama", "gpt2", "t5", "distilbert", "roberta", "phi"]


def logits(model, adapter, given):
    model.eval()
    slices = (BatchSlice(adapter, 2),) if adapter is not None else ()
    with torch.no_grad(), AdapterHooks.of(model).batch(*slices):
        return model(**given).logits


@pytest.mark.parametrize("scheme", ["none", "nf4"])
@pytest.mark.parametrize("family", EVERY)
def test_lora_starts_as_the_base_model_bit_for_bit(load_base, inputs, family, scheme):
    base = load_base(family, scheme)
    given = inputs(base.spec.task)
    before = logits(base.model, None, given)
    adapter = LoRA(r=4, modules_to_save=[]).attach(base.model, seed=1)
    assert torch.equal(logits(base.model, adapter, given), before)
    with torch.no_grad():
        for _, delta in adapter.adapted():
            delta.lora_B.normal_()
    assert not torch.allclose(logits(base.model, adapter, given), before)
    adapter.detach()
    assert torch.equal(logits(base.model, adapter, given), before)


@pytest.mark.parametrize("family", EVERY)
def test_only_the_adapters_parameters_receive_gradients(load_base, inputs, family):
    base = load_base(family, "nf4")
    adapter = LoRA(r=4).attach(base.model)
    with AdapterHooks.of(base.model).batch(BatchSlice(adapter, 2, key=1)):
        base.model(**inputs(base.spec.task)).logits.square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert all(delta.lora_B.grad.abs().sum() > 0 for _, delta in adapter.adapted())


def test_the_update_is_alpha_over_r_times_b_a_x(load_base):
    x, y = torch.randn(3, 8), torch.randn(3, 5)
    delta = LoRADelta(8, 5, r=4, scaling=LoRA(r=4, lora_alpha=12).scaling("any"))
    torch.nn.init.normal_(delta.lora_A)
    torch.nn.init.normal_(delta.lora_B)
    torch.testing.assert_close(delta(x, y, None), y + 3.0 * x @ (delta.lora_B @ delta.lora_A).T)
    torch.testing.assert_close(delta.delta_weight(), 3.0 * delta.lora_B @ delta.lora_A)


def test_rslora_divides_by_the_root_of_r():
    assert LoRA(r=16, lora_alpha=8, use_rslora=True).scaling("any") == 2.0
    assert LoRA(r=16, lora_alpha=8).scaling("any") == 0.5


def test_patterns_give_a_layer_its_own_r_and_alpha():
    spec = LoRA(r=8, lora_alpha=16, rank_pattern={"q_proj": 2, r".*\.1\.k_proj": 4}, alpha_pattern={"q_proj": 6})
    assert [spec.rank(n) for n in ("layers.0.q_proj", "layers.1.k_proj", "layers.0.k_proj")] == [2, 4, 8]
    assert (spec.scaling("layers.0.q_proj"), spec.scaling("layers.1.k_proj")) == (3.0, 4.0)


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1 / math.sqrt(3 * 256)), ("gaussian", 1 / 8)])
def test_a_is_drawn_with_the_deviation_its_name_says(init, deviation):
    delta = LoRADelta(256, 64, r=8, scaling=1.0)
    delta.draw(init, torch.Generator().manual_seed(0))
    assert float(delta.lora_A.std()) == pytest.approx(deviation, rel=0.05)
    assert not delta.lora_B.any()


def test_a_layers_start_does_not_depend_on_what_else_is_adapted(load_base):
    base = load_base()
    few = dict(LoRA(r=4, target_modules=["v_proj"]).attach(base.model, seed=3).adapted())
    many = dict(LoRA(r=4).attach(base.model, seed=3).adapted())
    other = dict(LoRA(r=4).attach(base.model, seed=4).adapted())
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(few[name].lora_A, many[name].lora_A)
    assert not torch.equal(many[name].lora_A, other[name].lora_A)
    assert not torch.equal(many[name].lora_A, many["model.layers.0.self_attn.v_proj"].lora_A)


def test_dropout_follows_the_key_alone_and_rests_in_evaluation():
    delta = LoRADelta(64, 8, r=4, scaling=1.0, dropout=0.5)
    torch.nn.init.normal_(delta.lora_A)
    torch.nn.init.normal_(delta.lora_B)
    x, y = torch.randn(6, 64), torch.zeros(6, 8)
    assert torch.equal(delta(x, y, 7), delta(x, y, 7))
    assert not torch.equal(delta(x, y, 7), delta(x, y, 8))
    torch.testing.assert_close(delta(x, y, None), x @ delta.delta_weight().T)


def test_bias_all_trains_every_bias_and_lora_only_those_of_adapted_layers(load_base):
    base = load_base("gpt2")
    counts = {}
    for bias in ("none", "lora_only", "all"):
        adapter = LoRA(r=4, target_modules=["c_attn"], bias=bias).attach(base.model)
        counts[bias] = sum(1 for _, delta in adapter.adapted() if not isinstance(delta, LoRADelta))
        adapter.detach()
    assert counts == {"none": 0, "lora_only": 2, "all": 2 * 6 + 1}  # 4 layers and 2 norms a block, one norm at the end


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("q_porj", "'q_porj' matches no adapted layer; did you mean q_proj"),
        ("k_proj", "valid: q_proj"),
        ("(", "regular"),
    ],
)
def test_a_pattern_that_no_adapted_layer_answers_to_is_refused(load_base, key, name, says):
    with pytest.raises(ConfigError, match=f"adapter.{key}: .*{says}"):
        LoRA(r=4, target_modules=["q_proj"], **{key: {name: 2}}).attach(load_base().model)


@pytest.mark.parametrize(("family", "warned"), [("llama", True), ("gpt2", False)])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_base_that_has_none_are_warned_of(load_base, caplog, family, warned, bias):
    LoRA(r=4, bias=bias).attach(load_base(family).model)
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said == [f"adapter.bias={bias} has no effect"] * warned


@pytest.mark.parametrize(("r", "warned"), [(64, []), (65, ["adapter.r=65 exceeds the smaller dimension of 14 of 14"])])
def test_a_rank_above_what_a_layer_can_have_is_warned_of_once(load_base, caplog, r, warned):
    LoRA(r=r).attach(load_base().model)
    assert [record.getMessage().partition(" layers")[0] for record in caplog.records] == warned


def test_one_module_to_save_needs_no_list(load_base):
    model = load_base().model
    alone, listed = (LoRA(r=2, modules_to_save=given).attach(model) for given in ("lm_head", ["lm_head"]))
    assert list(dict(alone.saved_modules())) == list(dict(listed.saved_modules())) == ["lm_head"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modules_to_save": 3}, "adapter.modules_to_save must be a list of module names or null, got 3"),
        ({"r": 0}, "adapter.r must be at least 1, got 0"),
        ({"lora_alpha": -1.0}, "adapter.lora_alpha must be a positive number, got -1"),
        ({"lora_alpha": math.nan}, "adapter.lora_alpha must be a positive number, got nan"),
        ({"lora_dropout": 1.5}, r"adapter.lora_dropout must be a number in \[0, 1\), got 1.5"),
        ({"lora_dropout": math.nan}, "adapter.lora_dropout"),
        ({"init_lora_weights": "gausian"}, "did you mean gaussian"),
        ({"bias": "lora"}, "adapter.bias='lora'"),
        ({"target_modules": []}, "adapter.target_modules must be"),
        ({"target_modules": 3}, "adapter.target_modules must be"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter.rank_pattern.q_proj must be at least 1"),
        ({"alpha_pattern": {"q_proj": -2.0}}, "adapter.alpha_pattern.q_proj must be a positive"),
    ],
)
def test_values_out_of_range_are_refused_with_their_key(changes, says):
    with pytest.raises(ConfigError, match=says):
        LoRA(**changes)


def test_a_bias_that_a_head_keeps_under_two_names_is_trained_once():
    """RoBERTa's decoder: PEFT trains as many biases, and counts as many parameters."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=50, max_position_embeddings=40, is_decoder=True, **sizes)
    targets = ["query", "value"]
    ours = LoRA(r=2, bias="all", target_modules=targets).attach(RobertaForCausalLM(config))
    theirs = get_peft_model(RobertaForCausalLM(config), LoraConfig(r=2, bias="all", target_modules=targets))
    assert ours.trainable_parameters() == theirs.get_nb_trainable_parameters()[0]
    assert "lm_head.decoder" in dict(ours.adapted())
