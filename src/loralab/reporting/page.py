"""One self-contained HTML page: no link leaves it, nothing is fetched, every text is escaped."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from loralab.reporting import svg
from loralab.reporting.axes import as_number, flatten, label, short_names
from loralab.reporting.figures import figures
from loralab.reporting.gather import MISSING, Study, Trial, reason
from loralab.reporting.provenance import Facts, facts, held_fixed
from loralab.reporting.table import Row, columns, score, seeds_text, trial_text


def page(study: Study, found: Sequence[Row]) -> str:
    """The whole document."""
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    known = facts(study)
    sections = [
        _header(study, found, known),
        _results(study, found),
        _figures(study, found),
        _failures(study),
        _provenance(study, known),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study.name)} - loralab</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        "<footer>Written by loralab from the runs' records; nothing on this page is fetched.</footer>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


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
    rows = [*_merged(fixed), *_pairs(known.header)]
    command = study.about.get("command")
    rows += [("command", f"<code>{escape(_command(command))}</code>")] if command else []
    return (
        f'<header>\n<div class="kicker">loralab study</div>\n<h1>{escape(study.name)}</h1>\n{question}\n'
        f'<div class="tiles">{"".join(_tiles(study, found, known))}</div>\n{_definitions(rows)}\n</header>'
    )


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def _tiles(study: Study, found: Sequence[Row], known: Facts) -> Iterator[str]:
    done, total = study.count("completed"), len(study.trials)
    waiting = study.count("running", MISSING)
    failed = total - done - waiting
    parts = [f"{failed} failed, listed below"] if failed else []
    parts += [f"{waiting} running or not started"] if waiting else []
    yield _tile(f"{done} of {total}", ", ".join(["trials completed", *parts]), bad=bool(failed))
    best = [row for row in found if row.best]
    if best:
        better = "lowest" if study.mode == "min" else "highest"
        yield _tile(f"{best[0].mean:.4f}", f"{better} mean {study.metric}: {_where(study, best[0])}")
    if known.seconds:
        yield _tile(_duration(known.seconds), "of running time, all trials together")


def _tile(value: str, words: str, bad: bool = False) -> str:
    return f'<div class="tile{" bad" if bad else ""}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def _where(study: Study, row: Row) -> str:
    short = short_names(list(study.axes))
    return ", ".join(f"{short[axis]} = {text}" for axis, text in row.values.items()) or "the only one"


def _results(study: Study, found: Sequence[Row]) -> str:
    short = short_names(list(study.axes))
    shown = columns(study, found)
    heads = [_head(short[axis], axis, key=True) for axis in study.axes]
    heads += [_head(study.metric, "mean and standard deviation over seeds"), '<th aria-label="spread"></th>']
    heads += [_head("seeds"), *(_head(column.title) for column in shown)]
    ends = [value for row in found for value in row.scores]
    scale = (min(ends), max(ends)) if ends else (0.0, 1.0)
    body = []
    for row in found:
        cells = [_cell(text, text, "key") for text in row.values.values()]
        cells += [_score_cell(row), _strip_cell(row, *scale), _seeds_cell(row)]
        cells += [_cell(column.text(row), _sort(column.number(row))) for column in shown]
        kind = ' class="best"' if row.best else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    table = _table(heads, body, "sortable")
    return f"<section>\n<h2>Results</h2>\n{table}\n{_notes(study, found)}</section>"


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
    if any(row.packed for row in found):
        notes.append("Trials were trained in packs: memory and time are the whole pack's, the same in each.")
    return "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)


def _score_cell(row: Row) -> str:
    if row.mean is None:
        return _cell("-", "")
    spread = f' <span class="spread">&plusmn; {row.std:.4f}</span>' if row.std is not None else ""
    best = '<span class="pill">best</span>' if row.best else ""
    return f'<td data-sort="{row.mean!r}">{row.mean:.4f}{spread}{best}</td>'


def _strip_cell(row: Row, low: float, high: float) -> str:
    drawn = svg.strip(row.scores, row.mean, row.std, low, high) if row.mean is not None else ""
    return f"<td>{drawn}</td>"


def _seeds_cell(row: Row) -> str:
    kind = "trouble" if len(row.ok) < len(row.trials) else ""
    return _cell(seeds_text(row), str(len(row.ok)), kind)


def _figures(study: Study, found: Sequence[Row]) -> str:
    drawn = [
        f"<figure>\n<h3>{escape(one.title)}</h3>\n{one.body}\n<figcaption>{escape(one.caption)}</figcaption>\n</figure>"
        for one in figures(study, found)
    ]
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
        f"{_definitions(_pairs(known.provenance))}\n{_trials(study)}\n{_config(study)}\n</section>"
    )


def _trials(study: Study) -> str:
    """Every trial on its own row, for those who want to look one up."""
    short = short_names(list(study.axes))
    heads = [_head(short[axis], axis, key=True) for axis in study.axes]
    heads += [_head("seed"), _head(study.metric), _head("status", key=True), _head("trial", key=True)]
    heads.append(_head("folder", key=True))
    body = []
    for trial in study.trials:
        value = score(trial, study.metric)
        cells = [_cell(trial.values[axis], trial.values[axis], "key") for axis in study.axes]
        cells += [
            _cell(trial.seed, trial.seed),
            _cell("-" if value is None else f"{value:.4f}", _sort(value)),
        ]
        cells += [_cell(text, text, "key") for text in (trial.status, str(trial.record["trial"]), trial.name)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    summary = f"<summary>All {len(study.trials)} trials</summary>"
    return f"<details>{summary}{_table(heads, body, 'sortable')}</details>"


def _config(study: Study) -> str:
    """The configuration shared by all trials."""
    flat = [flatten(trial.record["config"]) for trial in study.trials if trial.record["config"]]
    if not flat:
        return ""
    shared = [key for key in flat[0] if len({label(config.get(key)) for config in flat}) == 1]
    lines = escape("\n".join(f"{key}={label(flat[0][key])}" for key in shared))
    return f"<details><summary>Configuration shared by all trials</summary><pre>{lines}</pre></details>"


def _merged(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Several texts under one term become one cell."""
    texts: dict[str, list[str]] = {}
    for term, text in rows:
        texts.setdefault(term, []).append(escape(text))
    return [(term, "<br>".join(found)) for term, found in texts.items()]


def _pairs(values: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(term, escape(text)) for term, text in values.items() if text]


def _definitions(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{text}</dd>' for term, text in rows)}</dl>"


def _table(heads: Sequence[str], body: Sequence[str], kind: str) -> str:
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    rows = "\n".join(body)
    return f'<div class="scroll"><table class="{kind}">{head}\n<tbody>\n{rows}\n</tbody></table></div>'


def _head(text: str, hint: str = "", key: bool = False) -> str:
    title = f' title="{escape(hint)}"' if hint and hint != text else ""
    shown = escape(text).replace(" ", "&nbsp;" if len(text) < 8 else " ")
    return f'<th{" class=key" if key else ""}{title}><button type="button">{shown}</button></th>'


def _cell(text: str, sort: str, kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<td{css} data-sort="{escape(sort)}">{escape(text).replace(",", ",<wbr>")}</td>'


def _sort(value: float | None) -> str:
    return "" if value is None or as_number(repr(value)) is None else repr(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
