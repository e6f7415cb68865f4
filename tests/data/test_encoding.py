import numpy as np
import pytest

from loralab.data.base import Row, make_splits
from loralab.data.encoding import IGNORE, Blocks, encode, special_affixes
from loralab.data.tokenizer import train_tokenizer
from loralab.errors import ConfigError, DataError

CORPUS = ["def add(a, b):\n    return a + b\n", 'print("hello world")\n'] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, vocab_size=300)


@pytest.fixture(scope="module")
def framing(tokenizer):
    """The same tokenizer, putting <pad> before and </s> after a text, as BERT does with its own tokens."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def pairs(*rows):
    return make_splits("t", {"train": list(rows), "validation": list(rows), "test": []})


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_loss_is_on_the_target_and_its_end_only(tokenizer):
    example = encode(pairs(Row("print(", "hello")), tokenizer, "causal_lm", 64).train[0]
    prompt, target = plain(tokenizer, "print("), [*plain(tokenizer, "hello"), tokenizer.eos_token_id]
    assert example.input_ids == prompt + target
    assert example.labels == [IGNORE] * len(prompt) + target
    assert example.target_tokens == len(target)


def test_without_a_prompt_the_first_token_is_not_counted(tokenizer):
    example = encode(pairs(Row("", "hello")), tokenizer, "causal_lm", 64).train[0]
    assert example.target_tokens == len(example.input_ids) - 1


def test_a_long_prompt_is_cut_from_the_left(tokenizer):
    row = Row("a b c d e f g h i j", "hello")
    full = encode(pairs(row), tokenizer, "causal_lm", 500).train[0]
    cut = encode(pairs(row), tokenizer, "causal_lm", len(full.input_ids) - 3)
    assert cut.train[0].input_ids == full.input_ids[3:]
    assert cut.train[0].labels == full.labels[3:]
    assert cut.truncated == 2  # the row is in train and in validation


def test_a_long_target_is_cut_from_the_right_once_the_prompt_is_gone(tokenizer):
    target = plain(tokenizer, "hello world and more")
    example = encode(pairs(Row("print(", "hello world and more")), tokenizer, "causal_lm", 5).train[0]
    assert example.input_ids == example.labels == target[:5]
    assert example.target_tokens == 4


def test_rows_that_fit_exactly_are_not_truncated(tokenizer):
    length = len(encode(pairs(Row("print(", "hello")), tokenizer, "causal_lm", 64).train[0].input_ids)
    assert encode(pairs(Row("print(", "hello")), tokenizer, "causal_lm", length).truncated == 0


def test_special_tokens_stay_around_a_source_that_is_cut(framing):
    assert special_affixes(framing) == ([0], [1])
    prompt = plain(framing, "a b c d e f g h")
    encoded = encode(pairs(Row("a b c d e f g h", "hello world")), framing, "seq2seq_lm", 8)
    assert encoded.train[0].input_ids == [0, *prompt[-6:], 1]
    labels = encoded.train[0].labels
    assert (labels[0], labels[-1], len(labels) <= 8) == (0, 1, True)
    assert encoded.train[0].target_tokens == len(labels)
    assert encoded.truncated == 2


def test_a_causal_prompt_keeps_its_first_special_token_when_cut(framing):
    example = encode(pairs(Row("a b c d e f g h", "x")), framing, "causal_lm", 8).train[0]
    assert example.input_ids[0] == 0
    assert example.input_ids[-1] == framing.eos_token_id
    assert len(example.input_ids) == 8


def test_a_class_is_one_label(framing):
    rows = [Row("hello world", "good", 1), Row("a b c d e f g h i j k l m n", "bad", 0)]
    splits = make_splits("t", {"train": rows, "validation": rows}, kind="labels", labels=["bad", "good"])
    encoded = encode(splits, framing, "sequence_classification", 12)
    assert encoded.train[0].input_ids == [0, *plain(framing, "hello world"), 1]
    assert [example.labels for example in encoded.train] == [[1], [0]]
    assert [example.target_tokens for example in encoded.train] == [1, 1]
    assert [len(example.input_ids) <= 12 for example in encoded.train] == [True, True]
    assert [example.truncated for example in encoded.train] == [False, True]


def test_every_token_of_a_text_is_predicted_exactly_once():
    blocks = Blocks(np.arange(100, 111, dtype=np.int32), length=4)
    targets = [token for block in blocks for token in block.labels[1:]]
    assert targets == list(range(101, 111))
    assert sum(block.target_tokens for block in blocks) == 10
    assert blocks[-1].input_ids == blocks[3].input_ids == [109, 110]
    assert [len(block.input_ids) for block in blocks[:3]] == [4, 4, 4]


def test_documents_are_kept_apart_and_a_quoted_end_is_text(tokenizer):
    rows = [Row("", "a </s> b"), Row("", "c")]
    splits = make_splits("t", {"train": rows, "validation": rows}, kind="text")
    encoded = encode(splits, tokenizer, "causal_lm", 64)
    ids = encoded.train[0].input_ids
    assert ids.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(ids) == "</s>a </s> b</s>c</s>"
    assert encoded.tokens["train"]["target_tokens"] == len(ids) - 1


@pytest.mark.parametrize(("kind", "task"), [("pairs", "sequence_classification"), ("text", "seq2seq_lm")])
def test_a_task_refuses_data_of_another_form(tokenizer, kind, task):
    splits = make_splits("t", {"train": [Row("a", "b")]}, kind=kind)
    with pytest.raises(ConfigError, match=task):
        encode(splits, tokenizer, task, 16)


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="end-of-sequence"):
        encode(pairs(Row("a", "b")), endless, "causal_lm", 16)


def test_a_row_without_a_label_is_refused(tokenizer):
    splits = make_splits("t", {"train": [Row("a", "b", where="x.csv:3")]}, kind="labels", labels=["b"])
    with pytest.raises(DataError, match=r"x\.csv:3"):
        encode(splits, tokenizer, "sequence_classification", 16)


@pytest.mark.parametrize(("task", "warned"), [("causal_lm", True), ("sequence_classification", False)])
def test_labels_for_a_language_model_are_warned_of_with_the_task_that_classifies(framing, caplog, task, warned):
    rows = [Row("hello", "good", 1), Row("world", "bad", 0)]
    encode(make_splits("t", {"train": rows}, kind="labels", labels=["bad", "good"]), framing, task, 12)
    assert ("model.task=sequence_classification trains a classifier" in caplog.text) == warned
    assert len(caplog.records) == int(warned)


def test_statistics_add_up(tokenizer):
    encoded = encode(pairs(Row("print(", "hello"), Row("a", "b")), tokenizer, "causal_lm", 64)
    assert encoded.tokens["train"] == {
        "rows": 2,
        "tokens": sum(len(example.input_ids) for example in encoded.train),
        "target_tokens": sum(example.target_tokens for example in encoded.train),
        "longest": max(len(example.input_ids) for example in encoded.train),
    }
    assert encoded.tokens["test"]["rows"] == 0


def scored(tokenizer, row, length=64, task="causal_lm"):
    """The fingerprint of one row's targets."""
    return encode(pairs(row), tokenizer, task, length).targets


