"""Fingerprints of the source files of classes that are not loralab's."""

import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from loralab.records import fingerprints

_loaded: dict[str, tuple[ModuleSpec, str]] = {}  # module: its import spec, the fingerprint of its source then


def importable(folder: str | None = None) -> None:
    """Appends ``folder``, None: the current one, to sys.path, so that its modules can be imported; installed ones go
    first."""
    here = folder or str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def of(classes: Iterable[type], others: Iterable[type] = ()) -> dict[str, str]:
    """{module: fingerprint of its file} of the classes, their base classes, and the class that an adapter ``makes``; of
    ``others``, metrics and callbacks, that are in no installed package.

    Left out are modules of loralab and of Python, those without a file, and base classes in installed packages, whose
    version the record has. A module that this process has imported has the fingerprint from then, even if its file has
    changed since.
    """
    specs = list(classes)
    concrete = [cls for spec in specs for cls in (spec, getattr(spec, "makes", spec))]
    inherited = {base.__module__ for cls in concrete for base in getattr(cls, "__mro__", ())}
    names = {spec.__module__ for spec in specs} | {name for name in inherited if not _installed(name)}
    names |= {other.__module__ for other in others if not _installed(other.__module__)}
    foreign = [name for name in sorted(names) if _is_foreign(name)]
    return {name: fingerprint for name in foreign if (fingerprint := _fingerprint(name))}


def changed(stored: Mapping[str, str]) -> list[str]:
    """Files of modules whose fingerprint differs from ``stored``, a result of ``of``. Nothing is imported but the
    packages around a module; a module that is not found counts as unchanged."""
    if stored:
        importable()
    now = {name: _fingerprint(name) for name in stored}
    return [_file(name) for name, before in stored.items() if now[name] and before and now[name] != before]


def _is_foreign(module: str) -> bool:
    top = module.partition(".")[0]
    return top != "loralab" and top not in sys.stdlib_module_names


def _installed(module: str) -> bool:
    spec = _spec(module)
    return bool(spec and spec.origin and "site-packages" in Path(spec.origin).parts)


def _fingerprint(module: str) -> str | None:
    spec = _spec(module)
    if spec is None or not spec.origin:
        return None
    loaded = _loaded.get(module)
    if loaded is not None and loaded[0] is spec:
        return loaded[1]
    try:
        fingerprint = fingerprints.of([fingerprints.file_digest(Path(spec.origin))])
    except OSError:  # built into Python, or deleted
        return None
    if module in sys.modules:
        _loaded[module] = (spec, fingerprint)
    return fingerprint


def _spec(module: str) -> ModuleSpec | None:
    if loaded := sys.modules.get(module):
        return getattr(loaded, "__spec__", None)
    try:
        return find_spec(module)
    except Exception:  # raised by the package around it
        return None


def _file(module: str) -> str:
    spec = _spec(module)
    path = Path(spec.origin if spec and spec.origin else module)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
