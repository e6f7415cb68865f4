"""What merging costs: loss and outputs of a merged model beside those of the run, on the run's own validation rows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from loralab.artifacts.reopen import OpenRun
from loralab.artifacts.swap import Change, Merged
from loralab.data.batches import collate
from loralab.data.encoding import Encoded
from loralab.forward.metrics import nll, target_logits
from loralab.numerics.defined import defined, root
from loralab.quantization.sequences import decoder_input_ids
from loralab.running.attach import pad_token_id
from loralab.training.generation import evaluating

CHUNK = 64  # targets whose log-probabilities exist at once, in float64
NO_DELTA = "the run changes none of these weights"
DEFINITIONS = {  # of merge.json
    "loss": "mean negative log-likelihood of a target in nats, of a regression the mean squared error; "
    "the run's own is under measured",
    "kl": "mean KL(run || the other model) over the targets' positions, in nats",
    "weight_error": "RMS of (merged weight - weight that the run computes with) / RMS of the delta, which is what the "
    "run adds to the base's weight; under ways over all weights that the run changes, under layers of each",
    "codes_changed": "share of the quantized weights whose code is another one than the base's",
    "delta_kept": "<e, d> / <d, d> of the delta d and of what the requantized weights add to the base's in fact, e; 1: "
    "all of it, 0: nothing",
    "delta_rms": "RMS of the delta of one weight",
    "changed": "true where the validation rows are not those of the run",
    "untied": "true where layers of the base shared a weight and the merged ones do not",
    "undefined": "why a figure is null",
}
Within = Callable[[int], AbstractContextManager[None]]  # number of rows -> a context for their forward pass


class Damage:
    """Compares models over validation rows of a run, each with the run itself."""

    def __init__(self, run: OpenRun, data: Encoded, rows: int) -> None:
        """``rows``: at most so many are taken, at even distances, since a split may be in some order."""
        self.run, self.task = run, run.spec.model.task
        self.rows = min(rows, len(data.validation))
        self.about = {
            "split": "validation",
            "rows": self.rows,
            "of": len(data.validation),
            "data": data.splits.name,
            "changed": data.splits.fingerprint != run.record["data"]["fingerprint"],
        }
        size, pad = run.spec.data.batch_size, pad_token_id(run.base)
        chosen = [data.validation[place * len(data.validation) // self.rows] for place in range(self.rows)]
        self.batches = [collate(chosen[at : at + size], self.task, pad) for at in range(0, self.rows, size)]

    def base(self, model: nn.Module) -> dict[str, Any]:
        """``loss`` and ``kl`` of ``model``, the base without the adapter; also sets ``about``'s ``targets`` and the
        run's own ``loss``."""
        own, scores, targets = self._compare(model, lambda _: evaluating(model))
        self.about.update(targets=targets, loss=own)
        return scores

    def merged(self, merged: Merged) -> dict[str, Any]:
        """``loss``, the mean negative log-likelihood of a target (of a regression the mean squared error), and ``kl``,
        the mean KL(run || merged) of a target in nats, of which a regression has none."""
        _, scores, _ = self._compare(self.run.model, lambda _: self.run.bare(), merged)
        return scores

    def _compare(
        self, model: nn.Module, within: Within, merged: Merged | None = None
    ) -> tuple[float, dict[str, Any], int]:
        """(the run's loss, the scores of ``model``, the number of targets). The run is computed again each time, batch
        by batch, so that no logits have to be kept."""
        own = other = divergence = 0.0
        targets, distributions = 0, True
        for batch in self.batches:
            exact, labels = self._logits(self.run.model, batch, self.run.adapted)
            if merged is None:
                logits, _ = self._logits(model, batch, within)
            else:
                with merged.on():
                    logits, _ = self._logits(model, batch, within)
            own += float(nll(exact, labels, self.task)[0])
            loss, _, scored = nll(logits, labels, self.task)
            other, targets = other + float(loss), targets + len(scored)
            distributions &= not labels.is_floating_point()
            if distributions:
                pair = (target_logits(one, labels, self.task)[0] for one in (exact, logits))
                divergence += kl_divergence(*pair)
        scores = {"loss": other / targets, "kl": divergence / targets if distributions else None}
        return own / targets, defined(scores, {} if distributions else {"kl": "a score is no distribution"}), targets

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor], within: Within) -> tuple[Tensor, Tensor]:
        """(logits, labels) of one batch."""
        device = next(model.parameters()).device
        moved = {key: value.to(device) for key, value in batch.items()}
        labels = moved.pop("labels")
        if self.task == "seq2seq_lm":
            moved["decoder_input_ids"] = decoder_input_ids(model, labels)
        with self.run.spec.trainer.autocast(), within(len(labels)):
            return model(**moved).logits, labels


def kl_divergence(exact: Tensor, other: Tensor) -> float:
    """The sum over rows of KL(exact || other) of two tensors of logits (n, V), in nats, in float64."""
    total = 0.0
    for p, q in zip(torch.split(exact, CHUNK), torch.split(other, CHUNK), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())  # 0 log 0 is 0
    return total


def weights(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Of all weights that the run changes together: see ``of_weight``; the last two of those that are quantized."""
    again = [one for one in changes.values() if one.kept is not None]
    whole = of_weight(_sum(list(changes.values())))
    return {**whole, **{key: of_weight(_sum(again))[key] for key in ("codes_changed", "delta_kept") if again}}


def _sum(changes: list[Change]) -> Change:
    kept = [one.kept for one in changes if one.kept is not None]
    return Change(
        shape=[],
        delta=sum(one.delta for one in changes),
        error=sum(one.error for one in changes),
        kept=sum(kept) if len(kept) == len(changes) else None,
        codes=sum(one.codes for one in changes),
        codes_changed=sum(one.codes_changed for one in changes),
    )


def of_weight(change: Change) -> dict[str, Any]:
    """``weight_error``: RMS of (merged - what the run computes with) / RMS of what the run adds to the base's value.

    Of requantized weights also ``codes_changed``, the share of the base's codes that are others, and ``delta_kept``:
    with d what the run adds and e what was added in fact, <e, d> / <d, d>. None where ``undefined`` says why.
    """
    found: dict[str, Any] = {"weight_error": root(change.error, change.delta)}
    if change.kept is not None:
        found["codes_changed"] = change.codes_changed / change.codes if change.codes else None
        found["delta_kept"] = change.kept / change.delta if change.delta else None
    return defined(found, {"weight_error": NO_DELTA, "delta_kept": NO_DELTA, "codes_changed": "it has no codes"})


def layers(found: Mapping[str, Mapping[str, Change]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(parameter, its figures) from {way: {parameter: change}}; ``delta_rms`` is of what the run adds to it."""
    for name, one in next(iter(found.values())).items():
        count = max(1, torch.Size(one.shape).numel())
        figures = {way: of_weight(changes[name]) for way, changes in found.items()}
        yield name, {"shape": one.shape, "delta_rms": (one.delta / count) ** 0.5, "ways": figures}
