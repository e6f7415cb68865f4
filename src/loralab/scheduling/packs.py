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
        index = open_packs.get(member.shares)
        exceeds = index is not None and _exceeds([*packs[index], member], token_budget, memory_budget)
        if member.alone or exceeds or index is None:
            packs.append([member])
            if not member.alone:
                open_packs[member.shares] = len(packs) - 1
        else:
            packs[index].append(member)
    kinds: dict[Hashable, list[Member]] = {}
    for member in members:
        kinds.setdefault(member.shares, []).append(member)
    budgets = (token_budget, memory_budget)
    return [Pack(tuple(member.trial for member in pack), _why(pack, kinds[pack[0].shares], *budgets)) for pack in packs]


def need(members: Sequence[Member]) -> int:
    """Bytes that a pack is expected to take at its peak."""
    return max(member.base for member in members) + sum(member.own for member in members)


def _exceeds(members: Sequence[Member], token_budget: int, memory_budget: float) -> str:
    """The name of the budget that these members together exceed; empty where they fit."""
    if sum(member.tokens for member in members) > token_budget:
        return f"token budget of {token_budget}"
    return f"memory budget of {memory_budget / 2**30:.3g} GiB" if need(members) > memory_budget else ""


def _why(pack: Sequence[Member], alike: Sequence[Member], token_budget: int, memory_budget: float) -> str:
    """Why a pack has a single member; empty where it has several. ``alike``: all members that share its kind."""
    if len(pack) > 1:
        return ""
    single = pack[0]
    if single.alone:
        return single.alone
    others = (other for other in alike if other is not single)
    if len(alike) == 1:
        return "no other trial shares its model, quantization, optimizer, precision and intervals"
    exceeded = (_exceeds([single, other], token_budget, memory_budget) for other in others)
    return f"together with any other trial it would be over the {next(filter(None, exceeded), 'budget')}"


def spread(weights: Sequence[float], count: int) -> list[list[int]]:
    """Places of ``weights`` in ``count`` shares of about the same sum: the heaviest first, to the lightest share."""
    shares: list[list[int]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for place in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min(range(count), key=sums.__getitem__)
        shares[lightest].append(place)
        sums[lightest] += weights[place]
    return [sorted(share) for share in shares]


def halves(trials: Sequence[Any]) -> list[list[Any]]:
    """The trials of a pack that did not fit into memory, as two packs; empty ones left out."""
    middle = len(trials) // 2
    return [part for part in (list(trials[:middle]), list(trials[middle:])) if part]
