"""Counts from shapes alone agree with the papers and with models that really exist."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from loralab.adapters.full import Full
from loralab.adapters.lora import LoRA
from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.models import pretrained
from loralab.planning.count import count
from loralab.quantization.four_bit import FourBit
from loralab.quantization.loading import convert_model
from loralab.quantization.none import NoQuantization


def named(name):
    return build(plain(compose([f"model={name}"]))["model"], "model")


HEAD = 592_130  # RoBERTa base's and DistilBERT's classification head for two labels


def head(width):
    """Parameters of a dense layer of ``width`` and two labels above it."""
    return width * width + width + 2 * width + 2


@pytest.mark.parametrize(
    ("name", "targets", "r", "trainable"),
    [
        ("roberta_base", ["query", "value"], 8, 294_912 + HEAD),
        ("roberta_large", ["query", "value"], 8, 786_432 + head(1024)),
        ("deberta_v2_xxlarge", ["query_proj", "value_proj"], 16, 4_718_592 + head(1536)),
        ("distilbert", ["q_lin", "v_lin"], 1, 18_432 + HEAD),
        ("distilbert", ["q_lin", "v_lin"], 16, 294_912 + HEAD),
        ("gpt2_medium", ["c_attn"], 4, 393_216),
        ("gpt2_large", ["c_attn"], 4, 737_280),
        ("flan_t5_small", ["q", "v"], 8, 344_064),
        ("flan_t5_base", ["q", "v"], 16, 1_769_472),
        ("flan_t5_large", ["q", "v"], 32, 9_437_184),
        ("phi2", ["q_proj", "k_proj", "v_proj", "dense"], 32, 20_971_520),
        ("phi2", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], 32, 47_185_920),
        ("llama_7b", "all-linear", 64, 159_907_840),
        pytest.param("llama2_13b", "all-linear", 64, 250_347_520, marks=pytest.mark.slow),
        pytest.param("llama_33b", "all-linear", 64, 487_587_840, marks=pytest.mark.slow),
        pytest.param("llama_65b", "all-linear", 64, 799_539_200, marks=pytest.mark.slow),
        ("llama2_70b", "all-linear", 64, 828_375_040),
    ],
)
def test_lora_counts_of_the_papers_models(name, targets, r, trainable):
    # GPT-2's c_attn holds W_q, W_k and W_v in one matrix: (768 + 3 x 768) r a layer, as PEFT counts it
    found = count(named(name), NoQuantization(), LoRA(r=r, target_modules=targets))
    assert found["trainable_parameters"] == trainable


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("roberta_base", 124_055_040 + HEAD),
        ("roberta_large", 354_310_144 + head(1024)),
        ("distilbert", 66_955_010),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("flan_t5_base", 247_577_856),
        ("phi2", 2_779_683_840),
        ("llama2_7b", 6_738_415_616),
    ],
)
def test_totals_of_the_bare_models(name, total):
    assert count(named(name), NoQuantization(), Full())["total_parameters"] == total


@pytest.mark.parametrize(
    ("name", "layers", "width", "ffn", "key_width"),
    [
        ("llama2_7b", 32, 4096, 11008, 4096),
        ("llama2_13b", 40, 5120, 13824, 5120),
        ("llama2_70b", 80, 8192, 28672, 1024),
    ],
)
def test_quantized_parameters_are_the_linear_layers_and_not_the_head(name, layers, width, ffn, key_width):
    found = count(named(name), FourBit(), LoRA())
    assert found["quantized_parameters"] == layers * (2 * width * width + 2 * width * key_width + 3 * width * ffn)


SMALL = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("kind", SMALL)
def test_counts_equal_those_of_the_attached_model(kind):
    config = {"model_type": kind, "vocab_size": 320, **SMALL[kind]}
    spec = pretrained.Random(config=config)
    quantizer, adapter = FourBit(), LoRA(r=4)
    found = count(spec, quantizer, adapter)
    model = spec.weights(spec.prepared_config(None), NoQuantization(), "auto", "cpu")
    dense = sum(p.numel() for p in model.parameters())
    names = convert_model(model, quantizer)
    attached = adapter.attach(model)
    trained = sum(p.numel() for p in attached.parameters())
    packed = sum(model.get_submodule(name).out_features * model.get_submodule(name).in_features for name in names)
    assert found == {
        "trainable_parameters": trained,
        "adapter_parameters": trained,
        "total_parameters": dense + trained,
        "quantized_parameters": packed,
    }


CLASSES = {
    "CAUSAL_LM": ("causal_lm", AutoModelForCausalLM),
    "SEQ_2_SEQ_LM": ("seq2seq_lm", AutoModelForSeq2SeqLM),
    "SEQ_CLS": ("sequence_classification", AutoModelForSequenceClassification),
}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


def pefts(kind, task, adapter, **keys):
    """(trainable, total) parameters as PEFT counts them, on the meta device."""
    with torch.device("meta"):
        model = CLASSES[task][1].from_config(AutoConfig.for_model(kind, **keys))
        lora = LoraConfig(r=adapter.r, target_modules=adapter.target_modules, bias=adapter.bias, task_type=task)
        parameters = list(get_peft_model(model, lora).parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def ours(kind, task, adapter, **keys):
    spec = pretrained.Random(task=CLASSES[task][0], config={"model_type": kind, **keys})
    return count(spec, NoQuantization(), adapter)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize(
    ("kind", "task", "targets", "keys"),
    [
        ("gpt2", "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"], {}),
        ("phi", "CAUSAL_LM", ["q_proj", "dense"], ENCODER),
        ("t5", "SEQ_2_SEQ_LM", ["q", "v"], T5),
        ("bert", "SEQ_CLS", ["query", "value"], ENCODER),
        ("roberta", "SEQ_CLS", ["query", "value"], ENCODER),
    ],
)
def test_trained_and_total_are_pefts(kind, task, targets, keys, bias):
    adapter = LoRA(r=8, target_modules=targets, bias=bias)
    found = ours(kind, task, adapter, **keys)
    assert (found["trainable_parameters"], found["total_parameters"]) == pefts(kind, task, adapter, **keys)


def test_a_trained_bias_counts_once_in_the_total():
    adapter = LoRA(r=8, target_modules=["c_attn", "c_proj", "c_fc"], bias="all")
    found = count(named("gpt2"), NoQuantization(), adapter)
    assert (found["trainable_parameters"], found["total_parameters"]) == (1_281_792, 125_619_456)


def test_what_peft_leaves_as_it_was_drawn_is_named_and_can_be_left_out(caplog):
    keys, targets = {**ENCODER, "vocab_size": 300}, ["query_proj", "value_proj"]
    with caplog.at_level(logging.WARNING):
        found = ours("deberta-v2", "SEQ_CLS", LoRA(r=8, target_modules=targets), **keys)
    trainable, total = pefts("deberta-v2", "SEQ_CLS", LoRA(r=8, target_modules=targets), **keys)
    fewer = found["trainable_parameters"] - trainable
    assert fewer == 64 * 64 + 64  # the pooler
    assert "pooler: no checkpoint of the base holds it" in caplog.text
    assert f"{fewer:,} parameters fewer, as adapter.modules_to_save=[classifier] does" in caplog.text
    caplog.clear()
    same = ours("deberta-v2", "SEQ_CLS", LoRA(r=8, target_modules=targets, modules_to_save=["classifier"]), **keys)
    assert (same["trainable_parameters"], same["total_parameters"]) == (trainable, total)
    assert not caplog.text


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra"])
def test_heads_that_peft_trains_whole_need_no_word(kind, caplog):
    targets = ["q_lin", "v_lin"] if kind == "distilbert" else ["query", "value"]
    keys = {} if kind == "distilbert" else ENCODER
    found = ours(kind, "SEQ_CLS", LoRA(r=8, target_modules=targets), **keys)
    assert (found["trainable_parameters"], found["total_parameters"]) == pefts(
        kind, "SEQ_CLS", LoRA(r=8, target_modules=targets), **keys
    )
    assert not caplog.text
    assert found["adapter_parameters"] == found["trainable_parameters"] - head(keys.get("hidden_size", 768))
