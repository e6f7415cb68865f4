"""Axis values are compared as values; a label only shows one, and two values never share one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.analysis.arms import arms
from loralab.analysis.results import read_results
from loralab.analysis.values import UNSAID, aside, canonical, identity, label, names, spelled
from loralab.records import record


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (16, 16.0),
        (0.001, spelled("1e-3")),
        (1, "1"),
        (True, spelled("true")),
        (None, spelled("null")),
        (["q_proj", "v_proj"], spelled("[q_proj, v_proj]")),
        ("{a} ", spelled("'{a} '")),
        ("it's", spelled(r"'it\'s'")),
        ([8, 16], spelled("['8',16]")),
    ],
)
def test_one_value_however_it_is_written(one, other):
    assert canonical(one) == canonical(other)
    assert len(names([one, other])) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1234567890123, 1234567890124),
        (2**53, 2**53 + 1),
        (0.1, 0.1 + 1e-15),
        ("{a}", "{a} "),
        ("{a} {b}", "{a}  {b}"),
        ("a,b", ["a", "b"]),
        ("0001", "1"),
        (True, 1),
        (None, UNSAID),
        ("?", UNSAID),
        ([["a"], "b"], [["a", "b"]]),
    ],
)
def test_two_values_are_two_and_look_like_two(one, other):
    assert canonical(one) != canonical(other)
    assert len(set(names([one, other]).values())) == 2


settings = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6))


@given(st.lists(st.one_of(settings, st.lists(settings, max_size=3)), max_size=6))
def test_labels_are_as_many_as_values(values):
    found = names(values)
    assert len(set(found.values())) == len(found) == len({canonical(value) for value in values})


def test_blanks_that_would_not_be_seen_are_shown_in_quotes():
    assert [label(text) for text in ("a b", "a  b", "a\n")] == ["a b", '"a  b"', '"a\\n"']


def test_seeds_of_13_digits_are_three_seeds(tmp_path, synthetic, write):
    base = 1700000000000
    losses = {2: [1.0, 1.1, 1.3], 8: [1.01, 1.1, 1.301]}
    for r, values in losses.items():
        for index, loss in enumerate(values):
            stored_trial = {**synthetic("none", r, base + index), "metrics": {"val/loss": loss}}
            write(tmp_path / f"{r}-{index}", stored_trial)
    results = read_results(tmp_path)
    assert results.repeats == 0
    first, second = arms(results)
    assert (first.n, [trial.seed for trial in first.trials]) == (3, [str(base + index) for index in range(3)])
    assert (second.difference.n, second.difference.mean) == (3, pytest.approx(0.011 / 3))


def test_two_templates_that_differ_by_a_blank_are_two_named_arms(tmp_path, synthetic, write):
    prompts = ["{a}", "{a} "]
    for index, prompt in enumerate(prompts):
        stored_trial = synthetic("none", 2, 0)
        stored_trial["config"]["data"]["prompt"] = prompt
        write(tmp_path / str(index), stored_trial)
    listed = [{"trial": str(i), "folder": str(i)} for i in range(2)]
    record.write_sweep(tmp_path, {"name": "t", "axes": {"data.prompt": ["'{a}'", "'{a} '"]}, "trials": listed})
    results = read_results(tmp_path)
    assert results.axes == {"data.prompt": ["{a}", '"{a} "']}
    assert [row.values["data.prompt"] for row in arms(results)] == ["{a}", '"{a} "']


def test_one_number_written_in_two_ways_is_one_row(tmp_path, synthetic, write):
    for seed, alpha in ((0, 16), (1, 16.0)):
        stored_trial = synthetic("none", 2, seed)
        stored_trial["config"]["adapter"]["lora_alpha"] = alpha
        write(tmp_path / str(seed), stored_trial)
    (row,) = arms(read_results(tmp_path))
    assert row.n == 2


def test_a_callback_that_may_change_a_result_makes_another_configuration():
    def of(**nodes):
        return identity({"config": {"seed": 0, "callbacks": nodes}, "choices": {"callbacks": "default"}})

    stop = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"}
    memory = {"_target_": "loralab.memory.phases.PhaseMemory"}
    assert of(memory=memory) == of() == of(x={"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}, y=None)
    assert len({of(), of(x=stop), of(x={**stop, "patience": 9}), of(x={"_target_": "mine.Rate"})}) == 4


def test_what_a_trial_is_only_scored_on_is_no_part_of_what_it_is(synthetic):
    plain, scored = synthetic("none", 2, 0), synthetic("none", 2, 0)
    scored["config"]["data"] = {**scored["config"].get("data", {}), "forgetting": {"limit": 3}}
    plain["config"]["data"] = {**plain["config"].get("data", {}), "forgetting": None}
    scored["choices"]["data@data.forgetting"] = "docstrings"
    assert identity(plain) == identity(scored)
    assert all(map(aside, ["data.forgetting", "data.forgetting.limit", "data@data.forgetting", "trainer.test"]))
    assert not any(map(aside, ["data.limit", "data", "trainer.tests", "adapter.r"]))
