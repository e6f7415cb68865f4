"""``python -m loralab.gpu.lab JOB ANSWERS``: command lines one after the other in one process, which pays once for
its imports and for CUDA's context. After each its exit code is a line of ANSWERS.
"""

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

Row = dict[str, Any]


def answer(path: Path, row: Row) -> None:
    """One more line, whole or not at all."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main(asked: Path, answers: Path) -> None:
    """JOB: [{name, words of ``loralab train``, room}]; ``room``: see ``limited``."""
    from loralab.cli.main import run

    for one in json.loads(asked.read_text("utf-8")):
        begun = time.monotonic()
        with limited(one.get("room")):
            code = run(["train", *one["words"]])
        left = _clear()
        answer(answers, {"name": one["name"], "exit_code": code, "seconds": time.monotonic() - begun, **left})


def _clear() -> Row:
    """Gives back what a run held. ``left_bytes``: what torch still holds, which the next run's peak would include."""
    gc.collect()
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"left_bytes": left}


@contextmanager
def limited(room: Row | None) -> Iterator[None]:
    """Within, {"words", "trials", "fit"}: torch may allocate half-way between what ``fit`` trials are predicted to need
    and what ``trials`` are, and runs out of memory above that. A CPU has no such limit: there ``trials`` are refused.
    """
    if room is None:
        yield
    elif torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, _between(room) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        from loralab.training.module import FineTuner

        with patch.object(FineTuner, "training_step", _refusing(FineTuner.training_step, room["fit"])):
            yield


def _between(room: Row) -> float:
    """Bytes, on a card."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose
    from loralab.planning.plan import FRAGMENTATION, predict

    spec = trial_spec(compose(room["words"]), Path())
    few, many = (predict([spec] * count, "cuda").predicted_peak_bytes for count in (room["fit"], room["trials"]))
    return FRAGMENTATION * (few + many) / 2


def _refusing(real: Any, fit: int) -> Any:
    """A training step that has no memory for more than ``fit`` trials, from the second step on."""

    def step(self: Any, batches: Any, index: int) -> Any:
        if index and len(batches) > fit:
            raise torch.OutOfMemoryError(f"raised by the rehearsal for more than {fit} trials")
        return real(self, batches, index)

    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
