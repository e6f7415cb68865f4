"""The grammar of claims: every form is read as what it says, and what has no form is refused by name."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.config.claims import as_number, is_of_pack, is_settled, key_of, listed, read
from loralab.errors import ConfigError

BITS = "base.bits_per_parameter"


@pytest.mark.parametrize(
    ("text", "form", "arms", "bounds"),
    [
        ("nf4 <= fp4", "order", [{"": "nf4"}, {"": "fp4"}], (-math.inf, 0)),
        ("nf4 < fp4", "order", [{"": "nf4"}, {"": "fp4"}], (-math.inf, 0)),
        ("int8_product/a >= int8_product/b", "order", [{"": "int8_product/a"}, {"": "int8_product/b"}], (0, math.inf)),
        ("2 > 8", "order", [{"": "2"}, {"": "8"}], (0, math.inf)),
        ("a = b within 0.02", "equal", [{"": "a"}, {"": "b"}], (-0.02, 0.02)),
        ("a - b = -0.5 within 0.1", "difference", [{"": "a"}, {"": "b"}], (-0.6, -0.4)),
        ("a / b >= 1.5", "ratio", [{"": "a"}, {"": "b"}], (1.5, math.inf)),
        ("a / b <= 1.5", "ratio", [{"": "a"}, {"": "b"}], (-math.inf, 1.5)),
        ("a / b = 2 within 0.1", "ratio", [{"": "a"}, {"": "b"}], (1.9, 2.1)),
        ("a = 4.127 within 0.001", "number", [{"": "a"}], (4.126, 4.128)),
        (
            "adapter.r=8 & quantization=nf4 <= +r=2.0 & quantization='nf4'",
            "order",
            [{"adapter.r": "8", "quantization": "nf4"}, {"r": "2", "quantization": "nf4"}],
            (-math.inf, 0),
        ),
    ],
)
def test_a_form_is_read_as_what_it_says(text, form, arms, bounds):
    claim = read(text)
    assert (claim.form, list(claim.arms)) == (form, arms)
    assert claim.bounds == pytest.approx(bounds)
    assert claim.metric is None


@pytest.mark.parametrize(
    ("text", "form", "margin"),
    [
        ("rises with adapter.r", "rises", 0),
        ("falls with adapter.r", "falls", 0),
        ("flat in r within 0.02", "flat", 0.02),
    ],
)
def test_a_claim_along_an_axis(text, form, margin):
    claim = read(text)
    assert (claim.form, claim.arms, claim.margin) == (form, (), margin)
    assert claim.axis in ("adapter.r", "r")


def test_a_mapping_says_what_is_measured_where_and_who_said_so():
    said = {
        "claim": "a = 884736",
        "metric": "adapter.trainable_parameters",
        "where": {"adapter.r": 8},
        "source": "LoRA",
    }
    claim = read(said)
    assert (claim.value, claim.margin, claim.settled) == (884736, 0, True)
    assert (claim.where, claim.source) == ({"adapter.r": "8"}, "LoRA")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("r has no effect", "has no form that is known; valid: A <= B; A >= B; A = B within 0.02"),
        ("a<=b", "with blanks about each sign"),
        ("a = b", "nothing equals it exactly; valid: a margin"),
        ("a = 3.5", "nothing equals it exactly; valid: a margin"),
        ("a <= b within 0.1", "a margin goes with =, not with <="),
        ("a = b within few", "the margin 'few' is no number above 0"),
        ("a = b within -1", "the margin '-1' is no number above 0"),
        ("a = b within inf", "the margin 'inf' is no number above 0"),
        ("flat in adapter.r", "flat in AXIS needs a margin"),
        ("rises with adapter.r within 1", "rises with AXIS takes no margin"),
        ("a - b - c = 1 within 1", "more than two arms"),
        ("a / b = c within 1", "'c' is no number, which a ratio needs"),
        ("a & b <= c", "'a & b' names no arm"),
        ("a <= b <= c", "'b <= c' names no arm"),
        ("r=8 & r=9 <= c", "names an axis twice"),
        ("r= <= c", "or gives it no value"),
        (7, "is neither a text nor a mapping"),
        ({"metric": "val/loss"}, "is neither a text nor a mapping"),
        ({"claim": "a <= b", "sorce": "x"}, "has the key sorce; did you mean source?"),
        ({"claim": "a <= b", "where": "r=8"}, "where='r=8' is no mapping"),
        ({"claim": "a <= b", "metric": "base.bits_per_param"}, f"did you mean {BITS}?"),
        ({"claim": "a <= b", "metric": "base.name"}, "metric='base.name' is nothing that a record measures"),
        ({"claim": "a <= b", "metric": "loss"}, "metric='loss' is nothing that a record measures"),
        ({"claim": "a <= b", "metric": 3}, "metric=3 is nothing that a record measures"),
    ],
)
def test_what_has_no_form_is_refused(said, why):
    with pytest.raises(ConfigError) as refused:
        read(said)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [8, 8.0, "8", "8.0", "'8'", "8e0", " 8 "])
def test_one_number_has_one_spelling(value):
    assert key_of(value) == "8"


@pytest.mark.parametrize("value", [["q_proj", "v_proj"], "[q_proj,v_proj]", "q_proj,v_proj", "['q_proj', v_proj]"])
def test_one_list_has_one_spelling(value):
    assert key_of(value) == "q_proj,v_proj"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_different_numbers_have_different_spellings(number):
    assert float(key_of(number)) == number
    assert as_number(key_of(repr(number))) == number


def test_words_have_one_spelling_too():
    assert [key_of(value) for value in (None, "null", True, "True", "nf4")] == ["null", "null", "true", "true", "nf4"]


def test_numbers_of_the_configuration_need_one_seed_and_those_of_a_pack_are_nobodys():
    assert [is_settled(key) for key in (BITS, "memory.alone_peak_bytes", "val/loss", "time.train_s")] == [
        *(True, True, False, False)
    ]
    assert [is_of_pack(key) for key in ("memory.measured_peak_bytes", "time.train_s", "memory.alone_peak_bytes")] == [
        *(True, True, False)
    ]


def test_a_papers_claims_go_before_the_sweeps_own_and_one_may_stand_alone():
    assert listed({"claims": ["a <= b"], "paper": {"claims": "b <= a"}}) == ["b <= a"]
    assert listed({"claims": ["a <= b"], "paper": {}}) == ["a <= b"]
    assert listed({}) == listed({"paper": None, "claims": None}) == []