def test_the_targets_fingerprint_is_of_the_target_tokens_and_not_of_the_prompt(tokenizer):
    one = scored(tokenizer, Row("print(", "hello"))
    assert len(one) == 16
    assert one == scored(tokenizer, Row("another, longer prompt than that", "hello"))
    assert one == scored(tokenizer, Row("a b c d e f g h i j k l m n o p", "hello"), 12)  # its prompt is cut
    assert one != scored(tokenizer, Row("print(", "hallo"))


def test_targets_cut_at_another_place_are_other_targets(tokenizer):
    row = Row("a", "hello world, return a + b")
    assert scored(tokenizer, row, 6) != scored(tokenizer, row, 8)


def test_a_first_target_token_that_nothing_predicts_is_no_target(tokenizer):
    """Without a prompt a causal loss skips it; in front of a decoder there always is one."""
    assert scored(tokenizer, Row("", "hello")) != scored(tokenizer, Row("x", "hello"))
    assert scored(tokenizer, Row("", "hello"), task="seq2seq_lm") == scored(
        tokenizer, Row("x", "hello"), task="seq2seq_lm"
    )


def test_another_tokenizer_gives_other_targets(tokenizer):
    other = train_tokenizer(["hello hello hello " * 5, *CORPUS], vocab_size=320)
    assert plain(tokenizer, "hello") != plain(other, "hello")
    assert scored(tokenizer, Row("x", "hello")) != scored(other, Row("x", "hello"))


def test_classes_are_the_targets_of_a_classifier_however_its_texts_are_cut(tokenizer):
    def labelled(text, label):
        rows = [Row(text, target=str(label), label=label)]
        return make_splits("t", {"train": rows, "validation": rows}, kind="labels", labels=["0", "1"])

    def targets(text, label, length):
        return encode(labelled(text, label), tokenizer, "sequence_classification", length).targets

    assert targets("print( hello )", 1, 4) == targets("hello", 1, 64)
    assert targets("hello", 1, 64) != targets("hello", 0, 64)


def test_a_text_has_the_same_targets_in_blocks_of_any_length(tokenizer):
    rows = [Row("", "def add(a, b): return a + b " * 8)]
    splits = make_splits("t", {"train": rows, "validation": rows}, kind="text")
    assert encode(splits, tokenizer, "causal_lm", 8).targets == encode(splits, tokenizer, "causal_lm", 32).targets


def test_rows_are_told_apart_in_the_targets_fingerprint(tokenizer):
    """The same tokens in other rows end elsewhere; the test split is part of it, the training split is not."""
    a, b = Row("x", "hello"), Row("x", "world")

    def targets(train, validation, test):
        return encode(
            make_splits("t", {"train": train, "validation": validation, "test": test}), tokenizer, "causal_lm", 64
        ).targets

    assert targets([a], [a], []) == targets([b], [a], [])
    assert len({targets([a], [a, b], []), targets([a], [b, a], []), targets([a], [a], [b]), targets([a], [a], [])}) == 4
