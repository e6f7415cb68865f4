"""Of every method and kind of base: the merged folder, opened by plain transformers, computes what the run does."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from loralab.adapters.bitfit import BitFit
from loralab.adapters.full import Full
from loralab.adapters.ia3 import IA3
from loralab.adapters.intrinsic import Intrinsic
from loralab.adapters.last_layer import LastLayer
from loralab.adapters.lora import LoRA
from loralab.adapters.lora_fa import LoRAFA
from loralab.adapters.vera import VeRA
from loralab.artifacts import merged_files
from loralab.artifacts.swap import Merger
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8ZeroPoint

PLAIN = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
MOE = {
    **{"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "model_type": "qwen3_moe",
}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MODELS = {  # bases beside tests/conftest.py's: {name: (family, changes of its spec)}
    "moe": ("llama", {"config": MOE}),
    "decoder of roberta": ("roberta", {"task": "causal_lm", "config": {"is_decoder": True}}),
}
CASES = {
    "lora": ("llama", LoRA(r=4)),
    "rslora": ("llama", LoRA(r=4, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})),
    "pissa": ("llama", LoRA(r=4, init_lora_weights="pissa")),
    "dora": ("llama", LoRA(r=4, use_dora=True)),
    "vera": ("llama", VeRA(r=16)),
    "intrinsic": ("llama", Intrinsic(dimension=100, variant="said")),
    "ia3": ("llama", IA3()),
    "last_layer": ("llama", LastLayer(modules_to_save=["norm"])),
    "full": ("llama", Full()),
    "embedding": ("llama", LoRA(r=4, target_modules=["embed_tokens", "q_proj"])),
    "experts": ("moe", LoRA(r=4, target_modules=["q_proj"], **EXPERTS)),
    "Conv1D": ("gpt2", LoRA(r=4, bias="all")),
    "Conv1D dora": ("gpt2", LoRA(r=4, use_dora=True, bias="lora_only")),
    "Conv1D ia3": ("gpt2", IA3()),
    "Conv1D last_layer": ("gpt2", LastLayer()),
    "tied embedding": ("gpt2", LoRA(r=4, target_modules=["wte"])),
    "tied head": ("gpt2", LoRA(r=4, target_modules=["lm_head"])),
    "tied, saved": ("gpt2", LoRA(r=4, modules_to_save=["wte"])),
    "tied full": ("gpt2", Full()),
    "tied bias": ("decoder of roberta", BitFit()),
    "encoder-decoder": ("t5", LoRA(r=4)),
    "encoder-decoder ia3": ("t5", IA3()),
    "encoder-decoder head": ("t5", LoRA(r=4, target_modules=["lm_head", "q"])),
    "encoder-decoder full": ("t5", Full()),
    "classifier": ("distilbert", LoRA(r=4)),
    "classifier bitfit": ("roberta", BitFit()),
    "classifier lora_fa": ("roberta", LoRAFA(r=4)),
    "classifier last_layer": ("roberta", LastLayer()),
    "quantized": ("llama", LoRA(r=4, init_lora_weights="pissa"), FourBit(double_quant=True)),
    "quantized dora": ("llama", LoRA(r=4, use_dora=True), Int8ZeroPoint()),
    "quantized module": ("llama", LoRA(r=4, modules_to_save=["lm_head", "norm"]), FourBit()),
    "quantized Conv1D": ("gpt2", LoRA(r=4, bias="all", modules_to_save=["h.1.attn.c_proj"]), FourBit()),
    "quantized Conv1D ia3": ("gpt2", IA3(), FourBit()),
    "quantized last_layer": ("gpt2", LastLayer(), FourBit()),
    "quantized encoder-decoder": ("t5", VeRA(r=16), FourBit(quant_type="fp4")),
    "quantized classifier": ("roberta", BitFit(), FourBit()),
}


def bare(run, given):
    with run.bare():
        return run.model(**given).logits


def adapted(run, given):
    with run.adapted(2):
        return run.model(**given).logits


def plain(task, folder):
    model, info = PLAIN[task].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_the_runs_logits_from_the_folder(opened, inputs, tmp_path, case):
    family, adapter, *quantizer = CASES[case]
    family, changes = MODELS.get(family, (family, {}))
    run = opened(family, adapter, *quantizer, **changes)
    given = inputs(run.spec.model.task)
    before, wanted = run.base_logits(given), adapted(run, given)
    merger = Merger(run, torch.float32)
    merged = merger.merge(merger.ways[0])
    with merged.on():
        merged_files.save(run, merged, tmp_path / "merged", None)
    model = plain(run.spec.model.task, tmp_path / "merged")
    with torch.no_grad():
        logits = model(**given).logits
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert getattr(model.config, "use_cache", True)
