"""A row in words: what is decoded is what was encoded."""

import pytest

from loralab.data.base import Row, make_splits
from loralab.data.encoding import encode
from loralab.data.preview import WIDTH, preview, shown
from loralab.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Tokens are bytes."""
    return train_tokenizer(["a"], vocab_size=258)


def show(tokenizer, task, *rows, kind="pairs", length=64, **options):
    splits = make_splits("t", {"train": list(rows)}, kind=kind, labels=["bad", "good"])
    return preview(encode(splits, tokenizer, task, length), tokenizer, **options).split("\n")


PAIR = Row("a\tb\n", "caf\u00e9 \x1b[0m\\n", where="r.jsonl:3")


@pytest.mark.parametrize(("task", "size", "end"), [("causal_lm", 17, ""), ("seq2seq_lm", 4, "")])
def test_prompt_and_target_are_apart_with_what_is_invisible_escaped(tokenizer, task, size, end):
    assert show(tokenizer, task, PAIR) == [
        f"training row 1 (r.jsonl:3): {size} tokens, loss on 13, the end </s> among them",
        "  prompt a\\tb\\n" + end,
        "  target caf\u00e9 \\x1b[0m\\\\n</s>",
    ]


def test_a_class_is_shown_with_its_name(tokenizer):
    lines = show(tokenizer, "sequence_classification", Row("film", "good", 1), kind="labels")
    assert lines == ["training row 1: 4 tokens, loss on 1", "  prompt film", "  target class 1 (good)"]


def test_a_score_is_shown_as_a_number(tokenizer):
    lines = show(tokenizer, "sequence_classification", Row("film", "2.50", 2.5), kind="scores")
    assert lines == ["training row 1: 4 tokens, loss on 1", "  prompt film", "  target score 2.5"]


def test_a_block_of_text_is_all_target(tokenizer):
    lines = show(tokenizer, "causal_lm", Row("", "ab", where="t.txt"), Row("", "c"), kind="text")
    assert lines == [
        "training block 1: 6 tokens, loss on 5, the ends </s> of documents among them",
        "  target </s>ab</s>c</s>",
    ]


def test_only_the_rows_asked_for_are_shown_and_a_cut_is_told(tokenizer):
    assert len(show(tokenizer, "causal_lm", PAIR, PAIR, PAIR)) == 6
    (line, *_) = show(tokenizer, "causal_lm", PAIR, PAIR, rows=1, length=15)
    assert line.endswith("15 tokens, loss on 13, the end </s> among them, cut to model.max_length")
    (line, *_) = show(tokenizer, "causal_lm", PAIR, rows=1, length=9)
    assert line.endswith("9 tokens, loss on 8, the end </s> cut off, cut to model.max_length")


def test_of_a_long_text_both_ends_are_shown():
    line = shown("a" * 500 + "b" * 500)
    assert (line[0], line[-1], len(line)) == ("a", "b", WIDTH + len(" [...] "))
