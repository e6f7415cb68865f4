"""The label column: a class has one spelling, a number is never a position in a list that was inferred."""

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loralab.data.fields import BadRow, field_of, typename

log = logging.getLogger(__name__)

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
NAME_OR_NUMBER = "a label is a name or a whole number"
SHOWN = 20  # classes named in a message
FEWEST_SINGLES = 10  # classes of one row each, from which a warning says so


def normalized(text: str) -> str:
    """A class's name without white space or invisible marks around it, in Unicode's composed form (NFC)."""
    name = unicodedata.normalize("NFC", text)
    seen = [at for at, letter in enumerate(name) if not letter.isspace() and unicodedata.category(letter) != "Cf"]
    return name[seen[0] : seen[-1] + 1] if seen else ""


def key_of(text: str) -> str:
    """What equal classes have in common: 1.0 is the number 1."""
    name = normalized(text)
    if NUMBER.fullmatch(name) and re.search(r"[.eE]", name) and not fractional(name) and len(name) < 16:
        return str(int(float(name)))
    return name


def fractional(text: str) -> bool:
    """Whether it is a number, but no whole one."""
    return NUMBER.fullmatch(text) is not None and not float(text).is_integer()


def label_of(fields: Mapping[str, Any], name: str) -> str:
    """The label of a record, normalized. Raises BadRow where it is no text or number, empty, or not finite."""
    value = field_of(fields, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"field {name!r} is {typename(value)}; {NAME_OR_NUMBER}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} is {value}; {NAME_OR_NUMBER}")
    if not (text := normalized(str(value))):
        raise BadRow(f"field {name!r} is empty; {NAME_OR_NUMBER}")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow(f"field {name!r} holds a NUL character or bytes that are not UTF-8; {NAME_OR_NUMBER}")
    return text


def score_of(fields: Mapping[str, Any], name: str) -> tuple[float, str]:
    """(the number, as it is written) of a real-valued label. Raises BadRow."""
    text = label_of(fields, name)
    if not NUMBER.fullmatch(text) or not math.isfinite(number := float(text)):
        raise BadRow(f"field {name!r} is {text!r}; model.num_labels=1 is regression, which needs a finite number")
    return number, text


class Classes:
    """The classes of a data set by name; ``is_fixed``: the order is the user's or the data set's own."""

    def __init__(self, column: str, names: Iterable[str] = ()) -> None:
        self.column, self.names = column, [normalized(str(name)) for name in names]
        self.is_fixed = bool(self.names)
        self._index()

    def _index(self) -> None:
        self.places = {key_of(name): place for place, name in enumerate(self.names)}
        # in a list of names that holds no number, a number can only be a place
        self.accepts_index = self.is_fixed and not any(NUMBER.fullmatch(name) for name in self.names)

    def infer(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Changes the classes to those of ``records``: numbers by value, else names sorted. A value that is no label is
        left out here, and its row is refused later."""
        spellings: dict[str, str] = {}
        for fields in records:
            try:
                text = label_of(fields, self.column)
            except BadRow:
                continue
            if not fractional(text):
                spellings.setdefault(key_of(text), text)
        numbers = all(re.fullmatch(r"[+-]?[0-9]+", key) and len(key) < 16 for key in spellings)
        self.names = sorted(spellings, key=(lambda key: (int(key), key)) if numbers else None)
        self._index()
        self._warn_of_case()

    def _warn_of_case(self) -> None:
        """One line where names differ in their case alone."""
        alike: dict[str, list[str]] = {}
        for name in self.names:
            alike.setdefault(name.casefold(), []).append(name)
        if twice := next((names for names in alike.values() if len(names) > 1), None):
            log.warning("data.label=%s: %s are classes of their own", self.column, " and ".join(map(repr, twice)))

    def index(self, text: str) -> int:
        """The place of the class that ``text`` names, or BadRow."""
        if (place := self.places.get(key_of(text))) is not None:
            return place
        if self.accepts_index and text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(self.names):
            return int(text)
        if not self.is_fixed and fractional(text):
            raise BadRow(
                f"field {self.column!r} is {text}, a fraction; {NAME_OR_NUMBER} (model.num_labels=1 is regression on "
                "real-valued scores; data.labels lists fractions that are names)"
            )
        shown = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
        whose = "" if self.is_fixed else " of the training rows"
        raise BadRow(f"field {self.column!r} is {text!r}, not one of the {len(self.names)} labels{whose} ({shown})")


def warn_of_singles(column: str, names: Sequence[str]) -> None:
    """One line where most classes have one training row; ``names``: the class of each row."""
    counts = Counter(names)
    single = [name for name, count in counts.items() if count == 1]
    if len(single) >= FEWEST_SINGLES and 2 * len(single) > len(counts):
        log.warning(
            "data.label=%s: %d of %d classes have one training row each, such as %r: if they are scores, "
            "model.num_labels=1 is regression; if they are texts, data.prompt and data.target train to write them",
            *(column, len(single), len(counts), single[0]),
        )
