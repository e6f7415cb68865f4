"""The ``metrics`` group: torchmetrics classes by ``_target_``, each tried on made-up rows before weights load."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from loralab.config.classes import target
from loralab.errors import ConfigError

GIVEN = {
    "regression": "values (n,) and targets (n,)",
    "sequence_classification": "logits (n, classes) and classes (n,), with its own arguments",
    **dict.fromkeys(("causal_lm", "seq2seq_lm"), "token ids (n,) and target ids (n,)"),
}  # by kind: predictions and targets


def own_metrics(
    nodes: Mapping[str, Any], known: list[str], kind: str, generated: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that makes the metric) of each. ``known``: names that are taken; ``kind``: causal_lm, seq2seq_lm,
    sequence_classification or regression; ``generated``: whether some rows are completed. Raises ConfigError."""
    for name, node in nodes.items():
        if node is None:
            continue
        key = f"metrics.{name}"
        cls = target(node, key)
        _check_class(cls, key, str(node["_target_"]))
        if name in known or "/" in name:
            raise ConfigError(f"{key}: val/{name} is measured already; valid: another name, without /")
        if of_texts(cls) and not generated:
            raise ConfigError(
                f"{key}: {cls.__name__} scores generated texts, and none are generated; valid: data.generate_rows of "
                "at least 1 and a model.task that writes text"
            )
        make = partial(cls, **{str(option): value for option, value in node.items() if option != "_target_"})
        _try(make, key, kind)
        yield name, make


def _check_class(cls: Any, key: str, name: str) -> None:
    from torchmetrics import Metric, MetricCollection
    from torchmetrics.aggregation import BaseAggregator

    if isinstance(cls, type) and issubclass(cls, MetricCollection):
        raise ConfigError(f"{key}._target_={name!r} is several metrics; valid: each by a metrics.NAME of its own")
    if not (isinstance(cls, type) and issubclass(cls, Metric)):
        raise ConfigError(f"{key}._target_={name!r} is not a torchmetrics metric")
    if issubclass(cls, BaseAggregator):
        raise ConfigError(
            f"{key}: {cls.__name__} aggregates a value by weights, and is given predictions and targets; valid: a"
            " metric of these"
        )


def of_texts(cls: Any) -> bool:
    """Whether a metric takes lists of texts."""
    from loralab.forward.texts import takes_texts

    return takes_texts(cls)


def _try(make: Callable[[], Any], key: str, kind: str) -> None:
    """Raises ConfigError where the metric cannot be made, does not take what is predicted, or gives no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two made-up rows
        try:
            metric = make()
            metric.update(*_made_up(metric, kind))
            value = metric.compute()
        except Exception as error:
            name = getattr(make, "func", make).__name__
            text = " ".join(str(error).split()) or type(error).__name__
            given = "texts" if of_texts(getattr(make, "func", make)) else GIVEN[kind]
            raise ConfigError(f"{key}: {name} cannot be used: {text}; valid: a metric that takes {given}") from error
    if getattr(value, "numel", lambda: 0)() != 1 and not isinstance(value, float | int):
        raise ConfigError(f"{key}: {type(metric).__name__} gives no single number; valid: a metric of one value")


def _made_up(metric: Any, kind: str) -> tuple[Any, Any]:
    """Predictions and targets as a run gives them: texts; logits (n, C) and classes; scores; token ids."""
    import torch

    if of_texts(type(metric)):
        return ["some words of text", "more"], ["some words of text", "less"]
    if kind == "regression":
        return torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1.0, 2.0, 0.0])
    if kind == "sequence_classification":
        classes = int(getattr(metric, "num_classes", None) or 2)
        return torch.eye(max(2, classes))[:2], torch.tensor([0, 1])
    return torch.tensor([0, 1]), torch.tensor([0, 1])
