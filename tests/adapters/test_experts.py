"""LoRA on experts that are one parameter: PEFT's ``target_parameters``, its numbers and its files."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.planning.count import count
from loralab.quantization.four_bit import FourBit
from loralab.running.runner import Runner
from loralab.scheduling.members import alone

MOE = {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": MOE,
    "gpt_oss": {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 32},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "experts alone": {"target_modules": None, "target_parameters": BOTH},
    "and layers": {"target_modules": ["q_proj"], "target_parameters": BOTH, "rank_pattern": {".*down_proj": 2}},
    "one of them": {"target_modules": ["v_proj"], "target_parameters": ["gate_up_proj"], "use_rslora": True},
}


def config_of(kind):
    return {"model_type": kind, **KINDS[kind]}


def moved(adapter):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def logits(model, adapter, given):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(*([BatchSlice(adapter, 2)] if adapter else [])):
        return model(**given).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base_and_its_files_give_the_same_logits_in_peft(load_base, inputs, tmp_path, kind, case):
    base, given = load_base(config=config_of(kind)), inputs()
    bare = logits(base.model, None, given)
    adapter = attached(LoRA(r=4, lora_alpha=12, **CASES[case]), base.model, 5)
    assert torch.equal(logits(base.model, adapter, given), bare)
    ours = logits(base.model, moved(adapter), given)
    assert not torch.allclose(ours, bare, atol=1e-2)
    assert torch.equal(logits(base.model, None, given), bare)  # what a pass of nobody's computes with is the base's
    save(adapter, tmp_path / "adapter", 5)
    adapter.detach()
    again = load(tmp_path / "adapter", base.model)
    assert torch.equal(logits(base.model, again, given), ours)
    again.detach()
    theirs = PeftModel.from_pretrained(load_base(config=config_of(kind)).model, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_expert_computes_the_same(load_base, inputs, kind):
    base, given = load_base(config=config_of(kind)), inputs()
    adapter = moved(attached(LoRA(r=3, target_modules=None, target_parameters=BOTH), base.model))
    ours = logits(base.model, adapter, given)
    with torch.no_grad():
        for name, delta in adapter.adapted():
            base.model.get_submodule(name).get_parameter(delta.parameter).add_(delta.delta_weight())
    adapter.detach()
    torch.testing.assert_close(logits(base.model, None, given), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_it_trains_as_pefts(load_base, curves, kind):
    base, other = (load_base(config=config_of(kind)) for _ in range(2))
    adapter = attached(LoRA(r=4, lora_alpha=16, target_modules=None, target_parameters=BOTH), base.model, 5)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=[], target_parameters=BOTH)
    theirs = get_peft_model(other.model, config)
    stored = {key.replace(".weight", ".default.weight"): p for key, p in adapter.peft_state().items()}
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in trained.items()} == {name: p.shape for name, p in stored.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
    ours, pefts = curves(base.model, adapter, theirs, inputs, labels, 1e-2)
    assert ours == pytest.approx(pefts, rel=1e-4)
    assert ours[-1] < ours[0] - 0.2


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1 / (3 * 64) ** 0.5), ("gaussian", 1 / 4)])
def test_a_is_drawn_as_that_of_a_layer_by_the_seed(load_base, init, deviation):
    model = load_base(config=config_of("mixtral")).model
    spec = LoRA(r=4, target_modules=None, target_parameters=["gate_up_proj"], init_lora_weights=init)
    one, same, other = (next(spec.attach(model, seed).adapted())[1].lora_A for seed in (1, 1, 2))
    assert float(one.std()) == pytest.approx(deviation, rel=0.05)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_count_and_what_stays_dense(make_model, caplog):
    model = make_model(config=config_of("mixtral"))
    found = count(model, FourBit(block_size=32), LoRA(r=4, target_modules=None, target_parameters=BOTH))
    assert found["adapter_parameters"] == 2 * 4 * 4 * ((64 + 256) + (128 + 64))  # blocks, experts, r
    assert found["quantized_parameters"] == 2 * 4 * 64 * 64  # attention alone: experts stay dense
    assert "LoRA's adapter.target_parameters those of experts" in caplog.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"target_parameters": ["gate_up"]}, "'gate_up' is no parameter of MixtralForCausalLM; did you mean"),
        ({"target_parameters": ["gate.weight"]}, "gate.weight has 2 dimensions; valid: parameters of three"),
        ({"target_modules": ["experts"]}, "'experts' is of type MixtralExperts"),
    ],
)
def test_what_is_no_expert_is_refused(load_base, keys, words):
    with pytest.raises(ConfigError, match=words):
        attached(LoRA(r=2, **keys), load_base(config=config_of("mixtral")).model)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_dropout": 0.1}, "adapter.lora_dropout=0.1 does not go with adapter.target_parameters"),
        ({"use_dora": True}, "adapter.use_dora=True does not go with"),
        ({"init_lora_weights": "orthogonal"}, "valid: kaiming or gaussian"),
        ({"target_modules": None, "target_parameters": None}, "adapter.target_modules=null goes with"),
    ],
)
def test_what_peft_cannot_do_with_it_is_refused_before_a_base_is_there(keys, words):
    with pytest.raises(ConfigError, match=words):
        LoRA(**{"target_parameters": BOTH, **keys})


def test_a_run_trains_experts_alone_over_nf4_and_recomputes_them(make_spec, make_model, curve, weights):
    adapter = LoRA(r=2, target_modules=["q_proj"], target_parameters=BOTH)
    specs = [
        make_spec(
            name,
            adapter=adapter,
            model=make_model(config=config_of("mixtral"), gradient_checkpointing=lean),
            quantization=FourBit(block_size=32),
        )
        for name, lean in (("plain", False), ("lean", True))
    ]
    assert "adapter.target_parameters changes weights" in alone(specs[0])
    (refused, *_) = Runner().run(specs)
    assert (refused["status"], refused["exit_code"]) == ("failed", 2)
    assert [Runner().run([spec])[0]["error"] for spec in specs] == [None, None]
    assert curve(specs[0].folder) == curve(specs[1].folder)
    assert any(value.any() for key, value in weights(specs[0].folder).items() if "experts.lora_B" in key)
