"""``python -m loralab.gpu.speed JOB ANSWERS``: K trials in one pass over one base, for several K; seconds of a step.

Each step ends with the device idle (``Clock``), as the peer's does; the first steps are not counted, nor is what
comes before and after training.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from loralab.adapters.lora import LoRA
from loralab.bench.ours import Watch
from loralab.bench.table import quartiles
from loralab.bench.worker import Clock
from loralab.data.files import Files
from loralab.gpu.lab import Row, answer
from loralab.models.pretrained import Random
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.records.wandb import Wandb
from loralab.running.runner import Runner
from loralab.training.specs import TrialSpec
from loralab.training.trainer import TrainerSpec

WARM_UP = 3  # steps
LR = 1e-4


class Aware(Watch):
    """Does not mind how many trials share a step."""

    pack_aware = True


def specs(job: Row, count: int, clock: Clock) -> list[TrialSpec]:
    """``count`` trials that differ in their seeds."""
    cuda = job["device"] == "cuda"
    model = Random(
        config=job["config"],
        dtype="bfloat16" if cuda else "float32",
        max_length=job["length"],
        dropout=0.0,
        drawn_on="device",
    )
    return [
        TrialSpec(
            id=f"{count}_{seed}",
            folder=Path(job["folder"]) / f"{count}_{seed}",
            seed=seed,
            metric="val/loss",
            metric_mode="min",
            model=model,
            quantization=FourBit(double_quant=True),
            adapter=LoRA(r=job["r"]),
            data=Files(batch_size=job["rows"], text="{text}", train=job["train"], validation=job["validation"]),
            optimizer=AdamW(lr=LR),
            schedule=Schedule(),
            trainer=TrainerSpec(
                accelerator="gpu" if cuda else "cpu",
                max_steps=WARM_UP + job["steps"],
                precision="bf16-mixed" if cuda else "auto",
            ),
            logger=Wandb(mode="disabled"),
            callbacks={"watch": lambda: Aware(clock)},
        )
        for seed in range(count)
    ]


def measured(job: Row, steps: list[float], trials: int) -> Row:
    """``steps``: seconds of each step but the first, of ``trials`` trials in one pass; tokens/s are all of theirs."""
    steps = steps[WARM_UP - 1 :]
    middle = statistics.median(steps)
    peak = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else None
    return {
        **{"trials": trials, "step_s": middle, "quartiles_s": quartiles(steps), "steps": len(steps)},
        **{"tokens_per_s": trials * job["rows"] * job["length"] / middle, "peak_bytes": peak},
    }


def main(asked: Path, answers: Path) -> None:
    """JOB: {device, config, length, rows, r, trials, steps, train, validation, folder}."""
    job = json.loads(asked.read_text("utf-8"))
    runner = Runner()
    first: list[float] = []
    for count in job["trials"]:
        gc.collect()
        if job["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock, begun = Clock(job["device"]), time.monotonic()
        done = runner.run(specs(job, count, clock))
        failed = [one["error"] for one in done if one["status"] != "completed"]
        if failed:
            answer(answers, {"name": "loralab", "trials": count, "error": failed[0]})
            continue
        losses = _losses(Path(job["folder"]) / f"{count}_0")
        first = first or losses
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))
        told = measured(job, clock.steps(), count)
        packs = sorted({one["pack"]["size"] for one in done})
        told.update(name="loralab", loss_difference=apart, pack_sizes=packs, whole_s=time.monotonic() - begun)
        told["trainable_parameters"] = done[0]["adapter"]["trainable_parameters"]
        answer(answers, told)


def _losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
