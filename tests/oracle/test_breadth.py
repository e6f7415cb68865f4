"""Over all of transformers' architectures: one pass of four rows of unlike lengths, each row another trial's, has the
losses and gradients of the rows alone under transformers and PEFT, by whichever way it is computed."""

import copy

import breadth
import plain
import pytest
import torch
from peft import LoraConfig, get_peft_model

from loralab.adapters import peft
from loralab.adapters.attached import attached
from loralab.adapters.hooks import BatchSlice, NotPackable
from loralab.adapters.lora import LoRA
from loralab.data.batches import collate
from loralab.data.encoding import Example
from loralab.forward.graph import check_causal
from loralab.forward.stacked import Forward
from loralab.models import architecture, loading, pretrained
from loralab.models.batching import check_rows
from loralab.quantization.base import dense_weight, is_frozen
from loralab.quantization.four_bit import FourBit
from loralab.quantization.loading import convert_model
from loralab.quantization.reads import refuse_read
from loralab.quantization.sequences import decoder_input_ids

QUICK = {("causal_lm", "cohere2"), ("causal_lm", "qwen3_moe"), ("seq2seq_lm", "pegasus"), ("causal_lm", "roc_bert")}
UNFIT = {"mamba": ("out_proj",), "mamba2": ("out_proj",)}  # PEFT refuses them
LENGTHS, TARGETS = (23, 9, 14, 31), (6, 3, 5, 8)
# 2-D weights are too small for a block of 64 there
TINY = {"esm", "qwen2_moe", "qwen3_next"}


def rows(task):
    """[(input ids, label ids)]; a text that is classified ends in the end token."""
    generator, found = torch.Generator().manual_seed(5), []
    for length, count in zip(LENGTHS, TARGETS, strict=True):
        ids = torch.randint(2, 250, (length,), generator=generator).tolist()
        if task == "causal_lm":
            found.append((ids, [-100] * (length - count) + ids[-count:]))
        elif task == "seq2seq_lm":
            found.append((ids, ids[:count]))
        else:
            found.append(([*ids[:-1], 1], [count % 3]))
    return found


def pair(kind, task, scheme):
    """(loralab's base with a moved LoRA, the same in PEFT)."""
    config = breadth.config_of(kind, task)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        attention = architecture.attention("auto", task, config)
        model = plain.AUTO[task].from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
        breadth.spread(model)
    other = copy.deepcopy(model)
    if scheme == "nf4":
        convert_model(model, FourBit(skip_modules=[]))
    loading.prepare(pretrained.Random(task=task), model)
    packed = {name: layer for name, layer in model.named_modules() if is_frozen(layer)}
    refuse_read(model, packed)
    with torch.no_grad():
        for name, layer in packed.items():
            weight = dense_weight(layer)
            other.get_submodule(name).weight.copy_(weight.t() if layer.transposed else weight)
    adapter = attached(LoRA(r=4, lora_alpha=8, modules_to_save=[]), model)
    names = [name for name, _ in adapter.adapted()]
    left_out = {*peft.misread(model, names), *(n for n in names if n.rpartition(".")[2] in UNFIT.get(kind, ()))}
    if left_out:
        adapter.detach()
        names = [name for name in names if name not in left_out]
        adapter = attached(LoRA(r=4, lora_alpha=8, modules_to_save=[], target_modules=names), model)
    transposed = {type(other.get_submodule(name)).__name__ for name in names} == {"Conv1D"}
    theirs = get_peft_model(
        other, LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=transposed)
    ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, delta in adapter.adapted():
            delta.lora_B.normal_(0.0, 0.05, generator=generator)
            layer = theirs.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(delta.lora_A)
            layer.lora_B["default"].weight.copy_(delta.lora_B)
    return model, adapter, theirs


def one_pass(model, adapter, task, given):
    """(each share's summed loss, {PEFT's name: gradient of the mean over all targets})."""
    tensors = collate([Example(ids, labels, len(labels)) for ids, labels in given], task, 0)
    labels = tensors.pop("labels")
    if task == "seq2seq_lm":
        tensors["decoder_input_ids"] = decoder_input_ids(model, labels)
    forward = Forward(model.train(), task)
    try:
        scores = forward(dict(tensors), labels, [BatchSlice(adapter, 1, 1) for _ in given])
    except NotPackable:  # the base folds its batch: a pack would be dissolved
        scores = forward(dict(tensors), labels, [BatchSlice(adapter, len(given), 1)])
    (sum(loss for loss, _, _ in scores) / sum(len(targets) for _, _, targets in scores)).backward()
    gradients = {}
    for name, delta in adapter.adapted():
        for key, factor in zip(peft.lora_keys(name), (delta.lora_A, delta.lora_B), strict=True):
            gradients[key] = torch.zeros_like(factor) if factor.grad is None else factor.grad
    return [float(loss) for loss, _, _ in scores], gradients


def cases():
    for task, kinds in breadth.TABLE.items():
        for kind in kinds:
            for scheme in ("none",) if kind in TINY else ("none", "nf4"):
                quick = (task, kind) in QUICK and scheme == ("nf4" if kind == "roc_bert" else "none")
                yield pytest.param(task, kind, scheme, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("task", "kind", "scheme"), cases())
def test_a_pass_of_several_rows_is_each_row_alone_under_transformers_and_peft(task, kind, scheme):
    model, adapter, theirs = pair(kind, task, scheme)
    given = rows(task)
    if task == "causal_lm":
        check_causal(model)
    check_rows(model, task, [ids for ids, _ in given], len(given), True)
    losses, gradients = one_pass(model, adapter, task, given)
    expected = [nll for nll, _, _ in plain.score(theirs, given, task)]
    assert losses == pytest.approx(expected if len(losses) > 1 else [sum(expected)], rel=5e-5, abs=5e-5)
    right = plain.gradients(theirs, given, task)
    size = sum(float(gradient.square().sum()) for gradient in right.values()) ** 0.5
    for key, own in gradients.items():
        other = right.get(key, torch.zeros_like(own))
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * size, msg=lambda text, k=key: f"{k}: {text}")
