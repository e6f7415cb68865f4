"""Completions from a trial's adapter, framed as its training rows are, and their ROUGE-L.

Greedy, unless ``data.generation`` says otherwise: what a checkpoint's generation_config.json says is left out.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.base import Adapter
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.data.base import Row
from loralab.data.encoding import IGNORE, Encoder
from loralab.forward.metrics import rouge_l
from loralab.quantization.sequences import decoder_input_ids

FEWEST, SPARE = 8, 4  # tokens of room; beyond the longest target, so that one that does not end is seen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The base in evaluation mode and without gradients, put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Writer:
    """Writes completions of rows; ``length`` bounds prompt and completion together (of seq2seq: each)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        adapter: Adapter | None,
        task: str,
        length: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """``options``: of transformers' GenerationConfig, in place of greedy decoding; ``adapter`` None: the base."""
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.task, self.length, self.options = task, length, dict(options or {})
        self.encoder = Encoder(tokenizer, task, length)
        self.ends = [self.encoder.eos, *self.encoder.target_suffix[:1]]
        self.device = next(model.parameters()).device
        self.start = self._start() if task == "seq2seq_lm" else []

    def settings(self) -> dict[str, Any]:
        """How completions are decoded, for the record."""
        return {"do_sample": False, "num_beams": 1, **self.options}

    def complete(self, heads: Sequence[list[int]], rooms: Sequence[int], size: int = 16) -> list[list[int]]:
        """Token ids behind each of ``heads`` (prompts in token ids), at most as many as its room; up to their end."""
        made: list[list[int]] = [[]] * len(heads)
        for chosen in self._batches(heads, rooms, size):
            written = self._write([heads[at] for at in chosen], max(rooms[at] for at in chosen))
            for at, ids in zip(chosen, written, strict=True):
                made[at] = self.cut(ids[: rooms[at]])
        return made

    def cut(self, ids: list[int]) -> list[int]:
        """What stands before the end."""
        stop = next((at for at, one in enumerate(ids) if one in self.ends), len(ids))
        return ids[:stop]

    def text(self, ids: list[int]) -> str:
        """Special tokens that are not framing are part of a text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _batches(self, heads: Sequence[list[int]], rooms: Sequence[int], size: int) -> Iterator[list[int]]:
        """Places of rows that go together: no row is lengthened beyond ``length``; without padding where a base does
        not place its tokens by the mask."""
        padded = self.task == "seq2seq_lm" or "position_ids" in inspect.signature(self.model.forward).parameters
        batch: list[int] = []
        for at in sorted(range(len(heads)), key=lambda at: len(heads[at]), reverse=True):
            whole = len(heads[batch[0]]) + max(rooms[one] for one in [*batch, at]) if batch else 0
            fits = self.task == "seq2seq_lm" or whole <= self.length
            if batch and (len(batch) == size or not fits or not (padded or len(heads[at]) == len(heads[batch[0]]))):
                yield batch
                batch = []
            batch = [*batch, at]
        if batch:
            yield batch

    def _write(self, heads: list[list[int]], room: int) -> list[list[int]]:
        """A batch of completions, ``room`` tokens each at most, padding behind their end."""
        inputs = self._padded(heads)
        given = {"decoder_input_ids": torch.tensor([self.start] * len(heads), device=self.device)} if self.start else {}
        slices = (BatchSlice(self.adapter, len(heads)),) if self.adapter is not None else ()
        cards = [self.device] if self.device.type == "cuda" else []
        config, own = self._config(room), self.model.generation_config
        with evaluating(self.model), AdapterHooks.of(self.model).batch(*slices), torch.random.fork_rng(cards):
            torch.manual_seed(0)  # sampling, where it is asked for, is the same each time
            self.model.generation_config = config  # generate() takes from it what a config of its own leaves open
            try:
                out = self.model.generate(**inputs, **given, generation_config=config)  # type: ignore[operator]
            finally:
                self.model.generation_config = own
        skipped = len(self.start) if self.start else inputs["input_ids"].shape[1]
        rows: list[list[int]] = out[:, skipped:].tolist()
        return rows

    def _config(self, room: int) -> Any:
        from transformers import GenerationConfig

        bound = min(room, int(self.options.get("max_new_tokens", room)))
        given = {"eos_token_id": sorted(set(self.ends)), "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}
        start = {"decoder_start_token_id": self.start[0]} if self.start else {}
        return GenerationConfig(**{**given, **start, **self.settings(), "max_new_tokens": bound})

    def _padded(self, heads: list[list[int]]) -> dict[str, Tensor]:
        """Padded before a continuation, behind what an encoder reads (its positions count from the first column)."""
        longest = max(map(len, heads))
        before = self.task != "seq2seq_lm"
        ids, mask = [], []
        for head in heads:
            gap = longest - len(head)
            filler, ones, zeros = [self.tokenizer.pad_token_id] * gap, [1] * len(head), [0] * gap
            ids.append(filler + head if before else head + filler)
            mask.append(zeros + ones if before else ones + zeros)
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }

    def _start(self) -> list[int]:
        """What the decoder reads before the first token of a target, as in training."""
        prefix = self.encoder.target_prefix
        labels = torch.tensor([[*prefix, *(self.encoder.target_suffix or [self.encoder.eos])]], device=self.device)
        start: list[int] = decoder_input_ids(self.model, labels)[0, : 1 + len(prefix)].tolist()
        return start


def complete(
    model: nn.Module, tokenizer: Any, adapter: Adapter | None, prompts: list[str], task: str, room: int, length: int
) -> list[str]:
    """Greedy completions of ``prompts``: at most ``room`` new tokens, prompts cut from the left to fit ``length``."""
    writer = Writer(model, tokenizer, adapter, task, length)
    prefix, suffix = writer.encoder.prefix, writer.encoder.suffix if task == "seq2seq_lm" else []
    budget = max(1, length - len(prefix) - len(suffix) - (0 if task == "seq2seq_lm" else room))
    heads = [[*prefix, *ids[-budget:], *suffix] for ids in writer.encoder.plain(prompts)]
    return [writer.text(ids) for ids in writer.complete(heads, [room] * len(heads))]


def score(writer: Writer, rows: list[Row], words: str = "unicode", batch_size: int = 16) -> float:
    """ROUGE-L of completions against the rows' targets, both from their token ids; a prompt is the one of training."""
    examples, encoder = writer.encoder.examples(rows), writer.encoder
    targets = encoder.targets(rows)
    room = max(FEWEST, max(map(len, targets)) + SPARE)
    if writer.task == "seq2seq_lm":
        heads = [example.input_ids for example in examples]
        rooms = [min(room, writer.length - len(encoder.target_prefix))] * len(rows)
    else:
        counts = [next((at for at, label in enumerate(one.labels) if label != IGNORE), 0) for one in examples]
        heads = [one.input_ids[:count] or [encoder.eos] for one, count in zip(examples, counts, strict=True)]
        rooms = [max(1, min(room, writer.length - len(head))) for head in heads]
    made = writer.complete(heads, rooms, batch_size)
    return rouge_l([writer.text(ids) for ids in made], [writer.text(writer.cut(ids)) for ids in targets], words)
