import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from loralab.data.tokenizer import bytes_per_token, train_tokenizer

CODE = 'def add(first, second):\n    """Add two numbers."""\n    return first + second\n\n\nclass Sum:\n    total = 0\n'
TOKENIZER = train_tokenizer([CODE] * 20, vocab_size=400)


@given(st.text())
def test_any_text_comes_back_exactly(text):
    for options in ({}, {"split_special_tokens": True}):
        assert TOKENIZER.decode(TOKENIZER(text, **options)["input_ids"]) == text


@pytest.mark.parametrize("text", ["a\r\n\tb ", " </s> <pad>", "\n\n    x", "é漢\U0001f600", "don't  .5e-3"])
def test_awkward_text_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_a_line_break_and_its_indentation_are_one_token():
    assert "ĊĠĠĠĠ" in TOKENIZER.convert_ids_to_tokens(TOKENIZER(CODE)["input_ids"])


def test_the_quotes_of_a_docstring_stand_alone():
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(CODE)["input_ids"])
    assert tokens.count('"""') == 1
    assert tokens.count('."""') == 1


def test_one_end_one_padding_no_beginning_and_nothing_added():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (0, 1, None)
    assert TOKENIZER("a")["input_ids"] == TOKENIZER("a", add_special_tokens=False)["input_ids"]


def test_a_saved_tokenizer_loads_as_any_other(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(CODE)["input_ids"] == TOKENIZER(CODE)["input_ids"]
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "<pad>")


def test_training_is_repeatable_and_packs_what_it_saw():
    again = train_tokenizer([CODE] * 20, vocab_size=400)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert bytes_per_token(TOKENIZER, [CODE]) > 2 * bytes_per_token(TOKENIZER, ["ß漢Ω"])
