"""What generated texts are scored by, each in [0, 1] and the higher the better: ROUGE-L, BLEU, equality, the number."""

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal

from torchmetrics import Metric
from torchmetrics.text import SacreBLEUScore
from torchmetrics.text.rouge import ROUGEScore

SCORES = ("rouge_l", "bleu", "exact_match", "number_match")
BleuTokens = Literal["13a", "intl", "zh", "char", "none"]

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


def bleu(predictions: list[str], references: list[str], tokens: BleuTokens = "13a") -> float:
    """Corpus BLEU-4 of Papineni et al. (2002) with the words of sacrebleu's tokenizer ``tokens``; cased, not smoothed:
    0 where no four words of all predictions are right. sacrebleu prints 100 times this."""
    metric = SacreBLEUScore(tokenize=tokens)
    metric.update(predictions, [[reference] for reference in references])
    return float(metric.compute())


def exact_match(predictions: list[str], references: list[str]) -> float:
    """Share of predictions that are their reference, white space around both left out."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(one.strip() == other.strip() for one, other in pairs) / len(pairs)


# 1,000.5 and -3 and .5; the minus of 5-3 belongs to no number, nor does the comma of 1,2
_NUMBER = re.compile(r"(?:(?<![\w.])[-\u2212])?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> Decimal | None:
    """The last number that ``text`` writes, None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def number_match(predictions: list[str], references: list[str]) -> float:
    """Share of predictions whose last number equals their reference's, as GSM8K is scored (Cobbe et al. 2021, whose
    answers end in ``#### 18``). Rows whose reference has no number are left out; nan where none has."""
    pairs = [(last_number(one), last_number(other)) for one, other in zip(predictions, references, strict=True)]
    numbers = [one == other for one, other in pairs if other is not None]
    return sum(numbers) / len(numbers) if numbers else math.nan


def scores(predictions: list[str], references: list[str], words: str, tokens: BleuTokens) -> dict[str, float]:
    """Each of ``SCORES`` by name."""
    values = (
        rouge_l(predictions, references, words),
        bleu(predictions, references, tokens),
        exact_match(predictions, references),
        number_match(predictions, references),
    )
    return dict(zip(SCORES, values, strict=True))


def takes_texts(cls: type) -> bool:
    """Whether a torchmetrics class scores lists of texts."""
    return any(one.__module__.startswith("torchmetrics.text") for one in cls.__mro__)


def own_scores(metrics: Mapping[str, Metric], predictions: list[str], references: list[str]) -> dict[str, float]:
    """What the user's metrics of texts give, by name."""
    for metric in metrics.values():
        metric.update(predictions, references)
    return {name: float(metric.compute()) for name, metric in metrics.items()}
