"""The bases and batches that are measured, on a card and in a rehearsal, and the words of a run over them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.bench.setup import LLAMA_1B, device_words

LLAMA_7B = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048, "vocab_size": 32000},
}
SMALL = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "num_hidden_layers": 2},
}
SMALL_GPT2 = {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 64, "n_layer": 2, "n_head": 2}


@dataclass(frozen=True)
class Shape:
    """A random base (keys over loralab's small Llama) and the ``rows`` of ``length`` tokens that a trial's step has."""

    name: str
    config: dict[str, Any]
    length: int
    rows: int

    def words(self, device: str, rows: str = "rows") -> list[str]:
        """For the command line: base, batch, device and the data of ``write_rows``."""
        keys = [f"+model.config.{key}={value}" for key, value in self.config.items()]
        batch = [f"model.max_length={self.length}", f"data.batch_size={self.rows}"]
        data = ["data=files", "data.text='{text}'", f"data.train={rows}.jsonl", "data.validation=held_out.jsonl"]
        return ["model=random", "model.drawn_on=device", "model.dropout=0", *keys, *batch, *data, *device_words(device)]


@dataclass(frozen=True)
class Speed:
    """A base, and for each of ``shapes``, whose ``config`` is the same, how many trials share a pass."""

    quantization: str
    shapes: tuple[Shape, ...]
    trials: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What a session measures."""

    plan: tuple[Shape, ...]
    largest: Shape  # planned with checkpointing
    large: Shape  # paging, resuming, halving
    speed: tuple[Speed, ...]
    steps: int  # timed, of each speed
    spiky_length: int  # tokens

    @property
    def most_tokens(self) -> int:
        """Of a row of any run."""
        shapes = (*self.plan, self.largest, *(shape for speed in self.speed for shape in speed.shapes))
        return max(self.spiky_length, *(shape.length for shape in shapes))


ONE_B = (Shape("llama 1B", LLAMA_1B, 128, 1), Shape("llama 1B", LLAMA_1B, 512, 1))
TINY = (Shape("tiny llama", SMALL, 32, 1), Shape("tiny llama", SMALL, 64, 1))
PACKED, DENSE = "nf4_double", "none"
CARD = Sizes(
    plan=(
        Shape("tiny llama", {"model_type": "llama"}, 256, 8),
        Shape("gpt2", {"model_type": "gpt2"}, 512, 8),
        Shape("llama 1B", LLAMA_1B, 512, 4),
    ),
    largest=Shape("llama 7B", LLAMA_7B, 512, 1),
    large=Shape("llama 1B", LLAMA_1B, 192, 2),
    speed=(
        Speed(PACKED, ONE_B, (1, 4, 16, 64)),
        Speed(DENSE, ONE_B, (1, 4, 16, 64)),
        Speed(PACKED, (Shape("llama 7B", LLAMA_7B, 512, 1),), (1, 4, 8)),
    ),
    steps=10,
    spiky_length=1024,
)
CPU = Sizes(
    plan=(Shape("tiny llama", SMALL, 64, 2), Shape("gpt2", SMALL_GPT2, 64, 2)),
    largest=Shape("tiny llama", SMALL, 64, 2),
    large=Shape("tiny llama", SMALL, 64, 2),
    speed=(Speed(PACKED, TINY, (1, 4, 16, 64)), Speed(DENSE, TINY[:1], (1, 4))),
    steps=3,
    spiky_length=128,
)


def write_rows(folder: Path, words: int = 700) -> None:
    """rows.jsonl and held_out.jsonl: documents longer than any window here, so that rows are of the same length.
    ragged.jsonl: one such among shorter ones."""
    for name, first, count in (("rows", 0, 8), ("ragged", 500, 8), ("held_out", 1000, 1)):
        lengths = [words if name != "ragged" or not i else 4 + 3 * i for i in range(count)]
        lines = [json.dumps({"text": f"row {first + i} holds word {i} " * n}) for i, n in enumerate(lengths)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
