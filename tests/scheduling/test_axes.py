"""The trials of a sweep's axes: Hydra's own product where nothing is said, zip and when, and what is refused."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hypothesis import given
from hypothesis import strategies as st

from loralab.errors import ConfigError
from loralab.scheduling.axes import trials
from loralab.scheduling.rounds import axis_word

AXES = ["quantization=none,nf4,fp4", "quantization.double_quant=true,false", "seed=0,1"]
WHEN = {"quantization.double_quant": {"quantization": ["nf4", "fp4"]}}


@pytest.mark.parametrize(
    "words",
    [
        ["a=1,2", "b=x"],
        ["a=choice(1,2)", "+b=range(1,7,2)", "c=shuffle(range(3))"][:2],
        ["a=[1,2],[3]", "b={x:1},{x:2}", "c=null,'a b',\"it's, quoted\""],
        ["++a=sort(3,1,2)", "~b", "c=tag(x,choice(1,2))"],
        ["a=range(0.5,2,0.5)", "b=1e-3,true", "b='x=1'"],
    ],
)
def test_without_zip_and_when_the_trials_are_those_of_hydras_own_sweeper(words):
    (theirs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    assert trials(words) == theirs


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_zipped_axes_move_together_and_others_make_the_product(lengths, data):
    lengths[1] = lengths[0]
    words = [f"k{place}=" + ",".join(f"{place}.{n}" for n in range(length)) for place, length in enumerate(lengths)]
    order = data.draw(st.permutations(words))
    found = [
        {word.split("=")[0]: int(word.split(".")[-1]) for word in trial} for trial in trials(order, [["k1", "k0"]])
    ]
    total = 1
    for length in lengths[1:]:
        total *= length
    assert len(found) == total == len({tuple(sorted(one.items())) for one in found})
    assert all(one["k0"] == one["k1"] for one in found)


def test_the_first_axis_moves_slowest_and_words_stay_in_the_order_they_were_given():
    found = trials(["r=2,4", "x=5", "seed=0,1", "lr=0.1,0.2"], ["r", "lr"])
    assert found == [[f"r={r}", "x=5", f"seed={s}", f"lr={lr}"] for r, lr in ((2, 0.1), (4, 0.2)) for s in (0, 1)]


def test_an_axis_is_left_out_where_its_condition_does_not_hold():
    found = [" ".join(trial) for trial in trials(AXES, when=WHEN)]
    double = [f"quantization={q} quantization.double_quant={d}" for q in ("nf4", "fp4") for d in (True, False)]
    assert found == [f"{arm} seed={seed}" for arm in ("quantization=none", *double) for seed in (0, 1)]


def test_an_axis_whose_values_were_narrowed_by_words_is_left_out_where_it_has_no_trial():
    narrowed = ["quantization=none", *AXES[1:]]
    assert trials(narrowed, when=WHEN, written=AXES) == [["quantization=none", f"seed={seed}"] for seed in (0, 1)]
    never = {"quantization.double_quant": {"quantization": "nf5"}}
    for words in (AXES, narrowed):
        with pytest.raises(ConfigError, match="which is so in no trial"):
            trials(words, when=never, written=AXES)


def test_conditions_follow_from_one_another_and_compare_values_not_spellings():
    words = ["+c=7,8", "b=1e-1,2", "a='4',5"]
    when = {"c": {"b": 0.1}, "b": {"a": [4.0]}}
    # a='4' is a text, and the condition is a number
    with pytest.raises(ConfigError, match="c varies only where b is 0.1, which is so in no trial"):
        trials(words, when=when)
    words[2] = "a=4,5"
    assert trials(words, when=when) == [["+c=7", "b=0.1", "a=4"], ["a=5"], ["b=2", "a=4"], ["+c=8", "b=0.1", "a=4"]]


def test_axes_may_be_named_with_the_plus_signs_that_they_have():
    found = trials(["+method=a,b", "++x=1,2", "+x.y=3"], [["+method", "x"]], {"+x.y": {"method": "b"}})
    assert found == [["+method=a", "++x=1"], ["+method=b", "++x=2", "+x.y=3"]]


def test_a_zipped_axis_may_have_a_condition_and_a_repeated_value_stays_two_trials():
    found = trials(["a=1,2", "b=3,4", "q=0,1,1"], [["a", "b"]], {"b": {"q": 1}})
    assert found == [[f"a={a}", *([f"b={b}"] if q else []), f"q={q}"] for a, b in ((1, 3), (2, 4)) for q in (0, 1, 1)]


@pytest.mark.parametrize(
    ("zipped", "when", "says"),
    [
        ([["quantization", "seed"]], None, "sweep.zip: quantization has 3, seed has 2 values"),
        (
            [["quantization", "seeed"]],
            None,
            "sweep.zip names seeed, which is no axis of this sweep; did you mean seed?",
        ),
        ([["seed", "seed"]], None, "sweep.zip names seed twice"),
        ([["seed", "fixed"], ["fixed", "seed"]], None, "sweep.zip: seed has 2, fixed has 1 values"),
        ([["seed"]], None, "sweep.zip=[['seed']] is not understood: lists of axes, at least two in each"),
        ({"seed": "fixed"}, None, "sweep.zip={'seed': 'fixed'} is not understood"),
        ("seed", None, "sweep.zip=seed is not understood"),
        ([["seed", 3]], None, "is not understood"),
        (
            None,
            {"sed": {"quantization": "nf4"}},
            "sweep.when names sed, which is no axis of this sweep; did you mean seed",
        ),
        (None, {"seed": {"quant": "nf4"}}, "sweep.when.seed names quant, which is no axis"),
        (
            None,
            {"seed": {"quantization": "nf5"}},
            'seed varies only where quantization is "nf5", which is so in no trial',
        ),
        (None, {"seed": {"seed": 1}}, "sweep.when is circular: seed -> seed"),
        (
            None,
            {"seed": {"fixed": 1}, "fixed": {"quantization": "nf4"}, "quantization": {"seed": 0}},
            "sweep.when is circular: seed -> fixed -> quantization -> seed",
        ),
        (None, {"seed": "nf4"}, "sweep.when={'seed': 'nf4'} is not understood"),
        (None, ["seed"], "sweep.when=['seed'] is not understood"),
        (None, {"seed": {}}, "is not understood"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(zipped, when, says):
    with pytest.raises(ConfigError) as refused:
        trials(["quantization=none,nf4,fp4", "seed=0,1", "fixed=1"], zipped, when)
    assert says in str(refused.value)
    assert "; " in str(refused.value)


def test_an_axis_without_values_or_without_steps_is_refused():
    with pytest.raises(ConfigError, match=r"the sweep has no trial: seed=range\(0,0\) has no value"):
        trials(["seed=range(0,0)"])
    with pytest.raises(ConfigError, match=r"optimizer.lr=interval\(0,1\): an interval has no values to go through"):
        trials(["optimizer.lr=interval(0,1)"])
    with pytest.raises(OverrideParseException):
        trials(["seed=0,,1"])


def test_a_list_in_a_file_gives_the_values_of_an_axis_as_hydra_spells_them():
    from omegaconf import OmegaConf

    values = [1, 2.5, "a b", "it's, odd", None, True, ["q_proj", "v_proj"], {"x": 1}, "4"]
    word = axis_word("+k", OmegaConf.create(values))
    (parsed,) = OverridesParser.create().parse_overrides([word])
    assert [parsed._convert_value(value) for value in parsed.sweep_iterator(transformer=lambda x: x)] == values
    assert axis_word("k", "1,2") == "k=1,2"
