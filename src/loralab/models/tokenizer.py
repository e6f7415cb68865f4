"""The tokenizer of a base: loaded with a padding token, and no wider than the base's embeddings."""

from pathlib import Path
from typing import Any

from torch import nn

from loralab.errors import ConfigError
from loralab.models import weights

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load_tokenizer(key: str, name: str, path: str, remote_code: bool) -> Any:
    """The tokenizer of ``key=name``, which lies at ``path``, padded by its end-of-text token where it has no padding.

    ``key``: model.tokenizer, or model.name_or_path for the one beside the weights. Raises ConfigError.
    """
    from transformers import AutoTokenizer

    beside = key != "model.tokenizer"
    folder = weights.find(key, name, path) or Path(path)
    files = [folder / file for file in FILES if (folder / file).is_file()]
    for file in files:
        weights.read_json(file)
    whose = "the tokenizer beside its weights" if beside else "the tokenizer"
    where = f" ({files[0]})" if files else " (model.tokenizer can name another)" if beside else ""
    with weights.explained(f"{key}={name!r}: {whose}{where} cannot be loaded", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {path} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raises ConfigError where a token has no embedding in the model, or the model has no table of embeddings."""
    try:
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except NotImplementedError:
        raise ConfigError(
            f"model: {type(model).__name__} looks its tokens up in no table of embeddings, so that no tokenizer can be "
            "held against it; valid: a model with input embeddings"
        ) from None
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))  # ids may have holes
    if tokens > rows:
        raise ConfigError(
            f"model.tokenizer: its {tokens} tokens exceed the {rows} embeddings of the base model; "
            "name the tokenizer that belongs to the base, or raise model.config.vocab_size"
        )
