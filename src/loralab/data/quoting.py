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

from loralab.data.fields import template_spans

MARK = "\U0010fffd"  # the last private letter of Unicode


class Quoting:
    """A tokenizer that can tell a quoted special token from a special token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        by_role = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.specials: dict[str, int] = {name: number for name, number in {**by_role, **added}.items() if name}

    def quoted_tokens(self, texts: Sequence[str]) -> dict[int, str]:
        """{index of a text: the first special token that it quotes}; texts that quote none are left out."""
        joined = "\n".join(texts)
        names = [name for name in self.specials if name in joined]
        if not names:
            return {}
        pattern = _any_of(names)
        tokens: dict[int, str] = {}
        for index, text in enumerate(texts):
            token = next((match[0] for match in pattern.finditer(text) if not _in_template(text, match.span())), None)
            if token is not None:
                tokens[index] = token
        return tokens

    def with_private_names(self, text: str) -> str:
        """``text``, its template's special tokens replaced by their private names."""
        pattern = _any_of(list(self.specials))

        def private_name(match: re.Match[str]) -> str:
            return _private_name(self.specials[match[0]]) if _in_template(text, match.span()) else match[0]

        return pattern.sub(private_name, text)

    def ids(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text that quotes special tokens, nothing around them."""
        if self.fast:
            backend = self.private_tokenizer.backend_tokenizer
            return list(backend.encode(self.with_private_names(text), add_special_tokens=False).ids)
        key = "text_target" if options.get("target") else "text"
        encoded = self.private_tokenizer(**{key: self.with_private_names(text)}, add_special_tokens=False)
        return self._with_unknown(encoded["input_ids"], text)

    def framed(self, text: str, pair: str | None, **options: Any) -> dict[str, list[int]]:
        """As the tokenizer itself frames a text, or a pair, that quotes special tokens."""
        second = None if pair is None else self.with_private_names(pair)
        return dict(self.private_tokenizer(self.with_private_names(text), second, **options))

    def _with_unknown(self, ids: list[int], text: str) -> list[int]:
        """A word tokenizer without parts of words takes a quoted special token for the word of that name."""
        unknown = self.tokenizer.unk_token_id
        named = self.with_private_names(text)
        in_template = {number for number in self.specials.values() if _private_name(number) in named}
        quoted = set(self.specials.values()) - in_template
        return [unknown if number in quoted else number for number in ids]

    @property
    def fast(self) -> bool:
        return bool(self.tokenizer.is_fast)

    @cached_property
    def private_tokenizer(self) -> Any:
        """The copy of the tokenizer in which special tokens have private names."""
        return self._fast_copy() if self.fast else self._slow_copy()

    def _fast_copy(self) -> Any:
        from tokenizers import Tokenizer

        copied = copy.deepcopy(self.tokenizer)
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {name: _private_name(number) for name, number in self.specials.items()}
        for token in parts["added_tokens"]:
            if token["content"] in names:
                token.update(content=names[token["content"]], special=False, normalized=False)
        _rename(parts["model"], names)
        copied._tokenizer = Tokenizer.from_str(json.dumps(parts))
        return copied

    def _slow_copy(self) -> Any:
        copied = copy.copy(self.tokenizer)
        added = {number: copy.copy(token) for number, token in copied._added_tokens_decoder.items()}
        for token in added.values():
            if token.content in self.specials:
                token.content = _private_name(self.specials[token.content])
        copied._added_tokens_decoder = added
        copied._added_tokens_encoder = {token.content: number for number, token in added.items()}
        # the unknown token keeps its name: unknown words are looked up by it
        names = {name: _private_name(number) for name, number in self.specials.items() if name != copied.unk_token}
        roles = copied._special_tokens_map.items()
        copied._special_tokens_map = {role: names.get(str(token), token) for role, token in roles}
        copied._extra_special_tokens = [names.get(str(token), token) for token in copied._extra_special_tokens]
        copied.tokens_trie = type(copied.tokens_trie)()
        for token in added.values():
            copied.tokens_trie.add(token.content)
        return copied


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
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [merge for merge in merges if names.keys().isdisjoint((*merge, "".join(merge)))]


def _private_name(number: int) -> str:
    return f"{MARK}{number}{MARK}"


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _in_template(text: str, span: tuple[int, int]) -> bool:
    """Whether the template wrote this part."""
    return any(start <= span[0] and span[1] <= stop for start, stop in template_spans(text))
