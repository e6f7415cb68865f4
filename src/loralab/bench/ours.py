"""loralab's side: trials alone or several in one pass, composed from words as the command line's are."""

import gc
import itertools
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer

from loralab.bench.measurements import Clock
from loralab.bench.processes import Row
from loralab.bench.setup import trial_words
from loralab.config.build import trial_spec
from loralab.config.compose import compose, plain
from loralab.data.batches import permutation
from loralab.planning import foresee, plan
from loralab.running.runner import Runner
from loralab.training.module import FineTuner
from loralab.training.specs import TrialSpec


class StepTimes(Callback):
    """Reads the clock after each step, of however many trials, and ends this process by SIGKILL after ``kill_after``
    steps; None: never."""

    pack_aware = True

    def __init__(self, clock: Clock, kill_after: int | None = None) -> None:
        self.clock, self.kill_after = clock, kill_after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.clock()
        if self.kill_after is not None and trainer.global_step >= self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


class Loralab:
    """A runner, which keeps the base. ``setup``: device, folder, words common to all trials, more_words of this side
    alone; ``anew``: each answer has a runner of its own, and gives back the memory it held."""

    def __init__(self, setup: Row) -> None:
        self.setup, self.cuda = setup, setup["device"] == "cuda"
        self.runner, self.numbers = Runner(), itertools.count()

    def answer(self, request: Row) -> Row:
        """Runs ``trials`` (1) in one pass, which differ in their seeds, with the request's ``words`` or, where it has
        none, its settings; their folders are in ``name``. ``fit``: see ``limited``; ``kill_after``: see StepTimes;
        ``profiled``: see Clock; ``rows_to``: a file for the first trial's rows in token ids, as peers read them.

        {steps: seconds of each but the first, losses and trainable_parameters of the first trial, pack_sizes,
        peak_bytes, launches, left_bytes: what a run anew leaves to the next}; or an error; or ``skipped``, why there is
        too little memory to try.
        """
        clock = Clock(self.setup["device"], request.get("steps", 0), request.get("profiled", 0))
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        specs = self.specs(request, StepTimes(clock, request.get("kill_after")))
        if why := self.too_little(specs):
            return {"skipped": why}
        if path := request.get("rows_to"):
            self._write_rows(specs[0], Path(path))
        with limited(specs, request.get("fit")):
            records = self.runner.run(specs)
        peak = torch.cuda.max_memory_allocated() if self.cuda else None
        left = self._begin_anew() if self.setup.get("anew") else None
        for stored in records:
            if stored["status"] != "completed":
                return {"error": stored["error"]}
        rows = map(json.loads, (specs[0].folder / "metrics.jsonl").read_text("utf-8").splitlines())
        return {
            **{"steps": clock.steps(), "losses": [row["train/loss"] for row in rows if "train/loss" in row]},
            "trainable_parameters": records[0]["adapter"]["trainable_parameters"],
            "pack_sizes": sorted({stored["pack"]["size"] for stored in records}),
            **{"peak_bytes": peak, "left_bytes": left, "launches": clock.launches},
        }

    def specs(self, request: Row, step_times: StepTimes) -> list[TrialSpec]:
        words = [*self.setup["words"], *self.setup.get("more_words", ())]
        words += [*(trial_words([request]) if "r" in request else ()), *request.get("words", ())]
        content = plain(compose(words))
        folder = Path(self.setup["folder"]) / request.get("name", f"trial{next(self.numbers)}")
        specs = [
            trial_spec({**content, "seed": seed}, folder / str(seed), words) for seed in range(request.get("trials", 1))
        ]
        return [replace(spec, callbacks={**spec.callbacks, "step_times": lambda: step_times}) for spec in specs]

    def too_little(self, specs: Sequence[TrialSpec]) -> str:
        """Why the device has too little memory for a pass of ``specs``, by arithmetic; empty where it has enough, or
        where that is unknown. ``setup``'s ``free_bytes`` stands in for what the device has free."""
        free = self.setup.get("free_bytes")
        if free is None and self.cuda:
            free = foresee.free_bytes("cuda") + self.runner.inputs.base_bytes
        if free is None:
            return ""
        need = plan.device_bytes(plan.estimate(specs, "cuda"))
        return (
            "" if need <= free else f"it needs about {need / plan.GIB:.1f} GiB, and {free / plan.GIB:.1f} GiB are free"
        )

    def _write_rows(self, spec: TrialSpec, path: Path) -> None:
        """In the order in which the trial is fed them."""
        rows, count = self.runner.inputs.rows(spec), spec.trainer.max_steps * spec.data.batch_size
        order = [
            i for epoch in range(-(-count // len(rows.train))) for i in permutation(len(rows.train), spec.seed, epoch)
        ]
        splits = {"train": [rows.train[i] for i in order[:count]], "validation": rows.validation}
        path.write_text(
            json.dumps({name: [(one.input_ids, one.labels) for one in part] for name, part in splits.items()})
        )

    def _begin_anew(self) -> int | None:
        """What torch still holds then, which the next run's peak would include; None on a CPU."""
        self.runner = Runner()
        gc.collect()
        if not self.cuda:
            return None
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()


@contextmanager
def limited(specs: Sequence[TrialSpec], fit: int | None) -> Iterator[None]:
    """Within, torch may allocate half-way between what ``fit`` of the trials are predicted to need and what all are,
    and runs out of memory above that; None: no limit. A CPU has none either: there a pass of more trials is refused."""
    training_step = FineTuner.training_step

    def refuse(self: Any, batches: Any, index: int) -> Any:
        if index and fit is not None and len(batches) > fit:
            raise torch.OutOfMemoryError(f"raised by the rehearsal for more than {fit} trials")
        return training_step(self, batches, index)

    if fit is None:
        yield
    elif specs[0].trainer.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, room(specs, fit) / torch.cuda.mem_get_info()[1]))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        with patch.object(FineTuner, "training_step", refuse):
            yield


def room(specs: Sequence[TrialSpec], fit: int) -> float:
    """Bytes, on a card."""
    fitting, all_trials = (plan.predict(list(part), "cuda").predicted_peak_bytes for part in (specs[:fit], specs))
    return plan.FRAGMENTATION * (fitting + all_trials) / 2
