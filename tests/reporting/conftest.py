"""A made-up sweep, written to a temporary folder: synthetic numbers, none of them a result of loralab."""

import json
import math
import random

import pytest

from loralab.records import record

SCHEMES = {"none": (32.0, 2.41), "int8_absmax": (8.03, 2.415), "nf4_double": (4.127, 2.46)}


def synthetic_record(scheme: str, r: int, seed: int) -> dict:
    """Looks like a trial's record; every number comes from a formula and a random generator."""
    noise = random.Random(f"{scheme}{r}{seed}")
    bits, floor = SCHEMES[scheme]
    loss = floor + 0.16 / math.sqrt(r) + noise.gauss(0, 0.006)
    made = record.blank(
        f"synthetic-{scheme}-{r}-{seed}",
        config={
            "seed": seed,
            "metric": "val/loss",
            "metric_mode": "min",
            "model": {"_target_": "loralab.models.pretrained.Tiny", "name_or_path": "tiny", "max_length": 256},
            "quantization": {"_target_": f"loralab.quantization.x.{scheme}", "block_size": 64, "bits": bits},
            "adapter": {"_target_": "loralab.adapters.lora.LoRA", "r": r, "lora_alpha": 16},
            "data": {"_target_": "loralab.data.docstrings.Docstrings", "batch_size": 8},
            "optimizer": {"_target_": "loralab.optim.optimizers.AdamW", "lr": 0.002},
            "trainer": {"_target_": "loralab.training.trainer.Cpu", "max_steps": 60},
            "logger": {"project": f"p{seed}"},
        },
        overrides=[f"quantization={scheme}", f"adapter.r={r}", f"seed={seed}"],
        choices={"model": "tiny", "quantization": scheme, "adapter": "lora", "data": "docstrings"},
        seed=seed,
    )
    made["base"].update(name="tiny", fingerprint="f" * 64, parameters=4_325_376, quantized_parameters=3_145_728)
    made["base"].update(bytes=int(3_145_728 * bits / 8), bits_per_parameter=bits)
    made["adapter"].update(method="lora", trainable_parameters=6144 * r, bytes=6144 * r * 4, modules=["q_proj"] * 28)
    made["memory"].update(device="cpu", predicted_peak_bytes=210_000_000, measured_peak_bytes=212_345_678 + r)
    made["time"].update(startup_s=2.0, train_s=11.5 + noise.random(), wall_s=15.0, steps=60, tokens=61_000)
    made["time"].update(tokens_per_s=5200 + 300 * noise.random())
    made["pack"].update(size=1, index=0)
    made["data"].update(name="docstrings", fingerprint="d" * 64, rows={"train": 4000, "validation": 300})
    made["environment"].update(versions={"torch": "2.13.0", "lightning": "2.6.6"}, git="abc1234", python="3.11.4")
    made["environment"].update(cpu="Synthetic CPU, 2 cores")
    made.update(status="completed", metrics={"val/loss": loss, "val/perplexity": math.exp(loss)})
    return made


def synthetic_curve(final: float, name: str) -> list[dict]:
    noise = random.Random(name)
    rows = [
        {"step": step, "train/loss": final + 0.9 * math.exp(-step / 14) + noise.gauss(0, 0.05)} for step in range(1, 61)
    ]
    return rows + [{"step": step, "val/loss": final + 0.8 * math.exp(-step / 14)} for step in (20, 40, 60)]


def write_trial(folder, made: dict) -> None:
    record.write(folder, made)
    rows = synthetic_curve(made["metrics"].get("val/loss") or 3.0, made["trial"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def synthetic_sweep(tmp_path_factory):
    """3 quantizations x 2 ranks x 2 seeds; one of the twelve ran out of memory. Read it, do not change it."""
    root = tmp_path_factory.mktemp("runs") / "synthetic"
    trials = []
    for scheme in SCHEMES:
        for r in (2, 8):
            for seed in (0, 1):
                made = synthetic_record(scheme, r, seed)
                if (scheme, r, seed) == ("int8_absmax", 8, 1):
                    made.update(status="out_of_memory", metrics={}, error="backward: no room for 31 MiB <on cpu>")
                folder = f"{scheme},r={r},seed={seed}"
                write_trial(root / folder, made)
                trials.append({"trial": made["trial"], "folder": folder, "status": made["status"]})
    record.write_sweep(
        root,
        {
            "name": "synthetic",
            "question": "SYNTHETIC: what do quantization and rank cost?",
            "axes": {"quantization": list(SCHEMES), "adapter.r": [2, 8], "seed": [0, 1]},
            "fixed": "lora_alpha = 16 while r moves; the learning rate is the same in every arm",
            "command": "loralab sweep synthetic",
            "trials": trials,
        },
    )
    return root


@pytest.fixture
def make_trial():
    """The functions above, for tests that build their own folders: (record, write)."""
    return synthetic_record, write_trial
