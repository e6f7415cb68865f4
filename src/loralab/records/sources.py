"""The source of classes that are not loralab's: where they are found, and what it is by its bytes."""

import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loralab.records import fingerprints

_loaded: dict[str, tuple[ModuleSpec, str]] = {}  # module: how it was imported, and of what source


def importable() -> None:
    """Lets a module of the current folder be found by its name, behind all that is installed."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def of(classes: Iterable[type]) -> dict[str, str]:
    """{module: 16 hex digits of its file} of the classes, of those they derive from, and of what an adapter ``makes``.

    There is none of loralab, of Python's own modules and of what has no file, nor of a class derived from that lies in
    an installed package: the record has its version. A module that this process has imported counts as it was then,
    whatever has become of its file.
    """
    named = list(classes)
    kinds = [kind for cls in named for kind in (cls, getattr(cls, "makes", cls))]
    below = {one.__module__ for kind in kinds for one in kind.__mro__}
    names = {cls.__module__ for cls in named} | {name for name in below if not _installed(name)}
    return {name: found for name in sorted(names) if _own(name) and (found := _fingerprint(name))}


def changed(stored: Mapping[str, str]) -> list[str]:
    """Files of modules whose source is now another than ``stored``, which ``of`` gave. Nothing is imported for it but
    the packages around a module; one that is not found has not changed."""
    if stored:
        importable()
    now = {name: _fingerprint(name) for name in stored}
    return [_file(name) for name, before in stored.items() if now[name] and before and now[name] != before]


def _own(module: str) -> bool:
    top = module.partition(".")[0]
    return top != "loralab" and top not in sys.stdlib_module_names


def _installed(module: str) -> bool:
    spec = _spec(module)
    return bool(spec and spec.origin and "site-packages" in Path(spec.origin).parts)


def _fingerprint(module: str) -> str | None:
    spec = _spec(module)
    if spec is None or not spec.origin:
        return None
    known = _loaded.get(module)
    if known is not None and known[0] is spec:
        return known[1]
    try:
        found = fingerprints.of([fingerprints.file_digest(Path(spec.origin))])
    except OSError:  # built into Python, or gone
        return None
    if module in sys.modules:
        _loaded[module] = (spec, found)
    return found


def _spec(module: str) -> ModuleSpec | None:
    loaded: Any = sys.modules.get(module)
    if loaded is not None:
        spec: ModuleSpec | None = getattr(loaded, "__spec__", None)
        return spec
    try:
        return find_spec(module)
    except Exception:  # whatever the package around it does
        return None


def _file(module: str) -> str:
    spec = _spec(module)
    path = Path(spec.origin if spec and spec.origin else module)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
