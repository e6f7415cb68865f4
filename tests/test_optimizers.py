"""Optimizers say what they keep; schedules start, hold and end where they should."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.errors import ConfigError
from loralab.optimizers import SCHEDULES, AdamW, Schedule
from loralab.run import Runner


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_trains_and_its_record_says_what_was_paged(make_spec, name):
    record = Runner().run([make_spec(optimizer=AdamW(name=name, lr=1e-2))])[0]
    assert record["status"] == "completed", record["error"]
    state = record["optimizer"]
    assert state["state_bytes"] > 0
    assert (state["paged_bytes"], state["paged_fraction"]) == (0, 0.0)  # a CPU pages nothing
    assert state["effective_name"] == {"paged_adamw": "adamw_32bit"}.get(name, name.removeprefix("paged_"))


def test_torchs_state_is_two_float32_moments_a_parameter(make_spec):
    record = Runner().run([make_spec()])[0]
    assert record["optimizer"]["state_bytes"] == 8 * record["adapter"]["trainable_parameters"]


def test_the_learning_rate_in_the_rows_is_the_one_that_was_used(make_spec, curve):
    spec = make_spec(schedule=Schedule(kind="linear", warmup_steps=2), optimizer=AdamW(lr=1e-2), max_steps=6)
    Runner().run([spec])
    assert curve(spec.folder, "train/lr") == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_warm_up_by_ratio_counts_steps_of_the_run():
    factor = Schedule(kind="constant", warmup_ratio=0.1).factor(100)
    assert [factor(step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])


def test_cosine_passes_its_middle_and_ends_at_zero():
    factor = Schedule(kind="cosine").factor(10)
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


@given(st.sampled_from(SCHEDULES), st.integers(0, 30), st.integers(1, 60))
def test_a_factor_lies_in_0_to_1_rises_through_the_warm_up_and_never_again(kind, warmup, steps):
    factor = Schedule(kind=kind, warmup_steps=warmup).factor(steps)
    values = [factor(step) for step in range(steps)]
    assert all(0.0 < value <= 1.0 for value in values)
    rising, falling = values[: warmup + 1], values[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("spec", "changes", "says"),
    [
        (AdamW, {"lr": 0.0}, "optimizer.lr"),
        (AdamW, {"lr": math.nan}, "optimizer.lr"),
        (AdamW, {"lr": math.inf}, "optimizer.lr"),
        (AdamW, {"lr": 1e31}, "optimizer.lr"),
        (AdamW, {"weight_decay": -0.1}, "optimizer.weight_decay"),
        (AdamW, {"weight_decay": math.nan}, "optimizer.weight_decay"),
        (AdamW, {"betas": [0.9]}, "optimizer.betas must be two numbers"),
        (AdamW, {"betas": [0.9, 1.0]}, "optimizer.betas"),
        (AdamW, {"eps": 0.0}, "optimizer.eps"),
        (AdamW, {"name": "adamw8bit"}, "did you mean adamw_8bit"),
        (Schedule, {"kind": "cosin"}, "did you mean cosine"),
        (Schedule, {"warmup_steps": -1}, "schedule.warmup_steps"),
        (Schedule, {"warmup_ratio": 1.0}, "schedule.warmup_ratio"),
        (Schedule, {"warmup_steps": 5, "warmup_ratio": 0.1}, "exclude each other"),
    ],
)
def test_nonsense_is_refused_with_its_key(spec, changes, says):
    with pytest.raises(ConfigError, match=says):
        spec(**changes)
