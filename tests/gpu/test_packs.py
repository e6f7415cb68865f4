"""On a card the products and the step of a pack are those of one trial after the other, and the host waits for none."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from loralab.adapters import fused
from loralab.adapters.fused import lora_update
from loralab.adapters.runs import Part
from loralab.optim import packed
from loralab.optim.groups import TRIAL
from loralab.optim.optimizers import AdamW
from loralab.running.runner import Runner
from loralab.training import step_results
from loralab.training.module import FineTuner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@contextmanager
def without_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lengths", [[128] * 4, [100, 131, 64, 128]], ids=["equal", "ragged"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_products_of_a_pack_are_those_of_each_trial(monkeypatch, lengths, autocast):
    drawn = torch.Generator(device="cuda").manual_seed(0)
    shapes = [shape for r in (8, 8, 4, 4) for shape in ((r, 256), (512, r))]
    given = [torch.randn(*shape, generator=drawn, device="cuda").div(8).requires_grad_() for shape in shapes]
    starts = [sum(lengths[:i]) for i in range(4)]
    parts = [Part(at, at + n, 2.0 + i, 0.1, i) for i, (at, n) in enumerate(zip(starts, lengths, strict=True))]
    x = torch.randn(sum(lengths), 256, generator=drawn, device="cuda", requires_grad=True)
    y, dy = (torch.randn(sum(lengths), 512, generator=drawn, device="cuda") for _ in range(2))
    results = []
    for together in (set(), {"cuda"}):
        monkeypatch.setattr(fused, "TOGETHER", together)
        for tensor in (x, *given):
            tensor.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), without_waiting():
            out = lora_update(x, y.clone(), parts, given)
            out.backward(dy)
        results.append([out.detach(), *(tensor.grad for tensor in (x, *given))])
    bound = 2e-2 if autocast else 1e-5
    for one, together in zip(*results, strict=True):
        assert float((one - together).norm() / one.norm()) < bound


def test_a_pack_is_stepped_as_each_trial_is(monkeypatch):
    found = []
    for devices in (set(), {"cuda"}):
        monkeypatch.setattr(packed, "DEVICES", devices)
        drawn = torch.Generator(device="cuda").manual_seed(0)
        trials = [[nn.Parameter(torch.randn(s, generator=drawn, device="cuda")) for s in ((8, 64), (32, 8))]]
        trials += [[nn.Parameter(p.detach().clone() * 2) for p in trials[0]] for _ in range(3)]
        specs = [AdamW(lr=0.1 / (i + 1), weight_decay=0.1 * i) for i in range(4)]
        groups = [{**one.group(own), TRIAL: i} for i, (one, own) in enumerate(zip(specs, trials, strict=True))]
        optimizer = specs[0].build(groups)
        for _ in range(4):
            for parameter in (p for own in trials for p in own):
                parameter.grad = torch.randn(parameter.shape, generator=drawn, device="cuda")
            if packed.clip(optimizer, dict.fromkeys(range(4), 1.0)) is None:
                for own in trials:
                    nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
        found.append([p.detach() for own in trials for p in own])
    for one, together in zip(*found, strict=True):
        torch.testing.assert_close(together, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trials", [1, 3])
def test_a_step_waits_for_nothing_but_the_results_of_the_one_before(make_spec, make_data, monkeypatch, curve, trials):
    """Of which an event tells, and no synchronization of the stream."""
    step, data = FineTuner.optimizer_step, make_data("ragged", batch_size=2)

    def watched(self, *given, **named):
        made = 2 <= self.trials[0].step < 5  # by then there are moments, and what is made once for these shapes
        with without_waiting() if made else nullcontext():
            step(self, *given, **named)

    def run(prefix):
        specs = [make_spec(f"{prefix}{i}", seed=i, accelerator="gpu", max_steps=6, data=data) for i in range(trials)]
        assert [(one["status"], one["error"]) for one in Runner().run(specs)] == [("completed", None)] * trials
        return [curve(spec.folder) for spec in specs]

    monkeypatch.setattr(FineTuner, "optimizer_step", watched)
    late = run("late")
    monkeypatch.setattr(FineTuner, "optimizer_step", step)
    monkeypatch.setattr(step_results, "LATE", set())
    for one, other in zip(late, run("early"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_what_is_not_finite_in_one_trial_reaches_no_other(make_spec, make_data, monkeypatch):
    """It is in one pass more than its last step."""
    step, data = FineTuner.training_step, make_data("ragged", batch_size=2)

    def spoiled(self, batches, index):
        if self.trials[1].step == 2:
            for parameter in self.trials[1].adapter.parameters():
                parameter.data.fill_(float("nan"))
        return step(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", spoiled)
    common = {"accelerator": "gpu", "precision": "bf16-mixed", "max_steps": 6, "data": data}
    records = Runner().run([make_spec(f"{i}", seed=i, **common) for i in range(3)])
    assert [one["status"] for one in records] == ["completed", "diverged", "completed"]
