"""AdamW over the rows of a pack is AdamW trial by trial, in operations whose number does not grow with the trials."""

import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.adapters import dropout, fused, runs
from loralab.adapters.lora import LoRA
from loralab.adapters.low_rank import LoRADelta
from loralab.numerics.shadows import Shadowed
from loralab.optim import packed
from loralab.optim.groups import TRIAL
from loralab.optim.optimizers import AdamW, restore, states
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint, path

SHAPES = [[(4, 6), (5, 4)], [(4, 6), (5, 4)], [(2, 6), (5, 2)], [(4, 6), (5, 4)]]  # of the parameters of each trial
SPECS = [AdamW(lr=10.0**-i, weight_decay=0.1 * i, betas=[0.9 - 0.1 * i, 0.99], eps=1e-8) for i in range(1, 5)]


@pytest.fixture
def on_cpu(monkeypatch):
    """What a card does, on this CPU."""
    monkeypatch.setattr(dropout, "COUNTED", {"cpu"})  # its masks in both forms

    def switch(on):
        monkeypatch.setattr(packed, "DEVICES", {"cpu"} if on else set())
        monkeypatch.setattr(fused, "TOGETHER", {"cpu"} if on else set())

    return switch


def built(on_cpu, on, shapes=SHAPES):
    on_cpu(on)
    drawn = torch.Generator().manual_seed(0)
    trials = [[nn.Parameter(torch.randn(shape, generator=drawn)) for shape in own] for own in shapes]
    groups = [{**SPECS[i % 4].group(own), TRIAL: i} for i, own in enumerate(trials)]
    return SPECS[0].build(groups), trials


def step(optimizer, trials, number, resting=(), bounds=(0.5, float("inf"), 2.0, 1.0), spoilt=None, without=()):
    """A step with gradients of its own; ``spoilt``: the trial that fails. The norms."""
    optimizer.zero_grad()
    drawn = torch.Generator().manual_seed(number)
    for i, own in enumerate(trials):
        for j, parameter in enumerate(own):
            gradient = torch.randn(parameter.shape, generator=drawn)
            if i not in resting and (i, j) not in without:
                parameter.grad = gradient
                if i == spoilt:
                    parameter.grad[0, 0] = float("nan")
    found = packed.clip(optimizer, dict(enumerate(bounds)))
    if found is None:
        left = [i for i in range(len(trials)) if i not in resting]
        norms = [nn.utils.clip_grad_norm_([p for p in trials[i] if p.grad is not None], bounds[i]) for i in left]
        found = left, torch.stack(norms)
    if spoilt is not None:
        for parameter in trials[spoilt]:
            parameter.grad = None
    optimizer.step()
    return dict(zip(found[0], found[1].tolist(), strict=True))


