"""What went wrong, in loralab's own errors, and the record of it."""

from typing import Any

from loralab.errors import DiskError, Interrupted, LoralabError, OutOfMemory, is_out_of_memory


def explain(error: BaseException) -> LoralabError | Interrupted:
    """Any failure as one of loralab's: out of memory by its name, an unknown one as loralab's own (exit 1).

    What goes wrong while an interruption is being dealt with is still that interruption.
    """
    context = error.__context__
    while context is not None:
        if isinstance(context, Interrupted | KeyboardInterrupt):
            return explain(context)
        context = context.__context__
    if isinstance(error, LoralabError | Interrupted):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(2)
    if is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory: {' '.join(str(error).split())[:200]}; a smaller data.batch_size or model.max_length, "
            "model.gradient_checkpointing=true or a 4-bit quantization need less"
        )
    if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
        return DiskError(f"the disk is full: {' '.join(str(error).split())[:200]}; what was finished before is kept")
    wrapped = LoralabError(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    wrapped.__cause__ = error
    return wrapped


def close_record(entry: dict[str, Any], failure: LoralabError | Interrupted | None) -> None:
    entry["status"] = "completed" if failure is None else failure.status
    entry["error"] = None if failure is None else str(failure)
    entry["exit_code"] = 0 if failure is None else failure.exit_code
