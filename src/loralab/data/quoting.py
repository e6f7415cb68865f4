"""Special tokens that a row quotes are plain text; those that its template wrote are special.

Texts without quoted ones go to the tokenizer as they are. For the others there is a copy of it in which every special
token has a private name that no text holds: what the template wrote is given that name, the rest cannot be special.
"""

import copy
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from loralab.data.fields import written

MARK = "\U0010fffd"  # the last private letter of Unicode


class Quoting:
    """A tokenizer that can tell a quoted special token from a special token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        own = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.specials: dict[str, int] = {name: number for name, number in {**own, **known}.items() if name}

    def quoted(self, texts: Sequence[str]) -> dict[int, str]:
        """{place: the first special token that the text quotes} of those that do."""
        there = "\n".join(texts)
        names = [name for name in self.specials if name in there]
        if not names:
            return {}
        pattern = _any_of(names)
        found: dict[int, str] = {}
        for place, text in enumerate(texts):
            own = next((one[0] for one in pattern.finditer(text) if not _within(text, one.span())), None)
            if own is not None:
                found[place] = own
        return found

    def marked(self, text: str) -> str:
        """With the private names of the special tokens that the template wrote."""
        pattern = _any_of(list(self.specials))

        def name(one: re.Match[str]) -> str:
            return _private(self.specials[one[0]]) if _within(text, one.span()) else one[0]

        return pattern.sub(name, text)

    def ids(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text that quotes special tokens, nothing around them."""
        if self.fast:
            ids: list[int] = self.private.backend_tokenizer.encode(self.marked(text), add_special_tokens=False).ids
            return ids
        key = "text_target" if options.get("target") else "text"
        given: list[int] = self.private(**{key: self.marked(text)}, add_special_tokens=False)["input_ids"]
        return self._unmade(given, text)

    def framed(self, text: str, pair: str | None, **options: Any) -> dict[str, list[int]]:
        """As the tokenizer itself frames a text, or a pair, that quotes special tokens."""
        return dict(self.private(self.marked(text), None if pair is None else self.marked(pair), **options))

    def _unmade(self, ids: list[int], text: str) -> list[int]:
        """A word tokenizer without parts of words takes a quoted special token for the word of that name."""
        unknown = self.tokenizer.unk_token_id
        meant = {number for name, number in self.specials.items() if _private(number) in self.marked(text)}
        return [unknown if one in self.specials.values() and one not in meant else one for one in ids]

    @property
    def fast(self) -> bool:
        return bool(self.tokenizer.is_fast)

    @cached_property
    def private(self) -> Any:
        """The copy."""
        return self._fast_copy() if self.fast else self._slow_copy()

    def _fast_copy(self) -> Any:
        from tokenizers import Tokenizer

        made = copy.deepcopy(self.tokenizer)
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {name: _private(number) for name, number in self.specials.items()}
        for token in parts["added_tokens"]:
            if token["content"] in names:
                token.update(content=names[token["content"]], special=False, normalized=False)
        _rename(parts["model"], names)
        made._tokenizer = Tokenizer.from_str(json.dumps(parts))
        return made

    def _slow_copy(self) -> Any:
        made = copy.copy(self.tokenizer)
        added = {number: copy.copy(token) for number, token in made._added_tokens_decoder.items()}
        for token in added.values():
            if token.content in self.specials:
                token.content = _private(self.specials[token.content])
        made._added_tokens_decoder = added
        made._added_tokens_encoder = {token.content: number for number, token in added.items()}
        # the unknown token keeps its name: unknown words are looked up by it
        names = {name: _private(number) for name, number in self.specials.items() if name != made.unk_token}
        roles = made._special_tokens_map.items()
        made._special_tokens_map = {role: names.get(str(own), own) for role, own in roles}
        made._extra_special_tokens = [names.get(str(own), own) for own in made._extra_special_tokens]
        made.tokens_trie = type(made.tokens_trie)()
        for token in added.values():
            made.tokens_trie.add(token.content)
        return made


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """The pieces of a model that are special tokens, and those that it would merge them from."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        parts = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
        model["merges"] = [one for one in parts if names.keys().isdisjoint((*one, "".join(one)))]


def _private(number: int) -> str:
    return f"{MARK}{number}{MARK}"


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _within(text: str, span: tuple[int, int]) -> bool:
    """Whether the template wrote this part."""
    return any(start <= span[0] and span[1] <= stop for start, stop in written(text))
