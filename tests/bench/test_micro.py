"""Microbenchmarks of what every step is made of; `make bench` runs them, the fast tests do not."""

import pytest
import torch
from torch import nn

from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.forward.head import head_nll

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.bench

WIDTH, LENGTH, VOCABULARY = 256, 128, 4096


@pytest.mark.parametrize("k", [1, 8])
def test_a_linear_layer_with_the_adapters_of_k_trials_forward_and_backward(benchmark, k):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    adapters = [LoRA(r=2 ** (1 + i % 4), target_modules=["0"]).attach(model, seed=i) for i in range(k)]
    x = torch.randn(k, LENGTH, WIDTH, requires_grad=True)

    def step():
        with AdapterHooks.of(model).batch(*(BatchSlice(adapter, 1) for adapter in adapters)):
            model(x).sum().backward()

    benchmark(step)
    assert all(delta.lora_B.grad.abs().sum() > 0 for adapter in adapters for _, delta in adapter.adapted())


@pytest.mark.parametrize("masked", [0, LENGTH * 3 // 4], ids=["every token a target", "one in four a target"])
def test_the_frozen_head_and_the_loss_forward_and_backward(benchmark, masked):
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    hidden = torch.randn(4, LENGTH, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (4, LENGTH))
    labels[:, :masked] = -100

    kept, targets = labels != -100, labels[labels != -100]

    def step():
        losses, _ = head_nll(hidden[kept], targets, head)
        losses.sum().backward()

    benchmark(step)
    assert hidden.grad.abs().sum() > 0
