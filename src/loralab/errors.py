"""What can go wrong for a user, one class per exit code. Everything else is loralab's own fault (exit 1)."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class LoralabError(Exception):
    """One short paragraph: what, where (dotted key or file:line), the value, what would be valid."""

    exit_code = 1
    status = "failed"


class ConfigError(LoralabError):
    """Configuration, a base model that is missing or has no weights, remote code refused."""

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
    """Nothing more can be written."""

    exit_code = 7


class Interrupted(BaseException):
    """SIGINT (130) or SIGTERM (143) while a trial ran; like KeyboardInterrupt, no ``except Exception`` holds it."""

    status = "interrupted"

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


OF_A_PATH = (*(errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left: torch says so in several types and words."""
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, so that torch is not imported here
    named = not kinds.isdisjoint(("MemoryError", "OutOfMemoryError"))
    return named or any(text in str(error) for text in said)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk or a quota is full: safetensors and torch say so in the words of the operating system."""
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def unwritable(path: Path | str, error: OSError) -> DiskError:
    """The DiskError of a file or a folder that ``error`` kept from being written."""
    return DiskError(f"{path} cannot be written: {error.strerror or error}")


def explain(error: BaseException) -> LoralabError | Interrupted:
    """Any failure as one of loralab's: out of memory by its name, an unknown one as loralab's own (exit 1).

    What goes wrong while an interruption is being dealt with is still that interruption.
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
    if isinstance(error, OSError) and error.filename and error.errno in OF_A_PATH:
        return DiskError(f"{error.filename} cannot be read or written: {error.strerror}")
    wrapped = LoralabError(f"{type(error).__name__}: {text[:500]}")
    wrapped.__cause__ = error
    return wrapped


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that helps after an unknown ``name``: the nearest valid one and the list."""
    options = sorted({str(option) for option in valid})
    close = get_close_matches(name, options, n=1, cutoff=0.35)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(options)}"
