"""LoRA+: B learns ``lr_ratio`` times as fast as A, in every form of the optimizer, packed as alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from loralab.adapters.attached import attached
from loralab.adapters.bitfit import BitFit
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.optim.groups import rate
from loralab.optim.optimizers import AdamW, Schedule, describe, restore, states
from loralab.planning.sizes import sizes
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint

NAMES = ["adamw", "adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


def parameters():
    drawn = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (8, 700), "lora_B": (700, 8), "bias_delta": (40,)}
    return [
        (f"deltas.0.{name}", torch.nn.Parameter(torch.randn(shape, generator=drawn))) for name, shape in shapes.items()
    ]


def step(optimizer, owned, number):
    drawn = torch.Generator().manual_seed(number)
    for parameter in owned:
        parameter.grad = torch.randn(parameter.shape, generator=drawn)
    optimizer.step()


@pytest.mark.parametrize("flat", [False, True], ids=["each", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_b_moves_as_in_an_optimizer_of_its_rate_and_all_else_as_in_one_of_lr(name, flat):
    spec = AdamW(name, lr=1e-3, weight_decay=0.1, flat=flat, lr_ratio=16.0)
    named = parameters()
    optimizer = spec.build(spec.groups(named))
    apart = parameters()
    slow = AdamW(name, lr=1e-3, weight_decay=0.1, flat=flat)
    fast = AdamW(name, lr=1.6e-2, weight_decay=0.1, flat=flat)
    two = [slow.build([slow.group([apart[0][1], apart[2][1]])]), fast.build([fast.group([apart[1][1]])])]
    for number in range(3):
        step(optimizer, [one for _, one in named], number)
        drawn = torch.Generator().manual_seed(number)
        for _, one in apart:
            one.grad = torch.randn(one.shape, generator=drawn)
        for each in two:
            each.step()
    for (key, one), (_, other) in zip(named, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=key)
    assert rate(optimizer, 0) == 1e-3
    tables = 2048 if "8bit" in name else 0  # of codes, which each optimizer has once
    held = [describe(each, name)["state_bytes"] for each in two]
    assert describe(optimizer, name)["state_bytes"] == sum(held) - tables


@pytest.mark.parametrize("flat", [False, True], ids=["each", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_goes_through_a_file(name, flat, tmp_path):
    spec = AdamW(name, lr=1e-3, flat=flat, lr_ratio=4.0)
    named = parameters()
    optimizer = spec.build(spec.groups(named))
    step(optimizer, [one for _, one in named], 0)
    torch.save(states(optimizer), tmp_path / "state.pt")
    again = [(key, torch.nn.Parameter(one.detach().clone())) for key, one in named]
    resumed = spec.build(spec.groups(again))
    restore(resumed, torch.load(tmp_path / "state.pt", weights_only=True))
    for number in (1, 2):
        step(optimizer, [one for _, one in named], number)
        step(resumed, [one for _, one in again], number)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(named, again, strict=True))


def test_it_trains_as_pefts_loraplus(load_base, inputs):
    ours, theirs = load_base("llama").model, load_base("llama").model
    targets, given = ["q_proj", "v_proj"], inputs()
    adapter = attached(LoRA(r=4, lora_alpha=8, target_modules=targets), ours)
    model = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    named = dict(model.named_parameters())
    pairs = [
        (factor, named[f"base_model.model.{name}.{key}.default.weight"])
        for name, delta in adapter.adapted()
        for key, factor in delta.named_parameters()
    ]
    for own, other in pairs:
        other.data.copy_(own)
    spec = AdamW(lr=1e-3, lr_ratio=16.0)
    mine = spec.build(spec.groups(adapter.named_parameters()))
    peer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0)
    for _ in range(4):
        mine.zero_grad()
        with AdapterHooks.of(ours).batch(BatchSlice(adapter, 2)):
            ours.eval()(**given).logits.logsumexp(-1).sum().backward()
        mine.step()
        peer.zero_grad()
        model(**given).logits.logsumexp(-1).sum().backward()
        peer.step()
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["each", "flat"])
def test_packed_is_solo_with_other_ratios_and_schedules_beside_it(make_spec, weights, curve, flat):
    def three(prefix):
        kinds = [(1.0, "constant"), (16.0, "linear"), (4.0, "cosine")]
        return [
            make_spec(
                f"{prefix}{index}",
                optimizer=AdamW(lr=1e-3, lr_ratio=ratio, flat=flat),
                schedule=Schedule(kind),
            )
            for index, (ratio, kind) in enumerate(kinds)
        ]

    packed, solo = three("packed"), three("solo")
    together = Runner().run(packed)
    alone = [Runner().run([spec])[0] for spec in solo]
    assert [one["pack"]["size"] for one in together] == [3, 3, 3], together[0]["error"]
    for one, other, left, right in zip(packed, solo, together, alone, strict=True):
        mine, theirs = weights(one.folder), weights(other.folder)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert curve(one.folder, "train/lr") == curve(other.folder, "train/lr")
        assert left["optimizer"] == right["optimizer"]
    first = {key: weights(packed[0].folder)[key] for key in weights(packed[0].folder) if "lora_B" in key}
    assert any(not torch.equal(first[key], weights(packed[1].folder)[key]) for key in first)


def test_a_run_that_broke_off_goes_on_with_the_same_bits(make_spec, weights, break_off):
    def one(name):
        return make_spec(
            name, optimizer=AdamW(lr=1e-3, lr_ratio=8.0), callbacks={"checkpoint": lambda: Checkpoint(None, 1)}
        )

    whole, again = one("whole"), one("again")
    Runner().run([whole])
    break_off([again], step=2)
    assert Runner().run([again])[0]["resumed_from"] == 2
    ours, theirs = weights(again.folder), weights(whole.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_adapter_without_b_is_refused(load_base, make_spec):
    adapter = attached(BitFit(), load_base("phi").model)
    with pytest.raises(
        ConfigError, match="optimizer.lr_ratio=16 .* has no B; valid: optimizer.lr_ratio=1, or adapter=lora"
    ):
        AdamW(lr_ratio=16.0).groups(adapter.named_parameters())
    (record,) = Runner().run([make_spec("run", "phi", adapter=BitFit(), optimizer=AdamW(lr_ratio=16.0))])
    assert (record["status"], record["exit_code"]) == ("failed", 2)


def test_the_planned_state_is_what_is_held(make_spec):
    for flat in (False, True):
        spec = make_spec(f"run{flat}", optimizer=AdamW(lr_ratio=16.0, flat=flat))
        (record,) = Runner().run([spec])
        assert sizes(spec).optimizer == pytest.approx(record["optimizer"]["state_bytes"], rel=0.02)
