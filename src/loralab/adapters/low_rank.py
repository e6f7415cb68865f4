"""The updates of one layer: LoRA's, DoRA's, and PiSSA's."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loralab.adapters import dora
from loralab.adapters.dropout import length_of
from loralab.adapters.fused import lora_update
from loralab.adapters.grouped import Given
from loralab.adapters.runs import Part
from loralab.quantization.base import dense_weight


def drawn(init: str, rows: int, in_features: int, r: int, generator: torch.Generator) -> Tensor:
    """The start of A (rows, in), of one or several matrices of ``r`` rows: uniform in +-1/sqrt(in) (kaiming, a = sqrt
    5), or normal with deviation 1/r (gaussian)."""
    if init == "gaussian":
        return torch.randn(rows, in_features, generator=generator) / r
    return (torch.rand(rows, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)


class LoRADelta(nn.Module):
    """The update of one layer: A (r, in) drawn, B (out, r) zero, so that training starts at the base model."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.scaling, self.dropout = scaling, dropout

    def draw(self, init: str, generator: torch.Generator) -> None:
        """Fills A as ``drawn`` says; with orthogonal A and B, normal along directions of which B takes one half and A
        the other (PEFT's draw)."""
        if self.lora_A.is_meta:
            return
        r, in_features = self.lora_A.shape
        if init == "orthogonal":
            self._draw_orthogonal(generator)
            return
        with torch.no_grad():
            self.lora_A.copy_(drawn(init, r, in_features, r, generator))

    @torch.no_grad()
    def _draw_orthogonal(self, generator: torch.Generator) -> None:
        (r, in_features), out_features = self.lora_A.shape, self.lora_B.shape[0]
        directions = torch.linalg.qr(torch.randn(r, r, generator=generator)).Q
        self.lora_A.copy_((torch.randn(in_features, r // 2, generator=generator) @ directions[0::2]).t() / 10)
        self.lora_B.copy_(torch.randn(out_features, r // 2, generator=generator) @ directions[1::2] / 10)

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Starts training at A = ``a`` and B = ``b``."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the plain LoRA that computes the same with the same scaling: what files hold."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def restore(self, a: Tensor, b: Tensor) -> None:
        """Takes up what ``plain_factors`` gave."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # (..., in), (..., out) -> (..., out)
        return self.forward_grouped(x, y.clone(), [(0, x.numel() // x.shape[-1], self, key)])

    @staticmethod
    def forward_grouped(x: Tensor, y: Tensor, slices: Sequence[Given]) -> Tensor:
        """The updates of several trials, each (start, stop, delta, key) at its own positions, in one function."""
        length = length_of(x)
        parts = [Part(start, stop, one.scaling, one.dropout, key, length) for start, stop, one, key in slices]
        return lora_update(x, y, parts, [f for _, _, one, _ in slices for f in (one.lora_A, one.lora_B)])

    def delta_weight(self) -> Tensor:
        """scaling * B A, shape (out, in): what merging adds to W."""
        a, b = self.plain_factors()
        return self.scaling * (b @ a)

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight with the update added."""
        return {"weight": own["weight"] + self.delta_weight()}


class DoRADelta(LoRADelta):
    """The same with a trained length of each row of W + scaling B A, at first W's own."""

    squares: Tensor

    def over(self, layer: nn.Module) -> "DoRADelta":
        """Takes the lengths of the rows of ``layer``, which it will act on."""
        self._layer = [layer]  # in a list: the base is not a submodule
        self.register_buffer("squares", dora.squared_rows(layer), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt())
        return self

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """The lengths are those of the rows of W + scaling B A, so that training starts at that matrix."""
        super().begin(a, b)
        weight = dense_weight(self._layer[0]).float()
        self.lora_magnitude_vector.copy_(dora.row_norms(weight, self.squares, self))

    @staticmethod
    def forward_grouped(x: Tensor, y: Tensor, slices: Sequence[Given]) -> Tensor:
        """The same of several trials, whose base's weight is made dense once."""
        update = LoRADelta.forward_grouped(x, torch.zeros_like(y), slices)
        return dora.rescaled(slices[0][2]._layer[0], y, update, slices)

    def delta_weight(self) -> Tensor:
        """What merging adds to W, (out, in)."""
        weight = dense_weight(self._layer[0]).detach().float()
        scale = dora.ratio(weight, self, self.squares)[:, None]
        return (scale - 1) * weight + scale * super().delta_weight()

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of the given weight with scaling B A added, each as long as it was trained to be."""
        weight = own["weight"]
        scale = dora.ratio(weight, self, weight.square().sum(1))[:, None]
        return {"weight": scale * (weight + super().delta_weight())}


class PiSSADelta(LoRADelta):
    """scaling (B A - B0 A0): A and B train from A0 and B0, the principal part of W, and W stays whole.

    This is PiSSA's layer, whose base is W - scaling B0 A0 and takes no part in dropout. A0 and B0 are in the state.
    """

    initial_A: Tensor  # noqa: N815 - of lora_A
    initial_B: Tensor  # noqa: N815

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(in_features, out_features, r, scaling, dropout, device)
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B, requires_grad=False))

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        super().begin(a, b)
        self.initial_A.copy_(a)
        self.initial_B.copy_(b)

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """[A; A0] and [B, -B0], of rank 2 r."""
        return torch.cat([self.lora_A, self.initial_A]), torch.cat([self.lora_B, -self.initial_B], 1)

    @torch.no_grad()
    def restore(self, a: Tensor, b: Tensor) -> None:
        r = len(self.lora_A)
        super().restore(a[:r], b[:, :r])
        self.initial_A.copy_(a[r:])
        self.initial_B.copy_(-b[:, r:])

    merged = LoRADelta.merged

    @staticmethod
    def forward_grouped(x: Tensor, y: Tensor, slices: Sequence[Given]) -> Tensor:
        """The same of several trials. The two products are subtracted from each other before they meet y, so that the
        update is exactly zero at first."""
        x = x.view_as(x)  # its two gradients are added here first, in a pack and alone
        zeros = torch.zeros(y.shape, dtype=slices[0][2].lora_A.dtype, device=y.device)
        trained = LoRADelta.forward_grouped(x, zeros, slices)
        parts = [Part(start, stop, delta.scaling, 0.0, None) for start, stop, delta, _ in slices]
        initial = [factor for _, _, delta, _ in slices for factor in (delta.initial_A, delta.initial_B)]
        return y + (trained - lora_update(x, torch.zeros_like(zeros), parts, initial)).to(y.dtype)
