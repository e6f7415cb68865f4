"""Scores of generated texts against figures worked out by hand."""

import math
from collections import Counter
from decimal import Decimal

import pytest

from loralab.forward.texts import bleu, exact_match, last_number, number_match, rouge_l, scores


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # LCS of (the cat sat, the dog sat) is 2 of 3 words each way; the second pair is equal
    assert rouge_l(["the cat sat", "same words"], ["the dog sat", "same words"]) == pytest.approx((2 / 3 + 1) / 2)


def test_rouge_l_of_equal_texts_is_one_and_of_strangers_zero():
    assert rouge_l(["a b c"], ["a b c"]) == pytest.approx(1.0)
    assert rouge_l(["a b c"], ["d e f"]) == 0.0
    assert rouge_l(["a b c d"], ["a c"]) == pytest.approx(2 * 0.5 * 1.0 / 1.5)  # longest common: a c


SCRIPTS = [
    *(
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
        "\u4f60\u597d\u4e16\u754c",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
        "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
        "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c",
        "\u03b3\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    ),
    *("\U0001f600 \U0001f600", "\u2192 \u2211 \u2264", "...", "$$$", "12.5", "\u2014", "\u00e9", "don't stop"),
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_text_is_equal_to_itself_in_every_script(text):
    assert rouge_l([text], [text]) == pytest.approx(1.0)
    assert rouge_l([text, "a"], [text, "b"]) == pytest.approx(0.5)
    assert rouge_l(["xyz"], [text]) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "right"),
    [
        ("\u4f60\u597d\u4e16\u754c", "\u4f60\u597d", 2 / 3),
        ("\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u05e9\u05dc\u05d5\u05dd", 2 / 3),
    ],
)
def test_a_part_of_a_text_scores_in_every_script(one, other, right):
    assert rouge_l([one], [other]) == pytest.approx(right)


def test_one_letter_in_two_forms_is_one():
    assert rouge_l(["caf\u00e9 noir"], ["cafe\u0301 noir"]) == pytest.approx(1.0)


def test_the_published_scorer_counts_a_to_z_and_digits_alone():
    assert rouge_l(["\u05e9\u05dc\u05d5\u05dd"], ["\u05e9\u05dc\u05d5\u05dd"], "published") == 0.0
    plain = ["The cat_sat on: the mat, 3 times!", "it's $5 + 7", "a-b c"]
    other = ["the Cat sat on a mat 3 Times", "its 5 7", "A b"]
    published = rouge_l(plain, other, "published")
    assert rouge_l(plain, other) == pytest.approx(published)
    from torchmetrics.text.rouge import ROUGEScore

    scorer = ROUGEScore(rouge_keys="rougeL")
    scorer.update(plain, other)
    assert published == pytest.approx(float(scorer.compute()["rougeL_fmeasure"]))


def counts(words, n):
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def bleu_by_hand(predictions, references):
    """Papineni et al. (2002), equations 1 to 3, over words between spaces."""
    pairs = [(one.split(), other.split()) for one, other in zip(predictions, references, strict=True)]
    total = 0.0
    for n in range(1, 5):
        right = sum(sum((counts(one, n) & counts(other, n)).values()) for one, other in pairs)
        made = sum(sum(counts(one, n).values()) for one, _ in pairs)
        if not right:
            return 0.0
        total += math.log(right / made) / 4
    made, wanted = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return math.exp(total + min(0.0, 1 - wanted / made))


BLEU = [
    (["the cat sat on the mat today"], ["the cat sat on a mat today"]),
    (["a b c d", "the the the the the x y z w"], ["a b c d e f g", "the x y z w v"]),  # clipped, and too short
    (["x y z"], ["a b c"]),
    (["a b c"], ["a b c"]),  # without four words there is no BLEU-4
    ([""], ["a b c d"]),
    (["a b c d"], [""]),
    (["one two three four five"], ["one two three four five"]),
]


@pytest.mark.parametrize(("made", "wanted"), BLEU)
def test_bleu_is_the_papers(made, wanted):
    assert bleu(made, wanted) == pytest.approx(bleu_by_hand(made, wanted))


def test_bleu_is_of_the_corpus_and_of_the_declared_words():
    made, wanted = ["a b c d e", "f g h i j"], ["a b c d e", "f g h i k"]
    apart = [bleu([one], [other]) for one, other in zip(made, wanted, strict=True)]
    assert bleu(made, wanted) == pytest.approx(bleu_by_hand(made, wanted))
    assert bleu(made, wanted) != pytest.approx(sum(apart) / 2)
    assert bleu(["Now, then."], ["Now, then."]) == 1.0  # 13a: a mark is a word of its own
    assert bleu(["Now, then."], ["Now, then."], "none") == 0.0
    assert bleu(["the The the the"], ["the the the the"]) < 1.0  # cased
    text = "\u4f60\u597d\u4e16\u754c"
    assert bleu([text], [text]) == 0.0  # one word by 13a
    assert bleu([text], [text], "zh") == 1.0


def test_exact_match_is_of_the_whole_stripped_text():
    assert exact_match(["yes ", "yes sir", "", "Yes"], ["yes", "yes", " ", "yes"]) == 2 / 4


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = <<9*2=18>>18\n#### 18", "18"),
        ("#### 1,450,000.", "1450000"),
        ("it is $70,000.50!", "70000.50"),
        ("from 5-3 to -2", "-2"),
        ("5-3", "3"),
        ("(1,2)", "2"),
        ("12,3456", "3456"),
        ("1 or .5", "0.5"),
        ("\u22124 degrees", "-4"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_match_by_value_in_rows_that_have_one():
    made = ["so 18.0", "it is 1000", "no idea", "7", "5 then 6"]
    wanted = ["#### 18", "#### 1,000", "#### 3", "a text", "#### 5"]
    assert number_match(made, wanted) == 2 / 4
    assert math.isnan(number_match(["3"], ["three"]))


def test_texts_are_scored_by_all_of_them():
    made, wanted = ["a b c d 5"], ["a b c d 5"]
    assert set(scores(made, wanted, "unicode", "13a").values()) == {1.0}
    nothing = scores(["", ""], ["", ""], "unicode", "13a")
    assert nothing == {
        "rouge_l": 1.0,
        "bleu": 0.0,
        "exact_match": 1.0,
        "number_match": pytest.approx(math.nan, nan_ok=True),
    }
