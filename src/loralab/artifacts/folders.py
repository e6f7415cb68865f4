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
    """A folder beside ``out`` that becomes it at the end, and is gone where an error is raised within. Of a link it is
    the folder that this leads to.

    Raises ConfigError where ``out`` is a file or holds something, before or when all is written; DiskError where it
    cannot be written.
    """
    refuse_taken(out)
    place = out.resolve()  # "." has no name of its own, and no folder replaces a link
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        refuse_taken(out)  # somebody else may have written it meanwhile
        partial.replace(place)  # an empty folder is replaced
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_taken(out: Path) -> None:
    """Raises ConfigError where ``out`` is a file or holds something."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    what = "is not empty" if out.is_dir() else "leads nowhere" if out.is_symlink() else "is a file"
    raise ConfigError(f"--out {out} {what}, and nothing is overwritten; valid: a new or an empty folder")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtifactError."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(stored, dict):
        raise ArtifactError(f"{path} holds a {type(stored).__name__}, not an object")
    return stored
