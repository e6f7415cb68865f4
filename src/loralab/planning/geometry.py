"""What the memory of a step depends on beside its trials."""

from dataclasses import dataclass

from loralab.data.passes import Pass
from loralab.forward.stacked import ForwardMode


@dataclass(frozen=True)
class Geometry:
    """The shapes of a step: its heaviest pass; of several (accumulation) that one and its neighbour, in their order.

    ``ragged``: some rows are padded, which costs attention masks; None: if their lengths differ. ``mode``: how the pass
    is computed; None: as the base allows. ``first``: no gradients or states of an earlier step exist. ``scored``: a
    validation pass follows.
    """

    passes: tuple[Pass, ...]
    cuda: bool
    evaluation: Pass | None = None  # None: the first of ``passes``
    ragged: bool | None = None
    mode: ForwardMode | None = None
    first: bool = False
    scored: bool = True

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.cuda else "cpu"

    @property
    def masked(self) -> bool:
        """True if attention gets a mask of the padding, where padding is computed."""
        if self.ragged is not None:
            return self.ragged
        lengths = [length for shape in self.passes for batch in shape.present for length in batch.inputs]
        return min(lengths) < max(*lengths, *(shape.length or 0 for shape in self.passes))
