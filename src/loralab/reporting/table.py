"""What a row shows: its columns as text and numbers, and the same for results.json."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.reporting import published
from loralab.reporting.axes import UNKNOWN, is_number, lookup, short_names
from loralab.reporting.gather import UNSCORED, Study, Trial
from loralab.reporting.rows import Row, contenders
from loralab.reporting.sets import subject

MIB, GIB = 2**20, 2**30
VERSUS = "vs baseline"
TOLD = "!"  # behind a difference whose interval excludes 0
STEPS = "steps"
NOTICEABLE = 0.01  # by which bits over all weights must differ from the quantized ones' to be shown beside them
DECOMPOSED = (
    "A decomposed product (..._decomposed) stores every weight twice, in 8 bits for the int8 product and in 16 bits "
    "for the columns of outliers, which are not known before the input is: hence about 24 bits per parameter"
)
_BROKEN = ("out_of_memory", "diverged")  # counted as failed; each is named below the table


@dataclass(frozen=True)
class Column:
    """A column of the results: ``number`` sorts, ``text`` shows."""

    title: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None]


def columns(study: Study, found: Sequence[Row]) -> list[Column]:
    """The columns behind the metric that any row can fill."""
    every = [
        Column(
            VERSUS,
            lambda row: _difference_text(study, row),
            lambda row: row.difference.mean if row.difference else None,
        ),
        Column("published", lambda row: published.text(study.about, _arm(row)) or "-", lambda row: None),
        *(_metric_column(name) for name in _other_metrics(study)),
        *([Column(STEPS, steps_text, lambda row: row.average("time.steps"))] if _uneven(found) else []),
        _column("bits/param", lambda row: row.average("base.bits_per_parameter"), "{:.3f}".format),
        *([_column("bits overall", _overall, "{:.3f}".format)] if _partly_quantized(found) else []),
        _column("base size", lambda row: row.average("base.bytes"), memory),
        _column("trainable", lambda row: row.average("adapter.trainable_parameters"), "{:,.0f}".format),
        _column("peak alone", alone, memory),
        _measured("peak memory", "memory.measured_peak_bytes", memory, max),
        _measured("train s", "time.train_s", "{:.1f}".format),
        Column("tokens/s", lambda row: _speed_text(study, row), lambda row: _solo(row, "time.tokens_per_s")),
    ]
    return [column for column in every if any(column.text(row) != "-" for row in found)]


def alone(row: Row) -> float | None:
    """The predicted peak of the largest of the row's trials by itself, the same however it ran."""
    return max((value for trial in row.ok if (value := _alone(trial)) is not None), default=None)


def measured(row: Row, key: str, combine: Callable[[list[float]], float] | None = None) -> float | None:
    """A figure of the process that ran the row: over seeds that ran alone, or of the one pack that ran all of them;
    None where seeds ran in different packs, whose figures do not compare."""
    values = row.numbers(key)
    if not values or (len(row.packs) > 1) or (key.startswith("time.") and not any(row.steps)):
        return None
    return (combine or _mean)(values)


def pack_size(row: Row) -> int | None:
    """1 for a row that ran alone; None where its seeds ran in different packs."""
    if len(row.packs) != 1:
        return None
    pack = next(iter(row.packs))
    return int(pack[0]) if pack else 1


def speed(study: Study, row: Row) -> float | None:
    """Tokens per second: of a trial alone, or of all trials of the row's pack together."""
    if pack_size(row) == 1:
        return measured(row, "time.tokens_per_s")
    pack = next(iter(row.packs)) if len(row.packs) == 1 else None
    return study.packs.get(pack) if pack and any(row.steps) else None


def steps_text(row: Row) -> str:
    """``60``, ``20 to 60 (2 of 3 stopped early)``."""
    if not row.steps:
        return "-"
    ends = " to ".join(str(step) for step in dict.fromkeys((row.steps[0], row.steps[-1])))
    return f"{ends} ({row.stopped} of {len(row.ok)} stopped early)" if row.stopped else ends


def ended(trial: Trial) -> str:
    """Why a trial made no more steps; empty for one without a result."""
    if not trial.ok:
        return ""
    early, steps = trial.record.get("stopped_early"), trial.record["time"]["steps"]
    most = lookup(trial.record["config"], "trainer.max_steps")
    if isinstance(early, dict):
        best = early.get("best")
        value = f"{best:.4f}" if is_number(best) else "its best"
        return f"stopped early at step {early.get('step')} of {most}: {early.get('metric')} was not better than {value}"
    return "max_steps" if steps == most or steps is None else f"ended at step {steps} of {most}"


def seeds_text(row: Row) -> str:
    """``2 ok``, ``1 ok, 1 failed``; nothing that went wrong is left out."""
    counts: dict[str, int] = {}
    for trial in row.trials:
        name = "ok" if trial.ok else "failed" if trial.status in _BROKEN else trial.status
        name = "without a result" if name == UNSCORED else name
        counts[name] = counts.get(name, 0) + 1
    counted = ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: name != "ok"))
    return f"{counted}, one score (n = 1)" if row.n < len(row.scores) else counted


def score_text(row: Row) -> str:
    if row.mean is None:
        return "-"
    return f"{row.mean:.4f}" if row.std is None else f"{row.mean:.4f} +- {row.std:.4f}"


