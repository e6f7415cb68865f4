"""A step waits for the device a fixed number of times, however many trials share it."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.adapters import dropout, fused
from loralab.adapters.lora import LoRA
from loralab.forward.stacked import Forward
from loralab.optim import packed
from loralab.optim.optimizers import AdamW
from loralab.running.runner import Runner
from loralab.training import module, passes
from loralab.training.module import FineTuner

READS = ("_local_scalar_dense", "nonzero", "aten.equal", "aten.is_nonzero", "masked_select", "_unique")


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a card: values that it asks for, and shapes that depend on values. From a
    batch's making until it is sent to the card all is on the host."""

    def __init__(self):
        super().__init__()
        self.counts, self.on_card = Counter(), True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not self.on_card:
            return function(*args, **(kwargs or {}))
        indexed = "index.Tensor" in name and any(str(one.dtype) == "torch.bool" for one in args[1] if one is not None)
        if indexed or any(read in name for read in READS):
            self.counts["index by a mask" if indexed else name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads_of_a_step(make_spec, make_data, monkeypatch):
    def of(trials):
        steps, step, listed = [], FineTuner.optimizer_step, torch.Tensor.tolist  # no operator on a CPU
        stack, send = module.stack_batches, Forward._sent
        data = make_data("ragged", batch_size=2)

        def counted(*args, **kwargs):
            with Reads() as seen, monkeypatch.context() as patched:

                def reads(tensor):
                    seen.counts["tolist"] += seen.on_card
                    return listed(tensor)

                def stacks(*given):
                    seen.on_card = False
                    return stack(*given)

                def sends(self, inputs):
                    seen.on_card = True
                    return send(self, inputs)

                patched.setattr(torch.Tensor, "tolist", reads)
                patched.setattr(module, "stack_batches", stacks)
                patched.setattr(Forward, "_sent", sends)
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
def test_a_step_of_any_number_of_trials_waits_once(reads_of_a_step, monkeypatch, card):
    """For the losses and norms, together."""
    if card:  # the forms of a card, which run here too; the numbers of steps of each rank's rows are on the host there
        monkeypatch.setattr(packed, "DEVICES", {"cpu"})
        monkeypatch.setattr(fused, "TOGETHER", {"cpu"})
        monkeypatch.setattr(dropout, "COUNTED", {"cpu"})
        monkeypatch.setattr(passes, "MULTIPLES", {"cpu": 64})
    two, five = reads_of_a_step(2), reads_of_a_step(5)
    assert two == five == {"tolist": 1 + 2 * card}
