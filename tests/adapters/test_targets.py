"""``exclude_modules`` and ``layers_to_transform`` choose the layers that PEFT does."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.adapters.attached import attached
from loralab.adapters.export import save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.adapters.targets import block_number
from loralab.errors import ConfigError

CASES = {
    "list": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "exclude_modules": ["v_proj"]}),
    "path": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "regex": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*\.mlp\.c_proj"}),
    "one block": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}),
    "blocks": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0]}),
    "both stacks": ("t5", {"target_modules": ["q", "v"], "layers_to_transform": [1]}),
    "both": ("bert", {"target_modules": ["query", "value"], "exclude_modules": ["value"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layers_are_pefts_and_its_files_give_the_same_logits(load_any, fed, tmp_path, case):
    family, keys = CASES[case]
    model = load_any(family)
    adapter = attached(LoRA(r=2, **keys), model)
    theirs = get_peft_model(load_any(family), LoraConfig(r=2, **keys))
    assert [name for name, _ in adapter.adapted()] == theirs.targeted_module_names
    with torch.no_grad():
        for _, delta in adapter.adapted():
            delta.lora_B.add_(0.1)
        with AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
            ours = model.eval()(**fed(family)).logits
        save(adapter, tmp_path / "adapter")
        again = PeftModel.from_pretrained(load_any(family), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**fed(family)).logits, ours, rtol=1e-5, atol=1e-5)


def test_all_linear_takes_both(load_any):
    adapter = attached(LoRA(r=2, exclude_modules=["gate_proj"], layers_to_transform=[1]), load_any("llama"))
    leaves = [name for name, _ in adapter.adapted()]
    assert all(name.startswith("model.layers.1.") for name in leaves)
    assert {name.rpartition(".")[2] for name in leaves} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    }


def test_a_block_is_the_first_number():
    assert block_number("model.layers.3.mlp.experts.7.up_proj") == 3
    assert block_number("lm_head") is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"exclude_modules": ["q_prj"]}, "adapter.exclude_modules: 'q_prj' is no adapted layer; did you mean q_proj"),
        ({"exclude_modules": ".*"}, "leaves none of the 14 layers"),
        ({"exclude_modules": "("}, "adapter.exclude_modules='.' is not a valid regular expression"),
        (
            {"layers_to_transform": [0, 2]},
            "adapter.layers_to_transform: no adapted layer is in a block 2; valid: 0 to 1",
        ),
    ],
)
def test_what_chooses_nothing_is_refused(load_any, keys, words):
    with pytest.raises(ConfigError, match=words):
        attached(LoRA(r=2, **keys), load_any("llama"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "adapter.layers_to_transform=1 goes with a list"),
        ({"layers_to_transform": [-1]}, "adapter.layers_to_transform"),
        ({"exclude_modules": []}, "adapter.exclude_modules"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "cannot begin with r=3; valid: even ranks"),
    ],
)
def test_what_cannot_be_is_refused_before_a_base_is_there(keys, words):
    with pytest.raises(ConfigError, match=words):
        LoRA(**keys)


def test_orthogonal_begins_at_the_base_with_neither_factor_zero(load_any):
    adapter = attached(LoRA(r=8, init_lora_weights="orthogonal"), load_any("llama"), seed=3)
    again = attached(LoRA(r=8, init_lora_weights="orthogonal"), load_any("llama"), seed=3)
    for (_, one), (_, other) in zip(adapter.adapted(), again.adapted(), strict=True):
        assert one.lora_A.std() > 0.03
        assert one.lora_B.std() > 0.03
        assert one.delta_weight().abs().max() < 1e-6
        assert torch.equal(one.lora_B, other.lora_B)
