"""Whether a row of the data is, in a batch of this base, what it is alone; where it is not, the run is refused."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from loralab.errors import ConfigError
from loralab.forward.graph import check_padding

CAPPED = frozenset(
    {"nllb-moe"}
)  # an expert takes so many tokens of a batch, or of the one before, and drops the others


def check_rows(model: nn.Module, task: str, rows: Iterable[Sequence[int]], batch_size: int, together: bool) -> None:
    """Raises ConfigError where the loss of one of ``rows``, token ids, would depend on the rows beside it.

    ``together``: rows of several trials, or of one packed sequence, are in a batch whatever its size.
    """
    config: Any = model.config
    if config.model_type in CAPPED:
        raise ConfigError(
            f"model.name_or_path: {type(model).__name__} (model_type={config.model_type}) lets an expert take a bounded"
            " number of tokens of a whole batch, so that a row's loss depends on the rows beside it; valid: a base"
            " whose experts take every token"
        )
    turned = _turned_by_the_longest(config) if batch_size > 1 or together else None
    if task == "causal_lm" and turned is None:  # behind a row comes nothing that it could see
        return
    kept = list(rows)
    lengths = {len(row) for row in kept}
    if turned is not None and lengths:
        _check_rotation(turned, min(lengths), max(lengths), batch_size)
    if batch_size > 1 and len(lengths) > 1 and task != "causal_lm":
        check_padding(model, task, batch_size)


def _turned_by_the_longest(config: Any) -> int | None:
    """The tokens of a batch's longest row from which on rotary embeddings of the longrope kind turn all its rows
    otherwise; None where nothing does."""
    own = config.get_text_config()
    ropes = getattr(own, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else [one for one in ropes.values() if isinstance(one, dict)]:
        if rope.get("rope_type") == "longrope":
            room = rope.get("original_max_position_embeddings")
            return room or getattr(own, "original_max_position_embeddings", None)
    return None


def _check_rotation(room: int, shortest: int, longest: int, batch_size: int) -> None:
    if shortest <= room < longest:
        raise ConfigError(
            f"data.batch_size={batch_size}: the base's positions (rope_type=longrope) turn all rows of a batch by its "
            f"longest, and the data has rows of {shortest} to {longest} tokens, on both sides of "
            f"original_max_position_embeddings={room}; valid: model.max_length={room}, or data.batch_size=1 with "
            "data.packing=false and hydra.launcher.pack=off"
        )
