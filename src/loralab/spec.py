"""What a spec is: a frozen dataclass whose fields pydantic checks. A refusal is one paragraph, whatever pydantic says.

A text in a field's ``Annotated`` says in words what is valid there; pydantic passes it over.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from inspect import isfunction, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Lt
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError, validate_call
from pydantic.dataclasses import dataclass
from pydantic.errors import PydanticUserError
from pydantic_core import ArgsKwargs
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from loralab.errors import ConfigError, nearest

CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
SECTION = "__loralab_section__"  # attribute of a spec's class: the key that errors begin with
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
LONGEST_VALUE = 120  # characters of a wrong value in a message
WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}
Spec = TypeVar("Spec")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]  # 16.0 is 16; no truth value is a number, and no text
Number = Annotated[float, Strict()]
Text = Annotated[str, BeforeValidator(_text)]  # the name true is a truth value in YAML
Count = Annotated[Whole, Ge(1)]
Natural = Annotated[Whole, Ge(0)]
Positive = Annotated[Number, Gt(0), AllowInfNan(False), "a positive number"]
Gib = Annotated[Positive, "a positive number of GiB"]
NotNegative = Annotated[Number, Ge(0), AllowInfNan(False), "a number of at least 0"]
Share = Annotated[Number, Ge(0), Lt(1), AllowInfNan(False), "a number in [0, 1)"]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def spec(section: str, *, kw_only: bool = False) -> Callable[[type[Spec]], type[Spec]]:
    """Makes a class a spec of ``section``: a frozen pydantic dataclass that raises ConfigError.

    ``__post_init__`` is for relations between fields. What a plain dataclass inherits from a spec is checked likewise.
    """

    def decorate(cls: type[Any]) -> type[Spec]:
        if "__post_init__" in vars(cls) or not hasattr(cls, "__post_init__"):
            cls.__post_init__ = _checking(vars(cls).get("__post_init__"))
        made: Any = dataclass(cls, frozen=True, kw_only=kw_only, config=CONFIG)
        made.__init__ = _explaining(made.__init__, section)
        setattr(made, SECTION, section)
        return made  # type: ignore[no-any-return]

    return decorate


def arguments(section: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes an ``__init__`` check its arguments as a spec's fields are; errors begin with ``section``."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        return _explaining(wraps(init)(validate_call(config=CONFIG)(init)), section, init)

    return decorate


def _explaining(init: Callable[..., None], section: str, owner: Any = None) -> Callable[..., None]:
    @wraps(init)
    def explained(self: Any, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            raise refusal(error, owner or type(self), section) from None

    return explained


def _checking(post_init: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """``post_init`` after a check of the inherited fields, where the class is a plain dataclass derived from a spec."""

    def checked(self: Any) -> None:
        parent = next(kind for kind in type(self).__mro__ if SECTION in vars(kind))
        if parent is not type(self):
            values = {name: getattr(self, name) for name in _names(parent)}
            for name, value in check(parent, values, getattr(self, SECTION)).items():
                object.__setattr__(self, name, value)
        if post_init is not None:
            post_init(self)

    return checked


def make(cls: type[Spec], values: Mapping[str, Any], key: str) -> Spec:
    """An instance of the dataclass ``cls``, its fields checked by name and type; ``key`` is what errors begin with.

    Raises ConfigError; for a class of the user's own also what the class itself raises.
    """
    if SECTION not in vars(cls):
        return cls(**check(cls, values, key))
    try:
        made: Spec = vars(cls)["__pydantic_validator__"].validate_python(ArgsKwargs((), dict(values)))
    except ValidationError as error:
        raise refusal(error, cls, key) from None
    return made


def check(cls: Any, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The fields of the dataclass ``cls`` in ``values``, converted to their types. Raises ConfigError."""
    try:
        checked: dict[str, Any] = _fields(cls).validate_python(dict(values))
    except ValidationError as error:
        raise refusal(error, cls, key) from None
    except (PydanticUserError, NameError) as error:
        name, hint = _unknown_type(cls)
        raise ConfigError(
            f"{key}.{name}: {cls.__name__} says it is of type {getattr(hint, '__name__', hint)}, which no setting is"
            " checked by; valid: Any, or a type such as int, float, str, bool, list[str], dict[str, int]"
        ) from error
    return checked


def _names(owner: Any) -> list[str]:
    """The fields of a dataclass, the arguments of an ``__init__`` with self."""
    if isfunction(owner):
        return list(signature(owner).parameters)
    return [field.name for field in dataclasses.fields(owner) if field.init]


