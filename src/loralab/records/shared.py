"""Equal parts of records and configurations, kept once: ten thousand trials differ in a few settings and numbers."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn, TypeVar

MOST = 4096  # parts that are remembered

T = TypeVar("T")
Owner = TypeVar("Owner")

_parts: dict[str, Any] = {}
_sections: dict[str, "Section"] = {}


class Section(dict[str, Any]):
    """A mapping that nobody can change, so that what is computed of it is kept with it (``once``), whoever has it."""

    __slots__ = ("known",)

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.known: dict[Hashable, Any] = {}

    def _fixed(self, *given: Any, **named: Any) -> NoReturn:
        raise TypeError("a section of a record is shared by many: change a copy of it, {**section}")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _fixed  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # a copy, or what another process reads, is its owner's


def share(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with its sections, and theirs, as the equal ones of earlier calls: nobody may change them."""
    return {key: part(value, 2) for key, value in content.items()}


def part(value: Any, depth: int = 1) -> Any:
    """``value``, or what was given before and is equal to it; of ``depth`` levels of mappings each part likewise."""
    if not isinstance(value, dict | list):
        return value
    if depth > 1 and isinstance(value, dict):
        value = {key: part(item, depth - 1) for key, item in value.items()}
    if len(_parts) >= MOST:
        _parts.clear()
    return _parts.setdefault(repr(value), value)


def section(value: Any) -> Any:
    """A mapping as the Section of equal content that was given before, or a new one; anything else as it is."""
    if not isinstance(value, dict):
        return value
    key = repr(value)
    if key not in _sections:
        if len(_sections) >= MOST:
            _sections.clear()
        _sections[key] = Section(value)
    return _sections[key]


def once(function: Callable[..., T], value: Any, *given: Hashable) -> T:
    """``function(value, *given)``, of a Section computed the first time only. Nobody may change what it returns."""
    if not isinstance(value, Section):
        return function(value, *given)
    key = (function, *given)
    if key not in value.known:
        value.known[key] = function(value, *given)
    found: T = value.known[key]
    return found


def kept(function: Callable[[Owner], T]) -> Callable[[Owner], T]:
    """``function`` of an object of a frozen class, computed the first time only and kept with it. Nobody may change
    what it returns."""

    @wraps(function)
    def first_time(owner: Owner) -> T:
        known = vars(owner).setdefault("_kept", {})
        if function not in known:
            known[function] = function(owner)
        found: T = known[function]
        return found

    return first_time


def distinct(values: Iterable[T]) -> list[T]:
    """Each object once, in order of its first place: of sections that trials share, all that there are."""
    return list({id(value): value for value in values}.values())
