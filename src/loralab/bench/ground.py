"""What every side is given alike: the base, the rows in their order, the threads; and the processes they run in."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loralab.bench.worker import Row
from loralab.data.base import Row as Text
from loralab.data.batches import Stream
from loralab.data.docstrings import Docstrings
from loralab.data.encoding import Encoded, encode
from loralab.data.files import Files
from loralab.models.pretrained import SHIPPED_FOLDER, Pretrained

SOURCE = Path(__file__).resolve().parents[2]
TRAIN, VALIDATION = 2048, 16  # rows; no sweep here sees one twice
MAX_LENGTH = 128
LLAMA_1B = {
    **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048},
}


class Failed(Exception):  # noqa: N818 - it becomes a row's error
    """A side could not do its work; the others go on."""


@dataclass(frozen=True)
class Ground:
    """``job``: what a worker is told; ``lengths``: tokens of the training rows, in the order they are trained on."""

    folder: Path
    threads: int
    device: str
    job: Row
    lengths: list[int]
    last_block: int

    def tokens(self, steps: int, batch: int) -> int:
        """What one trial trains on, padding not counted."""
        return sum(self.lengths[: steps * batch])

    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            **{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        }

    def sweep(self, words: list[str]) -> float:
        """Seconds of a whole ``loralab train -m``, from its start to its end."""
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "loralab.cli.main", "train", "-m", *words, *self.words()],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise Failed(f"exit code {done.returncode}: {done.stderr.strip()[-1000:]}")
        return seconds

    def words(self) -> list[str]:
        """Base, data and device for the command line."""
        cuda = self.device == "cuda"
        precision = ["model.dtype=bfloat16", "trainer=gpu", "trainer.precision=bf16-mixed"]
        return [
            *("model=hf", f"model.name_or_path={self.job['model']}", f"model.max_length={MAX_LENGTH}"),
            *("data=files", *(f"data.{key}={value}" for key, value in self.job["files"].items())),
            *(precision if cuda else ["model.dtype=float32", "trainer=cpu"]),
            *("quantization=nf4_double", "seed=0", "logger=none", "callbacks=none", "plan.record=false"),
        ]


class Side:
    """A worker process with its base loaded; trials run in it when they are asked for."""

    def __init__(self, ground: Ground, engine: str, medium: bool = False, dense: bool = False) -> None:
        number = len(list(ground.folder.glob("job*.json")))
        job = ground.folder / f"job{number}.json"
        job.write_text(json.dumps({**ground.job, "engine": engine, "medium": medium, "dense": dense}), "utf-8")
        self._said = job.with_suffix(".log")
        begun = time.perf_counter()
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loralab.bench.worker", str(job)],
                cwd=ground.folder,
                env=ground.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        try:
            self._answer()
        except BaseException:
            self.close(kill=True)
            raise
        self.startup_s = time.perf_counter() - begun

    def trial(self, trial: Row) -> Row:
        """The worker's answer, and the ``seconds`` it took. Raises Failed."""
        assert self._process.stdin is not None
        begun = time.perf_counter()
        try:
            self._process.stdin.write(json.dumps(trial) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(self._last_words()) from None
        return {**self._answer(), "seconds": time.perf_counter() - begun}

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        answer: Row = json.loads(line)
        return answer

    def _last_words(self) -> str:
        return f"exit code {self._process.wait()}: {self._said.read_text('utf-8', 'replace').strip()[-1000:]}"

    def close(self, kill: bool = False) -> None:
        """Waits for the process to end, which closing its input asks for."""
        if kill:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


def prepare(folder: Path, device: str, threads: int) -> Ground:
    """Writes the rows, as text and in token ids, and on CUDA the weights of a random 1B Llama, below ``folder``."""
    mined = Docstrings().splits()
    files = {"prompt": "{prompt}", "target": "{target}"}
    for split, rows in (("train", mined.train[:TRAIN]), ("validation", mined.validation[:VALIDATION])):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(_text(row)) + "\n" for row in rows), "utf-8")
        files[split] = str(path)
    model = SHIPPED_FOLDER if device == "cpu" else _write_llama(folder / "llama_1b")
    tokenizer = Pretrained(name_or_path=str(SHIPPED_FOLDER)).load_tokenizer()
    made: Any = Files(**files)  # type: ignore[arg-type]
    encoded = encode(made.splits(), tokenizer, "causal_lm", MAX_LENGTH)
    order = Stream(len(encoded.train), seed=0).take(len(encoded.train))
    job = {
        **{"model": str(model), "device": device, "files": files, "folder": str(folder), "max_length": MAX_LENGTH},
        **{"rows": str(folder / "rows.json"), "pad": tokenizer.pad_token_id},
    }
    (folder / "rows.json").write_text(json.dumps(_ids(encoded, order)), "utf-8")
    layers = json.loads((model / "config.json").read_text("utf-8"))["num_hidden_layers"]
    return Ground(folder, threads, device, job, [len(encoded.train[i].input_ids) for i in order], layers - 1)


def _text(row: Text) -> Row:
    return {"prompt": row.prompt, "target": row.target}


def _ids(encoded: Encoded, order: list[int]) -> Row:
    return {
        "train": [(encoded.train[i].input_ids, encoded.train[i].labels) for i in order],
        "validation": [(one.input_ids, one.labels) for one in encoded.validation],
    }


def _write_llama(folder: Path) -> Path:
    """Speed asks nothing of the weights' values."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    keys: Row = {**LLAMA_1B, "vocab_size": 32000, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED_FOLDER).save_pretrained(folder)
    return folder