def test_rows_of_one_buffer_are_stepped_as_torchs_adamw_steps_each_trial(on_cpu):
    (ours, rows), (torchs, apart) = built(on_cpu, True), built(on_cpu, False)
    assert isinstance(ours, packed.PackedAdamW)
    assert type(torchs) is torch.optim.AdamW
    for number in range(6):
        resting = (1,) if number in (2, 3) else ()
        kept = [p.detach().clone() for p in rows[1]]
        norms = [step(*pair, number, resting) for pair in ((ours, rows), (torchs, apart))]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        if resting:
            assert all(torch.equal(p, before) for p, before in zip(rows[1], kept, strict=True))
    for own, theirs in zip(rows, apart, strict=True):
        for p, q in zip(own, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            assert ours.state[p].keys() == torchs.state[q].keys()
            for key, value in torchs.state[q].items():
                torch.testing.assert_close(ours.state[p][key], value, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_touches_no_other_row(on_cpu):
    found = []
    for spoilt in (None, 1):
        optimizer, trials = built(on_cpu, True)
        step(optimizer, trials, 0)
        before = [p.detach().clone() for p in trials[1]]
        step(optimizer, trials, 1, spoilt=spoilt)
        if spoilt:
            assert all(torch.equal(p, old) for p, old in zip(trials[1], before, strict=True))
            assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
        step(optimizer, trials, 2, resting=(1,))
        found.append([p.detach().clone() for i in (0, 2, 3) for p in trials[i]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_parameter_that_nothing_reaches_is_left_alone_as_torch_leaves_it(on_cpu):
    found = []
    for on in (True, False):
        optimizer, trials = built(on_cpu, on)
        for number in range(4):
            step(optimizer, trials, number, without=[(3, 1)] if number in (1, 2) else ())
        found.append([p.detach() for own in trials for p in own])
        assert float(optimizer.state[trials[3][1]]["step"]) == 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_it_goes_on_from_its_states_with_the_same_bits(on_cpu):
    optimizer, trials = built(on_cpu, True)
    for number in range(2):
        step(optimizer, trials, number)
    kept, values = states(optimizer), [p.detach().clone() for own in trials for p in own]
    step(optimizer, trials, 2)
    again, same = built(on_cpu, True)
    with torch.no_grad():
        for p, value in zip((p for own in same for p in own), values, strict=True):
            p.copy_(value)
    restore(again, kept)
    step(again, same, 2)
    for own, theirs in zip(trials, same, strict=True):
        for p, q in zip(own, theirs, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(value, again.state[q][key]) for key, value in optimizer.state[p].items())


def test_moments_that_are_moved_elsewhere_are_kept_nowhere_else(on_cpu):
    optimizer, trials = built(on_cpu, True)
    step(optimizer, trials, 0)
    held = weakref.ref(optimizer.state[trials[0][0]]["exp_avg"].untyped_storage())
    moments = [weakref.ref(optimizer.state[own[0]]["exp_avg"]._base) for own in trials]
    for parameter, state in optimizer.state.items():  # as Lightning does after a fit
        optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
    state = None
    assert held() is None
    assert [one() for one in moments] == [None] * 4


class Operations(TorchDispatchMode):
    """The operators that are called, without those that only make a view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [one.alias_info for one in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of_a_block(trials, layers=2, autocast=False):
    """Of the products of a block, forward and backward, clipping and update."""
    deltas = [[LoRADelta(16, 16, r=4, scaling=1.0 + i) for _ in range(layers)] for i in range(trials)]
    owned = [[p for delta in own for p in delta.parameters()] for own in deltas]
    optimizer = AdamW().build([{**SPECS[i % 4].group(own), TRIAL: i} for i, own in enumerate(owned)])
    names = []
    for _ in range(2):  # the first makes the moments
        optimizer.zero_grad()
        x = torch.randn(trials * 3, 16, requires_grad=True)
        with Operations() as seen:
            y = x
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for site in zip(*deltas, strict=True):
                    slices = [(3 * i, 3 * i + 3, delta, None) for i, delta in enumerate(site)]
                    y = LoRADelta.forward_grouped(y, torch.zeros_like(y), slices)
            y.sum().backward()
            if packed.clip(optimizer, dict.fromkeys(range(trials), 1.0)) is None:
                for own in owned:
                    nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
        names = seen.names
    return len(names)


def test_the_operations_of_a_block_and_its_step_do_not_grow_with_the_trials(on_cpu):
    counts = {}
    for on in (False, True):
        on_cpu(on)
        counts[on] = [operations_of_a_block(k) for k in (1, 4, 16)]
    assert counts[True][1] == counts[True][2], counts
    assert counts[False][2] > 3 * counts[False][1], counts


def test_in_half_precision_no_layer_casts_its_factors(on_cpu, monkeypatch):
    """A layer takes 18 operations where it took 22: its A and B were cast in the forward and in the backward pass. One
    cast of the buffer is left, of all layers."""
    on_cpu(True)

    def counted():
        return [[operations_of_a_block(k, layers, autocast=True) for k in (4, 16)] for layers in (2, 3)]

    two, three = counted()
    monkeypatch.setattr(Shadowed, "over", lambda tensor: None)
    two_cast, three_cast = counted()
    assert [after - before for before, after in zip(two, three, strict=True)] == [18, 18]
    assert [after - before for before, after in zip(two_cast, three_cast, strict=True)] == [22, 22]
    assert [apart - shared for apart, shared in zip(two_cast, two, strict=True)] == [2 * 4 - 1] * 2


@pytest.fixture
def used(monkeypatch):
    """Counts how often each form of a card is used; "runs": the most products that a layer was computed by."""
    seen = Counter()

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args):
            made = real(*args)
            seen.update([name])
            seen["runs"] = max(seen["runs"], len(made or ()))
            return made

        monkeypatch.setattr(owner, name, watched)

    watch(packed.Bucket, "update")
    watch(runs, "runs_of")
    return seen


@pytest.fixture
def pack(make_spec, make_data, on_cpu):
    def specs(on, prefix, lr=1e-2, **changes):
        on_cpu(on)
        data = make_data("ragged", batch_size=2)
        return [
            make_spec(
                f"{prefix}-{i}",
                adapter=LoRA(r=r, lora_dropout=0.1),
                optimizer=AdamW(lr=lr if i == 1 else 1e-2, weight_decay=0.1),
                data=data,
                **{"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_steps": 3, **changes},
            )
            for i, r in enumerate((4, 2, 4))
        ]

    return specs


def test_a_pack_trains_as_one_trial_after_the_other_would(pack, curve, weights, used):
    found = {}
    for on in (False, True):
        specs = pack(on, f"{on}")
        records = Runner().run(specs)
        assert [record["status"] for record in records] == ["completed"] * 3, records[0]["error"]
        found[on] = [(curve(s.folder), curve(s.folder, "train/grad_norm"), weights(s.folder)) for s in specs]
        bytes_kept = [record["optimizer"]["state_bytes"] for record in records]
        assert bytes_kept == [8 * record["adapter"]["trainable_parameters"] for record in records]
        assert bool(used["update"]) == bool(used["runs_of"]) == on
        assert used["runs"] == 2 * on  # one for each rank, whatever the trials' order
    alone = pack(True, "alone")[1]  # where its dropout masks are those of the pack
    Runner().run([alone])
    assert curve(alone.folder) == pytest.approx(found[True][1][0], abs=1e-5)
    for (losses, norms, state), (wanted, wanted_norms, wanted_state) in zip(found[True], found[False], strict=True):
        assert losses == pytest.approx(wanted, abs=1e-5)
        assert norms == pytest.approx(wanted_norms, rel=1e-4)
        for key, value in wanted_state.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4)


def test_a_trial_that_diverges_leaves_the_others_as_they_were(pack, curve):
    found = []
    for lr in (1e-2, 1e30):
        specs = pack(True, f"{lr}", lr=lr)
        statuses = [record["status"] for record in Runner().run(specs)]
        assert statuses == ["completed", "completed" if lr < 1 else "diverged", "completed"]
        found.append([curve(specs[i].folder) for i in (0, 2)])
    assert found[0] == found[1]


def test_a_pack_goes_on_with_the_same_bits_and_its_checkpoints_hold_one_trial_each(pack, curve, weights, break_off):
    callbacks = {"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=1)}
    whole, again = pack(True, "whole"), pack(True, "again", callbacks=callbacks)
    Runner().run(whole)
    break_off(again, step=2)
    stored = torch.load(path(again[0].folder), weights_only=True)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in stored["adapter"].values())
    assert [record["resumed_from"] for record in Runner().run(again)] == [2] * 3
    for one, other in zip(whole, again, strict=True):
        assert curve(one.folder) == curve(other.folder)
        assert all(torch.equal(value, weights(other.folder)[key]) for key, value in weights(one.folder).items())


def test_in_half_precision_a_pack_has_the_bits_of_factors_that_each_layer_casts(pack, curve, weights, monkeypatch):
    """Through accumulated passes, validations after updates, a trial that diverges, parameters perturbed before it."""
    found, copies, real = [], Counter(), Shadowed.copy
    for shadowed in (True, False):
        monkeypatch.setattr(Shadowed, "copy", lambda *given, by=shadowed: copies.update([by]) or real(*given))
        if not shadowed:
            monkeypatch.setattr(Shadowed, "over", lambda tensor: None)
        specs = pack(True, f"{shadowed}", lr=1e30, precision="bf16-mixed", val_check_interval=1)
        assert [record["status"] for record in Runner().run(specs)] == ["completed", "diverged", "completed"]
        curves = [curve(spec.folder, key) for spec in specs for key in ("train/loss", "val/loss")]
        found.append((curves, [weights(specs[i].folder) for i in (0, 2)]))
    (curves, kept), (wanted, wanted_kept) = found
    assert curves == wanted
    assert [len(values) for values in curves] == [3, 3, 1, 1, 3, 3]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(kept, wanted_kept, strict=True) for key in b)
    assert set(copies) == {True}
