"""``loralab merge``: a run's adapter as part of its base's weights, and what that costs.

Onto a quantized base there are three ways. dequantized: the update is added to the values that the base's codes stand
for, which are those it was trained on. original: to the weights before quantization, read again from the base's files.
requantized: the first one quantized again by the run's quantizer.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loralab.adapters.files import readable_as
from loralab.adapters.merging import check_spec
from loralab.artifacts import damage, merged_files
from loralab.artifacts.damage import Damage
from loralab.artifacts.folders import new_folder
from loralab.artifacts.reopen import OpenRun, open_run, read_run, spec_of
from loralab.artifacts.swap import DENSE, DEQUANTIZED, ORIGINAL, REQUANTIZED, Change, Merged, Merger
from loralab.data.encoding import Encoded
from loralab.errors import ConfigError, DataError
from loralab.quantization import stored
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.none import NoQuantization
from loralab.records.environment import environment
from loralab.running.inputs import Inputs
from loralab.training.specs import TrialSpec
from loralab.training.trainer import quiet

log = logging.getLogger(__name__)

ROWS = 64
ROUNDED = (
    "the run's quantization rounds what enters a layer as well, which no dense weight does: the dense ways compute "
    "without that rounding"
)


@dataclass(frozen=True)
class Request:
    """What is asked for. ``onto``: original, dequantized or None (dequantized over a quantized base); ``dtype``: of the
    weights, None: that of the base's checkpoint; ``rows``: validation rows to measure on, 0: nothing is measured."""

    out: Path
    onto: str | None = None
    requantize: bool = False
    dtype: str | None = None
    rows: int = ROWS

    def way(self, spec: TrialSpec) -> str:
        """The way that is written. Raises ConfigError where the request contradicts itself or the run."""
        if isinstance(spec.quantization, NoQuantization):
            if self.onto or self.requantize:
                flag = f"--onto {self.onto}" if self.onto else "--requantize"
                raise ConfigError(f"{flag} is of a quantized base, and this run's is not; valid: without it")
            return DENSE
        if self.requantize and self.onto == ORIGINAL:
            raise ConfigError(
                "--requantize quantizes what the run computes with, the update on the dequantized weights, and does "
                "not go with --onto original; valid: one of the two"
            )
        return REQUANTIZED if self.requantize else self.onto or DEQUANTIZED


def merge(folder: Path, request: Request) -> dict[str, Any]:
    """Merges the run in ``folder`` into ``request.out`` and returns what ``merge.json`` there holds.

    Raises ConfigError where method or request do not allow it or the folder is taken, ArtifactError where the run does
    not fit its base any more, DataError where the rows cannot be read, DiskError; nothing is left behind then.
    """
    quiet()
    spec = spec_of(folder, read_run(folder))
    check_spec(spec.adapter)
    chosen = request.way(spec)
    with new_folder(request.out) as partial:
        inputs = Inputs()
        rows = _rows(spec, inputs) if request.rows else None
        run = open_run(folder, inputs)
        before = run.untrained().model if run.spec.adapter.changes_base else None
        dtype = getattr(torch, request.dtype) if request.dtype else _stored_dtype(run)
        merger = Merger(run, dtype, before)
        work = _Work(run, merger, chosen, partial, None if rows is None else Damage(run, rows, request.rows))
        if not request.dtype:
            work.notes += _rounded(dtype, run.model.dtype)  # type: ignore[arg-type]
        result = work.result(request)
        (partial / merged_files.FIGURES).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        readable_as(partial / merged_files.FIGURES)
    return result


def _rows(spec: TrialSpec, inputs: Inputs) -> Encoded:
    try:
        return inputs.rows(spec)
    except DataError as error:
        raise DataError(f"{error}; --no-measure merges without the run's data") from error


def _stored_dtype(run: OpenRun) -> torch.dtype:
    """Of the weights in the base's checkpoint."""
    own: torch.dtype = run.model.dtype  # type: ignore[assignment]
    found = getattr(run.spec.model.architecture(), "dtype", None) if run.spec.model.dtype != "auto" else None
    return found if isinstance(found, torch.dtype) else own


