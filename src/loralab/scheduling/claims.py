"""The claims of a sweep file against its axes, before anything is loaded: what no trial could have is refused."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from loralab.config import sweep_files
from loralab.config.claims import FIRST, Chosen, Claim, as_number, check_marks, key_of, listed, read
from loralab.config.compose import plain_sweep
from loralab.errors import ConfigError, nearest
from loralab.scheduling import axes

log = logging.getLogger(__name__)

Row = dict[str, str]  # of a trial: {axis: value}
_SEEDS = 2  # over fewer no difference can be told from chance


def read_all(sweep: Mapping[str, Any]) -> list[Claim]:
    """The claims of ``sweep``, what a sweep file says under this name. Raises ConfigError for one that has no form, and
    for marks of what is not published."""
    check_marks(sweep)
    return [read(claim) for claim in listed(sweep)]


def check(master: DictConfig, words: Sequence[str], loader: Any) -> None:
    """Raises ConfigError for a claim about an axis or an arm that neither ``words``, the axes as they were called, nor
    the sweep file's own axes have; so an arm that the command line has left out is no mistake.

    With ``sweep.d90`` the trials are not known beforehand, and only the claims' form is checked.
    """
    sweep = plain_sweep(master)
    claims = read_all(sweep)
    if not claims or sweep.get("d90") is not None:
        return
    of_file = [f"{key}={values}" for key, values in _file_axes(master.hydra).items()]
    rows, first, texts, seeds = _rows(words, sweep, loader, of_file)
    for claim in claims:
        _check(claim, rows, first, texts)
    if len(seeds) < _SEEDS and (noisy := [claim for claim in claims if not claim.settled]):
        log.warning(
            "%d of %d claims cannot be told from chance with one seed, the first is %r; valid: several, as in "
            "seed=0,1,2",
            *(len(noisy), len(claims), noisy[0].text),
        )


def named_by(config: DictConfig, hydra: Any) -> dict[str, str]:
    """``named_by``: the axis whose values name arms in claims and among what is published, the sweep file's first,
    though the command line may have left one value of it; empty where the sweep has neither, or no file. ``hydra``:
    Hydra's own part of the configuration. Raises ConfigError for claims without a form."""
    sweep = plain_sweep(config)
    if not read_all(sweep) and not sweep.get("published") and not sweep.get("paper"):
        return {}
    names = [name for key in _file_axes(hydra) if axes.says_what_runs(name := key.lstrip("+"))]
    return {"named_by": names[0]} if names else {}


def _file_axes(hydra: Any) -> dict[str, str]:
    chosen = hydra.runtime.choices.get("sweeps")
    path = sweep_files.locate(str(chosen)) if chosen else None
    return (sweep_files.axes(path, sweep_files.scale_of(str(chosen))) or {}) if path else {}


def _rows(
    words: Sequence[str], sweep: Mapping[str, Any], loader: Any, of_file: Sequence[str]
) -> tuple[list[Row], str, set[str], set[str]]:
    """The trials as they were called and as the file has them; the first axis, and its values as they are written; the
    seeds that were called."""
    called = axes.trials(words, sweep.get("zip"), sweep.get("when"), loader)
    try:
        whole = axes.trials([*words, *of_file], sweep.get("zip"), sweep.get("when"), loader) if of_file else []
    except ConfigError:  # the file's axes and what was called do not go together: then the latter alone counts
        whole = []
    parser = OverridesParser.create()
    pairs = {}
    for word in dict.fromkeys(word for trial in [*called, *whole] for word in trial):
        override = parser.parse_override(word)
        pairs[word] = (str(override.get_key_element()).lstrip("+"), key_of(override.value()))
    rows = [dict(pairs[word] for word in trial) for trial in [*called, *whole]]
    keys = [name for row in rows for name in row if axes.says_what_runs(name)]
    swept = [name for name in dict.fromkeys(keys) if len({row.get(name) for row in rows}) > 1]
    named = [word.partition("=")[0].lstrip("+") for word in of_file]
    first = [*filter(axes.says_what_runs, named), *swept, *keys, ""][0]
    texts = {word.partition("=")[2] for word, (name, _) in pairs.items() if name == first}
    return rows, first, texts, {row.get("seed", "") for row in rows[: len(called)]}


def _check(claim: Claim, rows: Sequence[Row], first: str, texts: set[str]) -> None:
    if claim.form == "number" and claim.right in texts:
        raise ConfigError(claim.ambiguous(first))
    where = _chosen(claim, claim.where, rows, first)
    if not claim.axis:
        arms = [_chosen(claim, arm, rows, first) for arm in claim.arms]
        if both := sorted({axis for arm in arms for axis in arm} & where.keys()):
            raise ConfigError(f"the claim {claim.text!r}: {both[0]} is named by its arms and by where; valid: once")
        if len(arms) > 1 and arms[0] == arms[1]:
            raise ConfigError(f"the claim {claim.text!r} holds an arm against itself; valid: two arms")
        sides = [_chosen(claim, {**claim.where, **arm}, rows, first) for arm in claim.arms]
        if len(sides) > 1 and sides[0].keys() != sides[1].keys():
            raise ConfigError(claim.one_sided(sides[0].keys() ^ sides[1].keys()))
        return
    axis = _axis(claim, claim.axis, rows)
    values = dict.fromkeys(row[axis] for row in rows if axis in row and where.items() <= row.items())
    if len(values) < 2:
        raise ConfigError(f"the claim {claim.text!r}: {claim.axis} has fewer than two values there; valid: an axis")
    words = [value for value in values if as_number(value) is None]
    if claim.form != "flat" and words:
        raise ConfigError(claim.without_order(words[0]))


def _chosen(claim: Claim, written: Chosen, rows: Sequence[Row], first: str) -> Row:
    """{full name of the axis: value} of an arm. Raises ConfigError where no trial has them."""
    chosen = {first if axis == FIRST else _axis(claim, axis, rows): value for axis, value in written.items()}
    for axis, value in chosen.items():
        values = dict.fromkeys(row[axis] for row in rows if axis in row)
        if value not in values:
            raise ConfigError(
                f"the claim {claim.text!r}: no trial of this sweep has {axis}={value}; {nearest(value, values)}"
            )
    if not any(chosen.items() <= row.items() for row in rows):
        named = " & ".join(f"{axis}={value}" for axis, value in chosen.items())
        raise ConfigError(f"the claim {claim.text!r}: no trial of this sweep has {named}; valid: values that meet")
    return chosen


def _axis(claim: Claim, name: str, rows: Sequence[Row]) -> str:
    """The axis of a full name, or of the last part of one."""
    known = list(dict.fromkeys(axis for row in rows for axis in row if axes.says_what_runs(axis)))
    found = [axis for axis in known if axis == name] or [axis for axis in known if axis.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    what = f"{name} may be {' or '.join(found)}" if found else f"{name} is no axis of this sweep"
    raise ConfigError(f"the claim {claim.text!r}: {what}; {nearest(name, found or known)}")
