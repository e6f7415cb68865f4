"""What every side is given alike: the base, the rows in their order, the threads; and the processes they run in."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loralab.bench.processes import ProcessError, Row, WorkerProcess
from loralab.data.batches import permutation
from loralab.data.docstrings import Docstrings
from loralab.data.encoding import encode
from loralab.data.files import Files
from loralab.models.pretrained import SHIPPED_FOLDER, Pretrained
from loralab.records.environment import environment

TRAIN, VALIDATION = 2048, 16  # rows; no sweep here sees one twice
MAX_LENGTH = 128
LLAMA_1B = {
    **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 32000},
}


@dataclass(frozen=True)
class BenchmarkSetup:
    """``worker``: what every engine is made from; ``lengths``: tokens of the training rows, in the order they are
    trained on; ``last_block``: the number of the base's last layer."""

    folder: Path
    threads: int
    device: str
    worker: Row
    lengths: list[int]
    last_block: int
    test: str = ""  # a file of rows that neither training nor validation has

    def tokens(self, steps: int, batch: int) -> int:
        """What one trial trains on, padding not counted."""
        return sum(self.lengths[: steps * batch])

    def start(self, engine: str, **options: Any) -> WorkerProcess:
        """A process for one library."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return WorkerProcess(engine, {**self.worker, **options}, self.folder, threads)

    def sweep(self, words: list[str]) -> float:
        """Seconds of a whole ``loralab train -m``, from its start to its end. Raises ProcessError."""
        return self.command(["train", "-m", *self.worker["words"], *words])

    def command(self, words: list[str]) -> float:
        """Seconds of ``loralab WORDS``, from its start to its end. Raises ProcessError."""
        command = ["-m", "loralab.cli.main", *words]
        with self.start("loralab.bench.worker.Python") as process:
            answer = process.ask({"words": command, "folder": str(self.folder)})
            if answer["exit_code"]:
                raise ProcessError("loralab", answer["exit_code"], process.tail())
        return float(answer["seconds"])


def prepare(folder: Path, device: str, threads: int) -> BenchmarkSetup:
    """Writes the rows, as text and in token ids, and on CUDA the weights of a random 1B Llama, below ``folder``."""
    mined = Docstrings().splits()
    files: Row = {"prompt": "{prompt}", "target": "{target}"}
    parts = {"train": mined.train[:TRAIN], "validation": mined.validation[:VALIDATION], "test": mined.test[:VALIDATION]}
    for split, rows in parts.items():
        files[split] = str(folder / f"{split}.jsonl")
        lines = [json.dumps({"prompt": row.prompt, "target": row.target}) + "\n" for row in rows]
        Path(files[split]).write_text("".join(lines), "utf-8")
    test = files.pop("test")
    model = SHIPPED_FOLDER if device == "cpu" else _write_llama(folder / "llama_1b")
    tokenizer = Pretrained(name_or_path=str(SHIPPED_FOLDER)).load_tokenizer()
    encoded = encode(Files(**files).splits(), tokenizer, "causal_lm", MAX_LENGTH)
    train = [encoded.train[i] for i in permutation(len(encoded.train), seed=0, epoch=0)]
    words = [
        *("model=hf", f"model.name_or_path={model}", f"model.max_length={MAX_LENGTH}", *device_words(device)),
        *("data=files", *(f"data.{key}={value}" for key, value in files.items())),
        *("quantization=nf4_double", "callbacks=none", "plan.record=false"),
    ]
    worker = {
        **{"model": str(model), "device": device, "words": words, "folder": str(folder)},
        **{"rows": str(folder / "rows.json"), "pad": tokenizer.pad_token_id},
    }
    splits = {"train": train, "validation": encoded.validation}
    ids = {name: [(row.input_ids, row.labels) for row in rows] for name, rows in splits.items()}
    Path(worker["rows"]).write_text(json.dumps(ids), "utf-8")
    layers = json.loads((model / "config.json").read_text("utf-8"))["num_hidden_layers"]
    return BenchmarkSetup(folder, threads, device, worker, [len(row.input_ids) for row in train], layers - 1, test)


def device_words(device: str) -> list[str]:
    """Of every run here: where and in which precision, and that metrics.jsonl is all its log."""
    on_card = ["trainer=gpu", "trainer.precision=bf16-mixed", "model.dtype=bfloat16"]
    return ["logger=none", *(on_card if device == "cuda" else ["trainer=cpu", "model.dtype=float32"])]


def trial_words(trials: Sequence[Row]) -> list[str]:
    """A trial for loralab's command line, or a grid of r (lora_alpha = 2 r) and lr."""
    ranks, rates = (",".join(map(str, dict.fromkeys(trial[key] for trial in trials))) for key in ("r", "lr"))
    return [
        *(f"adapter.r={ranks}", f"optimizer.lr={rates}", "adapter.lora_alpha='${loralab.mul:2,${adapter.r}}'"),
        f"adapter.target_modules='{trials[0]['target_modules']}'",
        *(f"trainer.max_steps={trials[0]['steps']}", f"data.batch_size={trials[0]['batch']}"),
    ]


def describe_machine() -> Row:
    """A record's ``environment``, with the versions of the peers that are installed."""
    machine = environment()
    for name in ("peft", "accelerate"):
        with suppress(PackageNotFoundError):
            machine["versions"] = {**machine["versions"], name: version(name)}
    return machine


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once (Linux; elsewhere the logical ones)."""
    usable: Any = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in usable]
    return len({path.read_text() for path in siblings if path.is_file()}) or len(usable)


def _write_llama(folder: Path) -> Path:
    """Speed asks nothing of the weights' values."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    keys: Row = {**LLAMA_1B, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED_FOLDER).save_pretrained(folder)
    return folder
