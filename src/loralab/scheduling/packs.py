"""Trials to packs: members agree in what a pass must share, and their tokens and bytes stay under budgets.

Packing amortizes what a pass costs whatever its size: operator launches, dequantization, reading the weights. Once a
pass is large enough the rest is proportional to tokens, and on a CPU larger passes leave the caches: hence a budget of
tokens, not a fixed number of trials.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens of one pass from which a larger one gains nothing


@dataclass(frozen=True)
class Member:
    """A trial to be placed. ``tokens``: of one of its passes; ``alone``: why it cannot share one, else empty.

    A pack needs the bytes of its ``base`` once, and the ``own`` bytes of each member.
    """

    trial: str
    shares: Hashable
    tokens: int
    alone: str = ""
    base: int = 0
    own: int = 0


@dataclass(frozen=True)
class Pack:
    """Trials that run together, in their order; ``why``: what kept a single one alone."""

    trials: tuple[str, ...]
    why: str = ""


def plan(members: Sequence[Member], token_budget: int, memory_budget: float = math.inf) -> list[Pack]:
    """Every member once, packs in the order of their first members; ``memory_budget`` in bytes.

    Greedy in the given order: a member joins the open pack of its kind while the pass stays within both budgets. One
    that is larger than a budget by itself runs alone.
    """
    packs: list[list[Member]] = []
    open_packs: dict[Hashable, int] = {}
    for member in members:
        at = open_packs.get(member.shares)
        exceeds = at is not None and _exceeds([*packs[at], member], token_budget, memory_budget)
        if member.alone or exceeds or at is None:
            packs.append([member])
            if not member.alone:
                open_packs[member.shares] = len(packs) - 1
        else:
            packs[at].append(member)
    budgets = (token_budget, memory_budget)
    return [Pack(tuple(one.trial for one in found), _why(found, members, *budgets)) for found in packs]


def need(members: Sequence[Member]) -> int:
    """Bytes that a pack is expected to take at its peak."""
    return max(one.base for one in members) + sum(one.own for one in members)


def _exceeds(members: Sequence[Member], token_budget: int, memory_budget: float) -> str:
    if sum(one.tokens for one in members) > token_budget:
        return f"token budget of {token_budget}"
    return f"memory budget of {memory_budget / 2**30:.3g} GiB" if need(members) > memory_budget else ""


def _why(found: Sequence[Member], members: Sequence[Member], token_budget: int, memory_budget: float) -> str:
    if len(found) > 1:
        return ""
    one = found[0]
    if one.alone:
        return one.alone
    alike = [other for other in members if other is not one and other.shares == one.shares]
    if not alike:
        return "no other trial shares its model, quantization, optimizer, precision and intervals"
    exceeded = next((what for other in alike if (what := _exceeds([one, other], token_budget, memory_budget))), "")
    return f"together with any other trial it would be over the {exceeded or 'budget'}"


def spread(weights: Sequence[float], count: int) -> list[list[int]]:
    """Places of ``weights`` in ``count`` shares of about the same sum: the heaviest first, to the lightest share."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(weights)), key=lambda i: -weights[i]):
        min(shares, key=lambda share: sum(weights[i] for i in share)).append(place)
    return [sorted(share) for share in shares]


def halves(trials: Sequence[Any]) -> list[list[Any]]:
    """A pack that did not fit into memory, in two."""
    middle = len(trials) // 2
    return [part for part in (list(trials[:middle]), list(trials[middle:])) if part]