def _rounded(written: torch.dtype, computed: torch.dtype) -> list[str]:
    """A note where the checkpoint's dtype has fewer bits than the run computed with."""
    if written.itemsize >= computed.itemsize:
        return []
    short, long = (str(dtype).removeprefix("torch.") for dtype in (written, computed))
    return [f"what is dense is rounded to {short}, as the base's checkpoint is; the run had {long}: --dtype {long}"]


@dataclass
class _Work:
    run: OpenRun
    merger: Merger
    chosen: str
    partial: Path
    damage: Damage | None
    notes: list[str] = field(default_factory=list)

    def result(self, request: Request) -> dict[str, Any]:
        """What merge.json holds; the chosen way is written on the way."""
        run, measuring = self.run, self.damage
        base = measuring.base(self.merger.before) if measuring else None
        ways: dict[str, Any] = {}
        changes: dict[str, dict[str, Change]] = {}
        written: dict[str, Any] = {}
        for way in self.merger.ways if measuring else [self.chosen]:
            try:
                merged = self.merger.merge(way)
            except ConfigError as error:
                if way == self.chosen:
                    raise
                ways[way] = {"undefined": {"loss": str(error)}}
                self.notes.append(f"{way}: not merged, since {error}")
                continue
            changes[way], ways[way] = merged.changes, damage.weights(merged.changes)
            if measuring:
                ways[way] = _joined(ways[way], measuring.merged(merged))
            log.info("%s: merged%s", way, " and measured" if measuring else "")
            if way == self.chosen:
                written = self._write(merged)
        self._note(ORIGINAL in ways)
        return {
            "run": str(run.folder.absolute()),
            "out": str(request.out.absolute()),
            "method": run.spec.adapter.method,
            "base": {key: run.record["base"][key] for key in ("name", "fingerprint")},
            "quantization": run.spec.quantization.name,
            **written,
            "definitions": damage.DEFINITIONS,
            "measured": measuring.about if measuring else None,
            "without_adapter": base,
            "ways": ways,
            "layers": dict(damage.layers(changes)),
            "notes": self.notes,
            "versions": environment()["versions"],
        }

    def _write(self, merged: Merged) -> dict[str, Any]:
        """What was written, and how."""
        packed, why = None, ""
        if self.chosen == REQUANTIZED:
            packed, why = merged_files.packed_config(self.run, list(self.merger.frozen), self.merger.dtype)
        with merged.on():
            merged_files.save(self.run, merged, self.partial, packed)
        dtype = str(self.merger.dtype).removeprefix("torch.")
        if why:
            self.notes.append(f"the requantized weights are written as the dense {dtype} values of their codes: {why}")
        unfit = [name for name, layer in self.merger.frozen.items() if packed and stored.unfit_for_cpus(layer)]
        if unfit:
            self.notes.append(
                f"bitsandbytes computes with {unfit[0]} ({len(unfit)} such layers) on GPUs, not on CPUs with bfloat16 "
                f"instructions, since its output features are no multiple of {stored.CPU_ROWS}"
            )
        if merged.untied:
            self.notes.append("a weight that layers of the base share is one for each of them now: they differ")
        kind = "bitsandbytes" if packed else "dense"
        return {"written": self.chosen, "format": kind, "dtype": dtype, "untied": merged.untied}

    def _note(self, onto_original: bool) -> None:
        spec = self.run.spec.adapter
        if any(type(layer).product is not FrozenLinear.product for layer in self.merger.frozen.values()):
            self.notes.append(ROUNDED)
        if onto_original and spec.start_differs:
            self.notes.append(f"original: {spec.start_differs}, and the original weights have not lost it")
        unused = self.run.adapter.never_called() if self.damage else []
        if unused:
            self.notes.append(
                f"the base never calls {unused[0]} ({len(unused)} such layers): in the run its update has no effect, "
                "and merged it may have one"
            )
        if self.damage and self.damage.about["changed"]:
            self.notes.append("the validation rows are not those of the run: its data has changed since")


def _joined(weights: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    undefined = {**weights.pop("undefined", {}), **scores.pop("undefined", {})}
    return {**scores, **weights, **({"undefined": undefined} if undefined else {})}
