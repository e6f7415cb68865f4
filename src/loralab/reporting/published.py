"""A paper's numbers beside ours: what a sweep file says under ``sweep.paper``."""

from collections.abc import Iterator, Sequence

from loralab.reporting.axes import Record
from loralab.reporting.gather import Study
from loralab.reporting.table import Row


def published(study: Study, row: Row) -> str:
    """The paper's values for a row, in the order of its columns; empty where it has none."""
    return _values(_paper(study), next(iter(row.values.values()), ""))


def notes(study: Study, found: Sequence[Row]) -> Iterator[str]:
    """Where the paper's numbers come from, and each of its claims with our means."""
    paper = _paper(study)
    if not paper:
        return
    columns = ", ".join(map(str, paper.get("columns") or []))
    yield f"Published: {paper.get('table', '')}; {paper.get('metric', '')} ({columns}). Another model and other data."
    ours = {next(iter(row.values.values()), ""): row for row in found}
    for claim in paper.get("claims") or []:
        left, _, right = str(claim).partition(" <= ")
        means = [ours[name].mean if name in ours else None for name in (left, right)]
        if None in means:
            yield f"Claim {claim}: not measured here."
            continue
        yield (
            f"Claim {claim}: published {_values(paper, left)} and {_values(paper, right)}; here {means[0]:.4f} and"
            f" {means[1]:.4f} (means over seeds; no test of the difference)."
        )


def _paper(study: Study) -> Record:
    return study.about.get("paper") or {}


def _values(paper: Record, name: str) -> str:
    return " / ".join(f"{value:g}" for value in (paper.get("published") or {}).get(name, []))
