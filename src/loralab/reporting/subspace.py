"""Figures of ``loralab subspace`` as tables: of a run, of two runs, and of the trials and pairs of a sweep."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loralab.analysis import subspace_files
from loralab.analysis.results import SweepResults
from loralab.analysis.subspace_files import DIRECTIONS, INTRUDERS_OF
from loralab.analysis.trials import TrialResult
from loralab.reporting.layout import aligned, markdown_table, wrapped

UNDEFINED = "-"
COLUMNS: dict[str, tuple[str, str]] = {  # figure: (title, format)
    "frobenius": ("|dW|", "{:#.4g}"),
    "relative_frobenius": ("|dW|/|W|", "{:.4f}"),
    "effective_rank": ("eff. rank", "{:.2f}"),
    "stable_rank": ("stable", "{:.2f}"),
    "projected": ("|U'WV|", "{:#.4g}"),
    "projected_own": ("W's own", "{:#.4g}"),
    "projected_random": ("random", "{:#.3g}"),
    "amplification": ("amplif.", "{:#.3g}"),
    "intruders": ("intruders", "{:.2f}"),
}
ENDS = ("relative_frobenius", "effective_rank", "amplification", "intruders")
MATRICES = {"A": "A", "A_start": "A's start", "B": "B", "delta_left": "dW left", "delta_right": "dW right"}
READING = (
    "|.|: Frobenius norms; U, V: the first r singular vectors of dW, of W itself, or random ones (LoRA, table 7; "
    f"{DIRECTIONS} where a method has no r); amplif.: |dW| / |U'WV|; intruders: of the first {INTRUDERS_OF} left "
    f"singular vectors of W + dW, mean of the layers (arXiv 2410.21228); {UNDEFINED}: dW is 0"
)
PHI = (
    "phi(i, j): how much of the first i directions of one run lies within the first j of the other, 0 to 1 (LoRA, "
    "equation 4); in brackets what random matrices give; directions: right singular vectors of A, left ones of B, both "
    "of dW; A's start: of A as it was drawn, the same for the ranks of one seed as far "
    "as the smaller goes"
)

Table = tuple[list[str], list[list[str]]]  # titles, rows


def of_run(content: Mapping[str, Any], width: int) -> str:
    """The table of one run."""
    about = content["run"]
    count = len(content["layers"])
    head = f"{about['folder']}: {about['method']} over {about['base']}, {count} layers; means over n of them"
    titles = ["layer", "n", "rank", *(title for title, _ in COLUMNS.values())]
    rows = [
        [kind, str(group["layers"]), _mean(group, "rank", "{:g}"), *_means(group)]
        for kind, group in content["types"].items()
    ]
    lines = [*wrapped(head, width), "", *aligned(titles, rows, range(1, len(titles))), ""]
    lines += [line for figure in ENDS for line in wrapped(_ends(content["types"], figure), width, "  ")]
    return "\n".join([*lines, *wrapped(READING, width, "  ")])


def of_pair(content: Mapping[str, Any], width: int) -> str:
    """The table of two runs."""
    names = [about["folder"] for about in content["runs"]]
    points = list(dict.fromkeys((p["i"], p["j"]) for group in content["types"].values() for p in _points(group)))
    titles = ["layer", "of", "n", *(_point(i, j) for i, j in points)]
    rows = [
        [kind, MATRICES[what], str(group["layers"]), *(_phi(group[what], point) for point in points)]
        for kind, group in content["types"].items()
        for what in MATRICES
        if what in group
    ]
    lines = [*wrapped(f"{names[0]} and {names[1]}; phi, means over n layers", width), ""]
    lines += [*aligned(titles, rows, range(2, len(titles))), "", *wrapped(PHI, width, "  ")]
    for name, only in zip(names, content["only_in"], strict=True):
        if only:
            shown = ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
            lines += wrapped(f"only {name} adapts {shown}", width, "  ")
    return "\n".join(lines)


def lines(results: SweepResults, width: int) -> list[str]:
    """Of a sweep, for the terminal: means over all layers, phi of A alone; empty where nothing was asked or found."""
    found = []
    for titles, rows in _tables(results, brief=True):
        found += ["", *(line[:width].rstrip() for line in aligned(titles, rows, range(1, len(titles))))]
    return [*found, "", *wrapped(f"{READING}; {PHI}", width, "  ")] if found else []


def markdown(results: SweepResults) -> list[str]:
    """The same for report.md, by type of layer."""
    texts = [markdown_table(titles, rows) for titles, rows in _tables(results, brief=False)]
    return ["## Subspaces", "", *texts, f"{READING}; {PHI}.", ""] if texts else []


def plain(results: SweepResults) -> dict[str, Any]:
    """``subspace`` for results.json: the figures by type of layer of every trial and pair."""
    if not subspace_files.asked(results):
        return {}
    singles = [
        {"trial": trial.record["trial"], "values": trial.values, "types": content["types"]}
        for trial, content in _singles(results)
    ]
    both = [
        {
            **{"differ_in": pair.by, "trials": [pair.first.record["trial"], pair.second.record["trial"]]},
            **{"values": [pair.first.values, pair.second.values], "types": content["types"]},
        }
        for pair, content in _pairs(results)
    ]
    return {"subspace": {"trials": singles, "pairs": both}}


def _singles(results: SweepResults) -> list[tuple[TrialResult, dict[str, Any]]]:
    read = [(trial, subspace_files.single(trial)) for trial in results.trials if trial.ok]
    return [(trial, content) for trial, content in read if content is not None]


def _pairs(results: SweepResults) -> list[tuple[subspace_files.Pair, dict[str, Any]]]:
    read = [(pair, subspace_files.both(pair)) for pair in subspace_files.pairs(results)]
    return [(pair, content) for pair, content in read if content is not None]


def _tables(results: SweepResults, brief: bool) -> list[Table]:
    """Of trials and of pairs, averaged over what differs in seed alone, by type of layer. ``brief``: over all layers,
    and of pairs the first matrix with its start alone."""
    if not subspace_files.asked(results):
        return []
    singles: dict[tuple[str, ...], list[Any]] = {}
    for trial, content in _singles(results):
        for kind, group in content["types"].items():
            singles.setdefault((_setting(results, trial), *([] if brief else [kind])), []).append(group)
    pairs: dict[tuple[str, ...], list[Any]] = {}
    for pair, content in _pairs(results):
        for kind, group in content["types"].items():
            for what in _shown(group, brief):
                key = (f"{_pair_name(results, pair)}: {MATRICES[what]}", *([] if brief else [kind]))
                pairs.setdefault(key, []).extend(group[what])
    layers = [] if brief else ["layers"]
    points = sorted({(p["i"], p["j"]) for along in pairs.values() for p in along})[: 4 if brief else None]
    tables = [
        (
            ["subspaces", *layers, *(title for title, _ in COLUMNS.values())],
            [[*key, *_means(_joined(groups))] for key, groups in singles.items()],
        ),
        (
            ["phi", *layers, *(_point(i, j) for i, j in points)],
            [[*key, *(_phi(along, point) for point in points)] for key, along in pairs.items()],
        ),
    ]
    return [table for table in tables if table[1]]


def _joined(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One group of layers from several, whose means count by their layers."""
    groups, result = list(groups), dict[str, Any]()
    for figure in COLUMNS:
        known = [group[figure] for group in groups if group[figure]]
        count = sum(one["of"] for one in known)
        mean = math.fsum(one["mean"] * one["of"] for one in known) / count if count else None
        result[figure] = {"mean": mean} if count else None
    return result


