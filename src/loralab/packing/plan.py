"""Trials to packs: members agree in what a pass must share, and their tokens stay under a budget.

Packing amortizes what a pass costs whatever its size: operator launches, dequantization, reading the weights. Once a
pass is large enough the rest is proportional to tokens, and on a CPU larger passes leave the caches: hence a budget of
tokens, not a fixed number of trials.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

TOKEN_BUDGET = {"cpu": 512, "cuda": 16384}  # tokens of one pass from which a larger one gains nothing


@dataclass(frozen=True)
class Member:
    """A trial to be placed. ``tokens``: of one of its passes; ``alone``: why it cannot share one, else empty."""

    trial: str
    shares: Hashable
    tokens: int
    alone: str = ""


@dataclass(frozen=True)
class Pack:
    """Trials that run together, in their order; ``why``: what kept a single one alone."""

    trials: tuple[str, ...]
    why: str = ""


def plan(members: Sequence[Member], token_budget: int) -> list[Pack]:
    """Every member once, packs in the order of their first members.

    Greedy in the given order: a member joins the open pack of its kind while the pass stays within the budget. One
    that is larger than the budget by itself runs alone.
    """
    packs: list[list[Member]] = []
    open_packs: dict[Hashable, int] = {}
    for member in members:
        at = open_packs.get(member.shares)
        fits = at is not None and sum(other.tokens for other in packs[at]) + member.tokens <= token_budget
        if member.alone or not fits or at is None:
            packs.append([member])
            if not member.alone:
                open_packs[member.shares] = len(packs) - 1
        else:
            packs[at].append(member)
    return [Pack(tuple(one.trial for one in found), _why(found, members, token_budget)) for found in packs]


def _why(found: Sequence[Member], members: Sequence[Member], budget: int) -> str:
    if len(found) > 1:
        return ""
    one = found[0]
    if one.alone:
        return one.alone
    if not any(other.shares == one.shares for other in members if other is not one):
        return "no other trial shares its model, quantization, optimizer, precision and intervals"
    return f"a pass with another's exceeds the token budget of {budget}"


def halves(trials: Iterable[str]) -> list[tuple[str, ...]]:
    """A pack that did not fit into memory, in two."""
    found = tuple(trials)
    return [part for part in (found[: len(found) // 2], found[len(found) // 2 :]) if part]
