"""What a run exports, PEFT loads, and computes the same logits from."""

import json

import pytest
import torch
from peft import PeftModel

from loralab.adapters import peft
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA

SPECS = {
    "plain": LoRA(r=4, lora_alpha=12),
    "patterns": LoRA(r=4, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={"q_proj|c_attn|query": 5.0}),
    "rslora": LoRA(r=4, use_rslora=True, rank_pattern={r".*\.0\..*": 9}),
    "bias all": LoRA(r=4, bias="all"),
    "bias of adapted": LoRA(r=4, bias="lora_only"),
}
CASES = [(family, "plain") for family in ("llama", "gpt2", "t5", "distilbert", "roberta", "phi")]
CASES += [(f, s) for s in ("patterns", "rslora", "bias all", "bias of adapted") for f in ("llama", "gpt2", "roberta")]


def trained(model, spec):
    """An adapter whose every parameter has moved."""
    adapter = spec.attach(model, seed=5)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def logits(model, adapter, given):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        return model(**given).logits


def in_peft(base, folder, given):
    with torch.no_grad():
        return PeftModel.from_pretrained(base.model, folder).eval()(**given).logits


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(("family", "case"), CASES)
def test_an_exported_adapter_gives_the_same_logits_in_peft(load_base, inputs, tmp_path, family, case):
    base = load_base(family)
    given = inputs(base.spec.task)
    bare = base.model.eval()(**given).logits
    adapter = trained(base.model, SPECS[case])
    ours = logits(base.model, adapter, given)
    size = save(adapter, tmp_path)
    assert size == (tmp_path / "adapter_model.safetensors").stat().st_size
    theirs = in_peft(load_base(family), tmp_path, given)
    assert not torch.allclose(theirs, bare, atol=1e-3)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_quantized_base_names_its_layers_and_loads_over_the_dense_one(load_base, inputs, tmp_path):
    adapter = trained(load_base("gpt2", "nf4").model, LoRA(r=4))
    save(adapter, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["fan_in_fan_out"] is True
    assert stored["target_modules"] == [name for name, _ in adapter.adapted()]
    dense = load_base("gpt2")
    ours = LoRA(r=4).attach(dense.model)
    ours.load_state_dict(adapter.state_dict())
    given = inputs()
    expected = logits(dense.model, ours, given)
    torch.testing.assert_close(in_peft(load_base("gpt2"), tmp_path, given), expected, rtol=1e-5, atol=1e-5)


def test_a_list_of_one_name_does_not_become_a_pattern(load_base, tmp_path):
    base = load_base("llama")
    adapter = trained(base.model, LoRA(r=4, target_modules="model.layers.0.self_attn.q_proj"))
    save(adapter, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert (stored["r"], stored["lora_alpha"], stored["task_type"]) == (4, 16.0, "CAUSAL_LM")


MOE = {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
MIXTURES = {  # whose shared experts, or first layers, are called as the experts were
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**MOE, "mlp_only_layers": [0]},
    "glm4_moe": {
        **{"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32},
        **{"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 32},
    },
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_layers_that_peft_takes_for_fused_experts_are_named_and_loaded_by_loralab(load_base, tmp_path, caplog, kind):
    """A later PEFT that adapts them makes this fail: the warning may go then."""
    from peft import LoraConfig, get_peft_model

    base = load_base("llama", config={"model_type": kind, **MIXTURES[kind]})
    adapter = trained(base.model, LoRA(r=4))
    names = list(dict(adapter.adapted()))
    save(adapter, tmp_path / "adapter", 5)
    given = {"input_ids": torch.arange(2, 14)[None].expand(2, -1)}
    ours = logits(base.model, adapter, given)
    adapter.detach()
    again = load(tmp_path / "adapter", base.model)
    torch.testing.assert_close(logits(base.model, again, given), ours, rtol=0, atol=0)
    again.detach()
    theirs = get_peft_model(base.model, LoraConfig(r=4, target_modules=names))
    unadapted = [name for name in names if not hasattr(theirs.get_submodule(f"base_model.model.{name}"), "lora_A")]
    assert peft.misread(base.model, names) == unadapted
    assert (f"PEFT does not load what is trained at {len(unadapted)} of the" in caplog.text) == bool(unadapted)
