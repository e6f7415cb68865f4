"""What can go wrong for a user, one class per exit code; every other exception is a fault of loralab (exit 1)."""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb

LONG, KEPT = (
    re.compile(r"\S{500,}"),
    100,
)  # a value without a space that no one reads to its end, and what is shown of it


class LoralabError(Exception):
    """Its message is one short paragraph: what, where (dotted key or file:line), the value, what would be valid."""

    exit_code = 1
    status = "failed"

    def __str__(self) -> str:
        return LONG.sub(lambda value: f"{value[0][:KEPT]}... ({len(value[0]):,} characters)", super().__str__())


class ConfigError(LoralabError):
    """A wrong configuration, a base model that is missing or has no weights, refused remote code."""

    exit_code = 2


class DataError(LoralabError):
    """A data file that is missing, malformed or empty."""

    exit_code = 3


class ArtifactError(LoralabError):
    """An adapter, a checkpoint or a run folder that cannot be used."""

    exit_code = 4


class DivergedError(LoralabError):
    """The loss or a gradient is no longer finite."""

    exit_code = 5
    status = "diverged"


class OutOfMemory(LoralabError):  # noqa: N818 - the record's word
    """The device or the host has no memory left."""

    exit_code = 6
    status = "out_of_memory"


class DiskError(LoralabError):
    """A file that cannot be written: a full disk, no permission, no such folder."""

    exit_code = 7


class Interrupted(BaseException):
    """SIGINT (130) or SIGTERM (143) while a trial ran; like KeyboardInterrupt, no ``except Exception`` catches it."""

    status = "interrupted"

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


PATH_ERRORS = (
    *(errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left; torch raises several types and messages for that."""
    messages = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, so that torch is not imported here
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(text in str(error) for text in messages)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk or a quota is full; safetensors and torch keep the operating system's message, not its errno."""
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def unwritable(path: Path | str, error: OSError) -> DiskError:
    """The DiskError for a file or a folder whose writing raised ``error``."""
    return DiskError(f"{path} cannot be written: {error.strerror or error}")


def explain(error: BaseException) -> LoralabError | Interrupted:
    """The error of this module for any exception: what raised it where known, else a LoralabError (exit 1) with
    ``error`` as its cause. An exception that was raised while an interruption was handled is that interruption.
    """
    if isinstance(error, Interrupted):
        return error
    context = error.__context__
    while context is not None:
        if isinstance(context, Interrupted | KeyboardInterrupt):
            return explain(context)
        context = context.__context__
    if isinstance(error, LoralabError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(2)
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory: {text[:200]}; a smaller data.batch_size or model.max_length, "
            "model.gradient_checkpointing=true or a 4-bit quantization need less"
        )
    if is_disk_full(error):
        return DiskError(f"the disk is full: {text[:200]}; what was finished before is kept")
    if isinstance(error, FileNotFoundError) and not error.filename:
        return ConfigError("the current folder is gone; valid: start loralab in a folder that exists")
    if isinstance(error, OSError) and error.filename and error.errno in PATH_ERRORS:
        return DiskError(f"{error.filename} cannot be read or written: {error.strerror}")
    wrapped = LoralabError(f"{_own_line(error)}{type(error).__name__}: {text[:500]}")
    wrapped.__cause__ = error
    return wrapped


def _own_line(error: BaseException) -> str:
    """``mine.py:12: `` where a file below the current folder that is not loralab's was the last of the two to be in
    charge: the user's own callback, adapter or logger. Else empty."""
    try:
        here, package = Path.cwd(), Path(__file__).parent
    except FileNotFoundError:  # the folder is gone
        return ""
    for frame in reversed(extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(package):
            return ""
        if path.is_relative_to(here) and "site-packages" not in path.parts:
            return f"{path.relative_to(here)}:{frame.lineno}: "
    return ""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message on an unknown ``name``: "did you mean NEAREST? valid: ALL", the former where one is near."""
    options = sorted({str(option) for option in valid})
    close = get_close_matches(name, options, n=1, cutoff=0.35)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(options)}"
