"""What an arm shows: its columns as text and numbers, and the same for results.json."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.full import GAP, SHARE, ToFull, gap_is_new, to_full
from loralab.analysis.paired import LEVEL, Difference
from loralab.analysis.published import VERSUS_PUBLISHED, mark, published, published_gap, published_text
from loralab.analysis.search import points
from loralab.analysis.trials import UNSCORED
from loralab.analysis.tuning import Tuned, scale
from loralab.analysis.values import is_number
from loralab.records.shared import kept

MIB, GIB = 2**20, 2**30
VERSUS = "vs baseline"
SIGNIFICANT = "!"  # behind a difference that counts beside all others of the page
STEPS = "steps"
MEASURED = ("peak memory", "train s", "tokens/s")  # of a process
RATE = "lr x scale"  # what an update moves the weights by, to first order: B A is scaled by it and learned at this rate
NOTICEABLE = 0.01  # by which bits over all weights must differ from the quantized ones' to be shown beside them
DECOMPOSED = (
    "A decomposed product (..._decomposed) stores every weight twice, in 8 bits for the int8 product and in 16 bits "
    "for the columns of outliers, which are not known before the input is: hence about 24 bits per parameter"
)
_SEEDS = {"completed": "ok", "out_of_memory": "failed", "diverged": "failed", UNSCORED: "without a result"}

Number = Callable[[Arm], float | None]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Column:
    """A column of the results: ``number`` sorts, ``text`` shows."""

    title: str
    text: Callable[[Arm], str]
    number: Number


@kept
def columns(comparison: Comparison) -> list[Column]:
    """The columns behind the metric that any arm can fill."""
    arms, results = comparison.arms, comparison.results
    metrics = results.trials[0].record["metrics"] if results.single else {}  # a sweep's are in its CSV
    others = [name for name, value in metrics.items() if name != results.metric and is_number(value)]
    uneven = any(arm.stopped for arm in arms) or len({step for arm in arms for step in arm.steps}) > 1
    shown = [
        *_asked(comparison),
        *_tuned(comparison),
        Column(VERSUS, _difference_text, lambda arm: arm.difference.mean if arm.difference else None),
        *_to_full(comparison),
        Column("published", lambda arm: published_text(arm) or "-", lambda arm: None),
        column(VERSUS_PUBLISHED, published_gap, "{:+.4f}".format),
        *(_average(name, name, "{:.4f}".format) for name in others),
        *([Column(STEPS, steps_text, lambda arm: arm.means.get("time.steps"))] if uneven else []),
        _average("bits/param", "base.bits_per_parameter", "{:.3f}".format),
        *([_average("bits overall", "base.bits_per_parameter_overall", "{:.3f}".format)] * _partly_quantized(arms)),
        _average("base size", "base.bytes", memory),
        _average("trainable", "adapter.trainable_parameters", "{:,.0f}".format),
        column("peak alone", lambda arm: arm.alone_peak, memory),
        _measured("peak memory", lambda arm: arm.measured("memory.measured_peak_bytes", largest=True), memory),
        _measured("train s", lambda arm: arm.measured("time.train_s"), "{:.1f}".format),
        _measured("tokens/s", lambda arm: arm.speed, "{:,.0f}".format),
    ]
    shown = [column for column in shown if any(column.text(arm) != "-" for arm in arms)]
    if comparison.tuned is None:
        return shown
    # a tuned table has more columns, and what a pack measured compares with nothing
    return [one for one in shown if one.title not in MEASURED or any(one.number(arm) is not None for arm in arms)]


def _asked(comparison: Comparison) -> Iterator[Column]:
    """Of a search, as which point each row was asked for."""
    if comparison.results.searched:
        numbers = {id(point.arm): point.number for point in points(comparison)}
        yield column("point", lambda arm: numbers[id(arm)], "{:,.0f}".format)


def _tuned(comparison: Comparison) -> Iterator[Column]:
    """The value that each arm is tuned to and what it was chosen by; the scale of its update, where arms differ in it
    or in their rate."""
    tuned = comparison.tuned
    if tuned is not None:
        for place, name in enumerate(tuned.names):
            yield Column(name, partial(_tuned_text, tuned, place), partial(_setting, tuned.axes[place]))
        yield _average(tuned.whole.metric, tuned.whole.metric, "{:.4f}".format)
    scales = {_scale(arm) for arm in comparison.arms}
    if len(scales - {None}) > 1 or (tuned is not None and scales != {None}):
        yield column("scale", _scale, "{:.4g}".format)
        yield column(RATE, lambda arm: _product(_scale(arm), _setting("optimizer.lr", arm)), "{:.3g}".format)


def _to_full(comparison: Comparison) -> Iterator[Column]:
    """The share of full fine-tuning's improvement, else the difference to it."""
    gaps = to_full(comparison)
    if any(gap.share is not None for gap in gaps.values()):
        yield column(SHARE, lambda arm: gap.share if (gap := gaps.get(id(arm))) else None, "{:.1%}".format)
    elif gap_is_new(comparison, gaps):
        yield Column(GAP, lambda arm: _gap_text(arm, gaps.get(id(arm))), lambda arm: _gap(arm, gaps.get(id(arm))))


def _gap(arm: Arm, gap: ToFull | None) -> float | None:
    return gap.difference.mean if gap and gap.difference and gap.full is not arm else None


def _gap_text(arm: Arm, gap: ToFull | None) -> str:
    if gap is None or gap.difference is None or gap.full is arm:
        return "full" if gap and gap.full is arm else "-"
    return gap.difference.text + (f" {SIGNIFICANT}" if gap.difference.verdict(arm.results.mode) else "")


