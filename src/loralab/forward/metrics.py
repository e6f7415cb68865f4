"""The metrics of a split. A loss is the sum of the negative log-likelihoods divided by the number of targets."""

import math
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from loralab.errors import ConfigError
from loralab.forward.texts import SCORES

HIGHER = (
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "token_accuracy",
    "choice_accuracy",
    *SCORES,
)  # metrics of which a higher value is better; of all others a lower one is


def nll(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """(summed negative log-likelihood () float32, predictions, targets (n,)) at the labels other than -100.

    Causal LM: logits (B, T, V) at t predict labels (B, T) at t + 1; seq2seq: at t; predictions are token ids (n,).
    Classification: logits (B, C), labels (B,); predictions are the logits (n, C). Regression, where labels (B,) are
    floating point: the loss is the summed squared error of logits (B, 1), which are the predictions (B,).
    """
    if labels.is_floating_point():
        predictions, labels = logits.float().squeeze(-1), labels.float()
        return F.mse_loss(predictions, labels, reduction="sum"), predictions, labels
    logits, targets = target_logits(logits, labels, task)
    predictions = logits.detach() if task == "sequence_classification" else logits.argmax(-1)
    return F.cross_entropy(logits, targets, reduction="sum"), predictions, targets


def target_logits(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """(logits (n, V) in float32, targets (n,)) at the labels other than -100; shapes of the arguments: see ``nll``."""
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels != -100
    return logits[is_target].float(), labels[is_target]


def names(task: str, generated: bool, tested: bool, documents: bool = False, choices: bool = False) -> list[str]:
    """The names of the final metrics of a run of ``task``, such as val/loss; ``generated``: texts are generated,
    ``tested``: there is a test split, ``documents``: the rows are plain text, ``choices``: they have choices."""
    scores = ["accuracy", "f1", "matthews"] if task == "sequence_classification" else ["token_accuracy", "perplexity"]
    scores = ["pearson", "spearman"] if task == "regression" else scores
    if documents and task == "causal_lm":
        scores.append("bits_per_byte")
    if choices and task != "sequence_classification":
        scores.append("choice_accuracy")
    if generated and task in ("causal_lm", "seq2seq_lm"):
        scores += SCORES
    return [f"{split}/{name}" for split in ["val", *(["test"] if tested else [])] for name in ["loss", *scores]]


def _update(name: str, metric: Metric, predictions: Tensor, targets: Tensor) -> None:
    """Updates a user's metric; a ConfigError that names it where torchmetrics rejects the values."""
    try:
        metric.update(predictions, targets)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:  # such as another number of classes
        raise ConfigError(f"metrics.{name}: {' '.join(str(error).split())}") from error


class SplitMetrics:
    """Accumulates one trial's metrics over one split, by torchmetrics."""

    def __init__(
        self, task: str, num_labels: int, device: torch.device, size: int = 0, own: Mapping[str, Metric] | None = None
    ) -> None:
        """``size``: UTF-8 bytes of the texts where all their tokens are targets, else 0; ``own``: the user's metrics of
        predictions and targets by name."""
        self.own = {name: metric.to(device) for name, metric in (own or {}).items()}
        self.size, self.count = size, 0
        self.task, self.num_labels, self.device = task, num_labels, device
        # nan must stay nan: torchmetrics leaves such a batch out by default, and "disable" ignores weights
        self.loss = MeanMetric(nan_strategy=math.nan).to(device)
        self.scores: dict[str, Metric] = {}

    def _task_metrics(self, targets: Tensor) -> dict[str, Metric]:
        """New metrics beside the loss for such ``targets``, by name."""
        if targets.is_floating_point():
            # the correlation of one row or of equal predictions is nan, which is null in the record
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on Spearman's memory for all values
                return {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
        if self.task == "sequence_classification":
            accuracy = MulticlassAccuracy(self.num_labels, average="micro")
            return {
                "accuracy": accuracy,
                "f1": MulticlassF1Score(self.num_labels, average="macro"),
                "matthews": MulticlassMatthewsCorrCoef(self.num_labels),
            }
        return {"token_accuracy": MeanMetric(nan_strategy=math.nan)}

    def update(self, loss_sum: Tensor, predictions: Tensor, targets: Tensor) -> None:
        """Adds a batch as ``nll`` returns it. Raises ConfigError where a user's metric rejects it."""
        count = targets.numel()
        if not count:
            return
        if not self.scores:
            self.scores = {name: metric.to(self.device) for name, metric in self._task_metrics(targets).items()}
        self.count += count
        self.loss.update(loss_sum / count, weight=count)
        for name, metric in self.own.items():
            _update(name, metric, predictions, targets)
        if predictions.dim() > 1:  # logits
            predictions = predictions.argmax(-1)
        for name, metric in self.scores.items():
            if name == "token_accuracy":
                metric.update((predictions == targets).float().mean(), weight=count)
            else:
                metric.update(predictions, targets)

    def compute(self, split: str) -> dict[str, float]:
        """{"val/loss": ..., "val/perplexity": ..., ...} of all batches so far."""
        loss = float(self.loss.compute())
        values = {"loss": loss, **{name: float(metric.compute()) for name, metric in self.scores.items()}}
        values |= {name: float(metric.compute()) for name, metric in self.own.items() if self.count}
        if self.task != "sequence_classification":
            values["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if self.size:
            values["bits_per_byte"] = loss * self.count / math.log(2) / self.size
        return {f"{split}/{name}": value for name, value in values.items()}
