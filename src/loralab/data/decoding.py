"""How completions are decoded: those options of transformers' GenerationConfig that loralab takes."""

from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, Len

from loralab.errors import ConfigError
from loralab.spec import Count, Natural, Number, Positive, Share, make, spec

Portion = Annotated[Number, Gt(0), Le(1), "a number above 0, at most 1"]
Tokens = Annotated[list[Natural], Len(1), "a list of token ids"]
SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_k", "top_p", "typical_p")


@spec("data.generation", kw_only=True)
class Decoding:
    """One text a row; what frames a text is training's. None: as transformers has it, which is greedy here."""

    bad_words_ids: Annotated[list[Tokens], Len(1), "a list of lists of token ids"] | None = None
    begin_suppress_tokens: Tokens | None = None
    do_sample: bool | None = None
    early_stopping: bool | Literal["never"] | None = None
    encoder_no_repeat_ngram_size: Natural | None = None
    encoder_repetition_penalty: Positive | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    exponential_decay_length_penalty: Annotated[tuple[Natural, Positive], "[first token, factor]"] | None = None
    length_penalty: Number | None = None
    max_new_tokens: Count | None = None
    min_new_tokens: Natural | None = None
    min_p: Share | None = None
    no_repeat_ngram_size: Natural | None = None
    num_beams: Count | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    repetition_penalty: Positive | None = None
    sequence_bias: Annotated[list[tuple[Tokens, Number]], Len(1), "a list of [token ids, bias]"] | None = None
    suppress_tokens: Tokens | None = None
    temperature: Positive | None = None
    top_k: Natural | None = None
    top_p: Portion | None = None
    typical_p: Portion | None = None


def check_generation(options: dict[str, Any], key: str = "data.generation") -> None:
    """Raises ConfigError for an option that is not one of ``Decoding``'s, a wrong value, or what transformers refuses.

    ``key``: where the options are set, before the name of one in the message; empty: they stand alone.
    """
    from transformers import GenerationConfig

    given = make(Decoding, options, key)
    least, most = given.min_new_tokens, given.max_new_tokens
    if least is not None and most is not None and least > most:
        name = ".".join(filter(None, [key, "min_new_tokens"]))
        raise ConfigError(f"{name}={least} is more than max_new_tokens={most}; valid: at most that")
    try:
        GenerationConfig(**options).validate()
    except (ValueError, TypeError) as error:
        where = key or "the options of decoding"
        raise ConfigError(f"{where}={options}: transformers refuses it: {' '.join(str(error).split())}") from None
