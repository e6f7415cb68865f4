"""Small random bases, a tokenizer of single bytes, small files and a made-up sweep: no network, no weights.

The sweep's numbers are synthetic: none of them is a result of loralab.
"""

import functools
import gc
import json
import logging
import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is there, as the command line has it
os.environ["COLUMNS"] = "100"  # of terminal tables; a test process is told other widths
import compositions
import torch
from lightning.fabric.utilities import registry

from loralab import signals
from loralab.adapters.lora import LoRA
from loralab.data.files import Files
from loralab.data.tokenizer import train_tokenizer
from loralab.models import loading, pretrained
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.records import record
from loralab.records.log_file import LogFile
from loralab.records.wandb import Wandb
from loralab.training.specs import TrialSpec
from loralab.training.trainer import TrainerSpec

torch.set_num_threads(1)

VOCABULARY = 258  # 256 bytes, </s> and <pad>: a text's tokens are its bytes
FAMILIES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "t5": {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2},
    "roberta": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "phi": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
MORE = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 128},
    "roberta": {"max_position_embeddings": 130},
    "phi": {"max_position_embeddings": 128},
}
TASKS = {"t5": "seq2seq_lm", "distilbert": "sequence_classification", "roberta": "sequence_classification"}


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Tests that ask whether an object died collect garbage: what the session holds anyway is not looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_compositions():
    """Hydra reads and merges the same files in every composition; here once for each choice of them."""
    compositions.keep()


@pytest.fixture(scope="session", autouse=True)
def _quick_trainers():
    """Lightning looks through the metadata of every installed package for each Trainer; here once."""
    registry.entry_points = functools.cache(registry.entry_points)


@pytest.fixture(scope="session", autouse=True)
def _quick_writes():
    """No test asks what outlasts a power cut, so none waits for the disk."""
    os.fsync = lambda file: None


@pytest.fixture(scope="session", autouse=True)
def _quick_figures():
    """A figure's file is drawn in the tests of it alone (test_vega.py)."""
    from loralab.reporting import report

    report.drawn = lambda spec, kind: kind.encode()


@pytest.fixture(autouse=True)
def _no_handlers_left():
    """Hydra gives the root logger handlers on streams that end with the test."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in list(logging.getLogger().handlers):
        if handler not in before and type(handler) in (logging.StreamHandler, logging.FileHandler, LogFile):
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets, where this machine has it."""
    folder = os.environ.get("LORALAB_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LORALAB_TEST_DATA names no folder with real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A saved tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a"], VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Paths: pairs (all rows of 24 bytes, prompt and target of differing share), ragged pairs, labelled texts."""
    folder = tmp_path_factory.mktemp("rows")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    paths = {}
    for split, count in (("train", 20), ("validation", 7)):
        pairs, ragged, labels = [], [], []
        for i in range(count):
            text = f"{words[i % 6]} {words[(i * i + 1) % 6]} {i:02d}".ljust(24, ".")[:24]
            cut = 6 + 2 * (i % 7)
            pairs.append({"q": text[:cut], "a": text[cut:]})
            ragged.append({"q": words[i % 6] * (1 + i % 3), "a": words[(i + 1) % 6] + "!" * (i % 5)})
            labels.append({"t": text[: 8 + i % 9], "y": ["no", "yes", "maybe"][i % 3]})
        for name, content in (("pairs", pairs), ("ragged", ragged), ("labels", labels)):
            path = folder / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
            paths[name, split] = path
    return paths


@pytest.fixture(scope="session")
def make_data(rows):
    """A ``data=files`` spec over one kind of ``rows``."""

    def make(kind="pairs", **changes):
        templates = {"text": "{t}", "label": "y"} if kind == "labels" else {"prompt": "{q}", "target": "{a}"}
        paths = {split: str(rows[kind, split]) for split in ("train", "validation")}
        return Files(**{"batch_size": 2, **paths, **templates, **changes})

    return make


@pytest.fixture(scope="session")
def make_model(tokenizer_folder):
    """The spec of a small random base of one of FAMILIES."""

    def make(family="llama", config=None, **changes):
        keys = {"model_type": family, "vocab_size": VOCABULARY, **FAMILIES[family], **MORE.get(family, {})}
        given = {"task": TASKS.get(family, "causal_lm"), "max_length": 64, "dropout": 0.0, "dtype": "float32"}
        given.update(tokenizer=str(tokenizer_folder), config={**keys, **(config or {})})
        return pretrained.Random(**{**given, **changes})

    return make


@pytest.fixture(scope="session")
def load_base(make_model):
    """A loaded base: (family, scheme none or nf4, further fields of the spec)."""

    def load(family="llama", scheme="none", num_labels=None, **changes):
        spec = make_model(family, **changes)
        quantizer = FourBit() if scheme == "nf4" else NoQuantization()
        labels = num_labels or (3 if spec.task == "sequence_classification" else None)
        return loading.load(spec, quantizer, spec.load_tokenizer(), labels)

    return load


@pytest.fixture
def make_spec(tmp_path, make_model, make_data):
    """A checked trial of four steps below tmp_path; every field can be replaced, also ``max_steps`` and the like."""

    def make(name="trial", family="llama", kind=None, **changes):
        task = TASKS.get(family, "causal_lm")
        kind = kind or ("labels" if task == "sequence_classification" else "pairs")
        steps = {key: changes.pop(key) for key in list(changes) if key in TrainerSpec.__dataclass_fields__}
        trainer = TrainerSpec(**{"accelerator": "cpu", "max_steps": 4, **steps})
        given = {
            **{"id": name, "folder": tmp_path / name, "seed": 0, "metric": "val/loss", "metric_mode": "min"},
            **{"model": make_model(family), "quantization": NoQuantization(), "adapter": LoRA(r=4)},
            **{"data": make_data(kind), "optimizer": AdamW(lr=1e-2), "schedule": Schedule(), "trainer": trainer},
            "logger": Wandb(mode="disabled"),
        }
        return TrialSpec(**{**given, **changes})

    return make


@pytest.fixture
def curve():
    """The values of one key in a run's metrics.jsonl, in order."""

    def read(folder, key="train/loss"):
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [row[key] for row in lines if key in row]

    return read


