"""What a spec is: a frozen dataclass whose fields pydantic checks; a wrong value is one ConfigError of one paragraph.

A string in a field's ``Annotated`` is the message's text for what is valid there; pydantic ignores it.
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
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's error types
LONGEST_VALUE = 120  # characters of a wrong value in a message
TYPE_NAMES: dict[Any, str] = {
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


def before(function: Callable[[Any], Any]) -> Any:
    """For a field's ``Annotated``: ``function`` is given the value as it is set, and returns what is checked."""
    return BeforeValidator(function)


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]  # 16.0 is 16; true and "16" are no numbers
Number = Annotated[float, Strict()]
Text = Annotated[str, BeforeValidator(_text)]  # YAML reads a trial named true as a bool
Count = Annotated[Whole, Ge(1)]
Natural = Annotated[Whole, Ge(0)]
Positive = Annotated[Number, Gt(0), AllowInfNan(False), "a positive number"]
Gib = Annotated[Positive, "a positive number of GiB"]
NotNegative = Annotated[Number, Ge(0), AllowInfNan(False), "a number of at least 0"]
Share = Annotated[Number, Ge(0), Lt(1), AllowInfNan(False), "a number in [0, 1)"]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def spec(section: str, *, kw_only: bool = False) -> Callable[[type[Spec]], type[Spec]]:
    """A decorator that makes a class a spec: a frozen pydantic dataclass whose construction raises ConfigError for a
    wrong field; the message begins with ``section``.

    ``__post_init__`` is for relations between fields. A plain dataclass that derives from a spec has the inherited
    fields checked likewise.
    """

    def decorate(cls: type[Any]) -> type[Spec]:
        if "__post_init__" in vars(cls) or not hasattr(cls, "__post_init__"):
            cls.__post_init__ = _after_check(vars(cls).get("__post_init__"))
        spec_class: Any = dataclass(cls, frozen=True, kw_only=kw_only, config=CONFIG)
        spec_class.__init__ = _with_config_errors(spec_class.__init__, section)
        setattr(spec_class, SECTION, section)
        return spec_class  # type: ignore[no-any-return]

    return decorate


