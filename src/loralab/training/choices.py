"""Multiple choice by likelihood: of a row's answers, the one that the base with its adapter finds likeliest.

An answer's likelihood is that of its own tokens behind the prompt, without the end of text and not divided by its
length (``acc`` of the evaluation harness). Prompt and answer are encoded as in training.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from loralab.adapters.base import Adapter
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.data.base import Row
from loralab.data.batches import collate
from loralab.data.encoding import IGNORE, Encoder, Example
from loralab.forward.metrics import target_logits
from loralab.quantization.sequences import decoder_input_ids
from loralab.training.generation import evaluating


def choice_accuracy(model: nn.Module, adapter: Adapter | None, encoder: Encoder, rows: list[Row], size: int) -> float:
    """Share of ``rows`` whose target is likelier than each of their other choices; ``size``: answers in a pass."""
    likely = log_likelihoods(model, adapter, encoder, rows, size)
    right = 0
    for row, found in zip(rows, likely, strict=True):
        at = row.choices.index(row.target)
        right += all(found[at] > other for place, other in enumerate(found) if place != at)
    return right / len(rows)


def log_likelihoods(
    model: nn.Module, adapter: Adapter | None, encoder: Encoder, rows: Sequence[Row], size: int
) -> list[list[float]]:
    """Of each choice of each row, summed over the tokens of the answer."""
    answers = [Row(row.prompt, choice, where=row.where) for row in rows for choice in row.choices]
    examples = [_without_end(one, encoder) for one in encoder.examples(answers)]
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    found: dict[int, float] = {}
    for start in range(0, len(order), size):
        places = order[start : start + size]
        values = _scored(model, adapter, encoder, [examples[place] for place in places])
        found.update(zip(places, values, strict=True))
    given: Iterator[float] = iter([found[place] for place in range(len(examples))])
    return [[next(given) for _ in row.choices] for row in rows]


def _without_end(example: Example, encoder: Encoder) -> Example:
    """``example`` with nothing to predict behind its answer."""
    end = (encoder.target_suffix if encoder.task == "seq2seq_lm" else []) or [encoder.eos]
    labels = list(example.labels)
    if labels[-len(end) :] == end:
        labels[-len(end) :] = [IGNORE] * len(end)
    return Example(example.input_ids, labels, example.target_tokens - len(end))


def _scored(model: nn.Module, adapter: Adapter | None, encoder: Encoder, examples: list[Example]) -> list[float]:
    device = next(model.parameters()).device
    pad = encoder.tokenizer.pad_token_id
    batch = {key: value.to(device) for key, value in collate(examples, encoder.task, pad).items()}
    labels = batch.pop("labels")
    if encoder.task == "seq2seq_lm":
        batch["decoder_input_ids"] = decoder_input_ids(model, labels)
    slices = (BatchSlice(adapter, len(examples)),) if adapter is not None else ()
    with evaluating(model), AdapterHooks.of(model).batch(*slices):
        logits: Tensor = model(**batch).logits
    sums = []
    for own, wanted in zip(logits, labels, strict=True):
        known, targets = target_logits(own[None], wanted[None], encoder.task)
        sums.append(float(-torch.nn.functional.cross_entropy(known, targets, reduction="sum")))
    return sums
