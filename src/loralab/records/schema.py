"""What a record holds: the keys of result.json, section by section, and their types. None: not known, or undefined.

Numbers that are not finite are None. Keys that an earlier version did not have are None in its records.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

Number = int | float | None
Text = str | None


class BaseSection(TypedDict, total=False):
    """The frozen base model."""

    name: Text
    fingerprint: Text  # of the weights as they lie on disk
    parameters: Number
    quantized_parameters: Number
    bytes: Number
    bits_per_parameter: Number  # of the quantized layers
    bits_per_parameter_overall: Number
    out_of_reach: dict[str, Any] | None  # {parameters, share, names} of no linear layer
    attn_implementation: Text
    dequantize: Text  # resident or per_use, what quantization.dequantize came to
    precision: Text  # of the passes, what trainer.precision came to


class AdapterSection(TypedDict, total=False):
    """What the trial trains."""

    method: Text
    trainable_parameters: Number
    bytes: Number
    modules: list[str] | None  # names of the layers that it changes
    never_called: list[str] | None  # those of them that no pass has called
    note: Text  # on its start


class OptimizerSection(TypedDict, total=False):
    """The trial's own optimizer state."""

    name: Text
    effective_name: Text
    state_bytes: Number
    eight_bit_bytes: Number
    paged_bytes: Number
    paged_fraction: Number
    paging: Text
    note: Text


class MemorySection(TypedDict, total=False):
    """Bytes. Predicted and measured ones are the pack's, ``alone_peak_bytes`` the trial's own; observers may add
    keys."""

    device: Text
    alone_peak_bytes: Number
    predicted_peak_bytes: Number
    predicted_by_kind: dict[str, int] | None  # what lies in memory at that peak (planning/tracker.py)
    measured_peak_bytes: Number
    by_phase: dict[str, Any] | None
    spikes: list[dict[str, Any]] | None
    spike_count: Number
    instrument: Text
    measured_batch: dict[str, Any] | None
    seconds_by_phase: dict[str, Any] | None
    resident_by_phase: dict[str, Any] | None
    reserved_by_phase: dict[str, Any] | None
    host_rss_peak_bytes: Number
    host_available_least_bytes: Number
    device_used_peak_bytes: Number
    managed_peak_bytes: Number
    managed_resident_peak_bytes: Number
    other_processes: Any
    ballast_bytes: Number
    cap_bytes: Number
    simulated: Any
    predicted_on_card: dict[str, Any] | None  # of a run with long batches: by step (planning/spikes.py)


class TimeSection(TypedDict, total=False):
    """Seconds, of the pack; steps and tokens are the trial's own."""

    startup_s: Number
    train_s: Number
    wall_s: Number
    steps: Number
    tokens: Number  # padding not counted
    tokens_per_s: Number


class PackSection(TypedDict, total=False):
    """Which trials ran together."""

    size: Number
    index: Number
    why: Text  # it ran alone
    halved: list[int] | None  # sizes that were too much for the memory


class DataSection(TypedDict, total=False):
    """What the trial was fed with and scored on."""

    name: Text
    fingerprint: Text
    targets: Text  # fingerprint of the tokens that the losses are over
    tokenizer: Text  # fingerprint
    source: Text  # fingerprint of what the rows were read from
    max_length: Number
    rows: dict[str, int] | None
    truncated: Number
    packing: dict[str, float] | None  # rows, sequences and fill of the first epoch, where rows are packed
    id2label: dict[Any, str] | None
    label2id: dict[str, int] | None
    limited: dict[str, list[int]] | None  # {split: [rows scored or trained on, rows there are]} by a trainer's limit
    generation: dict[str, Any] | None
    rouge: Text
    bleu: Text
    forgetting: dict[str, Any] | None  # data.forgetting: {name, fingerprint, targets, source, rows} of what was scored


class EnvironmentSection(TypedDict, total=False):
    """Where it ran."""

    versions: dict[str, Any] | None
    git: Text
    python: Text
    cpu: Text
    gpu: Text
    threads: Number
    processes: Number  # that trained it together


class CodeSection(TypedDict, total=False):
    """What is not loralab's: classes and yaml files of the user's own."""

    sources: dict[str, str] | None  # {module: fingerprint of the file that defines its classes}
    files: list[str] | None  # yaml files, below ``cwd`` or absolute


class Record(TypedDict, total=False):
    """One trial."""

    schema: int
    trial: str
    status: str
    error: Text
    exit_code: int | None
    config: dict[str, Any]
    overrides: list[str]
    flags: list[str] | None  # Hydra's, that say where yaml files are looked up: --config-dir and its folder
    choices: dict[str, Text]
    seed: int | None
    metrics: dict[str, Any]
    base: BaseSection
    adapter: AdapterSection
    optimizer: OptimizerSection
    memory: MemorySection
    time: TimeSection
    pack: PackSection
    data: DataSection
    environment: EnvironmentSection
    code: CodeSection
    cwd: Text
    pid: int | None
    host: Text
    process: Text  # tells it from a later one with the same pid (records/process.py)
    resumed_from: int | None  # the step
    stopped_early: dict[str, Any] | None  # {step, metric, best, min_delta}; {step, why} where no metric ended it
    pauses: list[dict[str, Any]] | None  # trainer.until: {until, step, of, metrics} of each, in order
    best: dict[str, Any] | None  # trainer.keep_best: {metric, step, value, last_step, last_value, adapter, last}


KEYS = {
    name: tuple(section.__annotations__)
    for name, section in Record.__annotations__.items()
    if hasattr(section, "__required_keys__")  # a TypedDict
}
EXTENSIBLE = ("memory",)  # observers may add keys


def unknown_keys(record: Mapping[str, Any]) -> list[str]:
    """Dotted keys that are not in the schema."""
    unknown = [key for key in record if key not in Record.__annotations__]
    return unknown + [
        f"{section}.{key}"
        for section, keys in KEYS.items()
        if section not in EXTENSIBLE
        for key in record.get(section) or ()
        if key not in keys
    ]


def wrong_values(record: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose value has another type than the schema says."""
    from pydantic import ValidationError

    try:
        _checker().validate_python(dict(record))
    except ValidationError as error:
        return list(dict.fromkeys(".".join(map(str, fault["loc"][:2])) for fault in error.errors()))
    return []


@cache
def _checker() -> Any:
    from pydantic import ConfigDict, TypeAdapter, with_config

    return TypeAdapter(with_config(ConfigDict(strict=True, extra="allow"))(Record))