def memory(size: float) -> str:
    """Bytes in binary units (MiB = 2**20)."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def trial_text(study: Study, trial: Trial) -> str:
    """``quantization=nf4 r=8 seed=1``."""
    short = short_names(list(study.axes))
    pairs = [f"{short[axis]}={trial.values[axis]}" for axis in study.axes]
    return " ".join([*pairs, f"seed={trial.seed}"])


def where(study: Study, row: Row) -> str:
    """``quantization = nf4, r = 8``."""
    short = short_names(list(study.axes))
    known = [f"{short[axis]} = {text}" for axis, text in row.values.items() if text != UNKNOWN]
    return ", ".join(known) or "the only row"


def deviates(found: Sequence[Row]) -> bool:
    """Whether there is a standard deviation to speak of."""
    return any(row.std is not None for row in found)


def differs_in_seeds(found: Sequence[Row]) -> bool:
    """Whether the means are over different seeds, so that they do not compare."""
    return len({frozenset(row.by_seed) for row in contenders(found)}) > 1


def align(titles: list[str], body: list[list[str]], numeric_from: int) -> list[str]:
    """Lines of equal columns; those between ``numeric_from`` and the last one are set to the right."""
    table = [titles, *body]
    widths = [max(len(line[column]) for line in table) for column in range(len(titles))]
    last = len(titles) - 1

    def cell(text: str, column: int) -> str:
        right = numeric_from < column < last
        return text.rjust(widths[column]) if right else text.ljust(widths[column])

    lines = ["  ".join(cell(text, column) for column, text in enumerate(line)) for line in table]
    return [lines[0], "-" * len(lines[0].rstrip()), *lines[1:]]


def as_plain(study: Study, row: Row) -> dict[str, Any]:
    """An arm for results.json. ``n``: independent scores; ``pack_size``: None where seeds ran in different packs."""
    return {
        "set": subject(study),
        "name": where(study, row),
        "values": row.values,
        "metric": study.metric,
        "mean": row.mean,
        "std": row.std,
        "n": row.n,
        "scores": row.scores,
        "best": row.best,
        "baseline": row.baseline,
        "difference": _plain_difference(row),
        "against_baseline": (row.difference.verdict(study.mode) or None) if row.difference else None,
        "published": published.values(study.about, _arm(row)),
        "steps": row.steps,
        "stopped_early": row.stopped,
        "bits_per_parameter": row.average("base.bits_per_parameter"),
        "bits_per_parameter_overall": row.average("base.bits_per_parameter_overall"),
        "base_bytes": row.average("base.bytes"),
        "trainable_parameters": row.average("adapter.trainable_parameters"),
        "alone_peak_bytes": alone(row),
        "pack_size": pack_size(row),
        "measured_peak_bytes": measured(row, "memory.measured_peak_bytes", max),
        "train_s": measured(row, "time.train_s"),
        "tokens_per_s": speed(study, row),
        "seeds": [trial.seed for trial in row.trials],
        "statuses": [trial.status for trial in row.trials],
        "trials": [trial.record["trial"] for trial in row.trials],
    }


def _plain_difference(row: Row) -> dict[str, Any] | None:
    """``low`` and ``high``: the 95% interval of the mean paired difference."""
    if row.difference is None:
        return None
    one = row.difference
    low, high = one.interval or (None, None)
    return {"mean": one.mean, "low": low, "high": high, "p": one.p, "n": one.n, "seeds": one.seeds}


def _difference_text(study: Study, row: Row) -> str:
    if row.baseline or row.difference is None:
        return "baseline" if row.baseline else "-"
    return row.difference.text + (f" {TOLD}" if row.difference.verdict(study.mode) else "")


def _arm(row: Row) -> str:
    """The value of the first axis, by which a paper's arms are named."""
    return next(iter(row.values.values()), "")


def _other_metrics(study: Study) -> list[str]:
    """What else a single run measured; a sweep's are in its CSV."""
    found = study.trials[0].record["metrics"] if study.single else {}
    return [name for name, value in found.items() if name != study.metric and is_number(value)]


def _metric_column(name: str) -> Column:
    return _column(name, lambda row: row.measured(name), "{:.4f}".format)


def _column(title: str, number: Callable[[Row], float | None], show: Callable[[float], str]) -> Column:
    def text(row: Row) -> str:
        value = number(row)
        return "-" if value is None else show(value)

    return Column(title, text, number)


def _measured(
    title: str, key: str, show: Callable[[float], str], combine: Callable[[list[float]], float] | None = None
) -> Column:
    """A pack's figure says so, and is sorted nowhere: it compares with no other."""
    return Column(
        title, lambda row: _packed(row, measured(row, key, combine), show), lambda row: _solo(row, key, combine)
    )


def _packed(row: Row, value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    size = pack_size(row)
    return show(value) if size == 1 else f"{show(value)} (pack of {size})"


def _speed_text(study: Study, row: Row) -> str:
    return _packed(row, speed(study, row), "{:,.0f}".format)


def _solo(row: Row, key: str, combine: Callable[[list[float]], float] | None = None) -> float | None:
    return measured(row, key, combine) if pack_size(row) == 1 else None


def _alone(trial: Trial) -> float | None:
    """Records of older versions have it of trials that ran alone."""
    own = lookup(trial.record, "memory.alone_peak_bytes")
    if own is None and (lookup(trial.record, "pack.size") or 1) == 1:
        own = lookup(trial.record, "memory.predicted_peak_bytes")
    return float(own) if is_number(own) else None


def _overall(row: Row) -> float | None:
    return row.average("base.bits_per_parameter_overall")


def _partly_quantized(found: Sequence[Row]) -> bool:
    pairs = [(row.average("base.bits_per_parameter"), _overall(row)) for row in found]
    return any(own and whole and abs(whole - own) > NOTICEABLE * own for own, whole in pairs)


def _uneven(found: Sequence[Row]) -> bool:
    """Whether trials differ in how far they trained."""
    return any(row.stopped for row in found) or len({step for row in found for step in row.steps}) > 1


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
