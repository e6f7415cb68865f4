"""Streaming a checkpoint into packed layers: the same bytes as converting in place, and an ordinary model
after it.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
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
from loralab.quantization.base import dense_weight, measure, quantizable
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.loading import _source_key, convert_model, quantization_config
from loralab.quantization.none import NoQuantization

TOKENS = torch.arange(1, 13).view(2, 6)
SCHEMES = {
    "int8": Int8Absmax(),
    "llm_int8": LLMInt8(),
    "nf4": FourBit(),
    "nf4_double": FourBit(double_quant=True),
    "fp4": FourBit(quant_type="fp4"),
}


def llama():
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=True, **small)), AutoModelForCausalLM


def gpt2():
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config), AutoModelForCausalLM


def distilbert():
    config = DistilBertConfig(vocab_size=96, dim=64, hidden_dim=128, n_layers=2, n_heads=4, num_labels=3)
    return DistilBertForSequenceClassification(config), AutoModelForSequenceClassification


def t5():
    small = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=96, decoder_start_token_id=0, **small)
    return T5ForConditionalGeneration(config), AutoModelForSeq2SeqLM


FAMILIES = {"llama": llama, "gpt2": gpt2, "distilbert": distilbert, "t5": t5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (folder of a sharded checkpoint, the model, its Auto class)."""
    models = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model, auto = make()
        for bias in (p for n, p in model.named_parameters() if n.endswith("bias")):
            bias.data.normal_()  # zeros would hide a bias that was not carried over
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        models[name] = (folder, model.eval(), auto)
    return models


def arguments(model):
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    return {**inputs, "decoder_input_ids": TOKENS[:, :3]} if model.config.is_encoder_decoder else inputs


def packed(model):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}
    return {f"{name}.{key}": getattr(m, key) for name, m in layers.items() for key in m.packed_names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SCHEMES.values(), ids=SCHEMES.keys())
def test_streaming_equals_converting_in_place(saved, family, spec):
    folder, model, auto = saved[family]
    in_place = copy.deepcopy(model)
    names = convert_model(in_place, spec)
    loaded = auto.from_pretrained(folder, quantization_config=quantization_config(spec))
    ours, theirs = packed(loaded), packed(in_place)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 2 * len(names)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    with torch.no_grad():
        logits = loaded(**arguments(loaded)).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, in_place(**arguments(model)).logits)
    assert measure(loaded) == measure(in_place)


def test_the_loaded_model_is_an_ordinary_one(saved):
    folder, _, auto = saved["llama"]
    loaded = auto.from_pretrained(folder, quantization_config=quantization_config(FourBit()))
    assert not hasattr(loaded.config, "quantization_config")
    assert not hasattr(loaded.config, "_is_quantized")
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not loaded.is_quantized
    assert not loaded.training
    loaded.to(torch.bfloat16)  # transformers refuses this for its own quantized models
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not {key for key in loaded.state_dict() if "absmax" in key or "codes" in key}
    loaded.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_the_callers_config_is_left_alone(saved):
    folder, model, auto = saved["llama"]
    config = copy.deepcopy(model.config)
    auto.from_pretrained(folder, config=config, quantization_config=quantization_config(FourBit()))
    assert getattr(config, "quantization_config", None) is None


def test_loading_needs_no_accelerate(saved, monkeypatch):
    folder, _, auto = saved["llama"]
    for place in ("transformers.modeling_utils", "transformers.utils"):
        monkeypatch.setattr(f"{place}.is_accelerate_available", lambda *_: False)
    loaded = auto.from_pretrained(folder, quantization_config=quantization_config(FourBit()))
    assert measure(loaded).quantized_parameters > 0


def test_weights_are_packed_in_the_load_dtype(saved):
    folder, model, auto = saved["llama"]
    half = copy.deepcopy(model).to(torch.bfloat16)
    convert_model(half, Int8Absmax())
    loaded = auto.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization_config(Int8Absmax()))
    ours, theirs = packed(loaded), packed(half)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.dense_dtype == layer.weight.dtype == torch.bfloat16
    assert layer.absmax.dtype == torch.float32


def test_no_quantization_is_an_ordinary_load():
    assert quantization_config(NoQuantization()) is None


