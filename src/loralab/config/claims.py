"""What a sweep file claims of its arms (``sweep.claims``), read from its text; who measures and judges is elsewhere."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loralab.errors import ConfigError, nearest
from loralab.records import schema

FORMS = (
    *("A <= B", "A >= B", "A = B within 0.02", "A - B = 0.373 within 0.001", "A / B >= 1.5", "A / B = 2 within 0.1"),
    *("A = 884736", "A = 4.127 within 0.001", "rises with AXIS", "falls with AXIS", "flat in AXIS within 0.02"),
)
KEYS = ("claim", "metric", "where", "source")
FIRST = ""  # stands for the sweep's first axis, of which an arm that is named by a value alone has that value

_RELATION = re.compile(r"\s(<=|>=|<|>|=)\s")
_ALONG = re.compile(r"(rises|falls) with (\S+)|(flat) in (\S+)")
_BETWEEN = {"difference": re.compile(r"\s-\s"), "ratio": re.compile(r"\s/\s")}
# Sections of a record whose numbers follow from the configuration, and single numbers that do: no seed moves them.
_SETTLED = {"base", "adapter", "optimizer", "data"}
_SETTLED_KEYS = {"memory.alone_peak_bytes", "time.steps"}
_OF_TRIAL = {"memory.alone_peak_bytes", "time.steps", "time.tokens"}  # the others there are the pack's

Chosen = dict[str, str]  # {axis: value}, as written


@dataclass(frozen=True)
class Claim:
    """One claim. ``form``: order, equal, difference, ratio, number; rises, falls, flat: along an ``axis``.

    ``arms``: two, one of a number, none along an axis; ``sign``: <=, >= or =; ``value``: what a difference, a ratio or
    a number is held against; ``margin``: how far from it still counts, 0 where none was given; ``metric``: a metric's
    name or a dotted number of the record, None: the sweep's metric; ``where``: {axis: value} of the arms it speaks of.
    """

    text: str
    form: str
    arms: tuple[Chosen, ...] = ()
    sign: str = "="
    value: float = 0.0
    margin: float = 0.0
    axis: str = ""
    metric: str | None = None
    where: Chosen = field(default_factory=dict)
    source: str = ""

    @property
    def settled(self) -> bool:
        """Whether its numbers follow from the configuration: counts, bits, bytes, of which one seed says all."""
        return self.metric is not None and is_settled(self.metric)

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the difference, the ratio or the number lies if the claim is true."""
        if self.sign == "=":
            return self.value - self.margin, self.value + self.margin
        return (-math.inf, self.value) if self.sign == "<=" else (self.value, math.inf)

    def ambiguous(self, axis: str) -> str:
        """What to say where its number is also a value of the first axis."""
        return (
            f"the claim {self.text!r}: {self.right} is a number and an arm; valid: {axis}={self.right} for the arm, "
            f"{self.value:e} for the number"
        )

    def one_sided(self, axes: Iterable[str]) -> str:
        """What to say where one of its two arms alone is named by these axes."""
        return f"the claim {self.text!r} names {' and '.join(sorted(axes))} for one of its arms alone; valid: for both"

    def without_order(self, value: str) -> str:
        """What to say where a value of its axis is no number."""
        return (
            f"the claim {self.text!r}: {self.axis} has the value {value}, which is no number; valid: flat in, or arms"
        )

    @property
    def right(self) -> str:
        """What stands behind the relation, as written."""
        return _RELATION.split(self.text.partition(" within ")[0])[-1]


def is_settled(metric: str) -> bool:
    """Whether the number of this name is the same for every seed."""
    return metric in _SETTLED_KEYS or ("/" not in metric and metric.split(".")[0] in _SETTLED)


def is_of_pack(metric: str) -> bool:
    """Whether the number of this name is measured of all the trials that ran together."""
    return "/" not in metric and metric.split(".")[0] in ("memory", "time") and metric not in _OF_TRIAL


def listed(sweep: Mapping[str, Any]) -> list[Any]:
    """The claims as a sweep file has them, of ``sweep.paper`` where it has some; a single one may stand alone."""
    paper = sweep.get("paper")
    claims = (paper.get("claims") if isinstance(paper, Mapping) else None) or sweep.get("claims")
    return list(claims) if isinstance(claims, list) else [] if claims is None else [claims]


def check_marks(sweep: Mapping[str, Any]) -> None:
    """Raises ConfigError where ``marks`` is no mapping, or names an arm for which nothing is published."""
    for where, holder in {"sweep": sweep, "sweep.paper": sweep.get("paper")}.items():
        marks = holder.get("marks") if isinstance(holder, Mapping) else None
        if not isinstance(holder, Mapping) or marks is None:
            continue
        if not isinstance(marks, Mapping):
            raise ConfigError(f"{where}.marks={marks!r} is no mapping; valid: {{arm: confirmed or unconfirmed}}")
        published = holder.get("published")
        arms = list(map(str, published)) if isinstance(published, Mapping) else []
        for arm in map(str, marks):
            if arm not in arms:
                raise ConfigError(f"{where}.marks names {arm}, of which nothing is published; {nearest(arm, arms)}")


