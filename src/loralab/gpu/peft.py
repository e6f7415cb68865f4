"""``python -m loralab.gpu.peft JOB ANSWERS``: one trial of PEFT under Hugging Face's Trainer, over a random base whose
linear layers are bitsandbytes' own in NF4.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.bench.layer import linear4bit
from loralab.bench.peers import WithTrainer
from loralab.data.encoding import Example
from loralab.gpu.lab import Row, answer
from loralab.gpu.speed import LR, WARM_UP, measured
from loralab.models import pretrained
from loralab.models.architecture import auto_class


class Peer(WithTrainer):
    """A base drawn and packed on the device; rows of random tokens, as long as the other side's."""

    def __init__(self, job: Row) -> None:
        self.device, self.pad = job["device"], 0
        self.base = quantized(job["config"], self.device)
        shape = ((WARM_UP + job["steps"]) * job["rows"], job["length"])
        ids = torch.randint(1, self.base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.train = [Example(one, one, 0) for one in ids.tolist()]
        self.validation = self.train[: job["rows"]]


def quantized(config: Row, device: str) -> Any:
    """A random model with every linear layer but its output in NF4, double quantization."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = pretrained.Random(config=config, dropout=0.0)
    with torch.device(device):
        model = auto_class("causal_lm").from_config(spec.prepared_config(None), dtype=dtype)
    output = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not output:
            made: Any = linear4bit(layer, dtype).to(device)
            if hasattr(made, "support_avx512bf16_for_cpu"):
                made.support_avx512bf16_for_cpu = False  # its first validation would repack the weight for good
            model.set_submodule(name, made)
    model.is_loaded_in_4bit = True  # by which PEFT tells these layers from dense ones
    return model


def main(asked: Path, answers: Path) -> None:
    """JOB: as of ``speed``."""
    job = json.loads(asked.read_text("utf-8"))
    trial = {"r": job["r"], "lora_alpha": 2 * job["r"], "target_modules": "all-linear"}
    trial.update(steps=WARM_UP + job["steps"], batch=job["rows"], lr=LR)
    done = Peer(job).trial(trial)
    told = measured(job, done["steps"], 1)
    answer(answers, {"name": "PEFT + HF Trainer", **told, "trainable_parameters": done["trainable_parameters"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
