"""A data set as a base model is fed with it: the classes in the base's own order, pairs, scores."""

import inspect
import logging
from dataclasses import replace
from typing import Any

from torch import nn

from loralab.data.base import SPLITS, DataSpec, Splits
from loralab.data.encoding import Encoded, encode
from loralab.data.labels import key_of
from loralab.errors import ConfigError, DataError
from loralab.models.architecture import auto_class
from loralab.models.pretrained import Pretrained

log = logging.getLogger(__name__)

BY_THE_LAST_TOKEN = frozenset({"t5gemma", "t5gemma2"})  # these encoders with a decoder look for no ending


def encoded_rows(data: DataSpec, model: Pretrained, tokenizer: Any, held_out: bool = False) -> Encoded:
    """The rows of ``data`` in token ids, for ``model.task``; ``held_out``: those of the validation split alone. Raises
    DataError, ConfigError."""
    classifies = model.task == "sequence_classification"
    regression = classifies and model.num_labels == 1
    splits = (data.as_scores() if regression else data).splits()
    if held_out:
        splits = replace(splits, train=[], test=[])
    if classifies and not regression:
        splits = in_the_order_of(splits, model.class_names(), model.num_labels)
    encoded = encode(splits, tokenizer, model.task, model.length, typed=classifies and reads_types(model))
    if classifies:
        check_ends(encoded, model.architecture())
    return encoded


def check_ends(encoded: Encoded, config: Any) -> None:
    """Refuses rows that a classifier with a decoder (T5, BART) cannot read: it takes its class from where a row holds
    the end-of-sequence token, and transformers wants as many of them in every row of a batch.

    Raises ConfigError where the tokenizer writes none, DataError for the first row with another number of them.
    """
    if not config.is_encoder_decoder or config.model_type in BY_THE_LAST_TOKEN:
        return
    rows = [row for split in SPLITS for row in encoded.splits[split]]
    counts = [ids.input_ids.count(config.eos_token_id) for split in SPLITS for ids in encoded[split]]
    framed = min(counts, default=1)
    end = f"the end-of-sequence token (id {config.eos_token_id})"
    if not framed:
        raise ConfigError(
            f"model.tokenizer: it does not end a text with {end}, from which a {config.model_type} classifier takes "
            "the class of a row; valid: the base's own tokenizer"
        )
    for row, count in zip(rows, counts, strict=True):
        if count != framed:
            raise DataError(
                f"{row.where or 'a row'}: holds {end} {count} times, other rows {framed} times; a {config.model_type} "
                "classifier wants as many in each; valid: data.text without it"
            )


def reads_types(model: Pretrained) -> bool:
    """Whether the base tells the texts of a pair apart by token_type_ids."""
    config = model.architecture()
    known = auto_class(model.task)._model_mapping
    if type(config) not in known or getattr(config, "type_vocab_size", 2) < 2:
        return False
    return "token_type_ids" in inspect.signature(known[type(config)].forward).parameters


def in_the_order_of(splits: Splits, names: list[str], num_labels: int | None = None) -> Splits:
    """With the classes in the order of ``names``, those of the base's own head, where they are among them."""
    if splits.kind != "labels" or not names:
        return splits
    own = {_alike(name): name for name in splits.labels}
    theirs = [_alike(name) for name in names]
    fits = num_labels in (None, len(names)) and len(own) == len(splits.labels) and len(set(theirs)) == len(theirs)
    if not fits or not own.keys() <= set(theirs):
        if names != [f"LABEL_{place}" for place in range(len(names))]:
            log.warning(
                "the base's own classes (%s) are not the data's (%s), whose order is taken",
                *(", ".join(names[:20]), ", ".join(splits.labels[:20])),
            )
        return splits
    labels = [own.get(key, name) for key, name in zip(theirs, names, strict=True)]
    if labels != splits.labels:
        log.warning("the classes are numbered as in the base's own head: %s", ", ".join(labels[:20]))
    places = [theirs.index(_alike(name)) for name in splits.labels]
    rows: dict[str, Any] = {
        split: [replace(row, label=None if row.label is None else places[int(row.label)]) for row in splits[split]]
        for split in SPLITS
    }
    return replace(splits, labels=labels, **rows)


def name_classes(model: nn.Module, names: list[str]) -> None:
    """Makes ``names``, in order, those of the model's classes; classes beyond them keep transformers' LABEL_7."""
    config: Any = model.config
    if names and config.num_labels >= len(names):
        padded = [*names, *(f"LABEL_{place}" for place in range(len(names), config.num_labels))]
        config.id2label = dict(enumerate(padded))
        config.label2id = {name: place for place, name in enumerate(padded)}


def _alike(name: str) -> str:
    return key_of(name).casefold()
