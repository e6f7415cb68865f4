"""What an adapter costs at inference: a forward pass of a base alone, with an adapter, and with it merged.

LoRA (arXiv:2106.09685), table 1: a merged LoRA is the base with other weights, a bottleneck adapter adds layers that
wait for each other. Every arm is measured in turn, attached anew, in blocks that are compared with the base's own block
of the same round.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.attached import attached
from loralab.adapters.merging import check_spec
from loralab.artifacts.reopen import OpenRun
from loralab.artifacts.swap import Merger
from loralab.bench.measurements import Clock, interleaved
from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.errors import ConfigError
from loralab.models.loading import Base
from loralab.records.environment import environment
from loralab.running.inputs import Inputs
from loralab.training.generation import evaluating
from loralab.training.specs import TrialSpec

METHODS = ("lora", "bottleneck", "pfeiffer", "prefix")
SHAPES = ((1, 128), (16, 256), (32, 512))  # rows and tokens of a pass, as in the paper
BASE = "base"
AGAIN = "base, again"  # what the measurement cannot tell apart
MERGED = "merged"
BLOCK = 3  # passes of an arm in a round, behind one that warms up


@dataclass(frozen=True)
class Arm:
    """``spec`` None: the base alone."""

    name: str
    spec: TrialSpec | None = None
    merged: bool = False


def latency(
    overrides: list[str],
    methods: Sequence[str] = METHODS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    passes: int = 50,
    config_dir: str | None = None,
) -> dict[str, Any]:
    """Times of each arm at each of ``shapes`` (rows, tokens), from ``passes`` forward passes each, and the environment.

    ``methods``: of ``conf/method``, all over the base of ``overrides``; a method that can be merged is measured merged
    too. Raises ConfigError for a method that is unknown or has another base, an adapter in ``overrides``, and a shape
    that the base has no room for.
    """
    if named := [word for word in overrides if word.lstrip("+~").partition("=")[0] in ("adapter", "method")]:
        raise ConfigError(f"{named[0]} would be measured under the name of each method; valid: --methods NAMES")
    specs = {name: _spec(overrides, name, config_dir) for name in methods}
    first = next(iter(specs.values()))
    for name, spec in specs.items():
        if (repr(spec.model), repr(spec.quantization)) != (repr(first.model), repr(first.quantization)):
            raise ConfigError(f"method={name} brings a base of its own, and passes over different bases do not compare")
    rooms = [spec.room for spec in specs.values() if spec.room is not None]
    fitting = [shape for shape in shapes if not rooms or shape[1] <= min(rooms)]
    if not fitting:
        raise ConfigError(f"no shape fits: the base has room for {min(rooms)} tokens beside the methods' own")
    labels = 2 if first.model.task == "sequence_classification" else None
    base = Inputs().base(first, labels)
    arms = [Arm(BASE), Arm(AGAIN), *(arm for name, spec in specs.items() for arm in _arms(name, spec))]
    return {
        "base": base.record()["name"],
        "device": first.trainer.device,
        "threads": torch.get_num_threads(),
        "quantization": first.quantization.name,
        "left_out": [list(shape) for shape in shapes if shape not in fitting],
        "rows": [row for shape in fitting for row in _rows(base, arms, shape, passes)],
        "environment": environment(),
    }


def _spec(overrides: list[str], method: str, config_dir: str | None) -> TrialSpec:
    return trial_spec(compose([*overrides, f"+method={method}"], config_dir=config_dir), Path())


def _arms(name: str, spec: TrialSpec) -> Iterator[Arm]:
    """The method as it is trained; then as part of the base's weights, where that is possible."""
    if not spec.adapter.changes_base:
        yield Arm(name, spec)
    try:
        check_spec(spec.adapter)
    except ConfigError:
        return
    yield Arm(f"{name}, {MERGED}", spec, merged=True)


def _rows(base: Base, arms: Sequence[Arm], shape: tuple[int, int], passes: int) -> Iterator[dict[str, Any]]:
    """One row an arm."""
    given = _inputs(base, *shape)
    blocks: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    parameters: dict[str, int] = {}
    for _, arm in interleaved(arms, 2 * max(2, -(-passes // (2 * BLOCK)))):
        with _ready(base, arm, shape[0]) as count:
            parameters[arm.name] = count
            blocks[arm.name].append(_timed(base, given))
    for arm in arms:
        seconds = [one for block in blocks[arm.name] for one in block]
        low, middle, high = statistics.quantiles(_over(blocks[arm.name], blocks[BASE]), n=4, method="inclusive")
        yield {
            **{"arm": arm.name, "rows": shape[0], "tokens": shape[1], "parameters": parameters[arm.name]},
            **{"passes": len(seconds), "mean_s": statistics.fmean(seconds), "std_s": statistics.stdev(seconds)},
            **{"median_s": statistics.median(seconds), "over_base": middle, "over_base_quartiles": [low, high]},
        }


def _over(own: Sequence[Sequence[float]], bare: Sequence[Sequence[float]]) -> list[float]:
    """The arm's median time over the base's, one ratio for two rounds: the second is in reverse order, so that in their
    geometric mean what grows steadily meanwhile counts for both alike."""
    ratios = [statistics.median(one) / statistics.median(other) for one, other in zip(own, bare, strict=True)]
    return [(there * back) ** 0.5 for there, back in zip(ratios[::2], ratios[1::2], strict=True)]


@contextmanager
def _ready(base: Base, arm: Arm, rows: int) -> Iterator[int]:
    """Within, a pass of ``rows`` rows goes through the arm; gives the number of its trained parameters."""
    if arm.spec is None:
        with evaluating(base.model):
            yield 0
        return
    adapter = attached(arm.spec.adapter, base.model, arm.spec.seed)
    adapter.to(arm.spec.trainer.device)
    run = OpenRun(Path(), {}, arm.spec, base, adapter)
    try:
        count = adapter.trainable_parameters()
        if not arm.merged:
            with run.adapted(rows):
                yield count
            return
        merged = Merger(run, base.model.dtype).merge(_way(run))  # type: ignore[arg-type]
    finally:
        if not arm.merged:
            adapter.detach()
    adapter.detach()  # a merged model has no hooks
    with merged.on(), evaluating(base.model):
        yield count


def _way(run: OpenRun) -> str:
    """The one whose layers are dense, as a merged model's are."""
    return Merger(run, run.model.dtype).ways[0]  # type: ignore[arg-type]


def _timed(base: Base, given: Mapping[str, Tensor]) -> list[float]:
    """Seconds of each pass of a block."""
    clock = Clock(given["input_ids"].device.type, apart=True)
    for _ in range(BLOCK + 1):
        base.model(**given)
        clock()
    return clock.steps()


def _inputs(base: Base, rows: int, tokens: int) -> dict[str, Tensor]:
    """Tokens drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, int(vocabulary), (rows, tokens), generator=generator)
    device = next(base.model.parameters()).device
    given = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    return {**given, "decoder_input_ids": given["input_ids"]} if base.spec.task == "seq2seq_lm" else given
