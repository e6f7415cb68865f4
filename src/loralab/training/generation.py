"""Completions of a base with an adapter, for prompts encoded as the training rows are.

Greedy, unless ``data.generation`` says otherwise; a checkpoint's generation_config.json is not used.
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
from loralab.errors import ConfigError
from loralab.quantization.sequences import decoder_input_ids

FEWEST, SPARE = 8, 4  # new tokens at least; more than the longest target, to see a completion that does not end


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
        seed: int = 0,
    ) -> None:
        """``options``: of transformers' GenerationConfig, in place of greedy decoding; ``adapter`` None: the base;
        ``seed``: of sampling, the same for each batch."""
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.task, self.length, self.options = task, length, dict(options or {})
        self.encoder, self.seed = Encoder(tokenizer, task, length), seed
        self.ends = [self.encoder.eos, *self.encoder.target_suffix[:1]]
        self.device = next(model.parameters()).device
        self.start = self._start() if task == "seq2seq_lm" else []

    def settings(self) -> dict[str, Any]:
        """How completions are decoded, for the record."""
        return {"do_sample": False, "num_beams": 1, **self.options}

    def complete(self, heads: Sequence[list[int]], rooms: Sequence[int], size: int = 16) -> list[list[int]]:
        """New token ids for each of ``heads`` (prompts in token ids), at most its ``rooms``, without the end token."""
        completions: list[list[int]] = [[]] * len(heads)
        for batch in self._batches(heads, rooms, size):
            generated = self._write([heads[index] for index in batch], max(rooms[index] for index in batch))
            for index, ids in zip(batch, generated, strict=True):
                completions[index] = self.cut(ids[: rooms[index]])
        return completions

    def cut(self, ids: list[int]) -> list[int]:
        """The tokens before the first end token."""
        stop = next((index for index, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:stop]

    def text(self, ids: list[int]) -> str:
        """The decoded tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _batches(self, heads: Sequence[list[int]], rooms: Sequence[int], size: int) -> Iterator[list[int]]:
        """Indices of the prompts that are completed together, so that no row grows beyond ``length``. Where the base
        does not take position_ids, a batch holds prompts of one length, which need no padding."""
        padded = self.task == "seq2seq_lm" or "position_ids" in inspect.signature(self.model.forward).parameters
        batch: list[int] = []
        for index in sorted(range(len(heads)), key=lambda index: len(heads[index]), reverse=True):
            longest = len(heads[batch[0]]) if batch else 0
            fits = self.task == "seq2seq_lm" or longest + max(rooms[i] for i in [*batch, index]) <= self.length
            if batch and (len(batch) == size or not fits or not (padded or len(heads[index]) == longest)):
                yield batch
                batch = []
            batch = [*batch, index]
        if batch:
            yield batch

    def _write(self, heads: list[list[int]], room: int) -> list[list[int]]:
        """A batch of completions of at most ``room`` tokens each, padded after their end."""
        inputs = self._padded(heads)
        if self.start:
            inputs["decoder_input_ids"] = torch.tensor([self.start] * len(heads), device=self.device)
        slices = (BatchSlice(self.adapter, len(heads)),) if self.adapter is not None else ()
        devices = [self.device] if self.device.type == "cuda" else []
        config, previous = self._config(room), self.model.generation_config
        with evaluating(self.model), AdapterHooks.of(self.model).batch(*slices), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)  # sampling gives the same each time
            self.model.generation_config = config  # generate() falls back on it for what its argument leaves open
            try:
                out = self.model.generate(**inputs, generation_config=config)  # type: ignore[operator]
            except ValueError as error:  # of an option that does not fit the base, such as a token that it lacks
                raise ConfigError(f"decoding with {self.options} is refused: {' '.join(str(error).split())}") from error
            finally:
                self.model.generation_config = previous
        skipped = len(self.start) if self.start else inputs["input_ids"].shape[1]
        rows: list[list[int]] = out[:, skipped:].tolist()
        return rows

    def _config(self, room: int) -> Any:
        from transformers import GenerationConfig

        bound = min(room, int(self.options.get("max_new_tokens") or room))
        tokens = {"eos_token_id": sorted(set(self.ends)), "pad_token_id": self.tokenizer.pad_token_id}
        start = {"decoder_start_token_id": self.start[0]} if self.start else {}
        return GenerationConfig(**{"use_cache": True, **tokens, **start, **self.settings(), "max_new_tokens": bound})

    def _padded(self, heads: list[list[int]]) -> dict[str, Tensor]:
        """Prompts of a decoder are padded on the left, those of an encoder on the right, where its positions count from
        the first column."""
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
        """The tokens that the decoder reads before the first token of a target, as in training."""
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
    heads = [[*prefix, *ids[-budget:], *suffix] for ids in writer.encoder.token_ids(prompts)]
    return [writer.text(ids) for ids in writer.complete(heads, [room] * len(heads))]


def answers(writer: Writer, rows: list[Row], batch_size: int = 16) -> tuple[list[str], list[str]]:
    """(completions of the rows' training prompts, their targets), both decoded from token ids, in the rows' order."""
    examples, encoder = writer.encoder.examples(rows), writer.encoder
    targets = encoder.targets(rows)
    room = max(FEWEST, max(map(len, targets)) + SPARE)
    if writer.task == "seq2seq_lm":
        heads = [example.input_ids for example in examples]
        rooms = [min(room, writer.length - len(encoder.target_prefix))] * len(rows)
    else:
        heads = []
        for example in examples:
            prompt = next((index for index, label in enumerate(example.labels) if label != IGNORE), 0)
            heads.append(example.input_ids[:prompt] or [encoder.eos])
        rooms = [max(1, min(room, writer.length - len(head))) for head in heads]
    completions = writer.complete(heads, rooms, batch_size)
    return [writer.text(ids) for ids in completions], [writer.text(writer.cut(ids)) for ids in targets]


def predictions(rows: list[Row], made: list[str], targets: list[str], split: str) -> list[dict[str, Any]]:
    """The objects of predictions.jsonl for the first rows of ``split``: its target is the one that is scored."""
    return [
        {"row": place, "prompt": str(row.prompt), "target": target, "prediction": text, "split": split}
        for place, (row, target, text) in enumerate(zip(rows, targets, made, strict=True))
    ]
