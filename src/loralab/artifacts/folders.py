"""Folders that are written whole or not at all, and JSON that others wrote."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, ConfigError, unwritable


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it at the end, and is gone where an error is raised within.

    Raises ConfigError where ``out`` is a file or holds something, DiskError where it cannot be written.
    """
    refuse_taken(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)  # an empty folder is replaced
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_taken(out: Path) -> None:
    """Raises ConfigError where ``out`` is a file or holds something."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    what = "is not empty" if out.is_dir() else "is a file"
    raise ConfigError(f"--out {out} {what}, and nothing is overwritten; valid: a new folder")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtifactError."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(stored, dict):
        raise ArtifactError(f"{path} holds a {type(stored).__name__}, not an object")
    return stored
