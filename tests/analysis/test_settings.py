"""What is read of shared sections is what each record by itself says."""

import json
import math
import pickle
import random

import numpy as np
import pytest

from loralab.analysis.numbers import numbers
from loralab.analysis.results import read_results
from loralab.analysis.settings import varying
from loralab.analysis.trials import _rows, read_trial
from loralab.analysis.values import aside, axis_value, canonical, flatten, identity, is_number
from loralab.records.shared import Section, distinct, kept, once, section


def plainly_varying(records, axes):
    """The definition, key by key and record by record."""
    keys = [*(g for r in records for g in r["choices"]), *(k for r in records for k in flatten(r["config"]))]
    positions = [tuple(canonical(axis_value(r, axis)) for axis in axes) for r in records]
    chosen = []
    for key in dict.fromkeys(keys):
        if aside(key) or key in axes:
            continue
        values = [canonical({**flatten(r["config"]), **r["choices"]}.get(key)) for r in records]
        further = [(*position, value) for position, value in zip(positions, values, strict=True)]
        if len(set(further)) > len(set(positions)):
            chosen, positions = [*chosen, key], further
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_what_varies_is_what_the_records_say_one_by_one(seed):
    pick = random.Random(seed).choice
    own = {"none": None, "yes": {"bits": 4, "sizes": [1, 2]}, "other": {"bits": "4"}, "text": "8"}

    def record():
        lr, name = pick([0.1, "1e-1", 0.2]), pick(list(own))
        optimizer = section({"lr": lr, **pick([{}, {"decay": lr}])})
        config = {"optimizer": optimizer, "data": section({"batch": pick([8, 8.0])}), "seed": pick([0, 1])}
        config |= pick([{}, {"quantization": section(own[name]) if own[name] else None}])
        return {"config": config, "choices": section({"quantization": name}), "seed": 0, "overrides": []}

    records = [record() for _ in range(pick([2, 5, 9]))]
    for axes in ([], ["optimizer.lr"]):
        assert varying(records, axes) == plainly_varying(records, axes)


def test_the_identity_of_shared_sections_is_that_of_plain_ones(synthetic):
    record = synthetic("nf4_double", 8, 0)
    record["config"]["trainer"]["test"] = True
    record["config"]["callbacks"] = {"mine": {"_target_": "mine.Callback", "n": 2}}
    shared = {**record, "choices": section(record["choices"])}
    shared["config"] = {key: section(value) for key, value in record["config"].items()}
    assert identity(shared) == identity(record)
    config, choices = json.loads(identity(record))
    assert config["callbacks"] == [{"_target_": "mine.Callback", "n": 2}]
    assert "test" not in config["trainer"]
    assert "seed" not in config
    assert choices == record["choices"]
    for group, key in (("optimizer", "lr"), ("callbacks", "mine")):
        changed = {**record["config"], group: {**record["config"][group], key: {"_target_": "mine.Other"}}}
        assert identity({**record, "config": changed}) != identity(record)


def test_numbers_are_those_of_the_frame(synthetic_sweep, synthetic, write, tmp_path):
    trial = synthetic("none", 2, 0)
    trial["config"] |= {"time": {"train_s": "none of its own"}, "base": {"bytes": 3}}  # a setting hides a measurement
    trial["metrics"] |= {"optimizer.lr": 7, "status": 1.5, "val/x": None}
    write(tmp_path / "odd", trial)
    for folder in (synthetic_sweep, tmp_path):
        results = read_results(folder)
        expected = results.frame.map(lambda value: value if is_number(value) else None).astype(float)
        expected = expected.dropna(axis="columns", how="all")
        found = numbers(results.trials).dropna(axis="columns", how="all")
        assert sorted(found) == sorted(expected)
        np.testing.assert_array_equal(found[list(expected)].to_numpy(), expected.to_numpy())
    assert found["base.bytes"].tolist() == [3]
    assert found["optimizer.lr"].tolist() == [7]
    assert not {"time.train_s", "status"} & {*found}


def test_a_section_is_kept_once_and_cannot_be_changed():
    one, other = section({"a": {"b": 1}}), section({"a": {"b": 1}})
    assert one is other
    assert one == {"a": {"b": 1}}
    assert section({"a": {"b": True}}) is not one
    for change in (lambda: one.update(a=2), lambda: one.pop("a"), lambda: one.__setitem__("a", 2), one.clear):
        with pytest.raises(TypeError, match="shared by many"):
            change()
    copy = pickle.loads(pickle.dumps(one))
    copy["a"] = 2
    assert type(copy) is dict
    assert one == {"a": {"b": 1}}
    assert json.dumps(one) == '{"a": {"b": 1}}'
    assert distinct([one, None, other, {"a": 1}]) == [one, None, {"a": 1}]


def test_what_is_computed_of_a_section_is_computed_once():
    asked = []

    def sums(value, factor):
        asked.append(factor)
        return factor * sum(value.values())

    shared = Section({"a": 1, "b": 2})
    assert [once(sums, shared, factor) for factor in (2, 3, 2)] == [6, 9, 6]
    assert asked == [2, 3]
    assert [once(sums, {"a": 1}, 2), once(sums, {"a": 2}, 2)] == [2, 4]

    @kept
    def named(owner):
        asked.append(owner)
        return owner.name

    class Owner:
        name = "n"

    first, second = Owner(), Owner()
    assert [named(one) for one in (first, second, first)] == ["n"] * 3
    assert asked[4:] == [first, second]


@pytest.mark.parametrize(
    "lines",
    [
        ['{"step": 1, "x": 2.5}', '{"step": 2, "x": 1e-3}'],
        ['{"step": 1}', '{"step": 2, "x"'],  # killed within a row
        ['{"step": 1, "x": [{"y": 1}', '{"y": 2}]}'],  # two torn ones that would be one together
        ['{"step": 1, "x": [{"y": 1}', '{"y": 2}]}', '{"step": 3}, {"step": 4}'],
        ['{"step": 1}, {"step": 2}'],
        ["", '{"step": 2}', "[1]", "3"],
        [],
    ],
)
def test_rows_that_are_read_at_once_are_those_of_the_lines(lines):
    def alone(line):
        try:
            return json.loads(line)
        except ValueError:
            return None

    assert _rows(lines) == [alone(line) for line in lines]


def test_a_trial_that_is_read_says_what_its_file_says(synthetic_sweep):
    folder = next(path.parent for path in sorted(synthetic_sweep.glob("*/result.json")))
    stored, trial = json.loads((folder / "result.json").read_text()), read_trial(folder)
    assert {key: trial.record[key] for key in stored} == stored
    assert math.isclose(trial.score("val/loss"), stored["metrics"]["val/loss"])
