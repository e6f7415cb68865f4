"""Text sampled from the unquantized base itself: what a faithful copy of it predicts best, with no data needed.

The mean negative log-likelihood of its own samples is an estimate of the base's entropy; another model's is that
plus the Kullback-Leibler divergence from the base to it, so the change is never below 0 but for sampling noise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from loralab.data.base import DataSpec, Row, make_splits
from loralab.data.encoding import IGNORE, Encoded, Example, statistics
from loralab.errors import ConfigError, DataError

AT_ONCE = 32  # rows sampled together; part of what the seed decides


@dataclass(frozen=True, kw_only=True)
class Samples(DataSpec):
    """``rows`` documents of ``tokens`` tokens by ancestral sampling, each after the beginning-of-text token."""

    from_base: ClassVar[bool] = True

    rows: int = 24  # held out, for validation
    train_rows: int = 0
    tokens: int = 200
    temperature: float = 1.0
    draw: int = 0  # seed of the sampling

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("rows", 1), ("train_rows", 0), ("tokens", 1), ("draw", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key} must be at least {least}, got {getattr(self, key)}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"data.temperature must be a positive number, got {self.temperature}")

    def source(self) -> str | None:
        """Nothing but the base, which has a fingerprint of its own."""
        return None

    def sample(self, model: nn.Module, tokenizer: Any, task: str, max_length: int) -> Encoded:
        """Sampled on the model's own device; the same seed gives the same rows on the same kind of device."""
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if task != "causal_lm" or start is None:
            raise DataError(f"data=samples draws text from a causal language model, but model.task={task}")
        if self.tokens >= max_length:
            raise ConfigError(f"data.tokens={self.tokens} and a first token exceed model.max_length={max_length}")
        ids = self._continuations(model, start)
        examples = [Example(row, [IGNORE, *row[1:]], len(row) - 1) for row in ids]
        held, trained = examples[: self.rows][: self.limit], examples[self.rows :][: self.limit]
        parts = {"train": trained, "validation": held, "test": []}
        rows = {name: [Row("", tokenizer.decode(one.input_ids[1:])) for one in part] for name, part in parts.items()}
        splits = make_splits("samples", rows, kind="text")
        return Encoded(trained, held, [], 0, {name: statistics(part) for name, part in parts.items()}, splits)

    def _continuations(self, model: nn.Module, start: int) -> list[list[int]]:
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        training, total = model.training, self.rows + self.train_rows
        ids: list[list[int]] = []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self.draw)
            for first in range(0, total, AT_ONCE):
                prompt = torch.full((min(AT_ONCE, total - first), 1), start, device=device)
                made = model.eval().generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=self.tokens,
                    do_sample=True,
                    temperature=self.temperature,
                    top_k=0,
                    top_p=1.0,
                    use_cache=True,
                    eos_token_id=None,  # an end-of-text token is a token like any other here
                    pad_token_id=start,
                )
                ids += made.tolist()
        model.train(training)
        return ids
