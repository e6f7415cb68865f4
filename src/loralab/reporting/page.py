"""The page of a sweep or a run."""

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from loralab.reporting import published, svg
from loralab.reporting.axes import flatten, label, short_names
from loralab.reporting.figures import figures
from loralab.reporting.gather import MISSING, Study, Trial, reason
from loralab.reporting.html import (
    cell,
    definitions,
    document,
    duration,
    figure,
    head,
    merged,
    pairs,
    sort_key,
    table,
    tile,
)
from loralab.reporting.provenance import Facts, facts, held_fixed
from loralab.reporting.table import Row, columns, score, seeds_text, trial_text


def page(study: Study, found: Sequence[Row]) -> str:
    """The whole document."""
    known = facts(study)
    sections = [
        _header(study, found, known),
        _results(study, found),
        _figures(study, found),
        _failures(study),
        _provenance(study, known),
    ]
    return document(study.name, [section for section in sections if section])


def rerun(trial: Trial) -> str:
    """The command that runs one trial again."""
    words = list(trial.record["overrides"])
    seeded = any(word.lstrip("+").startswith("seed=") for word in words)
    seed = trial.record["seed"]
    words += [] if seeded or seed is None else [f"seed={seed}"]
    return shlex.join(["loralab", "train", *words])


def _header(study: Study, found: Sequence[Row], known: Facts) -> str:
    question = f'<p class="question">{escape(study.question)}</p>' if study.question else ""
    fixed = [("held fixed", text) for text in held_fixed(study)]
    rows = [*merged(fixed), *pairs(known.header)]
    command = study.about.get("command")
    rows += [("command", f"<code>{escape(_command(command))}</code>")] if command else []
    return (
        f'<header>\n<div class="kicker">loralab study</div>\n<h1>{escape(study.name)}</h1>\n{question}\n'
        f'<div class="tiles">{"".join(_tiles(study, found, known))}</div>\n{definitions(rows)}\n</header>'
    )


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def _tiles(study: Study, found: Sequence[Row], known: Facts) -> Iterator[str]:
    done, total = study.count("completed"), len(study.trials)
    waiting = study.count("running", MISSING)
    failed = total - done - waiting
    parts = [f"{failed} failed, listed below"] if failed else []
    parts += [f"{waiting} running or not started"] if waiting else []
    yield tile(f"{done} of {total}", ", ".join(["trials completed", *parts]), bad=bool(failed))
    best = [row for row in found if row.best]
    if best:
        better = "lowest" if study.mode == "min" else "highest"
        yield tile(f"{best[0].mean:.4f}", f"{better} mean {study.metric}: {_where(study, best[0])}")
    if known.seconds:
        yield tile(duration(known.seconds), "of running time, all trials together")


def _where(study: Study, row: Row) -> str:
    short = short_names(list(study.axes))
    return ", ".join(f"{short[axis]} = {text}" for axis, text in row.values.items()) or "the only one"


def _results(study: Study, found: Sequence[Row]) -> str:
    short = short_names(list(study.axes))
    shown = columns(study, found)
    heads = [head(short[axis], axis, key=True) for axis in study.axes]
    heads += [head(study.metric, "mean and standard deviation over seeds"), '<th aria-label="spread"></th>']
    paper = any(published.published(study, row) for row in found)
    heads += [head("published")] if paper else []
    heads += [head("seeds"), *(head(column.title) for column in shown)]
    ends = [value for row in found for value in row.scores]
    scale = (min(ends), max(ends)) if ends else (0.0, 1.0)
    body = []
    for row in found:
        cells = [cell(text, text, "key") for text in row.values.values()]
        cells += [_score_cell(row), _strip_cell(row, *scale)]
        cells += [cell(published.published(study, row), "")] if paper else []
        cells.append(_seeds_cell(row))
        cells += [cell(column.text(row), sort_key(column.number(row))) for column in shown]
        kind = ' class="best"' if row.best else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return f"<section>\n<h2>Results</h2>\n{table(heads, body, 'sortable')}\n{_notes(study, found)}</section>"


