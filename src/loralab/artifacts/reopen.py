"""A finished run opened again: its base as it was trained on, with its adapter attached."""

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import export
from loralab.adapters.base import Adapter
from loralab.adapters.hooks import BatchSlice
from loralab.config import staleness
from loralab.config.build import trial_spec
from loralab.data.base import FORGETTING
from loralab.errors import ArtifactError, ConfigError
from loralab.models.loading import Base
from loralab.records import record as records
from loralab.records import sources
from loralab.running.inputs import Inputs
from loralab.training.generation import evaluating
from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)

ON_CPU = {"16-mixed": "bf16-mixed", "tf32": "32-true"}  # the nearest precision that a CPU has


@dataclass
class OpenRun:
    """``spec``: as the run's configuration has it, on a device of this machine."""

    folder: Path
    record: dict[str, Any]
    spec: TrialSpec
    base: Base
    adapter: Adapter

    @property
    def model(self) -> nn.Module:
        """The base with the adapter's hooks, which act within ``adapted``."""
        return self.base.model

    @property
    def labels(self) -> int | None:
        """How many classes its data has; None: none."""
        return _labels(self.record)

    @contextmanager
    def adapted(self, rows: int) -> Iterator[None]:
        """Within, a forward pass of ``rows`` rows goes through the adapter, in evaluation mode without gradients."""
        with evaluating(self.model), self.base.hooks.batch(BatchSlice(self.adapter, rows)):
            yield

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within, a forward pass is the base's own; of a run that has trained the base itself it is the run's."""
        with evaluating(self.model):
            yield

    def untrained(self) -> "OpenRun":
        """Itself, or where the run has trained the base itself one over that base as it was, which is loaded anew:
        ``bare`` of it is the base before training."""
        return replace(self, base=Inputs().base(self.spec, self.labels)) if self.spec.adapter.changes_base else self

    def close(self) -> None:
        """Detaches the adapter; the base is as it was."""
        self.adapter.detach()


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run that has left an adapter. Raises ArtifactError where it has none."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected the folder of a run, with result.json and adapter/")
    if not (folder / records.RESULT).exists() and (below := records.find(folder)):
        raise ArtifactError(
            f"{folder} is no run but holds {len(below)}: name one of them, as in {below[0]} (loralab ls {folder})"
        )
    record = records.read(folder)
    if not (folder / "adapter" / export.SPEC).exists():
        ended = f"it is {record['status']}" + (f": {record['error']}" if record["error"] else "")
        raise ArtifactError(f"{folder} has no adapter ({ended}); valid: a completed run, with adapter/{export.SPEC}")
    if lacking := [part for part in ("model", "data") if not isinstance(record["config"].get(part), Mapping)]:
        raise ArtifactError(f"{folder / records.RESULT}: damaged: its config has no {lacking[0]}")
    return record


def spec_of(folder: Path, record: Mapping[str, Any]) -> TrialSpec:
    """The spec of a record, its relative paths taken from where the run was started, without data.forgetting, on which
    it was only scored. A GPU that this machine lacks is replaced by its CPU. Raises ConfigError or ArtifactError where
    the record's configuration is none of today's."""
    config = staleness.placed(record["config"], record.get("cwd"))
    config = {**config, "data": {**config["data"], FORGETTING: None}}
    if record["code"]["sources"]:  # classes of the folder that it was started in
        sources.importable(record.get("cwd"))
    try:
        spec = trial_spec(
            config,
            folder,
            record["overrides"],
            record["choices"],
        )
    except ConfigError as error:
        raise ArtifactError(f"{folder / records.RESULT}: its configuration is not valid today: {error}") from error
    try:
        device = spec.trainer.device
    except ConfigError:
        device = "cpu"
        log.warning("%s was trained on a GPU; this machine has none, so it runs on the CPU", folder)
    changes: dict[str, Any] = {"precision": _precision(spec, record, device)}
    if device == "cpu":
        changes["accelerator"] = "cpu"
    return replace(spec, trainer=replace(spec.trainer, **changes))


def _precision(spec: TrialSpec, record: Mapping[str, Any], device: str) -> str:
    """The precision that the run was computed in, or the one nearest to it where ``device`` is a CPU."""
    precision = str(record["base"].get("precision") or spec.trainer.precision)
    if precision == "auto":  # before records said so, auto was always this
        return "32-true"
    return ON_CPU.get(precision, precision) if device == "cpu" else precision


def open_run(folder: Path, inputs: Inputs | None = None, quantization: Any = None) -> OpenRun:
    """The run in ``folder`` with its base loaded and its adapter attached.

    ``inputs``: keeps the base for the next run that shares it; None: loads it anew. ``quantization``: another than the
    run's, for the same weights; None: the run's. Raises ArtifactError where the run has no adapter, where base or
    tokenizer have changed since, or where the adapter does not fit or is not finite; ConfigError where the base cannot
    be loaded.
    """
    record = read_run(folder)
    spec = spec_of(folder, record)
    if quantization is not None:
        spec = replace(spec, quantization=quantization)
    if changed := staleness.base_changed(record):
        raise ArtifactError(f"{folder} does not fit its base any more: {changed}")
    base = (inputs or Inputs()).base(spec, _labels(record))
    if base.fingerprint != record["base"]["fingerprint"] and None not in (
        base.fingerprint,
        record["base"]["fingerprint"],
    ):
        raise ArtifactError(
            f"{folder} does not fit its base any more: its weights are not those that it was trained on"
        )
    adapter = export.load(folder / "adapter", base.model)
    for name, value in adapter.named_parameters():
        if not bool(torch.isfinite(value).all()):
            adapter.detach()
            raise ArtifactError(f"{folder / 'adapter'}: {name} holds nan or infinite values; valid: finite ones")
    adapter.to(spec.trainer.device)
    if spec.trainer.precision == "bf16-true":  # so Lightning has trained them
        base.model.to(torch.bfloat16)
        adapter.to(torch.bfloat16)
    return OpenRun(folder, record, spec, base, adapter)


def unsaved(folder: str, *_: Any, **__: Any) -> None:
    """In place of ``save_pretrained`` of the model of the run in ``folder``. Raises ArtifactError."""
    place = shlex.quote(folder)
    raise ArtifactError(
        "save_pretrained would write the base alone, without the adapter; valid: loralab merge"
        f" {place} --out DIR, which writes one model, or loralab export {place} --out DIR, which writes the adapter"
    )


def _labels(record: Mapping[str, Any]) -> int | None:
    return len(record["data"].get("id2label") or ()) or None
