"""Conversations in token ids by the tokenizer's own template, the loss on what the assistant writes.

Where the template marks that itself (``{% generation %}``), transformers' mask of it is taken. Else a turn of the
assistant is what its message adds to the text of those before it and the generation prompt: what the model would be
asked to write. That needs a template that writes the same for the first messages whatever follows, which is checked.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from loralab.data.base import Row
from loralab.data.examples import IGNORE, Example
from loralab.data.quoting import Quoting
from loralab.errors import DataError

TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Messages = Sequence[dict[str, str]]


class Turns:
    """A tokenizer with a chat template. Raises DataError where it has none, or cannot say which letters a token is."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"model.tokenizer: {name} has no chat template, by which data=chat writes a conversation; valid: the "
                "tokenizer of a chat model, or data=files with templates of your own"
            )
        if not tokenizer.is_fast:
            raise DataError(f"model.tokenizer: {name} cannot say where its tokens lie in a text; valid: a fast one")
        self.tokenizer, self.max_length, self.quoting = tokenizer, max_length, Quoting(tokenizer)
        self.tagged = bool(TAG.search(tokenizer.get_chat_template()))

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """One example a conversation, in order. Raises DataError with the row's place."""
        return [self.example(json.loads(row.prompt), row.where or "a row") for row in rows]

    def example(self, messages: Messages, where: str) -> Example:
        """A conversation that is too long loses its first turns, whole, but the system's; then its first tokens."""
        quoted = self.quoting.quoted_tokens([one["content"] for one in messages])
        if quoted:
            place, token = next(iter(quoted.items()))
            raise DataError(
                f"{where}: message {place + 1} quotes the special token {token!r}, which the template's own could not "
                "be told from; valid: messages without it"
            )
        ids, mask = self.tokens(messages, where)
        long, starts = len(ids) > self.max_length, _later_user_turns(messages)
        while len(ids) > self.max_length and starts:
            ids, mask = self.tokens(_messages_from(messages, starts.pop(0)), where)
        ids, mask = ids[-self.max_length :], mask[-self.max_length :]
        labels = [token if scored else IGNORE for token, scored in zip(ids, mask, strict=True)]
        # the first position is never predicted: a causal loss shifts the labels by one
        return Example(ids, labels, sum(label != IGNORE for label in labels[1:]), long)

    def tokens(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        """(token ids, whether the assistant writes each)."""
        ids, mask = self._tokens_by_tags(messages, where) if self.tagged else self._tokens_by_turns(messages, where)
        if not any(mask):
            raise DataError(f"{where}: the template marks not one token as the assistant's")
        return ids, mask

    def _tokens_by_tags(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        encoded = self._render(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = [bool(value) for value in encoded["assistant_masks"]]
        turns = sum(message["role"] == "assistant" for message in messages)
        stretches = sum(own and not before for before, own in zip([False, *mask], mask, strict=False))
        # where the tokenizer has no token for a turn's last letter, transformers' mask runs on to the end of the row
        if stretches < turns:
            raise DataError(
                f"{where}: the template's generation tags mark {stretches} stretches of tokens, and the assistant has "
                f"{turns} turns; valid: tags that end with a letter that the tokenizer keeps"
            )
        return list(encoded["input_ids"]), mask

    def _tokens_by_turns(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        whole = self._render(messages, where, tokenize=False)
        spans = [
            self._span(messages, index, whole, where)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # a token of two parts is the assistant's, as it is in transformers' own mask
        mask = [any(a < stop and start < b for start, stop in spans) for a, b in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), mask

    def _span(self, messages: Messages, place: int, whole: str, where: str) -> tuple[int, int]:
        """(start, stop) in characters of the turn at ``place`` in ``whole``. Raises DataError."""
        head = self._render(messages[:place], where, tokenize=False, add_generation_prompt=True) if place else ""
        grown = self._render(messages[: place + 1], where, tokenize=False)
        if not whole.startswith(grown) or not grown.startswith(head):
            raise DataError(
                f"{where}: the tokenizer's chat template writes the messages before message {place + 1} otherwise than "
                "it does alone, so the assistant's turn cannot be found; valid: a template with {% generation %} tags"
            )
        return len(head), len(grown)

    def _render(self, messages: Messages, where: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except TemplateError as error:
            raise DataError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from None


def _later_user_turns(messages: Messages) -> list[int]:
    """Indices of the user's turns but the first: where a shorter conversation may begin."""
    return [index for index, message in enumerate(messages) if message["role"] == "user"][1:]


def _messages_from(messages: Messages, start: int) -> Messages:
    """A leading system or developer message, and the messages from ``start`` on."""
    system = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    return [*system, *messages[start:]]
