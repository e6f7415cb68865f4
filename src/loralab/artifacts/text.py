"""What an opened run makes of a prompt: a completion, or the probabilities of a classifier's classes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.base import Adapter
from loralab.artifacts.reopen import OpenRun
from loralab.data.base import Row
from loralab.data.chat import Chat
from loralab.data.decoding import SAMPLING, check_generation
from loralab.data.encoder import Encoder
from loralab.data.fields import TemplateText
from loralab.data.rows import RowSpec
from loralab.errors import ConfigError
from loralab.training.generation import Writer

NEW_TOKENS = 64  # where neither the command nor data.generation says how many


def completion(run: OpenRun, prompt: str, options: Mapping[str, Any], seed: int = 0, adapted: bool = True) -> str:
    """The text that the run writes behind ``prompt``, decoded as ``data.generation`` of the run and ``options`` say
    (transformers' GenerationConfig; greedy without either). ``adapted`` False: the base without its adapter.

    Raises ConfigError for an unknown option, a wrong value, one of sampling without do_sample, or a prompt that leaves
    no room for a token.
    """
    chosen = {**run.spec.data.generation, **options}
    check_generation(chosen, key="")
    if (idle := [key for key in SAMPLING if options.get(key) is not None]) and not chosen.get("do_sample"):
        raise ConfigError(f"{idle[0]}={options[idle[0]]} is of sampling, and decoding is greedy; valid: do_sample=true")
    adapter: Adapter | None = run.adapter if adapted else None
    length = room_of(run)
    writer = Writer(run.model, run.base.tokenizer, adapter, run.spec.model.task, length, chosen, seed)
    head = _head(run, writer.encoder, prompt)
    free = length - (0 if writer.task == "seq2seq_lm" else len(head))
    if free < 1 or len(head) > length:
        raise ConfigError(f"the prompt has {len(head)} tokens, and {run.base.record()['name']} has room for {length}")
    with run.spec.trainer.autocast():
        (ids,) = writer.complete([head], [min(free, chosen.get("max_new_tokens") or NEW_TOKENS)])
    return str(run.base.tokenizer.decode(ids, skip_special_tokens=True))


def class_probabilities(run: OpenRun, prompt: str, adapted: bool = True) -> dict[str, float]:
    """{class: probability} of a classifier, the likeliest first; of a regression ``{"score": value}``.

    Raises ConfigError for a text that is longer than the base reads, and for a run that classifies pairs.
    """
    if isinstance(run.spec.data, RowSpec) and isinstance(run.spec.data.text, list):
        raise ConfigError(
            f"{run.folder} classifies pairs of texts, data.text={run.spec.data.text}, and --prompt is one text; valid: "
            "a run whose data.text is one template"
        )
    room = room_of(run)
    (example,) = Encoder(run.base.tokenizer, run.spec.model.task, room).examples([Row(prompt, label=0)])
    if example.truncated:
        raise ConfigError(f"the prompt is longer than the {room} tokens that {run.base.record()['name']} has room for")
    ids = torch.tensor([example.input_ids], device=next(run.model.parameters()).device)
    with run.spec.trainer.autocast(), run.adapted(1) if adapted else run.bare():
        logits: Tensor = run.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    if len(logits) == 1:
        return {"score": float(logits[0])}
    names: Any = run.record["data"]["id2label"]
    shares = logits.softmax(0).tolist()
    named = {str(names.get(str(index), index)): share for index, share in enumerate(shares)}
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def room_of(run: OpenRun) -> int:
    """Tokens of prompt and completion together (seq2seq: of each): the base's positions; where it has no bound,
    model.max_length or more."""
    return run.spec.room or max(run.spec.model.length, 2**15)


def _head(run: OpenRun, encoder: Encoder, prompt: str) -> list[int]:
    """The prompt in token ids, framed as a training row's; of a chat as the user's turn."""
    if isinstance(run.spec.data, Chat):
        messages = [{"role": "user", "content": prompt}]
        return list(run.base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    (ids,) = encoder.token_ids([TemplateText(prompt, ((0, len(prompt)),))])  # special tokens in it are special
    if run.spec.data.documents:
        return ids or [encoder.eos]
    suffix = encoder.suffix if encoder.task == "seq2seq_lm" else []
    written = encoder.task == "causal_lm" and ids[: len(encoder.prefix)] == encoder.prefix  # in the prompt itself
    return [*([] if written else encoder.prefix), *ids, *suffix] or [encoder.eos]