@pytest.fixture
def weights():
    """The tensors of a run's exported adapter."""
    from safetensors.torch import load_file

    def read(folder):
        return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")

    return read


@pytest.fixture
def handlers():
    """Those of SIGINT and SIGTERM are set again afterwards."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def break_off():
    """Runs trials that fail in the pass behind ``step`` optimizer steps; their folders are as a crash leaves them."""

    def run(specs, step):
        from loralab.running.runner import Runner
        from loralab.training.module import FineTuner

        real = FineTuner.training_step

        def broken(self, batches, index):
            if self.trials[0].step == step:
                raise RuntimeError("gone")
            return real(self, batches, index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FineTuner, "training_step", broken)
            assert {one["status"] for one in Runner().run(specs)} == {"failed"}

    return run


@pytest.fixture
def inputs():
    """Model inputs of two rows of 12 tokens for a task, right padding in the second."""

    def make(task="causal_lm", length=12):
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(2, VOCABULARY, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        made = {"input_ids": ids, "attention_mask": mask}
        return {**made, "decoder_input_ids": ids[:, :7]} if task == "seq2seq_lm" else made

    return make


@pytest.fixture
def tiny_arguments(tiny_words):
    """``key=value`` words of the smallest run of the command line."""
    return list(tiny_words)


@pytest.fixture(scope="session")
def tiny_words(tokenizer_folder, rows):
    """Those of ``tiny_arguments``, for runs that several tests share."""
    config = {"vocab_size": VOCABULARY, **FAMILIES["llama"], "num_key_value_heads": 2}
    return [
        *("model=random", f"model.tokenizer={tokenizer_folder}", "model.max_length=64"),
        *(f"+model.config.{key}={value}" for key, value in config.items()),
        *("data=files", "data.prompt='{q}'", "data.target='{a}'", "data.batch_size=2"),
        *(f"data.{split}={rows['pairs', split]}" for split in ("train", "validation")),
        *("logger=none", "trainer=cpu", "trainer.max_steps=2", "adapter.r=2", "callbacks=none", "plan.record=false"),
    ]


@pytest.fixture
def vary():
    """dataclasses.replace."""
    return replace


SYNTHETIC_SCHEMES = {"none": (32.0, 2.41), "int8_absmax": (8.03, 2.415), "nf4_double": (4.127, 2.46)}


def synthetic_record(scheme: str, r: int, seed: int) -> dict:
    """Looks like a trial's record; every number comes from a formula and a random generator."""
    noise = random.Random(f"{scheme}{r}{seed}")
    bits, floor = SYNTHETIC_SCHEMES[scheme]
    loss = floor + 0.16 / math.sqrt(r) + noise.gauss(0, 0.006)
    trial = record.blank(
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
    trial["base"].update(name="tiny", fingerprint="f" * 64, parameters=4_325_376, quantized_parameters=3_145_728)
    trial["base"].update(bytes=int(3_145_728 * bits / 8), bits_per_parameter=bits)
    trial["adapter"].update(method="lora", trainable_parameters=6144 * r, bytes=6144 * r * 4, modules=["q_proj"] * 28)
    trial["memory"].update(device="cpu", predicted_peak_bytes=210_000_000, measured_peak_bytes=212_345_678 + r)
    trial["time"].update(startup_s=2.0, train_s=11.5 + noise.random(), wall_s=15.0, steps=60, tokens=61_000)
    trial["time"].update(tokens_per_s=5200 + 300 * noise.random())
    trial["pack"].update(size=1, index=0)
    trial["data"].update(name="docstrings", fingerprint="d" * 64, rows={"train": 4000, "validation": 300})
    trial["environment"].update(versions={"torch": "2.13.0", "lightning": "2.6.6"}, git="abc1234", python="3.11.4")
    trial["environment"].update(cpu="Synthetic CPU, 2 cores")
    trial.update(status="completed", metrics={"val/loss": loss, "val/perplexity": math.exp(loss)})
    return trial


def synthetic_curve(final: float, name: str) -> list[dict]:
    noise = random.Random(name)
    rows = [
        {"step": step, "train/loss": final + 0.9 * math.exp(-step / 14) + noise.gauss(0, 0.05)} for step in range(1, 61)
    ]
    return rows + [{"step": step, "val/loss": final + 0.8 * math.exp(-step / 14)} for step in (20, 40, 60)]


def write_trial(folder, trial: dict) -> None:
    record.write(folder, trial)
    rows = synthetic_curve(trial["metrics"].get("val/loss") or 3.0, trial["trial"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def synthetic_sweep(tmp_path_factory):
    """3 quantizations x 2 ranks x 2 seeds; one of the twelve ran out of memory. Read it, do not change it."""
    root = tmp_path_factory.mktemp("runs") / "synthetic"
    trials = []
    for scheme in SYNTHETIC_SCHEMES:
        for r in (2, 8):
            for seed in (0, 1):
                trial = synthetic_record(scheme, r, seed)
                if (scheme, r, seed) == ("int8_absmax", 8, 1):
                    trial.update(status="out_of_memory", metrics={}, error="backward: no room for 31 MiB <on cpu>")
                folder = f"{scheme},r={r},seed={seed}"
                write_trial(root / folder, trial)
                trials.append({"trial": trial["trial"], "folder": folder, "status": trial["status"]})
    record.write_sweep(
        root,
        {
            "name": "synthetic",
            "question": "SYNTHETIC: what do quantization and rank cost?",
            "axes": {"quantization": list(SYNTHETIC_SCHEMES), "adapter.r": [2, 8], "seed": [0, 1]},
            "fixed": "lora_alpha = 16 while r moves; the learning rate is the same in every arm",
            "command": "loralab sweep synthetic",
            "trials": trials,
        },
    )
    return root


@pytest.fixture(scope="session")
def synthetic():
    """The function that makes a record, for tests that build their own folders."""
    return synthetic_record


@pytest.fixture
def write():
    """The function that writes a record into a folder, with a curve."""
    return write_trial


@pytest.fixture
def write_runs(tmp_path):
    """Writes {(r, seed): loss} below a folder ``name`` with what ``change`` does to a record; returns the parent."""

    def write(losses, change=lambda trial, r, seed: None, name="runs"):
        for (r, seed), loss in losses.items():
            trial = synthetic_record("none", r, seed)
            trial["metrics"] = {"val/loss": loss}
            trial["trial"] = f"{name}-{r}-{seed}"
            change(trial, r, seed)
            write_trial(tmp_path / name / f"{r}-{seed}", trial)
        return tmp_path

    return write


PAPER = {
    "table": "table 2 of a paper",
    "metric": "perplexity",
    "columns": ["mean"],
    "published": {"none": [20.0], "int8_absmax": [29.48], "nf4_double": [31.07]},
}


@pytest.fixture
def paper(tmp_path, synthetic, write):
    """A sweep over quantization with ``losses`` {scheme: by seed} and ``claims``."""

    def build(losses, claims, change=lambda stored_trial: None):
        trials = []
        for scheme, values in losses.items():
            for seed, loss in enumerate(values):
                stored_trial = {**synthetic(scheme, 2, seed), "metrics": {"val/loss": loss}}
                change(stored_trial)
                write(tmp_path / stored_trial["trial"], stored_trial)
                trials.append({"trial": stored_trial["trial"], "folder": stored_trial["trial"]})
        axes = {"quantization": list(losses), "seed": [0, 1, 2]}
        record.write_sweep(
            tmp_path, {"name": "p", "axes": axes, "trials": trials, "paper": {**PAPER, "claims": claims}}
        )
        return tmp_path

    return build