def _shown(group: Mapping[str, Any], brief: bool) -> list[str]:
    """A with its start, and B; of methods that have neither, Delta W."""
    found = [what for what in ("A", "A_start", "B") if what in group] or [what for what in MATRICES if what in group]
    return [what for what in found if what in (found[0], "A_start")] if brief else found


def _setting(results: SweepResults, trial: TrialResult) -> str:
    words = [f"{results.short[axis]}={trial.values[axis]}" for axis in results.axes]
    return " ".join(words) or "all trials"


def _pair_name(results: SweepResults, pair: subspace_files.Pair) -> str:
    if pair.by == "seed":
        return " ".join([_setting(results, pair.first), "other seed"])
    ranks = f"r={pair.first.values[subspace_files.RANK]} in {pair.second.values[subspace_files.RANK]}"
    rest = [f"{results.short[axis]}={pair.first.values[axis]}" for axis in results.axes if axis != subspace_files.RANK]
    return " ".join([ranks, *rest, *(["other seed"] if pair.by == "rank and seed" else [])])


def _means(group: Mapping[str, Any]) -> list[str]:
    return [_mean(group, figure, form) for figure, (_, form) in COLUMNS.items()]


def _mean(group: Mapping[str, Any], figure: str, form: str) -> str:
    return form.format(group[figure]["mean"]) if group[figure] else UNDEFINED


def _ends(kinds: Mapping[str, Any], figure: str) -> str:
    """``amplif.: 1.93 (layers.0.q_proj) to 5.21 (layers.3.v_proj)``."""
    title, form = COLUMNS[figure]
    known = [group[figure] for group in kinds.values() if group[figure]]
    if not known:
        return f"{title}: {UNDEFINED}"
    least = min((one["least"] for one in known), key=lambda end: end["value"])
    most = max((one["most"] for one in known), key=lambda end: end["value"])
    form = "{:g}" if figure == "intruders" else form
    return f"{title}: " + " to ".join(f"{form.format(end['value'])} ({end['layer']})" for end in (least, most))


def _points(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [point for what in MATRICES if what in group for point in group[what]]


def _point(i: int, j: int) -> str:
    return f"i=j={i}" if i == j else f"i={i} j={j}"


def _phi(along: Sequence[Mapping[str, Any]], point: tuple[int, int]) -> str:
    at = [one for one in along if (one["i"], one["j"]) == point]
    count = sum(one["of"] for one in at)
    if not count:
        return ""
    phi, random = (math.fsum(one[key] * one["of"] for one in at) / count for key in ("phi", "random"))
    return f"{phi:.3f} ({random:.3f})"
