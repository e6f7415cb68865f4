"""Which step is profiled, what a pack's record says of its validation, and which step a callback's row is of."""

import json

import pytest
from lightning.pytorch import Callback

from loralab.adapters.lora import LoRA
from loralab.memory.phases import PhaseMemory
from loralab.running.runner import Runner


class Fed(Callback):
    """Notes what every step is really fed: of each pass (tokens, rows x longest of inputs, and of labels beside)."""

    pack_aware = True

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        tensors = [one["tensors"] for one in batch.values()]
        masks = [one["attention_mask"] for one in tensors]
        labels = [(one["labels"] != -100).reshape(len(one["labels"]), -1) for one in tensors]
        rows = sum(len(mask) for mask in masks)
        inputs, targets = (max(int(row.sum()) for part in parts for row in part) for parts in (masks, labels))
        found = (sum(int(mask.sum()) for mask in masks), rows * inputs, rows * (inputs + targets))
        self.steps.setdefault(trainer.global_step + 1, []).append(found)


KINDS = {  # family, weight (a place in what Fed notes), changes
    "without padding": ("llama", 0, {"max_steps": 8}),
    "accumulated": ("llama", 0, {"accumulate_grad_batches": 3}),
    "padded": ("llama", 1, {"model": "eager"}),
    "classified": ("roberta", 1, {"max_steps": 6}),
    "encoder and decoder": ("t5", 2, {"max_steps": 6}),
}
FAST = {("without padding", True), ("padded", False), ("encoder and decoder", True)}


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        pytest.param(kind, packed, marks=[] if (kind, packed) in FAST else pytest.mark.slow)
        for kind in KINDS
        for packed in (False, True)
    ],
)
def test_the_step_with_the_most_tokens_is_profiled(make_spec, make_model, kind, packed):
    family, weight, changes = KINDS[kind]
    if changes.get("model"):
        changes = {**changes, "model": make_model(attn_implementation=changes["model"])}
    rows = None if family == "roberta" else "ragged"
    fed = Fed()
    observed = {"memory": PhaseMemory, "fed": lambda: fed}
    specs = [make_spec(f"{n}", family, rows, seed=n, callbacks=observed, **changes) for n in range(3 if packed else 1)]
    records = Runner().run(specs)
    assert [one["error"] for one in records] == [None] * len(specs)
    heaviest = max(one[weight] for passes in fed.steps.values() for one in passes)
    for one in records:
        step = one["memory"]["measured_batch"]["step"]
        assert max(of[weight] for of in fed.steps[step]) == heaviest, (step, fed.steps)


def test_every_phase_of_a_pack_is_measured_its_validation_too(make_spec):
    changes = {"kind": "ragged", "callbacks": {"memory": PhaseMemory}}
    specs = [make_spec(f"{r}", adapter=LoRA(r=r), **changes) for r in (2, 4, 8)]
    records = Runner().run(specs)
    adapters = sum(one["adapter"]["bytes"] for one in records)
    for one in records:
        phases = one["memory"]["by_phase"]
        assert phases == records[0]["memory"]["by_phase"]  # the pack's
        assert phases["evaluation"] > one["base"]["bytes"] + adapters
        assert all(phases[phase] > phases["evaluation"] for phase in ("forward", "backward"))
        assert one["memory"]["measured_peak_bytes"] == max(phases.values())


class Counting(Callback):
    """Reports from every hook of a step."""

    pack_aware = True

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.report({"own/begun": trainer.global_step + 1})

    def on_before_backward(self, trainer, pl_module, *_):
        pl_module.report({"own/backward": trainer.global_step + 1})

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.report({"own/ended": trainer.global_step})


@pytest.mark.parametrize("packed", [False, True])
def test_a_callbacks_row_is_of_the_step_it_was_made_in(make_spec, packed):
    changes = {"callbacks": {"own": Counting}, "val_check_interval": 2}
    specs = [make_spec(f"{n}", seed=n, **changes) for n in range(2 if packed else 1)]
    Runner().run(specs)
    for spec in specs:
        found = [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]
        for key in ("own/begun", "own/backward", "own/ended"):
            assert [(row["step"], row[key]) for row in found if key in row] == [(n, n) for n in (1, 2, 3, 4)], key
        assert [row["step"] for row in found if "train/loss" in row] == [1, 2, 3, 4]
