"""Checkpoints that bitsandbytes quantized: the same bytes, and its own dequantization's values."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.models import loading, pretrained
from loralab.quantization.four_bit import FourBit
from loralab.quantization.kernels import import_bitsandbytes
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.none import NoQuantization

import_bitsandbytes()
functional = pytest.importorskip("bitsandbytes.functional")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
SCHEMES = {
    "nf4": (FourBit(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4_double": (
        FourBit(double_quant=True),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "fp4": (FourBit(quant_type="fp4"), {"load_in_4bit": True}),
    "llm_int8": (LLMInt8(), {"load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{scheme: (folder, the model as bitsandbytes has it)}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=258, num_hidden_layers=2, **SIZES)).save_pretrained(folder / "dense")
    made = {}
    for name, (_, options) in SCHEMES.items():
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder / name)
        made[name] = folder / name, model
    return made


def load(folder, quantizer):
    return loading.load(pretrained.Pretrained(name_or_path=str(folder), max_length=64), quantizer, None).model


def tensors_of(folder, name):
    """A layer's tensors by what follows its name, as they lie in the file."""
    tensors = load_file(folder / "model.safetensors")
    return {key[len(name) + 1 :]: one for key, one in tensors.items() if key.startswith(f"{name}.")}


def dequantized(held, scheme):
    """The values of a layer's tensors, by bitsandbytes' functions."""
    if scheme == "llm_int8":
        return functional.int8_vectorwise_dequant(held["weight"], held["SCB"])
    statistics = {key: one for key, one in held.items() if key != "weight"}
    state = functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    return functional.dequantize_4bit(held["weight"], state)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_are_the_files_and_the_values_bitsandbytes_own(written, scheme):
    folder, dense = written[scheme]
    model, tensors = load(folder, SCHEMES[scheme][0]), load_file(folder / "model.safetensors")
    names = [name[: -len(".weight")] for name, one in tensors.items() if name.endswith("_proj.weight")]
    assert len(names) == 14
    for name in names:
        layer = model.get_submodule(name)
        assert torch.equal(layer.codes, tensors[f"{name}.weight"])
        absmax = tensors.get(f"{name}.weight.absmax", tensors.get(f"{name}.SCB"))
        assert torch.equal(layer.absmax, absmax)
        wanted = dequantized(tensors_of(folder, name), scheme).float()
        off = 3e-7 if scheme == "llm_int8" else 0  # codes times SCB / 127: the order of the two rounds differently
        torch.testing.assert_close(layer.dense(torch.float32), wanted, rtol=off, atol=0)
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


@pytest.mark.parametrize("scheme", ["nf4", "nf4_double", "fp4"])
def test_the_model_computes_what_a_dense_one_of_these_values_does(written, scheme):
    """bitsandbytes' own layer is no yardstick here: on some CPUs it computes in bfloat16."""
    folder, _ = written[scheme]
    dense = AutoModelForCausalLM.from_pretrained(folder.parent / "dense", dtype=torch.float32)
    for name, layer in dense.named_modules():
        if name.endswith("_proj"):
            layer.weight.data = dequantized(tensors_of(folder, name), scheme)
    ids = torch.arange(20)[None] * 7
    with torch.no_grad():
        ours, wanted = load(folder, SCHEMES[scheme][0])(ids).logits, dense(ids).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "quantizer", "message"),
    [
        ("nf4", NoQuantization(), "asks for quantization=none .*valid: quantization=nf4, or the dense"),
        ("nf4_double", FourBit(), "asks for quantization=nf4 .*valid: quantization=nf4_double, or"),
        ("llm_int8", FourBit(), "valid: quantization=llm_int8, or"),
        ("nf4", FourBit(block_size=128), r"block_size=128: .* stored in blocks of 64; valid: quantization\.block_size"),
        ("nf4", FourBit(skip_modules=["q_proj"]), "q_proj is quantized in this checkpoint, and is a layer that stays"),
    ],
)
def test_another_scheme_than_the_checkpoints_is_refused(written, scheme, quantizer, message):
    with pytest.raises(ConfigError, match=message):
        load(written[scheme][0], quantizer)


def changed(written, tmp_path, name, make):
    """A copy of the NF4 checkpoint in which tensors are changed."""
    _, theirs = written["nf4"]
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    make(tensors, f"model.layers.0.mlp.up_proj.{name}")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("weight.quant_map", lambda held, key: held.update({key: held[key] * 2}), "by another code book than nf4"),
        ("weight.absmax", lambda held, key: held[key].fill_(torch.nan), "statistics that are nan"),
        ("weight.quant_state.bitsandbytes__nf4", lambda held, key: held.pop(key), "up_proj is not quantized in this"),
        ("weight", lambda held, key: held.update({key: held[key][:8].clone()}), "up_proj is "),
    ],
)
def test_damaged_statistics_are_refused(written, tmp_path, name, make, message):
    with pytest.raises(ConfigError, match=message):
        load(changed(written, tmp_path, name, make), FourBit())


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_start_from_original_weights_is_refused_where_only_codes_are_stored(written, init):
    model = load(written["nf4"][0], SCHEMES["nf4"][0])
    with pytest.raises(
        ConfigError, match="before quantization is no tensor of the checkpoint, which holds it quantized"
    ):
        LoRA(r=4, init_lora_weights=init).attach(model)
