"""Loss and outputs of a quantized model against those of its dense original, and the outliers of its activations."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.data.batches import collate
from loralab.data.encoding import Encoded
from loralab.forward.metrics import target_logits
from loralab.numerics.defined import defined
from loralab.quantization.sequences import decoder_input_ids, watch

OUTLIER = 6.0  # LLM.int8() (arXiv 2208.07339), section 4.1: |x| >= 6 ...
POSITIONS, LAYERS = 0.06, 0.25  # ... at 6% of the positions, in a quarter of the layers, is an outlier feature


class Evaluation:
    """Loss and outputs of the model over a data set's validation split, against those of the dense model."""

    def __init__(self, model: nn.Module, task: str, data: Encoded, batch_size: int, pad: int) -> None:
        self.model, self.task, self.data, self.batch_size, self.pad = model, task, data, batch_size, pad
        self.dense: list[Tensor] = []  # log-probabilities at the targets, on the host
        self.dense_loss = torch.empty(0)
        self.outlier_columns: dict[str, Tensor] = {}
        self.inputs: dict[str, list[Tensor]] = {}

    def reference(self, names: Sequence[str], keep: int = 0) -> dict[str, Any]:
        """The dense model: keeps its outputs and the inputs of ``names`` for the first ``keep`` tokens, and counts the
        outliers among these layers' inputs. Its loss; None where ``undefined`` says why."""
        with Activations(self.model, names, keep) as seen:
            losses = []
            for logits, targets in self.batches():
                self.dense.append(logits.log_softmax(-1).cpu())
                losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        self.dense_loss = torch.cat(losses).double()
        self.outlier_columns, self.inputs = seen.share(), seen.inputs
        return defined({"loss": float(self.dense_loss.mean())})

    def __call__(self) -> dict[str, Any]:
        """loss, its change with the standard error over targets, KL(dense || this) per target, same first choice.

        None where ``undefined`` says why."""
        losses, divergence, same_choices = [], 0.0, 0
        for dense, (logits, targets) in zip(self.dense, self.batches(), strict=True):
            quantized = logits.log_softmax(-1).cpu()
            losses.append(F.nll_loss(quantized, targets.cpu(), reduction="none"))
            terms = torch.where(dense.isneginf(), 0.0, dense.exp() * (dense - quantized))  # 0 log 0 is 0
            divergence += float(terms.sum(dtype=torch.float64))
            same_choices += int((dense.argmax(-1) == quantized.argmax(-1)).sum())
        loss = torch.cat(losses).double()
        change = loss - self.dense_loss
        n = change.numel()
        scores = {
            "loss": float(loss.mean()),
            "loss_change": float(change.mean()),
            "loss_change_se": float(change.std() / math.sqrt(n)) if n > 1 else None,
            "kl": divergence / n,
            "same_prediction": same_choices / n,
        }
        return defined(scores, {"loss_change_se": "one target"} if n == 1 else None)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits (n, V) float32, targets (n,)) of the targets of each batch."""
        rows = self.data.validation
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(rows), self.batch_size):
                stop = min(start + self.batch_size, len(rows))
                yield self._batch(collate([rows[i] for i in range(start, stop)], self.task, self.pad))
        finally:
            self.model.train(training)

    @torch.no_grad()
    def _batch(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        labels = batch.pop("labels").to(device)
        inputs = {key: value.to(device) for key, value in batch.items()}
        if self.task == "seq2seq_lm":
            inputs["decoder_input_ids"] = decoder_input_ids(self.model, labels)
        return target_logits(self.model(**inputs).logits, labels, self.task)

    def census(self) -> dict[str, dict[str, float]]:
        """Per layer: input features that reach 6 anywhere, and at 6% of the positions or more."""
        return {
            name: {
                "activation_outlier_columns": int((share > 0).sum()),
                "outlier_features": int((share >= POSITIONS).sum()),
            }
            for name, share in self.outlier_columns.items()
        }

    def outlier_features(self) -> list[int]:
        """Features of the hidden size that are outliers in a quarter of the layers that read it."""
        widths = [len(share) for share in self.outlier_columns.values()]
        hidden = max(set(widths), key=widths.count, default=0)
        read = [share >= POSITIONS for share in self.outlier_columns.values() if len(share) == hidden]
        return torch.stack(read).float().mean(dim=0).ge(LAYERS).nonzero().flatten().tolist() if read else []


class Activations:
    """While entered: counts, per input feature of the named layers, the tokens with |x| >= 6; padding is none."""

    def __init__(self, model: nn.Module, names: Sequence[str], keep: int = 0) -> None:
        """``keep``: of how many tokens the inputs are kept."""
        self.layers = {name: model.get_submodule(name) for name in names}
        self.sequences, self.keep = watch(model), keep
        self.counts: dict[str, Tensor] = {}
        self.positions: dict[str, int] = {}
        self.inputs: dict[str, list[Tensor]] = {}  # layer -> (s, in) of each sequence, on the host

    def __enter__(self) -> "Activations":
        self.hooks = [layer.register_forward_pre_hook(self._see(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _see(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            rows = x.reshape(-1, x.shape[-1])
            for sequence in self.sequences.of(x):
                self._add(name, rows[sequence])

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        """x (s, in): one sequence."""
        counted = self.positions.get(name, 0)
        self.counts[name] = self.counts.get(name, 0) + (x.abs() >= OUTLIER).sum(dim=0).cpu()
        self.positions[name] = counted + len(x)
        if counted < self.keep:
            self.inputs.setdefault(name, []).append(x[: self.keep - counted].cpu().clone())

    def share(self) -> dict[str, Tensor]:
        """{layer: (in,) share of the tokens}."""
        return {name: count / self.positions[name] for name, count in self.counts.items()}
