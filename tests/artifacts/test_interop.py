"""The same logits in loralab and in PEFT, whoever wrote the adapter, over dense and quantized bases.

PEFT computes over transformers' own model with the dequantized weights of our base.
"""

import copy
import warnings

import pytest
import torch
from made import LABELS, SCHEMES, TASKS, Bases, in_peft, logits, logits_of_run, moved, plain, write_run
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.loftq_utils import _low_rank_decomposition

from loralab.artifacts.exporting import export_run
from loralab.artifacts.importing import import_adapter

FAMILIES = ("llama", "gpt2", "distilbert", "t5")
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "distilbert": ["q_lin", "v_lin", "lin2"],
    "t5": ["q", "v", "wo"],
}
SCALED = {"llama": ["k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
SCALED |= {"distilbert": ["k_lin", "v_lin", "lin2"], "t5": ["k", "v", "wo"]}
HEADS = {"distilbert": ["pre_classifier", "classifier"]}
OURS = {
    "lora": ["adapter.r=4", "adapter.lora_alpha=12", "adapter.bias=all"],
    "dora": ["adapter.r=4", "adapter.use_dora=true"],
    "rslora": ["adapter.r=4", "adapter.lora_alpha=8", "adapter.use_rslora=true"],
    "pissa": ["adapter.r=4", "adapter.init_lora_weights=pissa"],
    "loftq": ["adapter.r=4", "adapter.init_lora_weights=loftq"],
    "fa": ["adapter=lora_fa", "adapter.r=4"],
    "ia3": ["adapter=ia3"],
    "vera": ["adapter=vera", "adapter.r=8"],
    "prefix": ["adapter=prefix", "adapter.num_virtual_tokens=3"],
    "prompt": ["adapter=prompt", "adapter.num_virtual_tokens=3"],
    "heads": ["adapter.r=4"],
    "bitfit": ["adapter=bitfit"],
}
BY = {"ia3": 1.0, "vera": 0.4}  # how far from their start they are moved; T5's logits are the largest
SHAPES = {"distilbert": {"token_dim": 64, "num_attention_heads": 2, "num_layers": 2}}  # which PEFT does not find
VARIANTS = ("lora", "rslora", "fa", "dora", "pissa", "loftq")
TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}


def distance(method, family):
    return BY.get(method, 0.05 if family == "t5" else 0.1)


def exists(method, family, scheme):
    """LoftQ starts at what quantization lost; DistilBERT keeps no past keys; Llama and T5 have no biases."""
    return not (
        (method == "loftq" and scheme == "none")
        or (method == "prefix" and family == "distilbert")
        or (method == "bitfit" and family in ("llama", "t5"))
    )


def cases(methods):
    """One scheme for each method and family, in turn, of LoRA's variants half of the families; the others are slow."""
    for number, method in enumerate(methods):
        for place, family in enumerate(FAMILIES):
            for turn, scheme in enumerate(SCHEMES):
                if exists(method, family, scheme):
                    quick = (number + place) % 3 == turn and (method not in VARIANTS or (number + place) % 2 == 0)
                    yield pytest.param(method, family, scheme, marks=[] if quick else [pytest.mark.slow])


THEIRS = list(cases([one for one in OURS if one not in ("fa", "bitfit")]))


@pytest.fixture(scope="module")
def bases(base_folder):
    return Bases(base_folder)


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(("method", "family", "scheme"), list(cases(OURS)))
def test_peft_opens_what_loralab_exports(bases, inputs, tmp_path, record_property, method, family, scheme):
    base, words = bases(family, scheme), list(OURS[method])
    if method == "heads":
        words.append(f"adapter.modules_to_save={HEADS.get(family, ['lm_head'])}")
    if method == "rslora":
        words.append(f"adapter.rank_pattern={{{TARGETS[family][0]}: 9}}")
    run = write_run(tmp_path / "run", base.folder, family, scheme, words, base.inputs, distance(method, family))
    export_run(run, tmp_path / "peft")
    given = inputs(TASKS.get(family, "causal_lm"))
    ours = logits_of_run(run, given, base.inputs)
    theirs = in_peft(base.plain, tmp_path / "peft", given)
    difference = float((tokens(theirs, ours) - ours).abs().max())
    record_property("difference", difference)
    assert difference < 1e-5
    assert float((ours - logits(base.plain, given)).abs().max()) > 1e-3


def tokens(theirs, ours):
    """Without those of a prompt, which PEFT's logits begin with."""
    return theirs if theirs.dim() == 2 else theirs[:, -ours.shape[1] :]


def config_of(method, family):
    kind, targets = TYPES[TASKS.get(family, "causal_lm")], TARGETS[family]
    low_rank = {"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": kind}
    return {
        "lora": lambda: LoraConfig(**low_rank, bias="all", layers_to_transform=[0, 1]),
        "dora": lambda: LoraConfig(**low_rank, use_dora=True),
        "rslora": lambda: LoraConfig(
            **low_rank, use_rslora=True, rank_pattern={r".*\.0\..*": 9, "idle": 3}, alpha_pattern={targets[0]: 5}
        ),
        "pissa": lambda: LoraConfig(**low_rank, init_lora_weights="pissa"),
        "loftq": lambda: LoraConfig(**low_rank),
        "ia3": lambda: IA3Config(
            target_modules=SCALED[family], feedforward_modules=SCALED[family][-1:], task_type=kind
        ),
        "vera": lambda: VeraConfig(r=8, target_modules=targets, task_type=kind, save_projection=family != "gpt2"),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type=kind, prefix_projection=family == "gpt2"),
        "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type=kind, **SHAPES.get(family, {})),
        "heads": lambda: LoraConfig(**low_rank, modules_to_save=HEADS.get(family, ["lm_head"])),
    }[method]()


def begin_loftq(theirs, original):
    """A and B at what quantization lost, as PEFT's replace_lora_weights_loftq sets them (which needs CUDA)."""
    with torch.no_grad():
        for name, layer in theirs.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                turned = getattr(layer, "fan_in_fan_out", False)
                lost = original.get_submodule(name).weight - layer.base_layer.weight
                made = _low_rank_decomposition(lost.T if turned else lost, reduced_rank=4)
                layer.lora_A["default"].weight.copy_(made["R"])
                layer.lora_B["default"].weight.copy_(made["L"])


@pytest.mark.parametrize(("method", "family", "scheme"), THEIRS)
def test_loralab_opens_what_peft_saves(bases, inputs, tmp_path, record_property, method, family, scheme):
    base = bases(family, scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT sets right, and of biases
        theirs = get_peft_model(copy.deepcopy(base.plain), config_of(method, family))
        if method == "loftq":
            begin_loftq(theirs, plain(base.folder, family))
        moved([one for one in theirs.parameters() if one.requires_grad], distance(method, family))
        theirs.save_pretrained(tmp_path / "peft")
    import_adapter(tmp_path / "peft", tmp_path / "run", [f"quantization={SCHEMES[scheme]}", "trainer=cpu"])
    given = inputs(TASKS.get(family, "causal_lm"))
    expected = logits(theirs, given)
    ours = logits_of_run(tmp_path / "run", given, base.inputs)
    difference = float((tokens(expected, ours) - ours).abs().max())
    record_property("difference", difference)
    assert difference < 1e-5
    assert float((ours - logits(base.plain, given)).abs().max()) > 1e-3
    assert LABELS.get(family, expected.shape[-1]) == expected.shape[-1]
