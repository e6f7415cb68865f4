"""One process at a time to a run folder or a sweep folder: a second one would overwrite what the first finished."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loralab.errors import ArtifactError, DiskError

LOCK = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep others out of it; the lock goes with the process, however that ends.

    Raises ArtifactError where another process holds it, DiskError where it cannot be written. Without file locks
    (Windows, some network file systems) nothing is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise DiskError(f"the run folder {folder} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ArtifactError(
                f"{folder} is in use by {owner}; valid: wait for it, or another hydra.run.dir or hydra.sweep.dir"
            ) from None
        except (OSError, ImportError):
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