@cache
def _fields(cls: Any) -> TypeAdapter[dict[str, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    dictionary: Any = TypedDict  # of a name and keys that only this moment knows
    typed = dictionary(cls.__name__, {name: _strict(hints[name]) for name in _names(cls)}, total=False)
    typed.__pydantic_config__ = CONFIG
    return TypeAdapter(typed)


def _strict(hint: Any) -> Any:
    """A plain type of a user's class as loralab's own specs have it."""
    if hint in (int, float):
        return Whole if hint is int else Number
    origin, args = get_origin(hint), tuple(map(_strict, get_args(hint)))
    if origin in (Union, UnionType):
        return Union[args]  # noqa: UP007 - of a tuple
    return origin[args] if origin in (list, dict) else hint


def _unknown_type(cls: Any) -> tuple[str, Any]:
    """(name, type) of the first field whose type pydantic does not know."""
    for one in dataclasses.fields(cls):
        try:
            TypeAdapter(get_type_hints(cls)[one.name])
        except (PydanticUserError, NameError):
            return one.name, one.type
    return "", cls


def refusal(error: ValidationError, owner: Any, key: str) -> ConfigError:
    """What pydantic found wrong with the fields of ``owner``, as a paragraph on one of them: an unknown one first.

    ``owner``: a dataclass, or the ``__init__`` whose arguments they are.
    """
    faults = error.errors(include_url=False)
    fault = next((one for one in faults if one["type"] in UNKNOWN), faults[0])
    place, value = fault["loc"], repr(fault["input"])
    if fault["type"] in UNKNOWN:
        return _unknown(owner, place, key)
    path, hint = _inside(owner, place)
    where, value = ".".join([key, *path]), value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
    if fault["type"].startswith("missing"):
        return ConfigError(f"{where} is missing; valid: {_words(hint) or 'a value'}")
    if get_origin(_bare(hint)) is Literal:
        choices = [*map(str, get_args(_bare(hint))), *(["null"] if _nullable(hint) else [])]
        return ConfigError(f"{where}={value} is unknown; {nearest(str(fault['input']), choices)}")
    wanted = _bound(fault, hint) or _words(hint)
    return ConfigError(f"{where} must be {wanted}, got {value}" if wanted else f"{where}={value}: {fault['msg']}")


def _unknown(owner: Any, place: Sequence[int | str], key: str) -> ConfigError:
    path, inner = _inside(owner, place[:-1])
    names = [name for name in _names(inner) if name != "self"]
    title = inner.__qualname__.partition(".")[0] if isfunction(inner) else inner.__name__
    valid = nearest(str(place[-1]), names) if names else "it has none"
    return ConfigError(f"{'.'.join([key, *path, str(place[-1])])} is not an option of {title}; {valid}")


def _inside(hint: Any, place: Sequence[int | str]) -> tuple[list[str], Any]:
    """(keys, type there) of what pydantic's ``place`` names below ``hint``, as far as it follows keys of the user's."""
    path: list[str] = []
    for part in place:
        bare, name = _bare(hint), str(part)
        if dataclasses.is_dataclass(bare) or isfunction(bare):
            if isinstance(part, int):  # a value given by its place
                name = dict(enumerate(_names(bare))).get(part, name)
            hint = get_type_hints(bare, include_extras=True).get(name, Any)
        elif get_origin(bare) in (list, dict):
            hint = get_args(bare)[-1]
        else:  # the rest names a member of a union
            break
        path.append(name)
    return path, hint


def _bare(hint: Any) -> Any:
    """``hint`` without its annotations, and without null where that leaves a single type."""
    if get_origin(hint) is Annotated:
        return _bare(get_args(hint)[0])
    members = [one for one in get_args(hint) if one is not NoneType] if _is_union(hint) else []
    return _bare(members[0]) if len(members) == 1 else hint


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _nullable(hint: Any) -> bool:
    return _is_union(hint) and NoneType in get_args(hint)


def _bound(fault: Any, hint: Any) -> str:
    """The bound that a whole number is beyond, in words; empty for all else."""
    if _bare(hint) is not int or fault["type"] not in ("greater_than_equal", "less_than_equal"):
        return ""
    null = ", or null" if _nullable(hint) else ""
    if "ge" in fault["ctx"]:
        return f"at least {fault['ctx']['ge']}{null}"
    least = [str(one.ge) for one in _annotations(hint) if isinstance(one, Ge)]
    return (f"a whole number from {least[0]} to" if least else "at most") + f" {fault['ctx']['le']}{null}"


def _annotations(hint: Any) -> Iterator[Any]:
    """What ``Annotated`` says of the type or of a member of the union."""
    yield from getattr(hint, "__metadata__", ())
    for member in get_args(hint) if _is_union(hint) else ():
        yield from _annotations(member)


def _words(hint: Any) -> str:
    """What a field of type ``hint`` takes; empty where there are no words for it."""
    if said := [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, str)]:
        return said[-1]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(args[0])
    if _is_union(hint) or origin is Literal:
        *options, last = map(_words, args) if _is_union(hint) else map(str, args)
        before = f"{', '.join(options)} or " if options else ""
        return before + last if all([*options, last]) else ""
    if origin is list:
        return "a list of texts" if _bare(args[0]) is str else f"a list, each {_words(args[0])}"
    return WORDS.get(origin or hint, "")
