"""The same trials in loralab, one after the other on one base: what a single run is made of."""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback

from loralab.adapters.lora import LoRA
from loralab.bench.worker import Clock, Row
from loralab.data.files import Files
from loralab.models.pretrained import Pretrained
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.records.wandb import Wandb
from loralab.running.runner import Runner
from loralab.training.specs import TrialSpec
from loralab.training.trainer import TrainerSpec


class Watch(Callback):
    """Reads the clock after each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock()


class Loralab:
    """A runner, which keeps the base."""

    dequantize: Literal["per_use", "resident"] = "per_use"

    def __init__(self, job: Row) -> None:
        self.job, self.runner, self.numbers = job, Runner(), itertools.count()
        self.folder = Path(tempfile.mkdtemp(dir=job["folder"]))

    def trial(self, trial: Row) -> Row:
        """{steps: seconds of each but the first, losses, trainable_parameters}."""
        clock = Clock(self.job["device"])
        spec = self.spec(trial, clock)
        (done,) = self.runner.run([spec])
        if done["status"] != "completed":
            raise RuntimeError(done["error"])
        rows = map(json.loads, (spec.folder / "metrics.jsonl").read_text("utf-8").splitlines())
        return {
            "steps": clock.steps(),
            "losses": [row["train/loss"] for row in rows if "train/loss" in row],
            "trainable_parameters": done["adapter"]["trainable_parameters"],
        }

    def spec(self, trial: Row, clock: Clock) -> TrialSpec:
        cuda = self.job["device"] == "cuda"
        name = f"trial{next(self.numbers)}"
        return TrialSpec(
            id=name,
            folder=self.folder / name,
            seed=0,
            metric="val/loss",
            metric_mode="min",
            model=Pretrained(
                name_or_path=self.job["model"],
                dtype="bfloat16" if cuda else "float32",
                max_length=self.job["max_length"],
            ),
            quantization=NoQuantization() if self.job["dense"] else self._nf4(),
            adapter=LoRA(r=trial["r"], lora_alpha=trial["lora_alpha"], target_modules=trial["target_modules"]),
            data=Files(batch_size=trial["batch"], **self.job["files"]),
            optimizer=AdamW(lr=trial["lr"]),
            schedule=Schedule(),
            trainer=TrainerSpec(
                accelerator="gpu" if cuda else "cpu",
                max_steps=trial["steps"],
                precision="bf16-mixed" if cuda else "auto",
            ),
            logger=Wandb(mode="disabled"),
            callbacks={"watch": lambda: Watch(clock)},
        )

    def _nf4(self) -> FourBit:
        return FourBit(double_quant=True, dequantize=self.dequantize)


class Resident(Loralab):
    """The dense weights kept: the same numbers for more memory."""

    dequantize = "resident"
