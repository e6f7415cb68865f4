"""The base model, its tokenizer and the data in token ids, kept from one pack to the next."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loralab.data.base import FORGETTING, SPLITS, DataSpec
from loralab.data.encoding import Encoded
from loralab.errors import ConfigError, DataError
from loralab.forward.graph import check_causal
from loralab.models import loading, pretrained
from loralab.models.feeding import encoded_rows
from loralab.quantization.base import is_frozen
from loralab.quantization.linear import resident_bytes
from loralab.quantization.none import NoQuantization
from loralab.quantization.reads import refuse_read
from loralab.running.forgetting import bare_scores
from loralab.training import epochs
from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialData:
    """The rows of a trial and the fingerprints of their source and of the tokenizer; None where there is none.

    ``forgetting_source``: of data.forgetting.
    """

    encoded: Encoded
    source: str | None
    forgetting_source: str | None
    tokenizer: str | None
    limited: dict[str, list[int]] | None = None  # {split: [rows, of so many]} where the trainer limits a split


@dataclass
class Inputs:
    """Loads each base, tokenizer and data set once for the packs that share it."""

    _base: loading.Base | None = None
    _base_key: tuple[Any, ...] = ()
    _tokenizers: dict[str, tuple[Any, str | None]] = field(default_factory=dict)
    _data: dict[str, tuple[Encoded, tuple[str | None, str | None]]] = field(default_factory=dict)
    _bare_scores: dict[tuple[Any, ...], dict[str, float]] = field(default_factory=dict)
    _parts: dict[Any, Encoded] = field(default_factory=dict)
    _parts_of: Encoded | None = None

    def forget_base(self) -> None:
        if self._base is not None:
            self._base, self._base_key = None, ()
            gc.collect()

    @property
    def base_bytes(self) -> int:
        """Of the base that is loaded now; 0 where none is."""
        return self._base.size.bytes + resident_bytes(self._base.model) if self._base is not None else 0

    def tokenizer(self, spec: pretrained.Pretrained) -> tuple[Any, str | None]:
        """(tokenizer, fingerprint of its files when they were read)."""
        spec.check()
        key = f"{type(spec)} {spec.tokenizer} {spec.path} {spec.trust_remote_code}"
        if key not in self._tokenizers:
            self._tokenizers[key] = spec.load_tokenizer(), spec.tokenizer_fingerprint()
        return self._tokenizers[key]

    def data(self, spec: TrialSpec) -> TrialData:
        """The rows of ``spec``. Raises DataError for a split that it needs and that is empty."""
        tokenizer, tokenizer_fingerprint = self.tokenizer(spec.model)
        key = f"{type(spec.data)} {spec.data} {spec.model.task} {spec.model.length} {tokenizer.name_or_path}"
        # a classifier's head may name the classes
        key += repr(spec.model) if spec.data.reads_base or spec.model.task == "sequence_classification" else ""
        if key not in self._data:
            other = spec.data.forgetting
            # before the rows are read, so that a change meanwhile is noticed
            sources = (spec.data.source(), other.source() if other is not None else None)
            encoded = encoded_data(spec.data, spec.model, tokenizer, spec.trainer.device)
            if other is not None:
                encoded = replace(encoded, forgetting=_other_data(other, spec, tokenizer))
            self._data = {key: (encoded, sources)}  # one at a time: sweeps seldom change the data
        encoded, sources = self._data[key]
        part = self._limited(encoded, spec)
        check_splits(spec, part)
        counts = {split: [len(part[split]), len(encoded[split])] for split in SPLITS}
        limited = {split: rows for split, rows in counts.items() if rows[0] < rows[1]} or None
        return TrialData(part, *sources, tokenizer_fingerprint, limited)

    def _limited(self, whole: Encoded, spec: TrialSpec) -> Encoded:
        """What the trainer's limits leave of ``whole``; trials with the same limits share the rows."""
        limits = {name: value for name, value in spec.trainer.decisive.items() if name in epochs.LIMITING}
        if not limits:
            return whole
        key = (id(whole), spec.data.batch_size, repr(limits), spec.metric)
        if self._parts_of is not whole:
            self._parts, self._parts_of = {}, whole
        if key not in self._parts:
            self._parts[key] = epochs.limited(whole, spec)
        return self._parts[key]

    def rows(self, spec: TrialSpec) -> Encoded:
        """The rows of ``spec`` in token ids."""
        return self.data(spec).encoded

    def base(self, spec: TrialSpec, labels: int | None) -> loading.Base:
        """The base of ``spec`` on its device, frozen and quantized. ``labels``: how many the data has; None: it has
        none. Raises ConfigError."""
        device, key = spec.trainer.base_device, _base_key(spec, labels)
        if self._base is None or key != self._base_key:
            self.forget_base()
            tokenizer, _ = self.tokenizer(spec.model)
            self._base = loading.load(spec.model, spec.quantization, tokenizer, labels, device)
            _prepare(self._base, device)
            self._base_key = key
        return self._base

    def bare_scores(self, base: loading.Base, spec: TrialSpec, data: Encoded) -> dict[str, float]:
        """The scores of ``base``, that of ``spec``, on data.forgetting without any adapter: computed once for all
        trials with the same base and rows. Empty where there are no such rows. Raises DivergedError where the loss is
        not finite."""
        other = data.forgetting
        if other is None:
            return {}
        key = (
            _base_key(spec, None),
            base.fingerprint,
            other.targets,
            other.splits.fingerprint,
            repr(spec.data.forgetting),
        )
        if key not in self._bare_scores:
            self._bare_scores[key] = bare_scores(base, spec, data)
        return self._bare_scores[key]


