"""The report in W&B: a run of the sweep's group with the page's tables, and its charts from the same specifications.

W&B can name a Vega-Lite specification of its own only through its server (``Api.create_custom_chart``); here each chart
is a panel of HTML that carries its specification and Vega, so that it is drawn of an offline run too.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from loralab.analysis.answer import answer
from loralab.analysis.arms import Comparison
from loralab.analysis.comparable import subject
from loralab.analysis.results import SweepResults
from loralab.analysis.values import as_number
from loralab.records import wandb_upload
from loralab.records.metric_logger import Labels
from loralab.records.wandb import Mirror, Wandb
from loralab.records.wandb_run import LONGEST_NAME
from loralab.reporting import cost
from loralab.reporting.charts import Figure
from loralab.reporting.html import embedded, render
from loralab.reporting.report import Report
from loralab.reporting.table import as_plain
from loralab.reporting.trials import columns
from loralab.reporting.vega import bundle

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0  # that the end of a sweep waits for W&B
Table = tuple[list[str], list[list[Any]]]  # columns, rows


def after_sweep(report: Report) -> str:
    """Logs the report of a sweep whose trials were logged to W&B. Returns the address of the run, or the folder of an
    offline one; empty where W&B was not asked for. Raises nothing, and takes half a minute at most."""
    stored = (wandb_upload.stored_logger(trial.record["config"], keep_mode=True) for trial in report.results.trials)
    logger = next(filter(None, stored), None)
    if logger is None or logger.effective_mode == "disabled" or report.results.single:
        return ""
    return _in_time(report, logger)


def on_request(report: Report) -> str:
    """Logs any report, whatever its trials were logged to. Raises ConfigError where the environment disables W&B."""
    stored = (wandb_upload.stored_logger(trial.record["config"]) for trial in report.results.trials)
    logger = next(filter(None, stored), None) or Wandb()
    wandb_upload.refuse_disabled(logger)
    return _in_time(report, logger)


def _in_time(report: Report, logger: Wandb) -> str:
    places: list[str] = []

    def work() -> None:
        try:
            places.append(_logged(report, logger))
        except Exception as error:
            log.warning("the report is not in W&B: %s", " ".join(str(error).split())[:160])

    thread = threading.Thread(target=work, name="report to W&B", daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        again = f"loralab report --wandb {report.results.folder}"
        log.warning("W&B has not taken the report within %.0f s; again: %s", PATIENCE_SECONDS, again)
    return "".join(places)


def _logged(report: Report, logger: Wandb) -> str:
    results = report.results
    mirror = logger.start(report.index.parent, _labels(results), resumed=True)
    if not (place := mirror.place):
        return ""
    try:
        _fill(mirror, report)
    finally:
        mirror.finish()
    return place


def _fill(mirror: Mirror, report: Report) -> None:
    for name, (titles, lines) in tables(report.results, report.compared).items():
        mirror.table(f"report/{name}", titles, lines)
    mirror.pages(pages(report.figures))
    found = answer(report.compared)
    mirror.summarize({"trials": len(report.results.trials), **({"answer": found} if found else {})})


def _labels(results: SweepResults) -> Labels:
    return Labels(
        name=f"{results.name[: LONGEST_NAME - 7]} report",
        group=results.name,
        job_type="report",
        tags=tuple(results.about.get("tags") or ()),
        config={"question": results.question, "metric": results.metric, "axes": dict(results.axes)},
    )


def tables(results: SweepResults, compared: Sequence[Comparison]) -> dict[str, Table]:
    """``results``: a row for each row of the page, with the columns of results.json; ``trials``: those of results.csv.
    A column that no row fills is left out."""
    lines = [_arm(comparison) for comparison in compared]
    found = columns(results)
    trials = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    return {"results": _columns([row for arms in lines for row in arms]), "trials": _columns(trials)}


def _arm(comparison: Comparison) -> Iterator[dict[str, Any]]:
    about = subject(comparison.results)
    for arm in comparison.arms:
        plain = {**as_plain(arm), **cost.plain(arm)}
        difference = {f"difference {key}": value for key, value in (plain["difference"] or {}).items()}
        yield {"set": about or None, **arm.values, **{**plain, **difference}}


def _columns(lines: list[dict[str, Any]]) -> Table:
    """W&B refuses a column of texts and numbers: numbers are numbers where all of a column are, else all are texts."""
    names = list(dict.fromkeys(key for line in lines for key, value in line.items() if _is_cell(value)))
    columns = {name: [line.get(name) if _is_cell(line.get(name)) else None for line in lines] for name in names}
    typed = {name: _typed(values) for name, values in columns.items()}
    return names, [[typed[name][at] for name in names] for at in range(len(lines))]


def _is_cell(value: object) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _typed(values: list[Any]) -> list[Any]:
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known):
        return values
    if all(as_number(str(value)) is not None for value in known):
        return [None if value is None else as_number(str(value)) for value in values]
    return [None if value is None else str(value) for value in values]


def pages(figures: Sequence[Figure]) -> dict[str, str]:
    """A document of its own for each figure, by its name."""
    vega = embedded(bundle(), name="vega") if figures else ""
    return {
        f"report/{figure.name}": render(
            "chart.html", title=figure.title, caption=figure.caption, spec=figure.spec, vega=vega
        )
        for figure in figures
    }