def _notes(study: Study, found: Sequence[Row]) -> str:
    better = "lower" if study.mode == "min" else "higher"
    counts = sorted({len(row.scores) for row in found})
    n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"
    notes = [
        f"{study.metric}: mean and sample standard deviation over n = {n} completed seeds; {better} is "
        "better. The best mean is marked; a difference within the spread of the seeds is not a finding. "
        "The strip shows each seed, the mean and one standard deviation, on one scale for all rows.",
        "Bits per parameter: packed weights and their statistics over the quantized layers' parameters. "
        "Peak memory is the largest over the seeds, times and speeds are means.",
    ]
    notes += published.notes(study, found)
    if any(row.packed for row in found):
        notes.append("Trials were trained in packs: memory and time are the whole pack's, the same in each.")
    return "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)


def _score_cell(row: Row) -> str:
    if row.mean is None:
        return cell("-", "")
    spread = f' <span class="spread">&plusmn; {row.std:.4f}</span>' if row.std is not None else ""
    best = '<span class="pill">best</span>' if row.best else ""
    return f'<td data-sort="{row.mean!r}">{row.mean:.4f}{spread}{best}</td>'


def _strip_cell(row: Row, low: float, high: float) -> str:
    drawn = svg.strip(row.scores, row.mean, row.std, low, high) if row.mean is not None else ""
    return f"<td>{drawn}</td>"


def _seeds_cell(row: Row) -> str:
    kind = "trouble" if len(row.ok) < len(row.trials) else ""
    return cell(seeds_text(row), str(len(row.ok)), kind)


def _figures(study: Study, found: Sequence[Row]) -> str:
    drawn = [figure(one.title, one.body, one.caption) for one in figures(study, found)]
    body = "\n".join(drawn)
    return f'<section>\n<h2>Figures</h2>\n<div class="figures">\n{body}\n</div>\n</section>' if drawn else ""


def _failures(study: Study) -> str:
    """Every trial without a result, why, and the command that runs it again."""
    troubled = [trial for trial in study.trials if not trial.ok]
    if not troubled:
        return ""
    blocks = []
    for trial in troubled:
        waiting = " waiting" if trial.status in ("running", MISSING) else ""
        again = f"<pre>{escape(rerun(trial))}</pre>" if trial.record["overrides"] else ""
        blocks.append(
            f'<div class="failure{waiting}"><b>{escape(trial_text(study, trial))}</b> '
            f'<span class="trouble">{escape(trial.status.replace("_", " "))}</span>'
            f"<p>{escape(reason(trial))}</p>{again}</div>"
        )
    heading = "Not completed" if study.broken else "Still running"
    return f"<section>\n<h2>{heading}</h2>\n" + "\n".join(blocks) + "\n</section>"


def _provenance(study: Study, known: Facts) -> str:
    return (
        "<section>\n<h2>Provenance</h2>\n"
        f"{definitions(pairs(known.provenance))}\n{_trials(study)}\n{_config(study)}\n</section>"
    )


def _trials(study: Study) -> str:
    """Every trial on its own row, for those who want to look one up."""
    short = short_names(list(study.axes))
    heads = [head(short[axis], axis, key=True) for axis in study.axes]
    heads += [head("seed"), head(study.metric), head("status", key=True), head("trial", key=True)]
    heads.append(head("folder", key=True))
    body = []
    for trial in study.trials:
        value = score(trial, study.metric)
        cells = [cell(trial.values[axis], trial.values[axis], "key") for axis in study.axes]
        cells += [
            cell(trial.seed, trial.seed),
            cell("-" if value is None else f"{value:.4f}", sort_key(value)),
        ]
        cells += [cell(text, text, "key") for text in (trial.status, str(trial.record["trial"]), trial.name)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    summary = f"<summary>All {len(study.trials)} trials</summary>"
    return f"<details>{summary}{table(heads, body, 'sortable')}</details>"


def _config(study: Study) -> str:
    """The configuration shared by all trials."""
    flat = [flatten(trial.record["config"]) for trial in study.trials if trial.record["config"]]
    if not flat:
        return ""
    shared = [key for key in flat[0] if len({label(config.get(key)) for config in flat}) == 1]
    lines = escape("\n".join(f"{key}={label(flat[0][key])}" for key in shared))
    return f"<details><summary>Configuration shared by all trials</summary><pre>{lines}</pre></details>"
