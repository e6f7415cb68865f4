"""Locks a run folder or a sweep folder, so that two processes do not overwrite each other's results."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loralab.errors import ArtifactError, unwritable

LOCK = ".lock"
OWNER = ".lock.owner"  # a file of its own: on Windows others cannot read a locked file


@contextmanager
def hold(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Makes ``folder`` and locks it; the lock ends with the process, however that ends. ``patience``: seconds for which
    another process is waited for.

    Raises ArtifactError where another process holds it, DiskError where it cannot be written. Where the file system
    has no locks (some network file systems) nothing is locked.
    """
    from filelock import FileLock, Timeout

    lock, owner = FileLock(folder / LOCK, fallback_to_soft=False), folder / OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()  # from here on only locking can fail
    except OSError as error:
        raise unwritable(f"the run folder {folder}", error) from error
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise ArtifactError(
            f"{folder} is in use by {_holder(owner)}; valid: wait for it, or another hydra.run.dir or hydra.sweep.dir"
        ) from None
    except PermissionError as error:  # the lock file is another account's
        raise unwritable(f"the run folder {folder}", error) from error
    except OSError:
        yield
        return
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _holder(owner: Path) -> str:
    """The process that holds the lock, where that is known."""
    with suppress(OSError):
        return owner.read_text("utf-8").strip() or "another process"
    return "another process"
