"""Lightning's data loaders. A pass is {index of a trial: its batch}, stacked along dim 0 before the base."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from loralab.data.encoding import IGNORE
from loralab.forward.compiled import MULTIPLE, width
from loralab.training.cursor import Batch
from loralab.training.trial import Trial

# a pass with padding is padded to a multiple of so many tokens: fewer shapes for the allocator and for kernels that are
# chosen by shape; by the kind of device
MULTIPLES = {"cuda": MULTIPLE}


class TrainPasses:
    """The training passes of a pack; a trial that has ended is in no further pass."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.micros = trials[0].spec.trainer.accumulate_grad_batches

    def __len__(self) -> int:
        return max(trial.end - trial.step for trial in self.trials) * self.micros

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        for _ in range(len(self) // self.micros):
            steps = {index: trial.data_cursor.step_batches() for index, trial in enumerate(self.trials) if trial.alive}
            for _ in range(self.micros):
                yield {index: next(batches) for index, batches in steps.items()}


class EvaluationPasses:
    """The evaluation passes of a pack over one split; a trial with fewer batches is in fewer passes."""

    def __init__(self, trials: Sequence[Trial], split: str) -> None:
        self.trials, self.split = trials, split

    def __len__(self) -> int:
        return max(-(-len(rows) // size) for rows, size in (trial.evaluated(self.split) for trial in self.trials))

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        streams = {
            index: trial.data_cursor.evaluation_batches(*trial.evaluated(self.split))
            for index, trial in enumerate(self.trials)
            if trial.failure is None
        }
        for _ in range(len(self)):
            batches = {index: next(stream, None) for index, stream in streams.items()}
            yield {index: batch or self._spare(index) for index, batch in batches.items() if batch or self.lockstep}

    @property
    def lockstep(self) -> bool:
        """Whether every process must compute every pass, since each holds a part of the base."""
        return self.trials[0].spec.trainer.spreads

    def _spare(self, index: int) -> Batch:
        """A row for a pass in which this process has none; it is not scored."""
        trial = self.trials[index]
        return {**trial.data_cursor.first(trial.evaluated(self.split)[0]), "spare": True}


def stack_batches(
    batches: Mapping[int, Batch],
    pad_token_id: int,
    device: torch.device,
    room: int | None = None,
    always: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, labels) of all trials along dim 0, on the host, padded for ``device`` as ``padded_alike`` does."""
    tensors = [batch["tensors"] for batch in padded_alike(batches, pad_token_id, device, room, always).values()]
    stacked = {key: torch.cat([t[key] for t in tensors]) if len(tensors) > 1 else tensors[0][key] for key in tensors[0]}
    labels = stacked.pop("labels")
    return stacked, labels


def has_padding(batches: Mapping[int, Batch]) -> bool:
    """Whether a row of the pass is shorter than the longest, so that attention gets a mask."""
    tensors = [batch["tensors"] for batch in batches.values()]
    unlike = len({own["input_ids"].shape[1] for own in tensors}) > 1
    return unlike or not all(bool(own["attention_mask"].all()) for own in tensors)


def padded_alike(
    batches: Mapping[int, Batch],
    pad_token_id: int,
    device: torch.device,
    room: int | None = None,
    always: bool = False,
) -> dict[int, Batch]:
    """The batches padded on the right to the longest of them; ``always``, and where there is padding on a device of
    MULTIPLES, to a multiple.

    ``room``: tokens that the base has positions for; None: no bound."""
    rounded = always or (device.type in MULTIPLES and has_padding(batches))
    if len(batches) < 2 and not rounded:
        return dict(batches)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORE}
    widths = [(key, part.shape[-1]) for batch in batches.values() for key, part in batch["tensors"].items()]
    longest = {key: max((width for name, width in widths if name == key), default=0) for key in fill}
    if rounded:
        tokens = longest["input_ids"]
        longest = {
            key: width(tokens, room) if own == tokens else own for key, own in longest.items()
        }  # a decoder's labels are others

    def padded(key: str, part: Tensor) -> Tensor:
        if part.dim() < 2 or part.shape[1] == longest[key]:  # labels of whole rows; the longest
            return part
        return torch.nn.functional.pad(part, (0, longest[key] - part.shape[1]), value=fill[key])

    return {
        index: {**batch, "tensors": {key: padded(key, part) for key, part in batch["tensors"].items()}}
        for index, batch in batches.items()
    }
