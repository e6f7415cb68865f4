"""Text sampled from the unquantized base itself: what a faithful copy of it predicts best, with no data needed.

The mean negative log-likelihood of its own samples is an estimate of the base's entropy; another model's is that
plus the Kullback-Leibler divergence from the base to it, so the change is never below 0 but for sampling noise.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from loralab.data.base import DataSpec, Row, make_splits
from loralab.data.encoding import IGNORE, Encoded, Example, statistics
from loralab.errors import ConfigError, DataError
from loralab.spec import Count, Natural, Positive, spec

AT_ONCE = 32  # rows sampled together; part of what the seed decides


@spec("data", kw_only=True)
class Samples(DataSpec):
    """``rows`` documents of ``tokens`` tokens by ancestral sampling, each after the beginning-of-text token."""

    from_base: ClassVar[bool] = True

    rows: Count = 24  # held out, for validation
    train_rows: Natural = 0
    tokens: Count = 200
    temperature: Positive = 1.0
    draw: Natural = 0  # seed of the sampling

    def source(self) -> str | None:
        """Nothing but the base, which has a fingerprint of its own."""
        return None

    def sample(self, model: nn.Module, tokenizer: Any, task: str, max_length: int) -> Encoded:
        """Rows sampled on the model's own device; the same ``draw`` gives the same rows on the same kind of device.

        Raises DataError for other tasks, ConfigError where a row would be longer than ``max_length`` tokens.
        """
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
        # sampled tokens need not spell whole characters, so their bytes are not known
        splits = replace(make_splits("samples", rows, kind="text"), bytes={})
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
                sampled = model.eval().generate(  # type: ignore[operator]
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
                ids += sampled.tolist()
        model.train(training)
        return ids
