"""One NF4 layer beside bitsandbytes' own, in this process."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loralab.bench.measurements import OURS, Clock, Table, interleaved
from loralab.quantization.four_bit import FourBit

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # (out, in): attention and feed-forward of a 1B Llama
ROWS = (16, 128, 512)  # tokens in a pass
PEER = "bitsandbytes Linear4bit"


def layers(
    table: Table, rounds: int, shapes: tuple[tuple[int, int], ...] = SHAPES, rows: tuple[int, ...] = ROWS
) -> None:
    """NF4, double quantization, block size 64: forward and backward with respect to the input, per_use, against
    bitsandbytes' Linear4bit holding the same bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for out_features, in_features in shapes:
        dense = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        peer = linear4bit(dense, dtype).to(device)
        ours = FourBit(double_quant=True).convert(dense).to(device)
        for n in rows:
            x = torch.randn(n, in_features, device=device, dtype=dtype)
            times = timed({PEER: _step(peer, x), OURS: _step(ours, x)}, device, rounds)
            difference = float((ours(x) - peer(x)).norm() / peer(x).norm())
            for name, seconds in times.items():
                row = table.row(name, f"{in_features} -> {out_features}, {n} rows", "ms", tokens=n)
                table.add(row, [1000 * each for each in seconds], output_difference=difference)


def timed(work: Mapping[str, Callable[[], None]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number, name in interleaved(work, rounds + 2):
        clock = Clock(device)
        clock()
        work[name]()
        clock()
        times[name] += clock.steps() if number >= 2 else []
    return times


def linear4bit(dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer with a copy of ``dense``'s weight, which it packs in NF4 when it is moved; no bias."""
    import bitsandbytes as bnb

    quantization = {"quant_type": "nf4", "compress_statistics": True}
    layer: nn.Module = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, **quantization
    )
    weight = dense.weight.data.clone()
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **quantization)
    return layer


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer(x.detach().requires_grad_(True)).sum().backward()

    return step
