"""Whatever is left out of a pass, its losses and gradients are the plain way's; where they are not, it is kept."""

import logging

import pytest
import torch

from loralab.adapters.hooks import BatchSlice
from loralab.adapters.lora import LoRA
from loralab.forward import stacked
from loralab.forward.stacked import Forward, ForwardMode

CAUSAL = ["llama", "gpt2", "phi"]


def batch(task="causal_lm", lengths=(12, 5, 9)):
    ids = torch.randint(2, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    given = {"input_ids": ids, "attention_mask": mask}
    if task == "seq2seq_lm":
        given["decoder_input_ids"] = ids[:, :7]
        labels = ids[:, :7].clone()
    if task == "sequence_classification":
        labels = torch.tensor([0, 2, 1])
    return given, labels


def run(base, adapters, mode, seed=5):
    """(losses, gradients) of one pass of two adapters, one row and two rows."""
    given, labels = batch(base.spec.task)
    forward = Forward(base.model, base.spec.task)
    forward.mode = mode
    slices = [BatchSlice(adapters[0], 1, seed), BatchSlice(adapters[1], 2, seed + 1)]
    scores = forward(given, labels, slices)
    total = sum(loss for loss, _, _ in scores)
    parameters = [p for a in adapters for p in a.parameters()]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return forward, scores, gradients


def adapters_on(base):
    made = []
    for r, dropout in ((2, 0.2), (4, 0.0)):
        adapter = LoRA(r=r, lora_dropout=dropout, modules_to_save=[]).attach(base.model, seed=r)
        for _, delta in adapter.adapted():
            torch.nn.init.normal_(delta.lora_B, std=0.02)
        made.append(adapter)
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scheme", ["none", "nf4"])
@pytest.mark.parametrize("family", CAUSAL)
def test_without_padding_and_dense_logits_losses_and_gradients_are_the_plain_ways(
    load_base, family, scheme, checkpointing
):
    base = load_base(family, scheme, gradient_checkpointing=checkpointing)
    adapters = adapters_on(base)
    base.model.train()
    chosen, ours, our_gradients = run(base, adapters, None)
    assert chosen.mode == ForwardMode(unpadded=True, fused_cross_entropy=True)
    _, theirs, gradients = run(base, adapters, ForwardMode(fused_cross_entropy=True))
    _, dense, _ = run(base, adapters, ForwardMode())
    for own, other, third in zip(ours, theirs, dense, strict=True):
        torch.testing.assert_close(own[0], other[0])
        torch.testing.assert_close(own[0], third[0])
        assert torch.equal(own[1], other[1])
        assert torch.equal(own[2], other[2])
    if not checkpointing:  # dropout masks are drawn for real tokens alone: only the second adapter has none
        own = list(zip(our_gradients, gradients, strict=True))[len(list(adapters[0].parameters())) :]
        for a, b in own:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(12, 5, 9), (7, 7, 7)])
def test_a_row_has_the_same_bits_whoever_shares_its_pass(load_base, lengths):
    base = load_base("llama", "nf4")
    adapter = LoRA(r=4).attach(base.model, seed=1)
    for _, delta in adapter.adapted():
        torch.nn.init.normal_(delta.lora_B, std=0.1)
    given, labels = batch(lengths=lengths)
    forward = Forward(base.model, "causal_lm")
    together = forward(given, labels, [BatchSlice(adapter, 1), BatchSlice(adapter, 2)])
    for row, (start, stop) in enumerate([(0, 1), (1, 3)]):
        longest = max(lengths[start:stop])
        own = {name: value[start:stop, :longest] for name, value in given.items()}
        alone = forward(own, labels[start:stop, :longest], [BatchSlice(adapter, stop - start)])
        assert torch.equal(alone[0][0], together[row][0])


