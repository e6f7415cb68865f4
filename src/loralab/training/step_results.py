"""What a step has come to, the losses and gradient norms of its trials, of which the host reads all values at once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab import signals
from loralab.numerics.stacks import received
from loralab.training.trial import Trial

# where the host may read them in the pass after the step, so that the device need not wait for it between steps
LATE = {"cuda"}

Results = tuple[dict[int, float], dict[int, float]]  # {trial: loss}, {trial: norm}


@dataclass(frozen=True)
class Unread:
    """The losses and norms of a step, which may still be on their way from the device."""

    of_losses: list[int]  # the trial of each loss, of every pass of the step
    of_norms: list[int]  # the trial of each norm
    values: Callable[[], Tensor]  # losses and norms; waits for them
    skips: Callable[[], bool]  # whether an update whose gradient is not finite was skipped

    def judged(self, trials: Sequence[Trial]) -> Results:
        """The results of the trials that made the step. One whose loss or norm is not finite has not, and fails; so
        does one whose gradient is zero."""
        values: list[float] = self.values().tolist()
        losses: dict[int, float] = {}
        for index, loss in zip(self.of_losses, values, strict=False):
            losses[index] = losses.get(index, 0.0) + loss
        failed = [index for index, loss in losses.items() if not math.isfinite(loss)]
        for index in failed:
            trials[index].fail_on_infinite("the training loss")
        norms = dict(zip(self.of_norms, values[len(self.of_losses) :], strict=True))
        for index, norm in norms.items():
            if not norm < float("inf") and not self.skips():
                trials[index].fail_on_infinite("the gradient")
                failed.append(index)
            elif norm == 0.0 and losses.get(index, 0.0) > 0.0:
                trials[index].fail_on_zero_gradient()
                failed.append(index)
        return {index: loss for index, loss in losses.items() if index not in failed}, norms


class StepResults:
    """The results of the step under way, and of the one before it where they have not been read.

    A step of a trial is counted, and logged, once its loss and its gradient are known to be finite. Where they are read
    ``late``, ``Trial.step`` is ahead of that by one until ``settle``, and the update of a trial that turns out to have
    failed has been made, of its own parameters alone, which nothing uses any more.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.late = False
        self.losses: dict[int, float] = {}  # {trial: loss} of the last step that was settled
        self._of_passes: list[tuple[int, Tensor]] = []  # (trial, loss) of each pass of the step, still on the device
        self._taken: Unread | Results | None = None  # of a step whose update is under way
        self._unread: tuple[Unread, list[float]] | None = None  # of the last step, and its rates
        self._ahead: dict[int, int] = {}  # those whose ``step`` counts that one, and what it was before

    @property
    def under_way(self) -> bool:
        """Whether a step has begun that has not been made."""
        return bool(self._of_passes) or self._taken is not None

    @property
    def ahead(self) -> list[Trial]:
        """The trials whose ``step`` counts one that is not settled."""
        return [self.trials[index] for index in self._ahead]

    def add(self, index: int, loss: Tensor) -> None:
        """The loss of a trial in one pass of the step, (), on the device."""
        self._of_passes.append((index, loss))

    def take(self, of_norms: list[int], norms: Tensor, skips: Callable[[], bool]) -> None:
        """The gradients are there, and not used yet: the ``norms`` of the trials ``of_norms``. ``skips``: whether an
        update whose gradient is not finite will be skipped. Reads all results of the step, unless they are read late; a
        trial that fails shall not make its update then."""
        values = torch.cat([*(loss.reshape(1) for _, loss in self._of_passes), norms])
        of_losses, self._of_passes = [index for index, _ in self._of_passes], []
        unread = Unread(of_losses, of_norms, received(values) if self.late else lambda: values, skips)
        self._taken = unread if self.late else unread.judged(self.trials)

    def made(self, rates: list[float]) -> None:
        """The update was made, with these learning rates of the trials."""
        with signals.whole():
            taken, self._taken = self._taken, None
            if taken is None:
                return
            took_part = set(taken.of_losses) if isinstance(taken, Unread) else taken[0].keys()
            stepped = [index for index in took_part if self.trials[index].failure is None]
            if not isinstance(taken, Unread):
                self._count(stepped, taken, rates)
                return
            self._unread, self._ahead = (taken, rates), {index: self.trials[index].step for index in stepped}
            for index, step in self._ahead.items():
                self.trials[index].step = step + 1

    def settle(self) -> bool:
        """Reads, counts and logs the last step; False, and nothing is done, where that was done before."""
        if self._unread is None:
            return False
        with signals.whole():
            for trial in self.ahead:
                trial.counting = True
            (unread, rates), self._unread = self._unread, None
            stepped, self._ahead = self._ahead, {}
            for index, step in stepped.items():
                self.trials[index].step = step
            self._count(list(stepped), unread.judged(self.trials), rates)
            for index in stepped:
                self.trials[index].counting = False
        return True

    def close(self) -> None:
        """The fit is over, maybe by an error: settles, and a trial that fails in a step whose update was cut short has
        failed."""
        self.settle()
        taken, self._taken = self._taken, None
        if isinstance(taken, Unread):
            taken.judged(self.trials)

    def _count(self, stepped: Sequence[int], results: Results, rates: list[float]) -> None:
        losses, norms = results
        for index in [index for index in stepped if index in losses]:
            trial = self.trials[index]
            trial.counting = True
            trial.finish_step()
            if trial.step % trial.spec.trainer.log_every_n_steps == 0 or not trial.alive:
                norm = norms.get(index, 0.0)
                found = {"train/grad_norm": norm} if norm < float("inf") else {"train/skipped_update": 1.0}
                trial.log({"train/loss": losses[index], "train/lr": rates[index], **found})
            trial.counting = False
        self.losses = losses or self.losses