def _base_key(spec: TrialSpec, labels: int | None) -> tuple[Any, ...]:
    """Equal where the loaded base is the same."""
    classes = (type(spec.model), type(spec.quantization))  # two classes may have the same name
    own = (repr(spec.model), repr(spec.quantization), labels, spec.trainer.device, spec.trainer.precision)
    return (*classes, *own)


def _other_data(other: DataSpec, spec: TrialSpec, tokenizer: Any) -> Encoded:
    """The rows of data.forgetting in token ids. Raises DataError or ConfigError that names it."""
    try:
        return encoded_data(other, spec.model, tokenizer, spec.trainer.device, held_out=True)
    except (DataError, ConfigError) as error:
        text = str(error)
        key, rest = f"data.{FORGETTING}", text.removeprefix("data.")
        raise type(error)(f"{key}.{rest}" if rest != text else f"{key}: {text}") from error


def encoded_data(
    data: DataSpec, model: pretrained.Pretrained, tokenizer: Any, device: str, held_out: bool = False
) -> Encoded:
    """The rows of ``data`` in token ids. Data that is sampled from the base loads it, unquantized. ``held_out``: those
    of the validation split are enough."""
    if not data.from_base:
        return encoded_rows(data, model, tokenizer, held_out)
    base = loading.load(model, NoQuantization(), tokenizer, device=device).model.to(device)
    sampled: Encoded = data.sample(base, tokenizer, model.task, model.length)
    return sampled


def _prepare(base: loading.Base, device: str) -> None:
    """Puts the base on ``device`` and logs which of its settings training ignores. Raises ConfigError for a base that
    reads frozen weights itself, or a causal language model that sees later tokens."""
    model: Any = base.model.to(device)
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
        log.info("the router loss of %s is not part of train/loss", type(model).__name__)
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        log.warning("the base's config says problem_type=multi_label_classification; a row has one class here")
    refuse_read(model, {name: layer for name, layer in model.named_modules() if is_frozen(layer)})
    if base.spec.task == "causal_lm":
        check_causal(model)


def check_labels(base: loading.Base, data: list[Encoded]) -> None:
    """Raises ConfigError where a classifier has fewer classes than the data."""
    if base.spec.task != "sequence_classification":
        return
    count = int(base.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    for encoded in data:
        if len(encoded.splits.labels) > count:
            raise ConfigError(
                f"model.num_labels={count}, but the data has {len(encoded.splits.labels)} labels:"
                f" {encoded.splits.labels}"
            )


def check_splits(spec: TrialSpec, data: Encoded) -> None:
    """Raises DataError for a split that this trial needs and that has no row, or no token to predict, and where its
    sweep tunes for a test split that is the validation split."""
    tuned = bool((spec.config.get("sweep") or {}).get("tune"))
    needed = ["train", "validation"] if spec.trainer.max_steps else ["validation"]
    needed += ["test"] if tuned or spec.metric.startswith("test/") or (spec.trainer.test and len(data.test)) else []
    if tuned and data.splits.test and data.splits.test == data.splits.validation:
        raise DataError(
            f"data: the test split of {data.splits.name} is its validation split, row for row: what sweep.tune chooses"
            " on the one has no score on the other; valid: other rows"
        )
    for split in needed:
        _check_split(data, split, "data", spec.model.length)
    if data.forgetting is not None:
        _check_split(data.forgetting, "validation", f"data.{FORGETTING}", spec.model.length)


def _check_split(data: Encoded, split: str, key: str, length: int) -> None:
    if not len(data[split]):
        raise DataError(f"{key}: the {split} split of {data.splits.name} is empty")
    if not data.tokens[split]["target_tokens"]:
        raise DataError(
            f"{key}: the {split} split of {data.splits.name} has not one token to predict;"
            f" model.max_length={length} may leave none of its targets"
        )


def check_metrics(base: loading.Base, specs: Sequence[TrialSpec]) -> None:
    """Raises ConfigError for a metric of the user's that is made for other than the classes of ``base``."""
    count = int(base.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    for spec in specs if specs[0].model.task == "sequence_classification" else ():
        for name, metric in spec.own_metrics(texts=False).items():
            classes = getattr(metric, "num_classes", None)
            if classes not in (None, count):
                raise ConfigError(
                    f"metrics.{name}.num_classes={classes}, and the base tells {count} apart; valid: {count}"
                )
