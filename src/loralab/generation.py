"""Greedy completions from a trial's adapter, and their ROUGE-L."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loralab.adapters.base import Adapter
from loralab.adapters.sites import Share, Sites
from loralab.data.base import Row
from loralab.metrics import rouge_l


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


def complete(
    model: nn.Module,
    tokenizer: Any,
    adapter: Adapter | None,
    prompts: list[str],
    task: str,
    room: int,
    length: int,
) -> list[str]:
    """Greedy completions of ``prompts``: at most ``room`` new tokens, prompts cut from the left to fit ``length``."""
    budget = length if task == "seq2seq_lm" else max(1, length - room)
    tokens = [tokenizer(prompt, add_special_tokens=True)["input_ids"][-budget:] for prompt in prompts]
    if len(tokens) > 1 and getattr(model, "_is_stateful", False):  # a state would take padding in
        return [complete(model, tokenizer, adapter, [one], task, room, length)[0] for one in prompts]
    longest = max(len(row) for row in tokens)
    pad, device = tokenizer.pad_token_id, next(model.parameters()).device
    ids = torch.full((len(tokens), longest), pad, device=device)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(tokens):  # an encoder counts its positions from the left
        own = slice(0, len(row)) if task == "seq2seq_lm" else slice(longest - len(row), longest)
        ids[place, own], mask[place, own] = torch.tensor(row, device=device), 1
    shares = (Share(adapter, len(prompts)),) if adapter is not None else ()
    with evaluating(model), Sites.of(model).batch(*shares):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    fresh = out if task == "seq2seq_lm" else out[:, longest:]
    return [str(text) for text in tokenizer.batch_decode(fresh, skip_special_tokens=True)]


def score(
    model: nn.Module,
    tokenizer: Any,
    adapter: Adapter,
    rows: list[Row],
    task: str,
    length: int,
    batch_size: int = 16,
) -> float:
    """ROUGE-L of greedy completions against the rows' targets."""
    room = max(8, max(len(tokenizer(row.target)["input_ids"]) for row in rows) + 4)
    made: list[str] = []
    for start in range(0, len(rows), batch_size):
        prompts = [row.prompt for row in rows[start : start + batch_size]]
        made += complete(model, tokenizer, adapter, prompts, task, min(room, length // 2), length)
    return rouge_l(made, [row.target for row in rows])
