"""The hooks hand each trial its own rows, and nothing to a batch that belongs to nobody."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from loralab.adapters.dropout import keyed_dropout
from loralab.adapters.hooks import AdapterHooks, BatchSlice, NotPackable, bare_copy


class Plus(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, x, y, key):
        return y + self.amount


def held(amounts):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    owners = [Plus(amount) for amount in amounts]
    for owner in owners:
        AdapterHooks.of(model).attach(model, "0", owner, owner)
    return model, owners


def test_each_trial_changes_its_own_rows_only():
    model, (one, two) = held([1.0, 10.0])
    x = torch.randn(5, 4)
    with AdapterHooks.of(model).batch(BatchSlice(one, 2), BatchSlice(two, 3)):
        change = model(x) - model[0].weight.new_tensor(0) - x @ model[0].weight.T
    torch.testing.assert_close(change, torch.tensor([1.0, 1.0, 10.0, 10.0, 10.0])[:, None].expand(5, 4))


def test_a_batch_without_shares_is_the_bare_base_and_a_released_layer_has_no_hook():
    model, (one,) = held([1.0])
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x @ model[0].weight.T)
    AdapterHooks.of(model).detach(one)
    assert not model[0]._forward_hooks


def test_a_layer_that_folds_the_batch_is_not_packable():
    model, (one, two) = held([1.0, 2.0])
    with (
        AdapterHooks.of(model).batch(BatchSlice(one, 2), BatchSlice(two, 3)),
        pytest.raises(NotPackable, match="5 stacked rows"),
    ):
        model(torch.randn(7, 4))


def test_rows_multiplied_by_beams_stay_with_their_trial():
    hooks = AdapterHooks()
    with hooks.batch(BatchSlice(nn.Identity(), 1), BatchSlice(nn.Identity(), 2)):
        assert [part.tolist() for part in hooks.split(torch.arange(6))] == [[0, 1], [2, 3, 4, 5]]


def test_keyed_dropout_keeps_the_mean_and_the_asked_share():
    x = torch.ones(100_000)
    y = keyed_dropout(x, 0.25, 11)
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert keyed_dropout(x, 0.25, None) is x


class Together(nn.Module):
    """Adds 1 alone and 100 by a kernel of its own, so that one sees which was used."""

    def forward(self, x, y, key):
        return y + 1

    @staticmethod
    def forward_grouped(x, y, slices):
        return y + 100


class Heir(Together):
    def forward(self, x, y, key):
        return y + 2


class Sure(Heir):
    """Names a kernel again."""

    @staticmethod
    def forward_grouped(x, y, slices):
        return y + 200


@pytest.mark.parametrize(
    ("kinds", "change"),
    [
        ([Together], [100]),
        ([Together, Together], [100, 100]),
        ([Heir], [2]),
        ([Heir, Heir], [2, 2]),
        ([Heir, Together], [2, 1]),
        ([Sure], [200]),
    ],
)
def test_a_grouped_kernel_serves_the_class_that_names_it_and_no_heir(kinds, change):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    owners = [kind() for kind in kinds]
    for owner in owners:
        AdapterHooks.of(model).attach(model, "0", owner, owner)
    x = torch.randn(len(kinds), 4)
    with AdapterHooks.of(model).batch(*(BatchSlice(owner, 1) for owner in owners)):
        added = model(x) - x @ model[0].weight.T
    torch.testing.assert_close(added, torch.tensor(change).float()[:, None].expand(-1, 4))


def test_a_layer_called_by_keyword_is_changed_as_any_other():
    class Block(nn.Module):
        def forward(self, hidden=None, scale=1.0):
            return hidden * scale

    model = nn.Sequential(Block())
    owner = Plus(3.0)
    AdapterHooks.of(model).attach(model, "0", owner, owner)
    with AdapterHooks.of(model).batch(BatchSlice(owner, 2)):
        assert torch.equal(model[0](scale=2.0, hidden=torch.ones(2, 4)), torch.full((2, 4), 5.0))
    assert AdapterHooks.of(model).never_called(owner) == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_a_pass_calls_again_draws_another_mask_and_the_pass_the_same_ones(checkpointing):
    class Dropped(nn.Module):
        def forward(self, x, y, key):
            return keyed_dropout(y, 0.5, key)

    model = nn.Sequential(nn.Identity())
    owner = Dropped()
    AdapterHooks.of(model).attach(model, "0", owner, owner)

    def twice(x):
        return torch.stack([model(x), model(x)])

    def once(key):
        x = torch.ones(1, 64, requires_grad=True)
        with AdapterHooks.of(model).batch(BatchSlice(owner, 1, key)):
            context = {"use_reentrant": False, "context_fn": AdapterHooks.of(model).replayed}
            y = torch.utils.checkpoint.checkpoint(twice, x, **context) if checkpointing else twice(x)
            y.square().sum().backward()
        return y, x.grad

    (first, second), grad = once(5)
    assert not torch.equal(first, second)
    assert torch.equal(once(5)[0][1], second)
    assert torch.equal(grad, 4 * (first > 0) * 2.0 + 4 * (second > 0) * 2.0)


def test_what_enters_a_layer_is_changed_for_the_rows_of_its_trial_however_it_is_given():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    owner, other = Plus(1.0), Plus(2.0)
    hooks, x = AdapterHooks.of(model), torch.randn(5, 4)
    hooks.attach(model, "0", owner, owner, before=True)
    assert (hooks.layers_of(owner), hooks.never_called(owner)) == (["0"], ["0"])
    with hooks.batch(BatchSlice(owner, 2), BatchSlice(other, 3)):
        given, named = model(x), model[0](input=x)
    assert hooks.never_called(owner) == []
    assert torch.equal(given, torch.nn.functional.linear(torch.cat([x[:2] + 1, x[2:]]), model[0].weight))
    assert torch.equal(named, given)
    assert not bare_copy(model)[0]._forward_pre_hooks
    hooks.detach(owner)
    assert not model[0]._forward_pre_hooks
