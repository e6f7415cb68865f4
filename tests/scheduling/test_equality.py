"""Over 45 steps, and over 200 in the slow test, a trial of a pack is bit for bit what it is alone."""

import gzip
import json

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.data.files import Files
from loralab.models.pretrained import Pretrained
from loralab.optim.optimizers import AdamW, Schedule
from loralab.running.runner import Runner

TARGETS = ["all-linear", ["q_proj", "v_proj"], ["down_proj"], r".*layers\.[34]\..*_proj"]
KINDS = ["constant", "linear", "cosine"]


@pytest.fixture
def trials(real_data, make_spec, tmp_path):
    """``count`` trials of a 260K-parameter Llama, unlike in all they may be unlike in; rows of 32 tokens."""
    with gzip.open(real_data / "tinyshakespeare" / "train.txt.gz", "rt") as file:
        text = " ".join(file.read(12_000).split())
    rows = [{"q": text[i : i + 200], "a": text[i + 200 : i + 216]} for i in range(0, 8000, 160)]
    data = {"prompt": "{q}", "target": "{a}"}  # prompts are cut until a row has 32 tokens
    for split, own in (("train", rows[:40]), ("validation", rows[40:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        data[split] = str(tmp_path / f"{split}.jsonl")
    model = Pretrained(str(real_data / "weights" / "stories260K-hf"), max_length=32, dropout=0.0, dtype="float32")

    def make(prefix, count, steps):
        return [
            make_spec(
                f"{prefix}{i}",
                model=model,
                seed=i,
                data=Files(batch_size=1 + i % 2, **data),
                adapter=LoRA(
                    r=1 + 3 * i % 16,
                    lora_alpha=8.0 + 2 * i,
                    lora_dropout=0.1 * (i % 3),
                    target_modules=TARGETS[i % 4],
                    use_rslora=i % 5 == 4,
                ),
                optimizer=AdamW(lr=1e-2 / (1 + i % 7), weight_decay=0.01 * (i % 4)),
                schedule=Schedule(kind=KINDS[i % 3], warmup_steps=10 * (i % 2)),
                gradient_clip_val=[1.0, None, 0.1, 0.5][i % 4],
                max_steps=steps - 20 * (i % 3),
            )
            for i in range(count)
        ]

    return make


@pytest.mark.parametrize(("count", "steps"), [(4, 45), pytest.param(16, 200, marks=pytest.mark.slow)])
def test_packed_trials_are_bit_identical_to_solo_ones(trials, count, steps, curve, weights):
    assert torch.get_num_threads() == 1
    runner = Runner()
    packed, solo = trials("packed", count, steps), trials("solo", count, steps)
    together = runner.run(packed)
    apart = [runner.run([spec])[0] for spec in solo]
    assert [one["status"] for one in (*together, *apart)] == ["completed"] * (2 * count), together[0]["error"]
    assert [one["pack"] for one in together] == [{"size": count, "index": i} for i in range(count)]
    for ours, theirs, one, other in zip(packed, solo, together, apart, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
            assert curve(ours.folder, key) == curve(theirs.folder, key)
        assert len(curve(ours.folder)) == ours.trainer.max_steps
        assert one["metrics"] == other["metrics"]
        left, right = weights(ours.folder), weights(theirs.folder)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in right)
