"""The frozen head with its loss is the head, and then the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loralab.forward.head import CHUNK, MAX_TERMS, bypassed, frozen_head, hands_on, head_nll


def head_of(width=8, classes=11, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(width, classes, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40, 2 * CHUNK + 1])
def test_losses_predictions_and_gradients_are_those_of_the_dense_way(rows, bias):
    head = head_of(bias=bias)
    hidden, targets = torch.randn(rows, 8, requires_grad=True), torch.randint(11, (rows,))
    weights = torch.rand(rows)
    losses, predictions = head_nll(hidden, targets, head)
    logits = head(hidden)
    dense = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, dense)
    assert torch.equal(predictions, logits.argmax(-1))
    ours, theirs = (torch.autograd.grad((x * weights).sum(), hidden)[0] for x in (losses, dense))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("classes", [11, 3 * MAX_TERMS + 5])
def test_under_autocast_too(classes):
    """Half precision rounds the products to 8 bits; more classes than are summed at a time are no other case."""
    head, targets = head_of(classes=classes), torch.randint(11, (40,))
    hidden = torch.randn(40, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = head_nll(hidden, targets, head)
        dense = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    torch.testing.assert_close(losses.float(), dense, rtol=0.02, atol=0.02)
    ours, theirs = (torch.autograd.grad(x.float().sum(), hidden)[0] for x in (losses, dense))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_gradients_are_right_to_double_precision():
    head = head_of(dtype=torch.float64)
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (5,))
    assert torch.autograd.gradcheck(lambda h: head_nll(h, targets, head)[0], (hidden,), atol=1e-6, eps=1e-4)


@pytest.mark.parametrize(("width", "classes"), [(64, 512), (256, 4096), (768, 2000)])
def test_a_rows_loss_and_gradient_have_the_same_bits_beside_any_number_of_others(width, classes):
    head = head_of(width, classes)
    hidden, targets = torch.randn(600, width, requires_grad=True), torch.randint(classes, (600,))

    def computed(count):
        losses = head_nll(hidden[:count], targets[:count], head)[0]
        return losses, torch.autograd.grad(losses.sum(), hidden)[0]

    losses, gradients = computed(600)
    for count in (1, 2, 3, 7, 15, 16, 60, 191, 192, 400):
        alone, gradient = computed(count)
        assert torch.equal(alone, losses[:count])
        assert torch.equal(gradient[:count], gradients[:count])


def test_without_a_target_there_is_no_loss():
    hidden = torch.randn(0, 8, requires_grad=True)
    losses, _ = head_nll(hidden, torch.empty(0, dtype=torch.int64), head_of())
    losses.sum().backward()
    assert losses.shape == (0,)


def test_no_logits_are_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        head_nll(torch.randn(50, 8, requires_grad=True), torch.randint(11, (50,)), head_of())
    assert kept == [torch.Size([50, 8])]


def test_a_head_that_is_trained_watched_or_none_is_left_alone(load_base):
    model = load_base().model
    model.requires_grad_(False)
    head = frozen_head(model)
    assert head is model.lm_head
    with bypassed(head):
        assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape[-1] == head.in_features
    assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape[-1] == head.out_features
    handle = head.register_forward_hook(lambda *_: None)
    assert frozen_head(model) is None
    handle.remove()
    head.weight.requires_grad_(True)
    assert frozen_head(model) is None
    assert frozen_head(load_base("distilbert").model) is None


CHANGES = {
    "capped": lambda x: 1e3 * torch.tanh(x / 1e3),
    "scaled": lambda x: x * 1.0001,
    "shifted": lambda x: x + 0.01,
    "normalized": lambda x: x.log_softmax(-1),
    "left out": lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 7, -1e9),
}


@pytest.mark.parametrize("family", ["llama", "phi", "t5"])
def test_a_model_hands_on_what_its_head_gives(load_base, inputs, family):
    model = load_base(family).model.eval().requires_grad_(False)
    given = inputs("seq2seq_lm" if family == "t5" else "causal_lm")
    assert hands_on(model, frozen_head(model), given)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_model_does_to_its_logits_is_seen_however_little_it_is(load_base, inputs, monkeypatch, change):
    model = load_base().model.eval().requires_grad_(False)
    real = type(model).forward

    def changed(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = CHANGES[change](out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", changed)
    assert not hands_on(model, frozen_head(model), inputs())


def test_a_vocabulary_of_several_sums_has_a_gradient_under_autocast():
    drawn = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 1500, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(1500, 16, generator=drawn))
    hidden = torch.randn(20, 16, generator=drawn, requires_grad=True)
    targets = torch.arange(20)
    with torch.autocast("cpu", torch.bfloat16):
        head_nll(hidden, targets, head)[0].sum().backward()
    found, hidden.grad = hidden.grad, None
    torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    assert float((found - hidden.grad).norm() / hidden.grad.norm()) < 0.02
