"""What a split is scored by. Losses are sums of negative log-likelihoods over the number of targets."""

import math
import re
import unicodedata
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.text.rouge import ROUGEScore

HIGHER = (
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "token_accuracy",
    "rouge_l",
)  # the better, the higher; of the others the lower


def nll(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """(summed negative log-likelihood, predictions, targets) in float32, masked positions left out.

    Causal LM: logits (B, T, V) at t predict labels (B, T) at t + 1; seq2seq: at t; classification: logits (B, C),
    labels (B,). Predictions and targets are flat, one entry a target token (or row). Labels in floating point are
    regression's: its loss is the squared error of logits (B, 1), which are the predictions.
    """
    if labels.is_floating_point():
        predictions, labels = logits.float().squeeze(-1), labels.float()
        return F.mse_loss(predictions, labels, reduction="sum"), predictions, labels
    logits, targets = target_logits(logits, labels, task)
    return F.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1), targets


def target_logits(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """(logits (n, V) in float32, targets (n,)) where there is something to predict."""
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    return logits[kept].float(), labels[kept]


def names(task: str, generated: bool, tested: bool) -> list[str]:
    """The metrics that a run of ``task`` ends with; ``generated``: some rows are completed, ``tested``: the test
    split."""
    scores = ["accuracy", "f1", "matthews"] if task == "sequence_classification" else ["token_accuracy", "perplexity"]
    scores = ["pearson", "spearman"] if task == "regression" else scores
    if generated and task in ("causal_lm", "seq2seq_lm"):
        scores.append("rouge_l")
    return [f"{split}/{name}" for split in ["val", *(["test"] if tested else [])] for name in ["loss", *scores]]


class SplitMetrics:
    """Accumulates one trial's scores over one split; torchmetrics does the sums."""

    def __init__(self, task: str, num_labels: int, device: torch.device) -> None:
        self.task, self.num_labels, self.device = task, num_labels, device
        # nan stays nan: by default such a batch is left out of the mean, and "disable" takes every weight for 1
        self.loss = MeanMetric(nan_strategy=math.nan).to(device)
        self.scores: dict[str, Metric] = {}

    def _made(self, targets: Tensor) -> dict[str, Metric]:
        """What these targets are scored by."""
        if targets.is_floating_point():
            # of one row, or of equal predictions, there is no correlation: nan, which the record has as null
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that Spearman keeps what it ranks
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
        count = targets.numel()
        if not count:
            return
        if not self.scores:
            self.scores = {name: metric.to(self.device) for name, metric in self._made(targets).items()}
        self.loss.update(loss_sum / count, weight=count)
        for name, metric in self.scores.items():
            if name == "token_accuracy":
                metric.update((predictions == targets).float().mean(), weight=count)
            else:
                metric.update(predictions, targets)

    def compute(self, split: str) -> dict[str, float]:
        """``{"val/loss": ..., "val/perplexity": ..., ...}`` of everything since the last reset."""
        loss = float(self.loss.compute())
        values = {"loss": loss, **{name: float(metric.compute()) for name, metric in self.scores.items()}}
        if self.task != "sequence_classification":
            values["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return {f"{split}/{name}": value for name, value in values.items()}


# Letters of scripts that are written without spaces are words: Thai, Lao, Tibetan, Myanmar, Khmer, Kana, Han
_ALONE = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_ALONE_PATTERN = re.compile(f"([{_ALONE}])")


def rouge_l(predictions: list[str], references: list[str], words: str = "unicode") -> float:
    """Mean ROUGE-L F1 over pairs (torchmetrics; no stemming). ``words``: ``unicode_words``, or ``published``, a-z and
    0-9 alone. Of Latin letters without accents both give the same."""
    own = {} if words == "published" else {"normalizer": _composed, "tokenizer": unicode_words}
    metric = ROUGEScore(rouge_keys="rougeL", **own)  # type: ignore[arg-type]
    metric.update(predictions, references)
    same = sum(one == other for one, other in zip(predictions, references, strict=True) if not unicode_words(other))
    found = float(metric.compute()["rougeL_fmeasure"])
    return found if words == "published" else found + same / len(references)  # of punctuation alone


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def unicode_words(text: str) -> list[str]:
    """Runs of letters, marks and digits; one each of what is written without spaces; symbols beyond ASCII (emoji)."""
    kept = "".join(letter if _counts(letter) else " " for letter in _composed(text))
    return _ALONE_PATTERN.sub(r" \1 ", kept).split()


def _counts(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind[0] in "LNM" or (kind[0] == "S" and not letter.isascii())
