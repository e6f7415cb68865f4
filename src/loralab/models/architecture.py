"""What an architecture is by its keys, and what it allows: its attention, and the tokens it has positions for."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from loralab.errors import ConfigError, nearest

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
# their first position stands after the padding token's, so that many of their embeddings are never reached
AFTER_PADDING = frozenset(
    {
        *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod", "data2vec-text"),
        *("esm", "ibert", "mpnet", "luke", "lilt", "longformer", "layoutlmv3", "markuplm"),
    }
)
POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_sequence_length"),
    *("max_encoder_position_embeddings", "max_decoder_position_embeddings", "max_target_positions"),
)
RELATIVE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "t5gemma"})  # n_positions is history there

SMALL_LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def auto_class(task: str) -> Any:
    """transformers' loader of a task."""
    import transformers

    return {
        "causal_lm": transformers.AutoModelForCausalLM,
        "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
    }[task]


def attention(wanted: str, task: str, config: Any) -> str | None:
    """``model.attn_implementation`` as transformers is asked for it: auto is SDPA where the architecture has it, else
    eager. None where nobody can say before the model is there (remote code): transformers chooses.

    Raises ConfigError for SDPA where there is none.
    """
    cls = _model_class(task, config)
    supported = bool(getattr(cls, "_supports_sdpa", False))
    if wanted == "auto":
        return None if cls is None else "sdpa" if supported else "eager"
    if wanted == "sdpa" and cls is not None and not supported:
        raise ConfigError(
            f"model.attn_implementation=sdpa: transformers has none for {cls.__name__}; valid: auto, or eager"
        )
    return wanted


def _model_class(task: str, config: Any) -> Any:
    """transformers' own class for the task, None for an architecture that it does not know."""
    try:
        found = auto_class(task)._model_mapping[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple | list) else found


def length(wanted: int | None, longest: int, config: Any) -> int:
    """Tokens of the longest row: ``wanted``, or where that is None the base's positions, at most ``longest``.

    Raises ConfigError where ``wanted`` exceeds the positions.
    """
    room = positions(config)
    if wanted is None:
        return min(longest, room or longest)
    if room and wanted > room:
        unused = unused_positions(config.get_text_config())
        why = f" ({room + unused} less {unused} that stand before the first token)" if unused else ""
        raise ConfigError(
            f"model.max_length={wanted} exceeds the {room} positions of the base model{why}; valid: at most {room}, or"
            f" null, which is {min(longest, room)} here"
        )
    return wanted


def positions(config: Any) -> int | None:
    """Tokens of the longest row that the base has positions for; None where it sets no bound."""
    if config.model_type in RELATIVE:
        return None
    own = config.get_text_config()
    alibi = getattr(getattr(own, "attn_config", None), "alibi", False)
    named = [getattr(own, "max_seq_len", None)] if own.model_type == "mpt" and not alibi else []
    named += [getattr(own, key, None) for key in POSITIONS]
    found = [value for value in named if isinstance(value, int) and value > 0]
    if not found:
        return None
    return min(found) - unused_positions(own)


def unused_positions(config: Any) -> int:
    """Position embeddings before that of a row's first token."""
    if config.model_type not in AFTER_PADDING or getattr(config, "position_embedding_type", "absolute") == "rotary":
        return 0
    return int(1 if config.pad_token_id is None else config.pad_token_id) + 1


def from_keys(keys: dict[str, Any]) -> Any:
    """The transformers config of ``model.config``, whose ``model_type`` is llama where it names none.

    Raises ConfigError for an architecture or a key that transformers does not know.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(keys.pop("model_type", "llama"))
    known = CONFIG_MAPPING.keys()
    if kind not in known:
        raise ConfigError(f"model.config.model_type={kind!r} is unknown to transformers; {nearest(kind, known)[:200]}")
    keys = {key: value for key, value in keys.items() if key not in ("architectures", "transformers_version", "dtype")}
    config = AutoConfig.for_model(kind)
    unknown = [key for key in keys if not (hasattr(config, key) or _reads(config, key))]
    if unknown:
        valid = [key for key in vars(config) if not key.startswith("_")]
        raise ConfigError(f"model.config.{unknown[0]}: {kind} has no such key; {nearest(unknown[0], valid)}")
    try:
        return AutoConfig.for_model(kind, **keys)
    except Exception as error:
        raise ConfigError(f"model.config is refused by transformers: {' '.join(str(error).split())}") from error


def _reads(config: Any, key: str) -> bool:
    """Whether the architecture's own source names ``key``: transformers reads some that its configs do not declare."""
    folder = Path(inspect.getfile(type(config))).parent
    return any(re.search(rf"\b{re.escape(key)}\b", path.read_text()) for path in folder.glob("*.py"))


def refuse_other(named: str, keys: Mapping[str, Any], config: Any) -> None:
    """Raises ConfigError where one of ``keys`` (``model.config``) is not what a checkpoint's ``config`` says: the
    weights are of that architecture, and counts and predictions of another one would not be theirs."""
    for key, wanted in keys.items():
        stored = getattr(config, key, None)
        if isinstance(stored, bool | int | float | str | None) and stored != wanted:
            raise ConfigError(
                f"model.config.{key}={wanted!r}: the checkpoint of {named} says {stored!r}; valid: leave it out, or "
                "model=random model.name_or_path=FOLDER, which draws weights for a changed architecture"
            )
