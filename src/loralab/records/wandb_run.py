"""What a run in W&B says of a trial: its name, group, tags, configuration and summary, all taken from its record."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError
from loralab.records.metric_logger import Labels
from loralab.records.record import PHASES, SWEEP, read_sweep
from loralab.records.secrets import redact

GIB = 2**30
LONGEST_NAME, LONGEST_TAG = 128, 64  # characters, W&B's bounds
# The resident set of the process, on a CPU: it is read at the end of each phase and is not what the phase needs.
RESIDENT = frozenset(f"memory/{phase}_peak_gib" for phase in PHASES)


def labels(folder: Path, record: Mapping[str, Any]) -> Labels:
    """Of the trial in ``folder``. ``config`` holds, beside the values, the trial's id and the names that were chosen
    (``choices.quantization: nf4_double``); what looks like a secret is masked."""
    config = redact(record["config"])
    sweep = config.get("sweep") or {}
    return Labels(
        name=run_name(folder, record),
        group=sweep.get("name"),
        job_type="train" if (config.get("trainer") or {}).get("max_steps", 1) else "evaluate",
        tags=tuple(sweep.get("tags") or ()),
        config={**config, "trial": record["trial"], "choices": dict(record["choices"])},
    )


def run_name(folder: Path, record: Mapping[str, Any]) -> str:
    """The swept axes with this trial's values, ``r=8 nf4_double seed=0``; of a single run all its settings; the trial's
    id where there are none. A name that W&B would refuse as too long is cut, and ends with the id."""
    words = [str(word).lstrip("+") for word in redact(record["overrides"])]
    settings = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("hydra"))
    axes = _axes(folder.parent)
    swept = {key: value for key, value in settings.items() if key in axes} or settings
    short = Counter(key.rpartition(".")[2] for key in swept)
    parts = []
    for key, value in swept.items():
        last = key.rpartition(".")[2]
        parts.append(value if key in record["choices"] else f"{last if short[last] == 1 else key}={value}")
    name, trial = " ".join(parts), str(record["trial"])
    return (name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - len(trial) - 2]}… {trial}") or trial


def _axes(folder: Path) -> Sequence[str]:
    """The swept keys of the sweep in ``folder``; none where there is no sweep."""
    if not (folder / SWEEP).is_file():
        return ()
    try:
        return list(read_sweep(folder)["axes"])
    except ArtifactError:
        return ()


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics, status and costs of a finished trial, without what is not known. Speed and measured memory of trials
    that ran together are the pack's, and are named so."""
    memory, pack, optimizer = record["memory"], record["pack"], record["optimizer"]
    prefix = "pack/" if (pack["size"] or 1) > 1 else ""
    costs = {
        "bits_per_parameter": record["base"]["bits_per_parameter"],
        "trainable_parameters": record["adapter"]["trainable_parameters"],
        "memory/alone_peak_gib": _gib(memory["alone_peak_bytes"]),
        f"{prefix}memory/measured_peak_gib": _gib(memory["measured_peak_bytes"]),
        **{f"{prefix}memory/{phase}_peak_gib": _gib(peak) for phase, peak in (memory["by_phase"] or {}).items()},
        "pack/size": pack["size"],
        f"{prefix}tokens_per_s": record["time"]["tokens_per_s"],
        f"{prefix}train_s": record["time"]["train_s"],
        "optimizer/effective_name": optimizer["effective_name"],
        "optimizer/state_gib": _gib(optimizer["state_bytes"]),
        "optimizer/paged_gib": _gib(optimizer["paged_bytes"]),
        "optimizer/paged_fraction": optimizer["paged_fraction"],
    }
    known = {key: value for key, value in costs.items() if value is not None}
    return {**known, **(record["metrics"] or {}), "status": record["status"]}


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


def not_measured(device: str | None) -> frozenset[str]:
    """The series of metrics.jsonl that W&B is not given: memory by phase where it is not measured by phase."""
    return frozenset() if device == "cuda" else RESIDENT
