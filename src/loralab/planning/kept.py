"""A cache of traces in the user's cache folder, for the next process.

The name of a file is a digest of everything that its content depends on. No error stops a run: a value that cannot be
read or written is computed again.
"""

import hashlib
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import loralab
from loralab.records.fingerprints import cache_folder

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "bitsandbytes", "lightning", "numpy")
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_known: dict[str, Any] = {}  # {file name: value} in this process


def kept(key: Any, make: Callable[[], Any], on_disk: bool = True) -> Any:
    """The cached result of ``make``, plain JSON. It depends on repr(``key``), versions and machine alone."""
    name = hashlib.sha256(repr((key, _surroundings())).encode()).hexdigest()
    if name not in _known:
        path = cache_folder() / "plans" / f"{name}.json"
        value = _read(path) if on_disk else None
        if value is None:
            value = make()
            if on_disk:
                _write(path, value)
        _known[name] = value
    return _known[name]


def _read(path: Path) -> Any:
    """The value in ``path``; None where there is none, or it is damaged."""
    try:
        stored = json.loads(path.read_bytes())
        return stored["value"] if stored["digest"] == _digest(stored["value"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps({"digest": _digest(value), "value": value}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        log.debug("%s is not kept: %s", path, error)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def _surroundings() -> tuple[Any, ...]:
    """Versions, the source of this package, and what the kernels depend on: processor, card, environment."""
    card = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    machine = (platform.machine(), platform.python_version(), torch.backends.cpu.get_cpu_capability(), card)
    return (*map(_version, PACKAGES), source(), *machine, *map(os.environ.get, VARIABLES))


def source() -> str:
    """A digest of all source files of this package."""
    root = Path(loralab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