def arguments(section: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that checks the arguments of an ``__init__`` as a spec's fields are checked. Wrong ones raise a
    ConfigError that begins with ``section``."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        return _with_config_errors(wraps(init)(validate_call(config=CONFIG)(init)), section, init)

    return decorate


def _with_config_errors(init: Callable[..., None], section: str, owner: Any = None) -> Callable[..., None]:
    """``init`` with pydantic's errors raised as ConfigError; ``owner``: see ``refusal``, None: the class itself."""

    @wraps(init)
    def wrapped(self: Any, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            raise refusal(error, owner or type(self), section) from None

    return wrapped


def _after_check(post_init: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """A ``__post_init__`` that calls ``post_init``; in a plain dataclass derived from a spec, whose ``__init__``
    pydantic did not make, it checks and converts the inherited fields first."""

    def checked_post_init(self: Any) -> None:
        parent = next(kind for kind in type(self).__mro__ if SECTION in vars(kind))
        if parent is not type(self):
            values = {name: getattr(self, name) for name in _names(parent)}
            for name, value in check(parent, values, getattr(self, SECTION)).items():
                object.__setattr__(self, name, value)
        if post_init is not None:
            post_init(self)

    return checked_post_init


def make(cls: type[Spec], values: Mapping[str, Any], key: str) -> Spec:
    """An instance of the dataclass ``cls`` with the fields ``values``, checked by name and type.

    Raises a ConfigError that begins with ``key``; for a class of the user's own also what the class itself raises.
    """
    if SECTION not in vars(cls):
        return cls(**check(cls, values, key))
    try:
        instance: Spec = vars(cls)["__pydantic_validator__"].validate_python(ArgsKwargs((), dict(values)))
    except ValidationError as error:
        raise refusal(error, cls, key) from None
    return instance


def check(cls: Any, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """``values``, fields of the dataclass ``cls``, converted to their types. Raises a ConfigError that begins with
    ``key``."""
    try:
        return _fields(cls).validate_python(dict(values))
    except ValidationError as error:
        raise refusal(error, cls, key) from None
    except (PydanticUserError, NameError) as error:
        name, hint = _unknown_type(cls)
        raise ConfigError(
            f"{key}.{name}: {cls.__name__} declares the type {getattr(hint, '__name__', hint)}, by which no setting"
            " can be checked; valid: Any, or a type such as int, float, str, bool, list[str], dict[str, int]"
        ) from error


def _names(owner: Any) -> list[str]:
    """The names of a dataclass's fields, or of an ``__init__``'s arguments, self among them."""
    if isfunction(owner):
        return list(signature(owner).parameters)
    return [field.name for field in dataclasses.fields(owner) if field.init]


@cache
def _fields(cls: Any) -> TypeAdapter[dict[str, Any]]:
    """A validator of mappings from the fields of the dataclass ``cls``, none of them required, to values."""
    hints = get_type_hints(cls, include_extras=True)
    typed_dict: Any = TypedDict  # mypy knows only those with a constant name
    typed = typed_dict(cls.__name__, {name: _strict(hints[name]) for name in _names(cls)}, total=False)
    typed.__pydantic_config__ = CONFIG
    return TypeAdapter(typed)


def _strict(hint: Any) -> Any:
    """The type of a field of a user's class with int and float as strict as loralab's own specs have them."""
    if hint in (int, float):
        return Whole if hint is int else Number
    origin, args = get_origin(hint), tuple(map(_strict, get_args(hint)))
    if origin in (Union, UnionType):
        return Union[args]  # noqa: UP007 - a tuple cannot be written with |
    return origin[args] if origin in (list, dict) else hint


def _unknown_type(cls: Any) -> tuple[str, Any]:
    """(name, type) of the first field whose type pydantic does not know."""
    for field in dataclasses.fields(cls):
        try:
            TypeAdapter(get_type_hints(cls)[field.name])
        except (PydanticUserError, NameError):
            return field.name, field.type
    return "", cls


def refusal(error: ValidationError, owner: Any, key: str) -> ConfigError:
    """The ConfigError for pydantic's ``error``; of several faults it names one, an unknown key before a wrong value.

    ``owner``: the dataclass with the fields, or the ``__init__`` with the arguments; ``key``: where they are set.
    """
    faults = error.errors(include_url=False)
    fault = next((fault for fault in faults if fault["type"] in UNKNOWN_KEY), faults[0])
    place, value = fault["loc"], repr(fault["input"])
    if fault["type"] in UNKNOWN_KEY:
        return _unknown_key(owner, place, key)
    path, hint = _key_path(owner, place)
    where, value = _joined(key, path), value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
    if fault["type"].startswith("missing"):
        return ConfigError(f"{where} is missing; valid: {_valid_text(hint) or 'a value'}")
    if get_origin(_plain_type(hint)) is Literal:
        choices = [*map(str, get_args(_plain_type(hint))), *(["null"] if _nullable(hint) else [])]
        return ConfigError(f"{where}={value} is unknown; {nearest(str(fault['input']), choices)}")
    wanted = _bound_text(fault, hint) or _valid_text(hint)
    return ConfigError(f"{where} must be {wanted}, got {value}" if wanted else f"{where}={value}: {fault['msg']}")


def _joined(key: str, path: Sequence[str]) -> str:
    """``key`` may be empty: the names of ``path`` stand alone."""
    return ".".join(filter(None, [key, *path]))


def _unknown_key(owner: Any, place: Sequence[int | str], key: str) -> ConfigError:
    path, inner = _key_path(owner, place[:-1])
    names = [name for name in _names(inner) if name != "self"]
    title = inner.__qualname__.partition(".")[0] if isfunction(inner) else inner.__name__
    valid = nearest(str(place[-1]), names) if names else "it has none"
    return ConfigError(f"{_joined(key, [*path, str(place[-1])])} is not an option of {title}; {valid}")


def _key_path(hint: Any, place: Sequence[int | str]) -> tuple[list[str], Any]:
    """(keys below ``hint``, type at the last) of the ``loc`` of a pydantic error, up to where it leaves the keys."""
    path: list[str] = []
    for part in place:
        kind, name = _plain_type(hint), str(part)
        if dataclasses.is_dataclass(kind) or isfunction(kind):
            if isinstance(part, int):  # a positional argument
                name = dict(enumerate(_names(kind))).get(part, name)
            hint = get_type_hints(kind, include_extras=True).get(name, Any)
        elif get_origin(kind) in (list, dict):
            hint = get_args(kind)[-1]
        else:  # the rest of ``place`` names a member of a union
            break
        path.append(name)
    return path, hint


def _plain_type(hint: Any) -> Any:
    """``hint`` without ``Annotated``, and without None where that leaves a single type."""
    if get_origin(hint) is Annotated:
        return _plain_type(get_args(hint)[0])
    members = [member for member in get_args(hint) if member is not NoneType] if _is_union(hint) else []
    return _plain_type(members[0]) if len(members) == 1 else hint


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _nullable(hint: Any) -> bool:
    return _is_union(hint) and NoneType in get_args(hint)


def _bound_text(fault: Any, hint: Any) -> str:
    """What a whole number out of bounds should be, such as "at least 1, or null"; empty for every other fault."""
    if _plain_type(hint) is not int or fault["type"] not in ("greater_than_equal", "less_than_equal"):
        return ""
    null = ", or null" if _nullable(hint) else ""
    if "ge" in fault["ctx"]:
        return f"at least {fault['ctx']['ge']}{null}"
    least = [str(bound.ge) for bound in _annotations(hint) if isinstance(bound, Ge)]
    return (f"a whole number from {least[0]} to" if least else "at most") + f" {fault['ctx']['le']}{null}"


def _annotations(hint: Any) -> Iterator[Any]:
    """The annotations of the type, or of all members of the union."""
    yield from getattr(hint, "__metadata__", ())
    for member in get_args(hint) if _is_union(hint) else ():
        yield from _annotations(member)


def _valid_text(hint: Any) -> str:
    """What a field of type ``hint`` takes, such as "a number or null"; empty where that has no text."""
    if texts := [text for text in getattr(hint, "__metadata__", ()) if isinstance(text, str)]:
        return texts[-1]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _valid_text(args[0])
    if _is_union(hint) or origin is Literal:
        *options, last = map(_valid_text, args) if _is_union(hint) else map(str, args)
        first = f"{', '.join(options)} or " if options else ""
        return first + last if all([*options, last]) else ""
    if origin is list:
        return "a list of texts" if _plain_type(args[0]) is str else f"a list, each {_valid_text(args[0])}"
    return TYPE_NAMES.get(origin or hint, "")
