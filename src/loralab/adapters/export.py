"""An adapter on disk: what its own ``export`` writes, its spec beside it, and the way back."""

import dataclasses
import json
import os
import shutil
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from torch import Tensor, nn

from loralab.adapters.base import Adapter, AdapterSpec
from loralab.adapters.files import readable_as, weight_bytes
from loralab.adapters.hooks import AdapterHooks
from loralab.errors import ArtifactError, ConfigError, unwritable

SPEC = "adapter_spec.json"


def check_export(adapter: Adapter) -> None:
    """Raises ConfigError where the trained parameters would not all be on disk afterwards."""
    spec, owner = adapter.spec, exporter(adapter)
    _stored(spec, 0, owner)
    for name, value in adapter.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"adapter={spec.method}: {name} of its state is no tensor; valid: a buffer or a parameter"
            )
    if owner is type(adapter) or owner is Adapter:
        lost = vars(owner)["lost"](adapter) if "lost" in vars(owner) else ""
    else:
        lost = f"what {type(adapter).__name__} adds to it"
    if lost:
        raise ConfigError(
            f"adapter={spec.method}: {type(spec).__name__} has no export of its own, and that of {owner.__name__} would"
            f" leave out {lost}; valid: an Adapter with a method `export(folder)` of its own, or loralab's format for "
            f"any adapter (in {type(spec).__name__}: `makes = Adapter`)"
        )


def exporter(adapter: Adapter) -> type[Adapter]:
    """The class whose ``export`` the adapter has."""
    return next(kind for kind in type(adapter).__mro__ if issubclass(kind, Adapter) and "export" in vars(kind))


def save(adapter: Adapter, folder: Path, seed: int = 0) -> int:
    """Writes the adapter as ``folder``, in place of what was there, and returns the bytes of its weights.

    Where an export of the adapter's own fails, what was trained is written in loralab's format all the same. Raises
    ArtifactError then, DiskError where nothing can be written.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        owner, failure = _export(adapter, partial)
        (partial / SPEC).write_text(json.dumps(_stored(adapter.spec, seed, owner), indent=2) + "\n")
        readable_as(partial / SPEC)
        size = weight_bytes(partial)
        _replace(folder, partial)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if failure is not None:
        raise ArtifactError(
            f"adapter={adapter.spec.method}: the export of {exporter(adapter).__name__} failed ("
            f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}); what was trained is in {folder}, in"
            " loralab's own format"
        ) from failure
    return size


def load(folder: Path, model: nn.Module) -> Adapter:
    """Attaches to ``model``, the same base, what ``save`` wrote as ``folder``. Raises ArtifactError."""
    path = folder / SPEC
    try:
        stored = json.loads(path.read_text())
        spec = _spec(stored)
        with AdapterHooks.of(model).given(restoring=True):
            adapter = spec.attach(model, int(stored["seed"]))
        adapter.spec = spec
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ArtifactError(f"{path} cannot be used: {' '.join(str(error).split())[:200]}") from error
    try:
        (Adapter.restore(adapter, folder) if stored["export"] == _path(Adapter) else adapter.restore(folder))
    except RuntimeError as error:  # load_state_dict's
        adapter.detach()
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder} does not fit {type(model).__name__}: {reason}") from error
    return adapter


def _export(adapter: Adapter, folder: Path) -> tuple[type[Adapter], Exception | None]:
    """The class whose format was written, and what went wrong with the adapter's own."""
    owner = exporter(adapter)
    try:
        adapter.export(folder)
        if not weight_bytes(folder):
            raise ArtifactError("it wrote no weights")
        return owner, None
    except Exception as error:
        if owner is Adapter:
            raise
        shutil.rmtree(folder)
        folder.mkdir()
        Adapter.export(adapter, folder)
        return Adapter, error


def _replace(folder: Path, partial: Path) -> None:
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _stored(spec: AdapterSpec, seed: int, owner: type[Adapter]) -> dict[str, Any]:
    """The spec as JSON: class path, method, fields; the seed it was drawn with; whose format the weights have."""
    values = {one.name: getattr(spec, one.name) for one in dataclasses.fields(spec) if one.init}
    for name, value in values.items():
        try:
            values[name] = json.loads(json.dumps(value, default=_plain))
        except TypeError as error:
            raise ConfigError(f"adapter.{name}={value!r} cannot be written into {SPEC}: {error}") from error
    return {"class": _path(type(spec)), "method": spec.method, "fields": values, "seed": seed, "export": _path(owner)}


def _plain(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a value of {type(value).__name__} has no form there")


def _spec(stored: dict[str, Any]) -> AdapterSpec:
    module, _, name = str(stored["class"]).rpartition(".")
    kind = getattr(import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, AdapterSpec)):  # before it is called: it may be any function
        raise TypeError(f"{stored['class']} is not an adapter's spec")
    hints = get_type_hints(kind)
    return kind(**{key: _revived(hints.get(key), value) for key, value in stored["fields"].items()})


def _revived(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and isinstance(value, str):
        if issubclass(kind, Enum):
            return kind[value]
        if issubclass(kind, Path):
            return kind(value)
    return tuple(value) if kind is tuple or get_origin(kind) is tuple else value
