"""One row to token ids: what is put around a text, where a prompt ends, which special tokens are text.

Prompt and target are tokenized alone, so their boundary is exact.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from loralab.data.base import Row
from loralab.data.examples import IGNORE, Blocks, Example
from loralab.data.fields import TemplateText, template_spans
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
        self.notices: dict[str, list[tuple[str, str]]] = {}  # {bos, eos or quoted: (file:line, token) of each row}

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """One example a row, in order."""
        self._add_quoted_notices(rows)
        if self.task == "sequence_classification":
            return self.classes(rows)
        prompts, targets = self.token_ids([row.prompt for row in rows]), self.targets(rows)
        pair = self.causal if self.task == "causal_lm" else self.seq2seq
        return [pair(prompt, target, row.where) for prompt, target, row in zip(prompts, targets, rows, strict=True)]

    def targets(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of each row's target, as they follow its prompt; not truncated, no special tokens added."""
        targets = [row.target for row in rows]
        if self.task == "causal_lm":
            return self.continuation_ids([row.prompt for row in rows], targets)
        return self.token_ids(targets, target=True)

    def causal(self, prompt: list[int], target: list[int], where: str = "") -> Example:
        """prefix + prompt + target + eos; the loss is on target and eos."""
        if self.prefix and prompt[: len(self.prefix)] == self.prefix:
            self._add_notice("bos", where, self.prefix)
            prompt = prompt[len(self.prefix) :]
        target = self.with_eos(target, where)
        room = max(0, self.max_length - len(self.prefix) - len(target))
        truncated_prompt = prompt[len(prompt) - room :] if room < len(prompt) else prompt
        head = self.prefix + truncated_prompt
        ids = (head + target)[: self.max_length]
        labels = ([IGNORE] * len(head) + target)[: self.max_length]
        # the first position is never predicted: a causal loss shifts the labels by one
        counted = sum(label != IGNORE for label in labels[1:])
        return Example(ids, labels, counted, len(head) + len(target) > len(ids) or room < len(prompt))

    def with_eos(self, target: list[int], where: str = "") -> list[int]:
        """``target`` and one end-of-text token; adds a notice where the template wrote it. ``where``: file:line."""
        if target and target[-1] == self.eos:
            self._add_notice("eos", where, [self.eos])
            return target
        return [*target, self.eos]

    def seq2seq(self, prompt: list[int], target: list[int], where: str = "") -> Example:
        """Source and target, each with its special tokens, each of at most ``max_length`` tokens: the source loses its
        start, the target its end."""
        room = max(0, self.max_length - len(self.prefix) - len(self.suffix))
        end = self.target_suffix or [self.eos]
        if target[-len(end) :] == end:
            self._add_notice("eos", where, end)
            target = target[: -len(end)]
        wanted = self.target_prefix + target
        labels = wanted[: max(0, self.max_length - len(end))] + end
        ids = self.prefix + prompt[max(0, len(prompt) - room) :] + self.suffix
        return Example(ids, labels, len(labels), room < len(prompt) or len(labels) < len(wanted) + len(end))

    def classes(self, rows: Sequence[Row]) -> list[Example]:
        """Classification: the text, or the pair, as the tokenizer itself frames and truncates it (its truncation_side).
        Raises DataError for a row without a label."""
        if not rows:
            return []
        texts, paired = [row.prompt for row in rows], any(row.pair is not None for row in rows)
        pairs = [row.pair or "" for row in rows] if paired else None
        options = {"truncation": True, "max_length": self.max_length, "return_attention_mask": False}
        encoded = self.tokenizer(texts, pairs, **options)
        inputs = [{key: encoded[key][index] for key in encoded} for index in range(len(rows))]
        for index in self.quoting.quoted_tokens(texts) | self.quoting.quoted_tokens(pairs or []):
            inputs[index] = self.quoting.framed(texts[index], pairs[index] if pairs else None, **options)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=paired)
        seconds = self.token_ids(pairs) if pairs else [[]] * len(rows)
        lengths = [len(ids) + len(second) for ids, second in zip(self.token_ids(texts), seconds, strict=True)]
        return [
            Example(
                own["input_ids"], [_label(row)], 1, length > room, own.get("token_type_ids") if self.typed else None
            )
            for own, row, length in zip(inputs, rows, lengths, strict=True)
        ]

    def blocks(self, rows: Sequence[Row]) -> Blocks:
        """Documents joined by eos (one before the first: its first token is predicted too), then cut."""
        self._add_quoted_notices(rows)
        parts = [np.array([self.eos], np.int32)]
        for start in range(0, len(rows), DOCUMENTS_PER_CALL):
            documents = [row.target for row in rows[start : start + DOCUMENTS_PER_CALL]]
            parts += [np.array([*document, self.eos], np.int32) for document in self.token_ids(documents)]
        return Blocks(np.concatenate(parts) if rows else np.empty(0, np.int32), self.max_length)

    def token_ids(self, texts: Sequence[str], target: bool = False) -> list[list[int]]:
        """Token ids, nothing cut, no special tokens but a template's; ``target``: as what a decoder writes."""
        if not texts:
            return []
        named: dict[str, Any] = {"text_target" if target else "text": list(texts)}
        encoded = self.tokenizer(**named, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        for index in self.quoting.quoted_tokens(texts):
            ids[index] = self.quoting.ids(texts[index], target=target)
        return ids

    def continuation_ids(self, texts: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
        """Targets behind their prompts, ``texts``; where a tokenizer marks the first word of a text by a space, that of
        the whole text is marked, not the target's."""
        separate = self.token_ids(targets)
        if not self.marks_start:
            return separate
        prompts = self.token_ids(texts)
        prompted = [index for index, prompt in enumerate(prompts) if prompt]
        whole = self.token_ids([concatenated(texts[index], targets[index]) for index in prompted])
        continued = {index: ids_behind(prompts[index], ids) for index, ids in zip(prompted, whole, strict=True)}
        # where a target would change its prompt's last token: behind a line break, which is part of no word
        changed = [index for index in prompted if not continued[index]]
        (line_break,) = self.token_ids(["\n"])
        broken = self.token_ids([concatenated("\n", targets[index]) for index in changed])
        continued.update({index: ids_behind(line_break, ids) for index, ids in zip(changed, broken, strict=True)})
        return [continued.get(index) or ids for index, ids in enumerate(separate)]

    def _add_quoted_notices(self, rows: Sequence[Row]) -> None:
        tokens: dict[int, str] = {}
        for key in ("prompt", "pair") if self.task == "sequence_classification" else ("prompt", "target"):
            tokens = self.quoting.quoted_tokens([getattr(row, key) or "" for row in rows]) | tokens
        if tokens:
            self.notices.setdefault("quoted", []).extend((rows[index].where, tokens[index]) for index in sorted(tokens))

    def _add_notice(self, kind: str, where: str, ids: list[int]) -> None:
        self.notices.setdefault(kind, []).append((where, self.tokenizer.decode(ids)))

    def log_notices(self) -> None:
        """Logs one warning for each kind of notice: its first row, and how many rows have it."""
        messages = {
            "quoted": "%s quotes the special token %r, read as text%s",
            "bos": "%s begins with %r, which the tokenizer puts there itself: it is there once%s",
            "eos": "%s ends in %r, which ends every target: it is there once%s",
        }
        for kind, notices in self.notices.items():
            rows = len({where for where, _ in notices})
            log.warning(
                messages[kind], notices[0][0] or "a row", notices[0][1], f" (so do {rows} rows)" if rows > 1 else ""
            )


def concatenated(first: str, second: str) -> str:
    """``first + second``; a TemplateText where a template wrote part of either."""
    shifted = [(start + len(first), stop + len(first)) for start, stop in template_spans(second)]
    spans = (*template_spans(first), *shifted)
    return TemplateText(first + second, spans) if spans else first + second


def ids_behind(head: list[int], whole: list[int]) -> list[int]:
    """What follows ``head`` in ``whole``; empty where that does not begin with it."""
    return whole[len(head) :] if whole[: len(head)] == head else []


def marks_start(tokenizer: Any) -> bool:
    """Whether a text's first word is encoded as one that follows a space."""
    word, two_words = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a a"))
    return bool(word) and two_words == word + word


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
