"""Every yaml of conf/optimizer moves what it is given, and its state goes through a file bit for bit; every one of
conf/schedule is what transformers has under its name. A new one is found by itself.
"""

import math
from functools import cache

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.config.places import data_root
from loralab.optim.optimizers import cannot_page, describe, restore, states

OPTIMIZERS, SCHEDULES = (
    sorted(path.stem for path in (data_root() / "conf" / group).glob("*.yaml")) for group in ("optimizer", "schedule")
)
SIZES = (5000, 300)  # the first is large enough for 8 bits


@cache
def made(group, option, *more):
    return build(plain(compose([f"{group}={option}", *more]))[group], group)


def parameters():
    drawn = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=drawn)) for size in SIZES]


def step(optimizer, owned, number):
    drawn = torch.Generator().manual_seed(number)
    for parameter in owned:
        parameter.grad = torch.randn(parameter.shape, generator=drawn)
    optimizer.step()


def test_every_yaml_is_found():
    assert {"adamw", "adamw_8bit", "paged_adamw"} <= set(OPTIMIZERS)
    assert {"constant", "linear", "cosine"} <= set(SCHEDULES)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("option", OPTIMIZERS)
def test_a_state_that_went_through_a_file_gives_the_bits_of_one_that_did_not(option, flat, tmp_path):
    spec = made("optimizer", option, f"optimizer.flat={str(flat).lower()}", "optimizer.weight_decay=0.1")
    whole = parameters()
    optimizer = spec.build([spec.group(whole)])
    for number in range(2):
        step(optimizer, whole, number)
    torch.save(states(optimizer), tmp_path / "state.pt")
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    resumed = spec.build([spec.group(again)])
    restore(resumed, torch.load(tmp_path / "state.pt", weights_only=True))
    for number in range(2, 4):
        step(optimizer, whole, number)
        step(resumed, again, number)
    assert all(map(torch.equal, whole, again))
    assert all(not torch.equal(now, before) for now, before in zip(whole, parameters(), strict=True))
    assert describe(resumed, spec.name) == describe(optimizer, spec.name)


@pytest.mark.parametrize("option", OPTIMIZERS)
def test_it_runs_as_what_it_says_it_runs_as(option):
    spec, owned = made("optimizer", option), parameters()
    optimizer = spec.build([spec.group(owned)])
    step(optimizer, owned, 0)
    found = describe(optimizer, spec.name)
    assert spec.name == found["name"] == option
    assert found["state_bytes"] == found["eight_bit_bytes"] + 4 * wide(optimizer) > 0
    assert (found["eight_bit_bytes"] > 0) == ("8bit" in option)
    if cannot_page():
        assert found["paged_bytes"] == 0
        assert found["effective_name"] == spec.effective_name
        assert not spec.effective_name.startswith("paged")


def wide(optimizer):
    """Elements of its state in 32 bits."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() for v in values if isinstance(v, torch.Tensor) and v.numel() > 1 and v.dtype == torch.float32)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("option", SCHEDULES)
def test_a_schedule_is_finite_and_rises_from_above_zero_to_the_full_rate(option, warmup):
    factor = made("schedule", option, f"schedule.warmup_steps={warmup}").factor(40)
    values = [factor(number) for number in range(40)]
    assert all(math.isfinite(value) and 0 < value <= 1 for value in values)
    assert values[:warmup] == pytest.approx([(number + 1) / warmup for number in range(warmup)])
    assert values[warmup] == 1.0


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("option", sorted(set(SCHEDULES) & {kind.value for kind in SchedulerType}))
def test_after_its_warm_up_a_schedule_is_transformers_own_of_the_same_name(option, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if option == "constant" else option  # transformers' constant has no warm-up
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    ours = made("schedule", option, f"schedule.warmup_steps={warmup}").factor(40)
    found = []
    for _ in range(41):
        found.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [ours(number) for number in range(warmup, 41)] == pytest.approx(found[warmup:], abs=1e-12)
    assert [ours(number) for number in range(warmup)] == pytest.approx(found[1 : warmup + 1])  # theirs loses step 0