def test_a_head_that_the_checkpoint_lacks_is_initialised_and_the_base_packed(saved):
    folder, _, _ = saved["llama"]
    torch.manual_seed(1)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, quantization_config=quantization_config(FourBit()), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert isinstance(loaded.score, nn.Linear)
    assert loaded.score.weight.std() > 0
    assert len(packed(loaded)) == 2 * 14


def test_a_weight_that_the_checkpoint_lacks_stays_dense_and_missing(tmp_path):
    model, auto = llama()
    lost = "model.layers.0.self_attn.q_proj.weight"
    model.save_pretrained(tmp_path, state_dict={key: w for key, w in model.state_dict().items() if key != lost})
    loaded, info = auto.from_pretrained(
        tmp_path, quantization_config=quantization_config(FourBit()), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {lost}
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, nn.Linear)
    assert isinstance(loaded.model.layers[1].self_attn.q_proj, FrozenLinear)


def test_an_error_while_packing_arrives_as_it_was_raised(saved, monkeypatch):
    folder, _, auto = saved["llama"]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FourBit, "pack", full)
    with pytest.raises(torch.OutOfMemoryError):
        auto.from_pretrained(folder, quantization_config=quantization_config(FourBit()))


def test_non_finite_weights_in_the_file_are_named(tmp_path):
    model, auto = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj"):
        auto.from_pretrained(tmp_path, quantization_config=quantization_config(FourBit()))
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj"):
        convert_model(model, FourBit())


def test_shapes_that_contradict_the_config_are_named(saved):
    folder, model, auto = saved["llama"]
    config = copy.deepcopy(model.config)
    config.intermediate_size = 192
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.\w+\.weight is"):
        auto.from_pretrained(folder, config=config, quantization_config=quantization_config(FourBit()))


def test_what_does_not_fit_is_refused_before_weights_are_read(saved, monkeypatch):
    folder, _, auto = saved["llama"]
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *a, **k: pytest.fail("weights were read"))
    for spec in (Int8Absmax(granularity="block", block_size=65536), FourBit(skip_modules=["no_such"])):
        with pytest.raises(ConfigError, match="quantization"):
            auto.from_pretrained(folder, quantization_config=quantization_config(spec))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match="no linear layer"):
        convert_model(nn.Sequential(nn.Embedding(4, 4)), FourBit())


def test_a_layer_with_two_names_is_replaced_under_both():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared})
    convert_model(model, FourBit())
    assert model["a"] is model["b"]
    assert isinstance(model["a"], FrozenLinear)


def test_t5_wo_quantized_on_request_computes_as_a_dense_wo_of_the_same_values(saved):
    """bitsandbytes' layer shows T5 a uint8 weight, and T5 casts its hidden states to that."""
    _, model, _ = saved["t5"]
    quantized, dense = copy.deepcopy(model), copy.deepcopy(model)
    for name in [n for n, _ in model.named_modules() if n.endswith("DenseReluDense.wo")]:
        frozen = FourBit().convert(quantized.get_submodule(name), name)
        quantized.set_submodule(name, frozen)
        dense.get_submodule(name).weight.data = dense_weight(frozen)
    with torch.no_grad():
        ours, theirs = (m(**arguments(m)).logits for m in (quantized, dense))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_embeddings_as_through_dense_layers(saved, family):
    _, model, _ = saved[family]
    quantized, dense = copy.deepcopy(model), copy.deepcopy(model)
    for name in quantizable(model, FourBit()):
        frozen = FourBit().convert(quantized.get_submodule(name), name)
        quantized.set_submodule(name, frozen)
        weight = dense_weight(frozen)
        layer = dense.get_submodule(name)
        layer.weight.data = weight.t().contiguous() if family == "gpt2" else weight
    for m in (quantized, dense):
        m(**arguments(m)).logits.square().sum().backward()
    ours, theirs = (m.get_input_embeddings().weight.grad for m in (quantized, dense))
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sources", "targets", "key"),
    [
        (["h.0.q.weight"], ["layers.0.q.weight"], "h.0.q.weight"),  # renamed
        (["qkv.weight"], ["layers.0.q.weight", "layers.0.k.weight"], None),  # cut
        (["gate.weight", "up.weight"], ["layers.0.q.weight"], None),  # put together
        (["c_attn"], ["q"], None),  # patterns of a conversion, no names
    ],
)
def test_a_layer_knows_the_one_tensor_that_it_was_read_from(sources, targets, key):
    given = {"source_patterns": sources, "target_patterns": targets}
    assert _source_key("layers.0.q.weight", given) == key
