"""Specs, the choice of layers, and what a model weighs."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from loralab.errors import ConfigError
from loralab.quantization.base import Quantizer, matching, measure, quantizable
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax
from loralab.quantization.kernels import KERNEL_BLOCKS
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.loading import convert_model
from loralab.quantization.none import NoQuantization
from loralab.spec import make

CONF = Path(__file__).parents[2] / "conf" / "quantization"


def llama(**changes):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **small, **changes))


def distilbert():
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=96, dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=64, d_ff=128, d_kv=16, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_each_yaml_builds_its_spec_and_lists_every_key(path):
    node = OmegaConf.load(path)
    assert path.read_text().startswith("# ")
    module, _, name = node.pop("_target_").rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert set(node) == {f.name for f in dataclasses.fields(cls)}
    spec = make(cls, OmegaConf.to_container(node), "quantization")
    assert isinstance(spec, Quantizer)
    assert spec.name == path.stem or path.parent.name == "int8_product"


@pytest.mark.parametrize(
    ("cls", "keys", "says"),
    [
        (FourBit, {"block_size": 100}, "quantization.block_size=100"),
        (FourBit, {"block_size": True}, "quantization.block_size"),
        (FourBit, {"quant_type": "nf5"}, "did you mean nf4"),
        (FourBit, {"double_quant": "maybe"}, "quantization.double_quant must be true or false, got 'maybe'"),
        (FourBit, {"compute_dtype": "float15"}, "did you mean float16"),
        (FourBit, {"dequantize": "peruse"}, "did you mean per_use"),
        (FourBit, {"skip_modules": ["("]}, "regular expression"),
        (Int8Absmax, {"granularity": "rows"}, "did you mean row"),
        (Int8Absmax, {"block_size": 0}, "quantization.block_size must be at least 8, got 0"),
        (LLMInt8, {"threshold": -1.0}, "quantization.threshold must be a number of at least 0, got -1.0"),
        (LLMInt8, {"threshold": float("nan")}, "quantization.threshold must be a number of at least 0, got nan"),
        (NoQuantization, {"compute_dtype": "float16"}, "quantization.compute_dtype"),
    ],
)
def test_bad_values_are_refused_with_key_and_value(cls, keys, says):
    with pytest.raises(ConfigError, match="quantization") as error:
        cls(**keys)
    assert says in str(error.value)


def test_a_block_larger_than_the_layer_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"encoder\.small"):
        FourBit(block_size=4096).check("encoder.small", 32, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(value):
    linear = nn.Linear(64, 4)
    linear.weight.data[1, 2] = value
    for spec in (FourBit(), Int8Absmax(), LLMInt8()):
        with pytest.raises(ConfigError, match=r"block\.q_proj"):
            spec.convert(linear, "block.q_proj")


def test_all_linears_of_a_causal_model_but_the_output():
    names = quantizable(llama(), FourBit())
    assert len(names) == 14
    assert "lm_head" not in names
    assert len(quantizable(llama(tie_word_embeddings=True), FourBit())) == 14
    assert len(quantizable(gpt2(), FourBit())) == 8


def test_classification_heads_stay_dense():
    names = quantizable(distilbert(), FourBit())
    assert len(names) == 12
    assert all(name.startswith("distilbert.") for name in names)


def test_what_the_model_keeps_in_float32_stays_dense():
    names = quantizable(t5(), FourBit())
    assert "decoder.block.0.layer.1.EncDecAttention.q" in names
    assert not [name for name in names if name.endswith(("wo", "lm_head"))]


@pytest.mark.parametrize(
    ("skip", "left"),
    [("down_proj", 12), ("model.layers.0.self_attn.q_proj", 13), (r"model\.layers\.1\..*", 7), ("lm_head", 14)],
)
def test_skip_modules_by_name_last_part_or_regex(skip, left):
    assert len(quantizable(llama(), FourBit(skip_modules=[skip]))) == left


def test_skip_modules_that_match_nothing_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean q_proj"):
        quantizable(llama(), FourBit(skip_modules=["q_prj"]))


def specs_of_all_sizes():
    four = [FourBit(block_size=b, double_quant=d) for b in KERNEL_BLOCKS for d in (False, True)]
    return [*four, *(Int8Absmax(granularity=g) for g in ("tensor", "row", "block")), LLMInt8()]


@pytest.mark.parametrize("shape", [(96, 160), (65, 63), (128, 256)])
def test_predicted_bits_are_the_stored_bits(shape):
    for spec in specs_of_all_sizes():
        if isinstance(spec, FourBit) and spec.block_size > shape[0] * shape[1]:
            continue
        layer = spec.convert(nn.Linear(shape[1], shape[0], bias=False))
        stored = 8 * sum(t.untyped_storage().nbytes() for t in layer.packed())
        assert stored == spec.storage_bits(*shape), repr(layer)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(FourBit(), 4.5), (FourBit(double_quant=True), 4.126955), (Int8Absmax(), 8.007812), (LLMInt8(), 8.007812)],
)
def test_bits_per_parameter_by_summing_storages_of_4096_squared(spec, bits):
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    assert convert_model(model, spec) == ["0"]
    size = measure(model)
    assert size.bits_per_parameter == pytest.approx(bits, abs=1e-6)
    assert size.quantized_parameters == size.parameters == 4096**2
    tables = sum(4 * table.numel() for table in model[0].code_tables())
    assert size.bytes == spec.storage_bits(4096, 4096) // 8 + tables


def test_measure_counts_shared_parameters_and_code_tables_once():
    model = gpt2()
    before = measure(model)
    assert before.parameters == sum(p.numel() for p in model.parameters())
    assert (before.quantized_parameters, before.bits_per_parameter) == (0, 32.0)
    convert_model(model, FourBit(double_quant=True))
    after = measure(model)
    assert after.parameters == before.parameters
    assert after.quantized_parameters == 2 * 12 * 64 * 64
    saved = before.bytes - after.bytes
    packed = sum(
        FourBit(double_quant=True).storage_bits(o, 64 * k) // 8 for o, k in [(192, 1), (64, 1), (256, 1), (64, 4)]
    )
    assert saved == 4 * after.quantized_parameters - 2 * packed - 64 - 1024


def test_measure_of_dense_and_of_meta_models():
    assert measure(llama().to(torch.bfloat16)).bits_per_parameter == 16.0
    with torch.device("meta"):
        model = llama()
    assert measure(model).parameters == measure(llama()).parameters


def test_no_quantization_freezes_and_keeps_the_layer():
    model = llama()
    names = convert_model(model, NoQuantization())
    assert len(names) == 14
    assert all(not p.requires_grad for name in names for p in model.get_submodule(name).parameters())


def test_packing_is_refused_only_where_a_row_depends_on_its_neighbours():
    assert FourBit().packable
    assert Int8Absmax().packable
    assert LLMInt8(threshold=0.0).packable
    assert not LLMInt8().packable


def test_an_expression_that_would_take_years_is_given_up_within_seconds():
    pattern = "(.*)" * 12 + r"\1[!]|(.*)*\1!"
    with pytest.raises(ConfigError, match="takes more than 1 s to match one name; valid: an expression without"):
        matching(pattern, ["model.layers.11.self_attn.q_proj"], "adapter.target_modules")
    assert matching("(.*)*proj", ["model.q_proj", "model.norm"], "x") == ["model.q_proj"]
