"""A step waits for the device a fixed number of times, however many trials share it."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.adapters import dropout, fused
from loralab.adapters.lora import LoRA
from loralab.optim import packed
from loralab.optim.optimizers import AdamW
from loralab.running.runner import Runner
from loralab.training.module import FineTuner

READS = ("_local_scalar_dense", "nonzero", "aten.equal", "aten.is_nonzero", "masked_select", "_unique")


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a card: values that it asks for, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indexed = "index.Tensor" in name and any(str(one.dtype) == "torch.bool" for one in args[1] if one is not None)
        if indexed or any(read in name for read in READS):
            self.counts["index by a mask" if indexed else name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads_of_a_step(make_spec, make_data, monkeypatch):
    def of(trials):
        steps, step, listed = [], FineTuner.optimizer_step, torch.Tensor.tolist  # no operator on a CPU
        data = make_data("ragged", batch_size=2)

        def counted(*args, **kwargs):
            with Reads() as seen, monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "tolist", lambda tensor: seen.counts.update(["tolist"]) or listed(tensor))
                step(*args, **kwargs)
            steps.append(seen.counts)

        monkeypatch.setattr(FineTuner, "optimizer_step", counted)
        specs = [
            make_spec(
                f"{trials}-{i}",
                adapter=LoRA(r=2 + i % 2, lora_dropout=0.1),
                optimizer=AdamW(lr=1e-3 * (1 + i)),
                data=data,
            )
            for i in range(trials)
        ]
        assert [record["status"] for record in Runner().run(specs)] == ["completed"] * trials
        monkeypatch.setattr(FineTuner, "optimizer_step", step)
        return steps[-1]

    return of


@pytest.mark.parametrize("card", [False, True])
def test_the_reads_of_a_step_do_not_grow_with_its_trials(reads_of_a_step, monkeypatch, card):
    if card:  # the forms of a card, which run here too; the numbers of steps, one more list, are on the host there
        monkeypatch.setattr(packed, "DEVICES", {"cpu"})
        monkeypatch.setattr(fused, "TOGETHER", {"cpu"})
        monkeypatch.setattr(dropout, "COUNTED", {"cpu"})
    two, five = reads_of_a_step(2), reads_of_a_step(5)
    assert two == five
    assert two.total() <= 6 + card, two
