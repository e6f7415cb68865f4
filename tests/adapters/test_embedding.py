"""LoRA on the table of the tokens: PEFT's numbers, its start, its files, its packs and its plan."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.intrinsic import Intrinsic
from loralab.adapters.lora import LoRA
from loralab.adapters.vera import VeRA
from loralab.errors import ConfigError
from loralab.planning.count import count
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

NAMES = {
    "llama": ["embed_tokens", "q_proj"],
    "gpt2": ["wte", "c_attn"],
    "roberta": ["word_embeddings", "query"],
    "t5": ["embed_tokens", "v"],
    "gemma": ["embed_tokens", "o_proj"],
}
GEMMA = {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}


def base_of(load_base, family, **changes):
    if family == "gemma":
        return load_base("llama", config={**GEMMA, "tie_word_embeddings": True}, **changes)
    return load_base(family, **changes)


def lora(family, **fields):
    patterns = {"rank_pattern": {NAMES[family][0]: 3}, "alpha_pattern": {NAMES[family][0]: 5}}
    return LoRA(**{"r": 4, "target_modules": NAMES[family], **patterns, **fields})


def logits(model, adapter, given):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(*([BatchSlice(adapter, 2)] if adapter else [])):
        return model(**given).logits


def tables(adapter):
    return [delta for _, delta in adapter.adapted() if hasattr(delta, "lora_embedding_A")]


def moved(adapter):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("family", NAMES)
def test_it_starts_at_the_base_and_its_files_give_the_same_logits_in_peft(load_base, inputs, tmp_path, family):
    base = base_of(load_base, family)
    given = inputs(base.spec.task)
    bare = logits(base.model, None, given)
    adapter = attached(lora(family, modules_to_save=[]), base.model, 5)
    assert len(tables(adapter)) == (2 if family == "t5" else 1)
    assert torch.equal(logits(base.model, adapter, given), bare)
    ours = logits(base.model, moved(adapter), given)
    assert not torch.allclose(ours, bare, atol=1e-2)
    save(adapter, tmp_path / "adapter", 5)
    adapter.detach()
    again = load(tmp_path / "adapter", base.model)
    assert torch.equal(logits(base.model, again, given), ours)
    again.detach()
    theirs = PeftModel.from_pretrained(base_of(load_base, family).model, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, ours, rtol=1e-5, atol=1e-5)


def test_a_row_gains_its_own_column_of_b_a(load_base):
    base = load_base("llama")
    adapter = moved(attached(LoRA(r=4, lora_alpha=12, target_modules=["embed_tokens"]), base.model))
    (delta,) = tables(adapter)
    table, ids = base.model.model.embed_tokens, torch.tensor([[5, 7, 5]])
    with torch.no_grad(), AdapterHooks.of(base.model).batch(BatchSlice(adapter, 1)):
        found = table(ids)
    expected = table.weight + 3 * (delta.lora_embedding_B @ delta.lora_embedding_A).T
    torch.testing.assert_close(found, expected[ids])
    torch.testing.assert_close(table.weight + delta.delta_weight(), expected)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_it_trains_as_pefts_and_the_padding_token_and_a_tied_head_stay_the_bases(load_base, curves, family, caplog):
    base, other = base_of(load_base, family), base_of(load_base, family).model
    for model in (base.model, other):
        model.get_input_embeddings().padding_idx = 3
    adapter = attached(LoRA(r=4, target_modules=NAMES[family], lora_dropout=0.0), base.model)
    assert ("lm_head" in caplog.text) == (family == "gemma")
    theirs = get_peft_model(other, LoraConfig(r=4, lora_alpha=16, target_modules=NAMES[family]))
    named = dict(theirs.named_modules())
    with torch.no_grad():
        for name, delta in adapter.adapted():
            layer = named[f"base_model.model.{name}"]
            if hasattr(delta, "lora_A"):
                layer.lora_A["default"].weight.copy_(delta.lora_A)
            else:
                assert not layer.lora_embedding_A["default"].any()  # PEFT's zero is ours
                layer.lora_embedding_B["default"].copy_(delta.lora_embedding_B)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 250, (2, 9), generator=generator)
    ids[:, 2] = 3
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
    ours, pefts = curves(base.model, adapter, theirs, inputs, labels, 3e-2)
    assert ours == pytest.approx(pefts, rel=1e-4)
    assert ours[-1] < ours[0] - 0.2
    assert not tables(adapter)[0].lora_embedding_A[:, 3].any()
    assert tables(adapter)[0].lora_embedding_A[:, ids[0, 0]].any()


def test_b_is_drawn_standard_normal_by_the_seed_and_no_dropout_acts(load_base):
    model = load_base("llama").model
    spec = LoRA(r=64, target_modules=["embed_tokens"], lora_dropout=0.5, init_lora_weights="gaussian")
    one, same, other = (tables(spec.attach(model, seed))[0] for seed in (1, 1, 2))
    assert float(one.lora_embedding_B.std()) == pytest.approx(1, rel=0.05)
    assert torch.equal(one.lora_embedding_B, same.lora_embedding_B)
    assert not torch.equal(one.lora_embedding_B, other.lora_embedding_B)
    torch.nn.init.normal_(one.lora_embedding_A)
    ids, y = torch.arange(12).view(2, 6), torch.zeros(2, 6, 64)
    assert torch.equal(one(ids, y, 7), one(ids, y, None))


def test_all_linear_leaves_it_out_and_a_regular_expression_may_name_it(load_base):
    model = load_base("llama").model
    for targets, expected in (("all-linear", 0), (r".*embed_tokens|.*\.0\..*q_proj", 1)):
        adapter = LoRA(r=2, target_modules=targets).attach(model)
        assert len(tables(adapter)) == expected
        adapter.detach()


@pytest.mark.parametrize(
    ("family", "spec", "words"),
    [
        ("llama", LoRA(target_modules=["embed_tokens"], use_dora=True), "'embed_tokens' is of type Embedding; valid"),
        ("llama", LoRA(target_modules=["embed_tokens"], init_lora_weights="pissa"), "with a drawn start"),
        (
            "llama",
            VeRA(target_modules=["q_proj", "embed_tokens"]),
            "by adapter=lora, with a drawn start and without use_dora",
        ),
        ("llama", Intrinsic(target_modules=["embed_tokens"]), "'embed_tokens' is of type Embedding; valid: Linear"),
        ("gpt2", LoRA(target_modules=["wpe"]), "'wpe' is of type Embedding; .* the Embedding of the tokens"),
        ("t5", LoRA(target_modules=["relative_attention_bias"]), "'relative_attention_bias' is of type Embedding"),
    ],
)
def test_other_methods_and_other_tables_are_refused(load_base, family, spec, words):
    with pytest.raises(ConfigError, match=f"adapter.target_modules: .*{words}"):
        attached(spec, load_base(family).model)


def test_the_count_is_r_times_tokens_and_width(make_model):
    found = count(make_model("llama"), NoQuantization(), LoRA(r=4, target_modules=["embed_tokens"]))
    assert found["trainable_parameters"] == found["adapter_parameters"] == 4 * (258 + 64)


@pytest.mark.parametrize("family", ["llama", "t5", "roberta"])
def test_packed_is_solo_bit_for_bit(make_spec, make_data, weights, curve, family):
    own = family == "llama"  # elsewhere the rows are of differing lengths, and all three see the same ones

    def three(prefix):
        data = make_data("labels" if family == "roberta" else "pairs")
        adapters = [lora(family), LoRA(r=2, lora_dropout=0.1), lora(family, r=2)]
        return [make_spec(f"{prefix}{i}", family, adapter=a, seed=i * own, data=data) for i, a in enumerate(adapters)]

    packed, solo = three("packed"), three("solo")
    records = Runner().run(packed)
    assert [(one["status"], one["pack"]["size"]) for one in records] == [("completed", 3)] * 3, records[0]["error"]
    for one, other in zip(packed, solo, strict=True):
        assert Runner().run([other])[0]["status"] == "completed"
        assert curve(one.folder) == curve(other.folder)
        ours, theirs = weights(one.folder), weights(other.folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any("lora_embedding_B" in key and value.any() for key, value in weights(packed[0].folder).items())


def test_recomputed_blocks_change_no_loss(make_spec, make_model, curve):
    specs = [
        make_spec(name, adapter=lora("llama"), model=make_model(gradient_checkpointing=lean), quantization=FourBit())
        for name, lean in (("plain", False), ("lean", True))
    ]
    assert [Runner().run([spec])[0]["error"] for spec in specs] == [None, None]
    assert curve(specs[0].folder) == curve(specs[1].folder)
