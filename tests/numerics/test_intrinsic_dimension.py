"""d90 and the search for it, against numbers worked out by hand. The scores are made up."""

import math

import pytest

from loralab.errors import ConfigError
from loralab.numerics.intrinsic_dimension import Search
from loralab.spec import make

SEARCH = Search(ladder=[10, 100, 1000])


def by_seed(**roles):
    return {int(role[1:]) if role[0] == "d" else role: {"0": a, "1": b} for role, (a, b) in roles.items()}


# full 0.8: 90% is 0.72. d100 has (0.70 + 0.74) / 2 = 0.72, which reaches it
ACCURACY = by_seed(full=(0.79, 0.81), d10=(0.60, 0.62), d100=(0.70, 0.74), d1000=(0.77, 0.78))
# 4.0 untrained, 3.0 trained: 90% of the improvement is 3.1. d100 has 3.2, d1000 3.05
LOSS = by_seed(base=(4.0, 4.0), full=(2.9, 3.1), d10=(3.9, 3.9), d100=(3.1, 3.3), d1000=(3.0, 3.1))


def test_of_an_accuracy_it_is_90_percent_of_the_score():
    found = SEARCH.answer(ACCURACY, "max")
    assert found.threshold == pytest.approx(0.72)
    assert (found.low, found.high, found.seeds) == (10, 100, ("0", "1"))
    assert found.tried == {10: pytest.approx(0.61), 100: pytest.approx(0.72), 1000: pytest.approx(0.775)}
    assert "100; 10 falls short (90% of the score of +method=full is 0.7200: 0.8000" in found.text


def test_of_a_loss_it_is_90_percent_of_the_improvement_over_the_untrained_base():
    found = SEARCH.answer(LOSS, "min")
    assert found.threshold == pytest.approx(3.1)
    assert (found.low, found.high) == (100, 1000)
    assert "is 3.1000: 4.0000 untrained, 3.0000 trained; mean over seeds 0, 1)" in found.text
    assert Search(ladder=[10], share=0.5).answer(LOSS, "min").high == 100  # 3.5


def test_the_smallest_that_gets_there_counts_though_a_larger_one_does_not():
    found = SEARCH.answer({**ACCURACY, 1000: {"0": 0.5, "1": 0.5}}, "max")
    assert (found.low, found.high) == (10, 100)


def test_an_open_bracket_says_so_and_asks_for_nothing():
    none = SEARCH.answer({key: own for key, own in ACCURACY.items() if key in ("full", 10)}, "max")
    assert (none.low, none.high, none.following) == (10, None, None)
    assert "above 10, which falls short" in none.text
    first = SEARCH.answer({key: own for key, own in ACCURACY.items() if key in ("full", 100)}, "max")
    assert (first.low, first.high, first.following) == (None, 100, None)
    assert "100; no smaller one was tried" in first.text


@pytest.mark.parametrize(
    ("scores", "mode", "words"),
    [
        ({key: own for key, own in LOSS.items() if key != "base"}, "min", "have no seed that is completed"),
        ({**LOSS, "base": {"2": 4.0}}, "min", "have no seed that is completed"),
        ({**LOSS, "full": {"0": math.nan, "1": 3.0}}, "min", "have no seed that is completed, once, in all"),
        ({**LOSS, "full": {"0": 4.0, "1": 4.2}}, "min", "is no better than no training"),
        ({**ACCURACY, "full": {"0": -0.1, "1": 0.1}}, "max", "is no better than no training"),
        ({"full": ACCURACY["full"]}, "max", "no dimension was tried with every seed"),
    ],
)
def test_where_there_is_nothing_to_measure_by_it_cannot_tell(scores, mode, words):
    found = SEARCH.answer(scores, mode)
    assert found.following is None
    assert "cannot tell" in found.text
    assert words in found.text


def test_a_dimension_counts_with_every_seed_alone():
    found = SEARCH.answer({**ACCURACY, 100: {"0": 0.9}}, "max")
    assert (found.low, found.high) == (10, 1000)
    assert 100 not in found.tried


@pytest.mark.parametrize("answer", [1, 10, 11, 37, 500, 999, 1000])
@pytest.mark.parametrize("within", [1.01, 2.0])
def test_the_search_closes_in_on_the_dimension_in_few_rounds(answer, within):
    search = Search(ladder=[1, 1000], within=within)
    scores = {"full": {"0": 1.0}, **{d: {"0": float(d >= answer)} for d in search.ladder}}
    rounds = 0
    while (dimension := search.answer(scores, "max").following) is not None:
        assert dimension not in scores
        scores[dimension] = {"0": float(dimension >= answer)}
        rounds += 1
    found = search.answer(scores, "max")
    assert found.high >= answer > (found.low or 0)
    assert found.low is None or found.high <= max(within * found.low, found.low + 1)
    assert rounds <= 11


REFERENCE = ["+sweeps=s", "trainer.max_steps=6", "+method=full", "seed=0"]


def test_it_asks_for_the_ladder_and_of_a_loss_for_the_untrained_base():
    other = [*REFERENCE[:2], "+method=lora", "seed=0"]
    search = Search(ladder=[10, 100])
    words = search.first([REFERENCE, other], "min")
    rungs = [
        ["+sweeps=s", "trainer.max_steps=6", "+method=intrinsic", "seed=0", f"adapter.dimension={d}"] for d in (10, 100)
    ]
    assert words == [[*REFERENCE, "trainer.max_steps=0"], *rungs]
    assert search.first([REFERENCE], "max") == rungs
    roles = [search.role(own) for own in (REFERENCE, other, *words)]
    assert roles == ["full", None, "base", 10, 100]
    assert len({search.setting(own) for own in (REFERENCE, *words)}) == 1


def test_trials_of_other_settings_are_apart_and_one_of_two_scores_is_none():
    long = [REFERENCE[0], "trainer.max_steps=9", *REFERENCE[2:]]
    scores = SEARCH.scores([(REFERENCE, "0", 0.5), (long, "0", 0.6), (long, "1", None)])
    assert list(scores.values()) == [{"full": {"0": 0.5}}, {"full": {"0": 0.6}}]
    (both,) = SEARCH.scores([(REFERENCE, "0", 0.5), (REFERENCE, "0", 0.6)]).values()
    assert math.isnan(both["full"]["0"])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "sweep.d90.ladder"),
        ({"ladder": []}, "sweep.d90.ladder"),
        ({"ladder": [0]}, "sweep.d90.ladder"),
        ({"ladder": [1], "within": 1}, "sweep.d90.within"),
        ({"ladder": [1], "share": 1.5}, "sweep.d90.share"),
        ({"ladder": [1], "shar": 0.5}, "did you mean share"),
    ],
)
def test_a_wrong_setting_is_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        make(Search, keys, "sweep.d90")


def test_a_sweep_without_the_reference_is_refused():
    with pytest.raises(ConfigError, match="sweep.d90.reference=\\+method=full is an override of none of the 1 trials"):
        SEARCH.first([["+method=lora", "seed=0"]], "min")
