"""Speed beside the libraries that people would use instead: the same work in the same process, interleaved, medians.

Times of one machine mean little; the ratio to a peer measured in the same run does.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralab.quantization.four_bit import FourBit
from loralab.telemetry.environment import environment

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # (out, in): attention and feed-forward of a 1B Llama
ROWS = (16, 128, 512)  # tokens in a pass
ROUNDS = 15


def bench() -> dict[str, Any]:
    """{cpu, gpu, threads, layers: [{layer, rows, ours_ms, peer_ms, ratio, ...}]}; ratio above 1: ours is faster."""
    machine = environment()
    return {
        "cpu": machine["cpu"],
        "gpu": machine["gpu"],
        "threads": torch.get_num_threads(),
        "versions": machine["versions"],
        "layers": list(layers()),
    }


def layers(shapes: tuple[tuple[int, int], ...] = SHAPES, rows: tuple[int, ...] = ROWS) -> Iterator[dict[str, Any]]:
    """NF4, double quantization, block size 64: forward and backward with respect to the input, per_use, against
    bitsandbytes' Linear4bit holding the same bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for out_features, in_features in shapes:
        dense = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        peer = _linear4bit(dense, dtype).to(device)
        ours = FourBit(double_quant=True).convert(dense).to(device)
        for n in rows:
            x = torch.randn(n, in_features, device=device, dtype=dtype)
            times = interleaved({"ours": _step(ours, x), "peer": _step(peer, x)}, device)
            mine, theirs = (statistics.median(times[name]) for name in ("ours", "peer"))
            yield {
                "layer": f"{in_features} -> {out_features}",
                "rows": n,
                "dtype": str(dtype).removeprefix("torch."),
                "ours_ms": 1000 * mine,
                "peer_ms": 1000 * theirs,
                "ratio": theirs / mine,
                "spread": [_quartiles(times["ours"]), _quartiles(times["peer"])],
                "same_output": float((ours(x) - peer(x)).norm() / peer(x).norm()),
            }


def interleaved(work: Mapping[str, Callable[[], None]], device: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each round, one after the other in turn, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 2):
        for name in sorted(work, reverse=bool(number % 2)):
            begun = time.perf_counter()
            work[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - begun)
    return times


def render(found: Mapping[str, Any]) -> str:
    """A table for the terminal."""
    where = found["gpu"] or f"{found['cpu']}, {found['threads']} threads"
    lines = [f"one NF4 layer, forward and backward, {where}; ms are medians of {ROUNDS}, interleaved", ""]
    lines.append(f"{'layer':>14} {'rows':>5} {'dtype':>9} {'loralab ms':>11} {'Linear4bit ms':>14} {'ratio':>6}")
    lines += [
        f"{one['layer']:>14} {one['rows']:>5} {one['dtype']:>9} {one['ours_ms']:>11.2f} {one['peer_ms']:>14.2f}"
        f" {one['ratio']:>6.2f}"
        for one in found["layers"]
    ]
    return "\n".join(lines)


def _linear4bit(dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
    )
    layer.weight = bnb.nn.Params4bit(
        dense.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    made: nn.Module = layer
    return made


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        given = x.detach().requires_grad_(True)
        layer(given).sum().backward()

    return step


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4)
    return [1000 * low, 1000 * high]