def test_the_model_sees_only_real_tokens(load_base):
    base = load_base()
    adapter = LoRA(r=2).attach(base.model)
    forward = Forward(base.model, "causal_lm")
    given, labels = batch()
    forward(given, labels, [BatchSlice(adapter, 3)])
    seen = []
    base.model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1]))
    forward(given, labels, [BatchSlice(adapter, 3)])
    assert seen == [(1, 26)]


def test_a_base_that_caps_its_logits_is_computed_the_plain_way_and_the_log_says_so(load_base, caplog, monkeypatch):
    base = load_base()
    adapter = LoRA(r=2).attach(base.model)
    real = type(base.model).forward

    def capped(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(type(base.model), "forward", capped)
    forward = Forward(base.model, "causal_lm")
    given, labels = batch()
    with caplog.at_level(logging.INFO, "loralab"):
        (loss, _, _), *_ = forward(given, labels, [BatchSlice(adapter, 3)])
    assert forward.mode == ForwardMode(unpadded=True)
    assert "is not computed without dense logits: it changes what its head gives" in caplog.text
    shifted = torch.nn.functional.cross_entropy(
        base.model(**given).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, shifted)


def test_a_window_of_attention_keeps_its_padding(load_base):
    base = load_base()
    base.model.config.sliding_window = 4
    adapter = LoRA(r=2).attach(base.model)
    forward = Forward(base.model, "causal_lm")
    forward(*batch(), [BatchSlice(adapter, 3)])
    assert not forward.mode.unpadded


@pytest.mark.parametrize(
    ("family", "mode"), [("t5", ForwardMode(fused_cross_entropy=True)), ("distilbert", ForwardMode())]
)
def test_other_tasks_keep_their_padding(load_base, family, mode):
    base = load_base(family)
    adapters = adapters_on(base)
    chosen, ours, _ = run(base, adapters, None)
    assert chosen.mode == mode
    _, theirs, _ = run(base, adapters, ForwardMode())
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own[0], other[0])


def test_generation_after_a_flat_pass_is_what_it_was(load_base):
    base = load_base()
    given, labels = batch()
    adapter = LoRA(r=2).attach(base.model)
    ids, mask = given["input_ids"][:, :5], given["attention_mask"][:, :5]
    words = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base.model.eval()
    before = base.model.generate(**words)
    Forward(base.model, "causal_lm")(given, labels, [BatchSlice(adapter, 3)])
    assert torch.equal(base.model.generate(**words), before)


@pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("t5", "seq2seq_lm")])
def test_the_check_of_a_long_row_makes_dense_logits_of_a_few_tokens_and_sees_its_targets(
    load_base, monkeypatch, family, task
):
    base = load_base(family)
    adapter = LoRA(r=4).attach(base.model, seed=1)
    ids = torch.randint(2, 60, (2, 200), generator=torch.Generator().manual_seed(1))
    given, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
    if task == "seq2seq_lm":
        given["decoder_input_ids"] = ids
    else:
        labels[:, :150] = -100
        labels[:, 190:] = -100
    forward, seen, real = Forward(base.model, task, unpad=False), [], stacked.Forward._plain

    def plain(self, logits, labels):
        seen.append((logits.shape[1], int((labels != -100).sum())))
        return real(self, logits, labels)

    monkeypatch.setattr(stacked.Forward, "_plain", plain)
    forward(given, labels, [BatchSlice(adapter, 2)])
    assert forward.mode == ForwardMode(fused_cross_entropy=True)
    assert {length for length, _ in seen} == {stacked.CHECKED}
    assert min(targets for _, targets in seen) > 30


def test_a_row_without_targets_and_one_of_few_tokens_are_checked_whole():
    for length, kept in ((200, stacked.CHECKED), (7, 7)):
        ids = torch.ones(2, length, dtype=torch.int64)
        cut, labels = stacked._short({"input_ids": ids, "attention_mask": ids}, torch.full_like(ids, -100))
        assert labels.shape == cut["input_ids"].shape == cut["attention_mask"].shape == (1, kept)