def plain_gap(gap: ToFull | None) -> dict[str, Any]:
    """Of a row beside full fine-tuning, for results.json; None where there is none."""
    return {
        "full": gap.full.name if gap else None,
        "share_of_full": gap.share if gap else None,
        "difference_to_full": _plain_difference(gap.difference) if gap else None,
    }


def _tuned_text(tuned: Tuned, place: int, arm: Arm) -> str:
    return tuned.text(arm.values, place, arm.trials[0].values[tuned.axes[place]])


def _setting(key: str, arm: Arm) -> float | None:
    """The number that all trials of the arm have; None where there is none."""
    values = {value for trial in arm.trials if is_number(value := trial.setting(key))}
    return values.pop() if len(values) == 1 else None


def _scale(arm: Arm) -> float | None:
    return scale(arm.trials[0])


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def steps_text(arm: Arm) -> str:
    """``60``, ``20 to 60 (2 of 3 stopped early)``."""
    if not arm.steps:
        return "-"
    ends = " to ".join(str(step) for step in dict.fromkeys((arm.steps[0], arm.steps[-1])))
    return f"{ends} ({arm.stopped} of {len(arm.ok)} stopped early)" if arm.stopped else ends


def seeds_text(arm: Arm) -> str:
    """``2 ok``, ``1 ok, 1 failed``; nothing that went wrong is left out."""
    names = [_SEEDS.get(trial.status, trial.status) for trial in arm.trials]
    counted = ", ".join(f"{names.count(name)} {name}" for name in sorted(dict.fromkeys(names), key="ok".__ne__))
    return f"{counted}, one score (n = 1)" if arm.n < len(arm.scores) else counted


def score_text(arm: Arm) -> str:
    if arm.mean is None:
        return "-"
    return f"{arm.mean:.4f}" if arm.std is None else f"{arm.mean:.4f} +- {arm.std:.4f}"


def level_text(level: float) -> str:
    """``at 99.29%, 95% for all 7 paired differences together``: how sure each difference must be to count."""
    count = round((1 - LEVEL) / (1 - level))
    each = f"at {100 * level:.4g}%"
    return each if count < 2 else f"{each}, {LEVEL:.0%} for all {count} paired differences together"


def memory(size: float) -> str:
    """Bytes in binary units (MiB = 2**20)."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def as_plain(arm: Arm) -> dict[str, Any]:
    """An arm for results.json. ``n``: independent scores; ``pack_size``: None where seeds ran in different packs."""
    return {
        "name": arm.name,
        "values": arm.values,
        "metric": arm.results.metric,
        "mean": arm.mean,
        "std": arm.std,
        "n": arm.n,
        "scores": arm.scores,
        "best": arm.best,
        "baseline": arm.baseline,
        "difference": _plain_difference(arm.difference),
        "against": arm.against.name if arm.against else None,
        "against_baseline": (arm.difference.verdict(arm.results.mode) or None) if arm.difference else None,
        "published": published(arm),
        "published_mark": mark(arm),
        "difference_to_published": published_gap(arm),
        "steps": arm.steps,
        "stopped_early": arm.stopped,
        "bits_per_parameter": arm.means.get("base.bits_per_parameter"),
        "bits_per_parameter_overall": arm.means.get("base.bits_per_parameter_overall"),
        "base_bytes": arm.means.get("base.bytes"),
        "trainable_parameters": arm.means.get("adapter.trainable_parameters"),
        "alone_peak_bytes": arm.alone_peak,
        "pack_size": arm.pack_size,
        "measured_peak_bytes": arm.measured("memory.measured_peak_bytes", largest=True),
        "train_s": arm.measured("time.train_s"),
        "tokens_per_s": arm.speed,
        "seeds": [trial.seed for trial in arm.trials],
        "statuses": [trial.status for trial in arm.trials],
        "trials": [trial.record["trial"] for trial in arm.trials],
    }


def _plain_difference(difference: Difference | None) -> dict[str, Any] | None:
    """``low`` and ``high``: the 95% interval of the mean paired difference."""
    if difference is None:
        return None
    low, high = difference.interval or (None, None)
    fields = asdict(difference)
    return {"mean": fields["mean"], "low": low, "high": high, **{key: fields[key] for key in ("p", "n", "seeds")}}


def _difference_text(arm: Arm) -> str:
    if arm.baseline or arm.difference is None:
        return "baseline" if arm.baseline else "-"
    return arm.difference.text + (f" {SIGNIFICANT}" if arm.difference.verdict(arm.results.mode) else "")


def column(title: str, number: Number, show: Format) -> Column:
    """``-`` where there is no number."""
    return Column(title, lambda arm: "-" if (value := number(arm)) is None else show(value), number)


def _average(title: str, key: str, show: Format) -> Column:
    return column(title, lambda arm: arm.means.get(key), show)


def _measured(title: str, number: Number, show: Format) -> Column:
    """A pack's figure says so, and is sorted nowhere: it compares with no other."""

    def text(arm: Arm) -> str:
        value = number(arm)
        if value is None:
            return "-"
        return show(value) if arm.pack_size == 1 else f"{show(value)} (pack of {arm.pack_size})"

    return Column(title, text, lambda arm: number(arm) if arm.pack_size == 1 else None)


def _partly_quantized(arms: Sequence[Arm]) -> bool:
    bits = [
        (arm.means.get("base.bits_per_parameter"), arm.means.get("base.bits_per_parameter_overall")) for arm in arms
    ]
    return any(
        quantized and overall and abs(overall - quantized) > NOTICEABLE * quantized for quantized, overall in bits
    )