def read(claim: Any) -> Claim:
    """The claim of a text, or of a mapping with ``claim`` and, where wanted, ``metric``, ``where`` and ``source``.
    Raises ConfigError."""
    if isinstance(claim, str):
        claim = {"claim": claim}
    if not isinstance(claim, Mapping) or not isinstance(claim.get("claim"), str):
        raise ConfigError(f"the claim {claim!r} is neither a text nor a mapping with one under claim; {_valid()}")
    text = " ".join(claim["claim"].split())
    if unknown := [str(key) for key in claim if key not in KEYS]:
        raise ConfigError(f"the claim {text!r} has the key {unknown[0]}; {nearest(unknown[0], KEYS)}")
    metric, where, source = (claim.get(key) for key in ("metric", "where", "source"))
    if metric is not None:
        _check_metric(text, metric)
    if where is not None and not isinstance(where, Mapping):
        raise ConfigError(f"the claim {text!r}: where={where!r} is no mapping; valid: {{axis: value}}")
    given = {str(axis).lstrip("+"): key_of(value) for axis, value in (where or {}).items()}
    rest: dict[str, Any] = {"metric": metric, "where": given, "source": str(source or "")}
    found = Claim(text, **_form(text), **rest)
    if found.sign == "=" and found.form not in ("rises", "falls") and not found.margin and not found.settled:
        raise ConfigError(
            f"the claim {text!r}: a seed moves {metric or 'the metric'}, so nothing equals it exactly; valid: a margin,"
            " as in within 0.02, or metric: a count, bits or bytes"
        )
    return found


def key_of(value: Any) -> str:
    """A value of an axis in one spelling, whether it comes from YAML, an override, a label or a claim: 8, 8.0 and '8'
    are one, and so are [a, b] and the text a,b."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{key_of(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(key_of, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value).strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return key_of(text[1:-1])
    if len(text) > 1 and text[0] + text[-1] in ("[]", "{}"):
        return ",".join(key_of(item) for item in text[1:-1].split(","))
    if (number := as_number(text)) is not None:
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return text.lower() if text.lower() in ("true", "false", "null") else text


def as_number(text: str) -> float | None:
    """The finite number that a text spells; None where it spells none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _form(text: str) -> dict[str, Any]:
    said, within, margin = text.partition(" within ")
    held = {"margin": _margin(text, margin)} if within else {}
    if along := _ALONG.fullmatch(said):
        form, axis = along[1] or along[3], along[2] or along[4]
        if (form == "flat") != bool(within):
            wanted = "flat in AXIS needs a margin" if form == "flat" else f"{form} with AXIS takes no margin"
            raise ConfigError(f"the claim {text!r}: {wanted}; {_valid()}")
        return {"form": form, "axis": axis.lstrip("+"), **held}
    relation = _RELATION.search(said)
    if relation is None:
        raise ConfigError(f"the claim {text!r} has no form that is known; {_valid()}, with blanks about each sign")
    sign = {"<": "<=", ">": ">="}.get(relation[1], relation[1])
    left, right = said[: relation.start()].strip(), said[relation.end() :].strip()
    if within and sign != "=":
        raise ConfigError(f"the claim {text!r}: a margin goes with =, not with {relation[1]}; {_valid()}")
    return {"sign": sign, **held, **_sides(text, left, right, sign)}


def _sides(text: str, left: str, right: str, sign: str) -> dict[str, Any]:
    number = as_number(right)
    for form, between in _BETWEEN.items():
        if parts := between.split(left)[1:]:
            if len(parts) > 1:
                raise ConfigError(f"the claim {text!r} holds more than two arms; {_valid()}")
            if number is None:
                raise ConfigError(f"the claim {text!r}: {right!r} is no number, which a {form} needs; {_valid()}")
            arms = tuple(_arm(text, part) for part in between.split(left))
            return {"form": form, "arms": arms, "value": number}
    if sign == "=" and number is not None:
        return {"form": "number", "arms": (_arm(text, left),), "value": number}
    return {"form": "equal" if sign == "=" else "order", "arms": (_arm(text, left), _arm(text, right))}


def _arm(text: str, named: str) -> Chosen:
    """``nf4`` or ``adapter.r=8 & quantization=nf4``."""
    parts = [part.strip() for part in re.split(r"\s&\s", named)]
    pairs = [part.partition("=") for part in parts]
    if not all(parts) or (len(parts) > 1 and not all(sign for _, sign, _ in pairs)) or _RELATION.search(f" {named} "):
        raise ConfigError(
            f"the claim {text!r}: {named!r} names no arm; valid: a value of the first axis, or axis=value,"
            " several of them with & between"
        )
    chosen = {axis.lstrip("+") if sign else FIRST: key_of(value if sign else axis) for axis, sign, value in pairs}
    if len(chosen) < len(parts) or not all(chosen.values()):
        raise ConfigError(f"the claim {text!r}: {named!r} names an axis twice or gives it no value; valid: axis=value")
    return chosen


def _margin(text: str, margin: str) -> float:
    number = as_number(margin)
    if number is None or number <= 0:
        raise ConfigError(f"the claim {text!r}: the margin {margin!r} is no number above 0; valid: as in within 0.02")
    return number


def _check_metric(text: str, metric: Any) -> None:
    split, slash, name = str(metric).partition("/")
    if slash and name and split in ("train", "val", "test"):
        return
    section, _, key = str(metric).partition(".")
    keys = schema.KEYS.get(section, ())
    if key and (key in numbers(section) or (section in schema.EXTENSIBLE and key.split(".")[0] not in keys)):
        return
    if "." in key and key.split(".")[0] in keys:  # a number of a group, such as memory.by_phase.forward
        return
    known = [f"{section}.{name}" for section in schema.KEYS for name in numbers(section)]
    raise ConfigError(
        f"the claim {text!r}: metric={metric!r} is nothing that a record measures; "
        f"{nearest(str(metric), ['val/loss', 'test/loss', *known])}"
    )


def numbers(section: str) -> list[str]:
    """The keys of a section of the record that are numbers."""
    annotations = schema.Record.__annotations__[section].__annotations__
    return [key for key, kind in annotations.items() if kind == schema.Number]


def _valid() -> str:
    return f"valid: {'; '.join(FORMS)}"
