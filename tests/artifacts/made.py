"""Bases, runs and PEFT models for the tests of what goes to other libraries and comes from them."""

import copy
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from loralab.adapters import export
from loralab.adapters.attached import attached
from loralab.artifacts.reopen import open_run
from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.quantization.base import dense_weight, is_frozen
from loralab.records import record as records
from loralab.running.inputs import Inputs

AUTO = {
    **{"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM},
    "distilbert": AutoModelForSequenceClassification,
    "roberta": AutoModelForSequenceClassification,
}
TASKS = {"t5": "seq2seq_lm", "distilbert": "sequence_classification", "roberta": "sequence_classification"}
LABELS = {"distilbert": 3, "roberta": 3}
SCHEMES = {"none": "none", "int8": "int8_blockwise", "nf4": "nf4"}


def moved(parameters, by=0.1):
    """Every parameter away from its start."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def write_run(folder, base_folder, family, scheme, words, inputs, by=0.1):
    """A completed run whose adapter has moved from its start, without training."""
    task = TASKS.get(family, "causal_lm")
    given = ["model=hf", f"model.name_or_path={base_folder}", f"model.task={task}", f"quantization={SCHEMES[scheme]}"]
    given += ["trainer=cpu", "logger=none", *words]
    spec = trial_spec(compose(given), folder, given, {"quantization": SCHEMES[scheme]})
    base = inputs.base(spec, LABELS.get(family))
    adapter = attached(spec.adapter, base.model, spec.seed)
    moved(adapter.parameters(), by)
    record = records.blank("made", config=spec.config, overrides=given, choices=spec.choices, seed=0)
    record.update(status="completed", exit_code=0)
    record["base"] = base.record()
    record["adapter"].update(method=spec.adapter.method, trainable_parameters=adapter.trainable_parameters())
    if family in LABELS:
        record["data"].update(id2label={place: f"LABEL_{place}" for place in range(LABELS[family])})
    export.save(adapter, folder / "adapter")
    adapter.detach()
    records.write(folder, record)
    return folder


def logits_of_run(folder, given, inputs):
    opened = open_run(folder, inputs)
    with opened.adapted(2):
        found = opened.model(**given).logits
    opened.close()
    return found


def plain(base_folder, family, quantized=None):
    """transformers' own model; its linear layers hold what the codes of ``quantized`` stand for. bitsandbytes' layers
    are not used, whose CPU kernels dequantize some widths wrongly."""
    labels = {"num_labels": LABELS[family]} if family in LABELS else {}
    model = AUTO[family].from_pretrained(base_folder, **labels).eval()
    for name, module in quantized.named_modules() if quantized is not None else ():
        if is_frozen(module):
            weight = dense_weight(module).t() if module.transposed else dense_weight(module)
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(weight)
    return model


def logits(model, given):
    with torch.no_grad():
        return model.eval()(**given).logits


def in_peft(model, folder, given):
    """Of the adapter in ``folder`` over ``model``, as PEFT opens it, which gives those of a prompt too."""
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), folder), given)


class Bases:
    """One base of ours for each (family, scheme), and transformers' model with the same values."""

    def __init__(self, base_folder):
        self.base_folder, self.kept = base_folder, {}

    def __call__(self, family, scheme):
        if (family, scheme) not in self.kept:
            inputs, folder = Inputs(), self.base_folder(family)
            given = ["model=hf", f"model.name_or_path={folder}", f"quantization={SCHEMES[scheme]}", "trainer=cpu"]
            spec = trial_spec(compose([*given, f"model.task={TASKS.get(family, 'causal_lm')}"]), folder)
            model = plain(folder, family, inputs.base(spec, LABELS.get(family)).model)
            self.kept[family, scheme] = SimpleNamespace(inputs=inputs, plain=model, folder=folder)
        return self.kept[family, scheme]
