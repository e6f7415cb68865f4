"""Which layers are adapted, and which heads are trained whole."""

import gc

import pytest
import torch

from loralab.adapters.base import match_targets
from loralab.adapters.full import Full
from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError

HEADS = {
    "llama": {"lm_head"},
    "gpt2": {"lm_head"},
    "t5": {"lm_head"},
    "phi": {"lm_head"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
}
COUNTS = {"llama": 14, "gpt2": 8, "t5": 2 * 6 + 2 * 10, "phi": 12, "distilbert": 12, "roberta": 12}


@pytest.mark.parametrize("scheme", ["none", "nf4"])
@pytest.mark.parametrize("family", list(HEADS))
def test_all_linear_is_every_linear_of_the_base_and_no_head(load_base, family, scheme):
    model = load_base(family, scheme).model
    found = match_targets(model, "all-linear")
    assert len(found) == COUNTS[family]
    assert not HEADS[family] & set(found)


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_a_new_classification_head_is_trained_and_counted(load_base, family):
    base = load_base(family)
    adapter = LoRA(r=4).attach(base.model, seed=2)
    saved = dict(adapter.saved_modules())
    assert set(saved) == {name.partition(".")[0] for name in HEADS[family]}
    whole = sum(p.numel() for module in saved.values() for p in module.parameters())
    ours = sum(p.numel() for _, delta in adapter.adapted() for p in delta.parameters())
    assert adapter.trainable_parameters() == whole + ours
    assert all(p.requires_grad for module in saved.values() for p in module.parameters())


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_the_heads_of_many_trials_copy_neither_each_other_nor_the_base(load_base, family):
    model = load_base(family).model

    def held():
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if isinstance(one, torch.nn.Parameter))

    before, adapters = held(), []
    for seed in range(4):
        adapters.append(LoRA(r=4).attach(model, seed))
        assert held() - before == sum(one.trainable_parameters() for one in adapters)


def test_a_heads_start_follows_the_seed(load_base):
    base = load_base("distilbert")
    heads = [dict(LoRA(r=4).attach(base.model, seed=s).saved_modules())["classifier"].weight for s in (1, 1, 2)]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.1\..*_proj", ["self_attn.o_proj"], ["lm_head"]])
def test_lists_and_regular_expressions_match_as_peft_matches(load_base, targets):
    from peft import LoraConfig, get_peft_model

    model = load_base("llama").model
    ours = match_targets(model, targets)
    theirs = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).targeted_module_names
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_porj"], r"'q_porj' matches no linear layer.*did you mean q_proj.*q_proj \(x2\)"),
        (["q_proj", "nope"], "'nope' matches no linear layer"),
        ("layers.9.*", "'layers.9.*' matches no linear layer"),
        ("(q_proj", "not a valid regular expression"),
        (["embed_tokens"], "'embed_tokens' is of type Embedding"),
    ],
)
def test_targets_that_match_nothing_are_named_with_what_there_is(load_base, targets, says):
    with pytest.raises(ConfigError, match=says):
        match_targets(load_base("llama").model, targets)


def test_a_module_to_save_that_is_not_there_is_named(load_base):
    with pytest.raises(ConfigError, match="adapter.modules_to_save: no module is called 'lm_haed'; did you mean"):
        LoRA(r=2, modules_to_save=["lm_haed"]).attach(load_base().model)


def test_full_refuses_a_quantized_base(load_base):
    with pytest.raises(ConfigError, match="adapter=full cannot train the quantized layer model.layers.0"):
        Full().attach(load_base("llama", "nf4").model)
