"""One row to token ids: what is put around a text, where a prompt ends, which special tokens are text.

Prompt and target are tokenized alone, so their boundary is exact.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from loralab.data.base import Row
from loralab.data.examples import IGNORE, Blocks, Example
from loralab.data.fields import Filled, written
from loralab.data.quoting import Quoting
from loralab.errors import ConfigError, DataError

log = logging.getLogger(__name__)

DOCUMENTS_PER_CALL = 128  # a tokenizer call returns Python lists: bounds the memory of a large corpus


class Encoder:
    """A tokenizer, what it puts around a text, and the form of an example that a task wants."""

    def __init__(self, tokenizer: Any, task: str, max_length: int, typed: bool = False) -> None:
        """``typed``: the model reads which text of a pair a token is of."""
        self.tokenizer, self.task, self.max_length, self.typed = tokenizer, task, max_length, typed
        self.prefix, self.suffix = special_affixes(tokenizer)
        self.target_prefix, self.target_suffix = self.prefix, self.suffix
        self.eos = tokenizer.eos_token_id
        if self.eos is None and task != "sequence_classification":
            raise ConfigError(
                f"model.tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__} has no "
                f"end-of-sequence token, which model.task={task} needs to learn where a target ends"
            )
        if task == "seq2seq_lm":
            _check_language(tokenizer)
            self.target_prefix, self.target_suffix = special_affixes(tokenizer, target=True)
        self.quoting = Quoting(tokenizer)
        self.marks_start = task == "causal_lm" and marks_start(tokenizer)
        self.told: dict[str, list[tuple[str, str]]] = {}  # {what is to be said: (where, token) of the rows}

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """One example a row, in order."""
        self._note_quoted(rows)
        if self.task == "sequence_classification":
            return self.classes(rows)
        prompts, targets = self.plain([row.prompt for row in rows]), self.targets(rows)
        pair = self.causal if self.task == "causal_lm" else self.seq2seq
        return [pair(one, other, row.where) for one, other, row in zip(prompts, targets, rows, strict=True)]

    def targets(self, rows: Sequence[Row]) -> list[list[int]]:
        """Of each row, nothing cut, nothing around them."""
        targets = [row.target for row in rows]
        if self.task == "causal_lm":
            return self.continuations([row.prompt for row in rows], targets)
        return self.plain(targets, target=True)

    def causal(self, prompt: list[int], target: list[int], where: str = "") -> Example:
        """prefix + prompt + target + eos; the loss is on target and eos."""
        if self.prefix and prompt[: len(self.prefix)] == self.prefix:
            self._note("bos", where, self.prefix)
            prompt = prompt[len(self.prefix) :]
        target = self.ended(target, where)
        room = max(0, self.max_length - len(self.prefix) - len(target))
        kept = prompt[len(prompt) - room :] if room < len(prompt) else prompt
        head = self.prefix + kept
        ids = (head + target)[: self.max_length]
        labels = ([IGNORE] * len(head) + target)[: self.max_length]
        # the first position is never predicted: a causal loss shifts the labels by one
        counted = sum(label != IGNORE for label in labels[1:])
        return Example(ids, labels, counted, len(head) + len(target) > len(ids) or len(kept) < len(prompt))

    def ended(self, target: list[int], where: str = "") -> list[int]:
        """With the end of text behind it, unless the template wrote it there."""
        if target and target[-1] == self.eos:
            self._note("eos", where, [self.eos])
            return target
        return [*target, self.eos]

    def seq2seq(self, prompt: list[int], target: list[int], where: str = "") -> Example:
        """Source and target, each with its special tokens, each at most max_length long."""
        room = max(0, self.max_length - len(self.prefix) - len(self.suffix))
        end = self.target_suffix or [self.eos]
        if target[-len(end) :] == end:
            self._note("eos", where, end)
            target = target[: -len(end)]
        wanted = self.target_prefix + target
        labels = wanted[: max(0, self.max_length - len(end))] + end
        ids = self.prefix + prompt[max(0, len(prompt) - room) :] + self.suffix
        return Example(ids, labels, len(labels), room < len(prompt) or len(labels) < len(wanted) + len(end))

    def classes(self, rows: Sequence[Row]) -> list[Example]:
        """The text, or the pair, as the tokenizer itself frames and truncates it (its truncation_side)."""
        if not rows:
            return []
        texts, paired = [row.prompt for row in rows], any(row.pair is not None for row in rows)
        pairs = [row.pair or "" for row in rows] if paired else None
        options = {"truncation": True, "max_length": self.max_length, "return_attention_mask": False}
        made = self.tokenizer(texts, pairs, **options)
        cut = [{key: made[key][place] for key in made} for place in range(len(rows))]
        for place in self.quoting.quoted(texts) | self.quoting.quoted(pairs or []):
            cut[place] = self.quoting.framed(texts[place], pairs[place] if pairs else None, **options)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=paired)
        seconds = self.plain(pairs) if pairs else [[]] * len(rows)
        lengths = [len(one) + len(other) for one, other in zip(self.plain(texts), seconds, strict=True)]
        return [
            Example(
                one["input_ids"], [_label(row)], 1, length > room, one.get("token_type_ids") if self.typed else None
            )
            for one, row, length in zip(cut, rows, lengths, strict=True)
        ]

    def blocks(self, rows: Sequence[Row]) -> Blocks:
        """Documents joined by eos (one before the first: its first token is predicted too), then cut."""
        self._note_quoted(rows)
        parts = [np.array([self.eos], np.int32)]
        for start in range(0, len(rows), DOCUMENTS_PER_CALL):
            documents = [row.target for row in rows[start : start + DOCUMENTS_PER_CALL]]
            parts += [np.array([*document, self.eos], np.int32) for document in self.plain(documents)]
        return Blocks(np.concatenate(parts) if rows else np.empty(0, np.int32), self.max_length)

    def plain(self, texts: Sequence[str], target: bool = False) -> list[list[int]]:
        """Token ids, nothing cut, no special tokens but a template's; ``target``: as what a decoder writes."""
        if not texts:
            return []
        given: dict[str, Any] = {"text_target" if target else "text": list(texts)}
        encoded = self.tokenizer(**given, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        for place in self.quoting.quoted(texts):
            ids[place] = self.quoting.ids(texts[place], target=target)
        return ids

    def continuations(self, texts: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
        """Targets behind their prompts, ``texts``; where a tokenizer marks the first word of a text by a space, that of
        the whole text is marked, not the target's."""
        alone = self.plain(targets)
        if not self.marks_start:
            return alone
        prompts = self.plain(texts)
        behind = [at for at, prompt in enumerate(prompts) if prompt]
        whole = self.plain([joined(texts[at], targets[at]) for at in behind])
        found = {at: after(prompts[at], ids) for at, ids in zip(behind, whole, strict=True)}
        # where a target would change its prompt's last token: behind a line break, which is part of no word
        changed = [at for at in behind if not found[at]]
        (end,) = self.plain(["\n"])
        broken = self.plain([joined("\n", targets[at]) for at in changed])
        found.update({at: after(end, ids) for at, ids in zip(changed, broken, strict=True)})
        return [found.get(at) or ids for at, ids in enumerate(alone)]

    def _note_quoted(self, rows: Sequence[Row]) -> None:
        found: dict[int, str] = {}
        for key in ("prompt", "pair") if self.task == "sequence_classification" else ("prompt", "target"):
            found = self.quoting.quoted([getattr(row, key) or "" for row in rows]) | found
        if found:
            self.told.setdefault("quoted", []).extend((rows[place].where, found[place]) for place in sorted(found))

    def _note(self, what: str, where: str, ids: list[int]) -> None:
        self.told.setdefault(what, []).append((where, self.tokenizer.decode(ids)))

    def tell(self) -> None:
        """One line for each thing that rows have been found to hold."""
        says = {
            "quoted": "%s quotes the special token %r, read as text%s",
            "bos": "%s begins with %r, which the tokenizer puts there itself: it is there once%s",
            "eos": "%s ends in %r, which ends every target: it is there once%s",
        }
        for what, found in self.told.items():
            rows = len({where for where, _ in found})
            log.warning(says[what], found[0][0] or "a row", found[0][1], f" (so do {rows} rows)" if rows > 1 else "")


def joined(first: str, second: str) -> str:
    """One text of two, each knowing what its template wrote."""
    spans = (*written(first), *((start + len(first), stop + len(first)) for start, stop in written(second)))
    return Filled(first + second, spans) if spans else first + second


def after(head: list[int], whole: list[int]) -> list[int]:
    """What follows ``head`` in ``whole``; empty where that does not begin with it."""
    return whole[len(head) :] if whole[: len(head)] == head else []


def marks_start(tokenizer: Any) -> bool:
    """Whether a text's first word is encoded as one that follows a space."""
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a a"))
    return bool(one) and two == one + one


def special_affixes(tokenizer: Any, target: bool = False) -> tuple[list[int], list[int]]:
    """What a tokenizer puts around a text: Llama ([bos], []), T5 ([], [eos]), BERT ([cls], [sep]); ``target``: around
    one that the decoder writes, which may name another language."""
    key = "text_target" if target else "text"
    bare, full = (tokenizer(**{key: "a"}, add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _check_language(tokenizer: Any) -> None:
    """Raises ConfigError where a tokenizer that marks languages does not know the targets'."""
    marks = hasattr(tokenizer, "_switch_to_target_mode") and getattr(tokenizer, "src_lang", None) is not None
    if marks and getattr(tokenizer, "tgt_lang", "") is None:
        codes = [name for name in tokenizer.all_special_tokens if "_" in name][:5]
        raise ConfigError(
            f"model.tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__} has no target language, and its "
            f"source language is {tokenizer.src_lang}; valid: tgt_lang in tokenizer_config.json, such as "
            f"{', '.join(codes)}"
        )


def _label(row: Row) -> int | float:
    if row.label is None:
        raise DataError(f"{row.where or 'a row'}: has no label")
    return row.label
