"""The page of a sweep or a run."""

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loralab.records.record import MASK
from loralab.reporting import memory, svg
from loralab.reporting.axes import canonical, flatten, label, lookup, short_names
from loralab.reporting.figures import figures
from loralab.reporting.gather import MISSING, STALE, Study, Trial, reason, score
from loralab.reporting.html import (
    cell,
    definitions,
    document,
    duration,
    figure,
    head,
    link,
    merged,
    pairs,
    sort_key,
    table,
    tile,
)
from loralab.reporting.notes import differing, general, notes, undecided
from loralab.reporting.provenance import Facts, facts, held_fixed
from loralab.reporting.provenance import question as question_of
from loralab.reporting.rows import Row, Table, contenders
from loralab.reporting.sets import subject
from loralab.reporting.table import DECOMPOSED, Column, columns, deviates, ended, seeds_text, trial_text, where
from loralab.reporting.verdicts import verdicts

EXPLAINED = {
    "bits/param": "Bits per parameter: packed weights and their statistics over the quantized layers' parameters.",
    "bits overall": "Bits overall: the same over all of the base's weights, quantized or not.",
    "peak alone": "Peak alone: predicted for a trial by itself, for the largest batch that the data can give.",
    "peak memory": (
        "Peak memory: measured, the largest over the seeds. On a CPU it is measured of one step only, whatever batch "
        "that step had, so it can be smaller than peak alone, which is for the largest batch."
    ),
    "train s": (
        "Train s: the time of the training steps, without steps whose memory was profiled. Times and speeds are means, "
        "and not a benchmark: other processes on the machine count."
    ),
}


def page(study: Study, tables: Sequence[Table]) -> str:
    """The whole document; where trials cannot be compared, results and figures by set."""
    known = facts(study)
    sections = [_header(study, tables, known), _general(study, tables)]
    for part, found in tables:
        sections += [_results(part, found, len(tables) > 1), memory.section(part, found), _figures(part, found)]
    sections += [_failures(study), _provenance(study, known)]
    return document(study.name, [section for section in sections if section])


def rerun(trial: Trial) -> str:
    """The command that runs one trial again, in the folder where it was started."""
    words = list(trial.record["overrides"])
    seeded = any(word.lstrip("+").startswith("seed=") for word in words)
    seed = trial.record["seed"]
    words += [] if seeded or seed is None else [f"seed={seed}"]
    command = shlex.join(["loralab", "train", *words])
    return f"{command}  # {MASK} hides a secret" if any(MASK in word for word in words) else command


def _header(study: Study, tables: Sequence[Table], known: Facts) -> str:
    asked = question_of(study)
    question = f'<p class="question">{escape(asked)}</p>' if asked else ""
    fixed = [("settings" if study.single else "held fixed", text) for text in held_fixed(study)]
    rows = [*merged(fixed), *pairs(known.header)]
    command = study.about.get("command")
    rows += [("command", f"<code>{escape(_command(command))}</code>")] if command else []
    kind = "run" if study.single else "study"
    return (
        f'<header>\n<div class="kicker">loralab {kind}</div>\n<h1>{escape(study.name)}</h1>\n{question}\n'
        f'<div class="tiles">{"".join(_tiles(study, tables, known))}</div>\n{definitions(rows)}\n</header>'
    )


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def _tiles(study: Study, tables: Sequence[Table], known: Facts) -> Iterator[str]:
    done, total = study.count("completed"), len(study.trials)
    waiting = study.count("running", MISSING)
    stale = study.count(STALE)
    failed = total - done - waiting - stale
    parts = [f"{failed} failed, listed below"] if failed else []
    parts += [f"{waiting} running or not started"] if waiting else []
    parts += [f"{stale} stale: base or data have changed since, listed below"] if stale else []
    yield tile(f"{done} of {total}", ", ".join(["trials completed", *parts]), bad=bool(failed or stale))
    if len(tables) > 1:
        yield tile(f"{len(tables)} sets", "whose numbers do not compare with each other, for the reason below")
    else:
        yield from _headline(*tables[0])
    if known.seconds:
        yield tile(duration(known.seconds), "of running time, all trials together")


def _headline(study: Study, found: Sequence[Row]) -> Iterator[str]:
    if study.single and found[0].mean is not None:
        yield tile(f"{found[0].mean:.4f}", study.metric)
    best = next((row for row in found if row.best), None)
    if best is not None:
        yield tile(f"{best.mean:.4f}", f"{study.metric} of the best row, by its intervals: {where(study, best)}")
    elif len(contenders(found)) > 1:
        title, _, why = undecided(found).partition(": ")
        yield tile(title, "; ".join(filter(None, [why, differing(study, found)])))


def _general(study: Study, tables: Sequence[Table]) -> str:
    """What is said of all tables together, and of the paper's claims."""
    words = [*general(study, tables), *(verdict.text for verdict in verdicts(study, tables))]
    return f"<section>\n{_words(words)}</section>" if words else ""


def _words(texts: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(_sentence(text))}</p>\n' for text in texts if text)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _results(study: Study, found: Sequence[Row], one_of_several: bool) -> str:
    short = short_names(list(study.axes))
    shown = columns(study, found)
    heads = [head(short[axis], axis, key=True) for axis in study.axes]
    heads += [
        head(study.metric, "mean and standard deviation over seeds" if deviates(found) else ""),
        '<th aria-label="spread"></th>',
    ]
    heads += [*(head(column.title, EXPLAINED.get(column.title, "")) for column in shown), head("seeds")]
    ends = [value for row in found for value in _ends(row)]
    scale = (min(ends), max(ends)) if ends else (0.0, 1.0)
    body = []
    for row in found:
        cells = [cell(text, text, "key") for text in row.values.values()]
        cells += [_score_cell(row), _strip_cell(row, *scale)]
        cells += [cell(column.text(row), sort_key(column.number(row)), "breaks") for column in shown]
        cells.append(_seeds_cell(row))
        kind = ' class="best"' if row.best else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    words = [f"Held fixed: {text}" for text in held_fixed(study) if one_of_several]
    words += [*_notes(study, found, shown), *notes(study, found)]
    title = f"Results: {subject(study)}" if one_of_several else "Results"
    return f"<section>\n<h2>{escape(title)}</h2>\n{table(heads, body, 'sortable')}\n{_words(words)}</section>"


