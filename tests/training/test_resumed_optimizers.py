"""Every optimizer goes on from a checkpoint with the bits of a run that did not break off: adapter, state and rows."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._pytree import tree_flatten

from loralab.adapters.lora import LoRA
from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.config.places import data_root
from loralab.optim.optimizers import state_of
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint

OPTIONS = sorted(path.stem for path in (data_root() / "conf" / "optimizer").glob("*.yaml"))
OTHERS = {  # whatever a class keeps: a momentum, sums, counts, 8-bit codes, nested states
    "sgd with momentum": {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"_target_": "torch.optim.RMSprop", "lr": 1e-3, "centered": True, "momentum": 0.5},
    "nadam": {"_target_": "torch.optim.NAdam", "lr": 1e-3},
    "adafactor": {"_target_": "torch.optim.Adafactor", "lr": 1e-2},
    "lion": {"_target_": "bitsandbytes.optim.Lion", "lr": 1e-3},
    "lion in 8 bits": {"_target_": "bitsandbytes.optim.Lion8bit", "lr": 1e-3},
    "ademamix": {"_target_": "bitsandbytes.optim.AdEMAMix", "lr": 1e-3},
}
QUICK = ("sgd with momentum", "lion in 8 bits")


class Keep(Callback):
    """The optimizer state at the end of the training."""

    pack_aware = True
    states: dict = {}  # noqa: RUF012 - of all of them, by trial

    def on_train_end(self, trainer, module):
        for index, trial in enumerate(module.trials):
            self.states[trial.spec.id] = state_of(trainer.optimizers[0], index)


def made(name, flat):
    if name in OTHERS:
        return build(OTHERS[name], "optimizer")
    return build(plain(compose([f"optimizer={name}", f"optimizer.flat={str(flat).lower()}"]))["optimizer"], "optimizer")


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        *((option, False) for option in OPTIONS),
        *((name, False) for name in QUICK),
        *(pytest.param(option, True, marks=pytest.mark.slow) for option in OPTIONS),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in OTHERS if name not in QUICK),
    ],
)
def test_it_goes_on_with_the_same_bits(make_spec, break_off, weights, curve, name, flat):
    optimizer = made(name, flat)

    def trial(prefix):
        callbacks = {"checkpoint": lambda: Checkpoint(None, 1), "keep": Keep}
        adapter = LoRA(r=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
        return make_spec(prefix, max_steps=3, optimizer=optimizer, adapter=adapter, callbacks=callbacks)

    whole, again = trial("whole"), trial("again")
    (expected,) = Runner().run([whole])
    break_off([again], step=2)
    (done,) = Runner().run([again])
    assert done["status"] == expected["status"] == "completed", expected["error"]
    assert done["resumed_from"] == 2
    assert curve(again.folder) == curve(whole.folder)
    assert all(torch.equal(value, weights(again.folder)[key]) for key, value in weights(whole.folder).items())
    (ours, structure), (theirs, like) = (tree_flatten(Keep.states[key]) for key in ("again", "whole"))
    assert structure == like
    assert ours
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert done["optimizer"] == expected["optimizer"]
