"""Which trials go together: alike, within the budget, each exactly once."""

from hypothesis import given
from hypothesis import strategies as st

from loralab.scheduling.packs import Member, halves, need, plan, spread

members = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 300), st.sampled_from(["", "", "reason"])), max_size=20
).map(lambda rows: [Member(str(i), shares, tokens, alone) for i, (shares, tokens, alone) in enumerate(rows)])


@given(members=members, budget=st.integers(1, 600))
def test_every_trial_is_placed_once_alike_and_within_the_budget(members, budget):
    packs = plan(members, budget)
    by_name = {member.trial: member for member in members}
    assert sorted(trial for pack in packs for trial in pack.trials) == sorted(by_name)
    for pack in packs:
        inside = [by_name[trial] for trial in pack.trials]
        assert len({member.shares for member in inside}) == 1
        assert [int(trial) for trial in pack.trials] == sorted(int(trial) for trial in pack.trials)
        if len(inside) > 1:
            assert sum(member.tokens for member in inside) <= budget
            assert not any(member.alone for member in inside)
            assert not pack.why
        else:
            assert pack.why


def test_a_single_trial_says_what_kept_it_alone():
    found = plan(
        [Member("1", "a", 10, "measures memory"), Member("2", "b", 10), Member("3", "c", 900), Member("4", "c", 10)],
        512,
    )
    assert [pack.why for pack in found] == [
        "measures memory",
        "no other trial shares its model, quantization, optimizer, precision and intervals",
        *["together with any other trial it would be over the token budget of 512"] * 2,
    ]


def test_a_pack_that_is_full_is_closed_and_a_new_one_opened():
    found = plan([Member(str(i), "a", 200) for i in range(5)], 512)
    assert [pack.trials for pack in found] == [("0", "1"), ("2", "3"), ("4",)]


@given(st.lists(st.text(), max_size=9))
def test_halves_hold_everything_and_shrink(trials):
    parts = halves(trials)
    assert [trial for part in parts for trial in part] == trials
    assert all(0 < len(part) < max(2, len(trials)) for part in parts)


sized = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=16)


@given(rows=sized, budget=st.integers(1, 400))
def test_a_packs_bytes_stay_under_the_memory_budget_with_the_base_counted_once(rows, budget):
    members = [Member(str(i), shares, 1, "", base, own) for i, (shares, base, own) in enumerate(rows)]
    packs = plan(members, 10**9, budget)
    by_name = {member.trial: member for member in members}
    assert sorted(trial for pack in packs for trial in pack.trials) == sorted(by_name)
    for pack in packs:
        inside = [by_name[trial] for trial in pack.trials]
        assert need(inside) == max(one.base for one in inside) + sum(one.own for one in inside)
        assert len(inside) == 1 or need(inside) <= budget


def test_the_budget_that_kept_a_trial_alone_is_named():
    alike = [Member(str(i), "a", 10, "", 2**30, 2**29) for i in range(2)]
    assert [len(pack.trials) for pack in plan(alike, 100, 2 * 2**30)] == [2]
    apart = plan(alike, 100, 1.75 * 2**30)
    assert [pack.why for pack in apart] == [
        "together with any other trial it would be over the memory budget of 1.75 GiB"
    ] * 2
    assert "token budget of 15" in plan(alike, 15)[0].why


@given(weights=st.lists(st.integers(1, 100), max_size=20), count=st.integers(1, 5))
def test_shares_hold_every_pack_once_and_none_exceeds_another_by_more_than_a_pack(weights, count):
    shares = spread(weights, count)
    assert len(shares) == count
    assert sorted(place for share in shares for place in share) == list(range(len(weights)))
    sums = [sum(weights[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(weights, default=0)