def _notes(study: Study, found: Sequence[Row], shown: Sequence[Column]) -> Iterator[str]:
    better = "lower" if study.mode == "min" else "higher"
    counts = sorted({row.n for row in found})
    n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    titles = {column.title for column in shown}
    if deviates(found):
        yield (
            f"{study.metric}: mean and sample standard deviation over n = {n} seeds; {better} is better. "
            "The strip shows each seed, the mean and one standard deviation, on one scale for all rows."
        )
    else:
        yield f"{study.metric}: {better} is better" + ("." if study.single else f"; n = {n}.")
    yield " ".join(text for title, text in EXPLAINED.items() if title in titles)
    if any(_keeps_both(row) for row in found):
        yield DECOMPOSED
    yield from _cut(study)


def _keeps_both(row: Row) -> bool:
    return any("decomposed" in str(trial.record["choices"].get("quantization")) for trial in row.ok)


def _cut(study: Study) -> Iterator[str]:
    """``50 of 384 rows were cut to model.max_length = 192``, once for each combination of numbers."""
    counts = []
    for trial in study.trials:
        data = trial.record["data"]
        rows = data["rows"] if isinstance(data["rows"], Mapping) else {}
        total = sum(count for count in rows.values() if isinstance(count, int))
        longest = data.get("max_length") or lookup(trial.record["config"], "model.max_length")
        counts += [(data["truncated"], total, longest)] if data["truncated"] else []
    for cut, total, longest in dict.fromkeys(counts):
        at = "model.max_length" if longest is None else f"model.max_length = {longest}"
        yield f"{cut:,} of {total:,} rows were cut to {at}."


def _score_cell(row: Row) -> str:
    if row.mean is None:
        return cell("-", "")
    spread = f' <span class="spread">&plusmn; {row.std:.4f}</span>' if row.std is not None else ""
    best = '<span class="pill">best</span>' if row.best else ""
    return f'<td data-sort="{row.mean!r}">{row.mean:.4f}{spread}{best}</td>'


def _ends(row: Row) -> list[float]:
    """What the row's strip must hold: every seed, and one deviation to either side of the mean."""
    mean, std = row.mean or 0.0, row.std or 0.0
    return [*row.scores, mean - std, mean + std] if row.scores else []


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
    heading = f"Not completed{' or stale' * (study.count(STALE) > 0)}" if study.broken else "Still running"
    return f"<section>\n<h2>{heading}</h2>\n" + "\n".join(blocks) + "\n</section>"


def _provenance(study: Study, known: Facts) -> str:
    return (
        "<section>\n<h2>Provenance</h2>\n"
        f"{definitions(pairs(known.provenance))}\n{_trials(study)}\n{_config(study)}\n</section>"
    )


def _trials(study: Study) -> str:
    """Every trial on its own row, with its files and the command that runs it again."""
    short = short_names(list(study.axes))
    keys = [*((short[axis], axis) for axis in study.axes), ("seed", "seed"), ("status", ""), ("trial", "")]
    heads = [head(text, hint, key=True) for text, hint in keys]
    heads += [head(study.metric), head("steps"), head("ended", key=True)]
    heads += [head("files", key=True), head("run it again", key=True)]
    body = []
    for trial in study.trials:
        value, steps = score(trial.record, study.metric) if trial.ok else None, trial.record["time"]["steps"]
        name = str(trial.record["trial"])
        names = name if trial.name in (name, "") else f"{name} in {trial.name}"
        texts = [*(trial.values[axis] for axis in study.axes), trial.seed, trial.status, names]
        cells = [*(cell(text, text, "key") for text in texts)]
        cells.append(cell("-" if value is None else f"{value:.4f}", sort_key(value)))
        cells += [cell("-" if steps is None else str(steps), sort_key(steps)), cell(ended(trial), "", "key")]
        cells += [
            f'<td class="key">{_files(study, trial)}</td>',
            f'<td class="key"><code>{escape(rerun(trial))}</code>',
        ]
        body.append(f"<tr>{''.join(cells)}</td></tr>")
    summary = f"<summary>{'The trial' if study.single else f'All {len(study.trials)} trials'}</summary>"
    return f"<details>{summary}{table(heads, body, 'sortable')}</details>"


def _files(study: Study, trial: Trial) -> str:
    there = [name for name in ("result.json", "train.log", "metrics.jsonl") if (trial.folder / name).exists()]
    return " ".join(link(_beside(study.folder, trial.folder / name), name) for name in there)


def _beside(root: Path, path: Path) -> str:
    """The path as seen from the page in ``root/report``."""
    return Path(os.path.relpath(path, root / "report")).as_posix()


def _config(study: Study) -> str:
    """What all trials share; of a single run, everything."""
    flat = [flatten(trial.record["config"]) for trial in study.trials if trial.record["config"]]
    if not flat:
        return ""
    shared = [key for key in flat[0] if len({canonical(config.get(key)) for config in flat}) == 1]
    lines = escape("\n".join(f"{key}={label(flat[0][key])}" for key in shared))
    title = "Configuration" if study.single else "Configuration shared by all trials"
    return f"<details><summary>{title}</summary><pre>{lines}</pre></details>"
