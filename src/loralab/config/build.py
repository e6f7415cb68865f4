"""From a composed configuration to checked specs: unknown keys and wrong types fail before anything loads."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from loralab.config import identity
from loralab.config.callbacks import callbacks, stopping
from loralab.config.classes import BARE, target
from loralab.config.compose import compose, plain
from loralab.config.loggers import logger
from loralab.config.metrics import of_texts, own_metrics
from loralab.config.places import conf_folders, data_root, options, searched
from loralab.data.base import FORGETTING
from loralab.errors import ConfigError, DataError, nearest
from loralab.records.wandb_run import LONGEST_TAG

if TYPE_CHECKING:
    from loralab.training.specs import TrialSpec

SPECS = (
    *("trainer", "plan", "logger", "data"),  # need no torch, so that an error in them is reported at once
    *("adapter", "quantization", "optimizer", "schedule", "model", "memory"),
)
OTHERS = ("callbacks", "metrics", "seed", "metric", "metric_mode", "sweep")
KINDS = {  # what a class of a section derives from
    "adapter": "loralab.adapters.base.AdapterSpec",
    "quantization": "loralab.quantization.base.Quantizer",
    "data": "loralab.data.base.DataSpec",
}
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes of a file's name, characters of a path
CACHE_SIZE = 4096

_built: dict[tuple[Any, str, str], Any] = {}  # specs are frozen, so that trials may share equal ones


def build(node: Mapping[str, Any], key: str) -> Any:
    """The spec that ``node`` names in ``_target_``, its fields checked by name and type. Raises ConfigError.

    ``key``: where ``node`` stands in the configuration. Equal settings give one object.
    """
    if key == "logger":
        return logger(node)
    return _one(node, key)


def _one(node: Mapping[str, Any], key: str) -> Any:
    _check_paths(node, key)
    cls = target(node, key)
    cache_key = (cls, key, json.dumps(node, default=repr))
    if cache_key not in _built:
        if len(_built) >= CACHE_SIZE:
            _built.clear()
        _built[cache_key] = _build(cls, node, key)
    return _built[cache_key]


def _build(cls: Any, node: Mapping[str, Any], key: str) -> Any:
    from loralab.spec import make  # pydantic, which a configuration that is only shown does not need

    values = {str(name): value for name, value in node.items() if name != "_target_"}
    if key in BARE and not is_dataclass(cls):
        from loralab.optim import foreign, schedulers

        return foreign.optimizer_of(cls, values) if key == "optimizer" else schedulers.schedule_of(cls, values)
    if key.partition(".")[0] == "data" and (other := values.get(FORGETTING)) is not None:
        if isinstance(other, str):
            raise ConfigError(
                f"data.forgetting={other!r} is a text, where another data set's settings belong; valid:"
                f" +data@data.forgetting={other} with an option of conf/data/, or null"
            )
        values[FORGETTING] = build(other, f"{key}.{FORGETTING}")
    base = KINDS.get(key.partition(".")[0], "")
    derived = isinstance(cls, type) and (
        not base or base in [f"{each.__module__}.{each.__name__}" for each in cls.__mro__]
    )
    if not (derived and isinstance(cls, type) and is_dataclass(cls)):
        raise ConfigError(
            f"{key}._target_={node['_target_']!r} is no {base.rpartition('.')[2] or 'spec of loralab'}; valid: a"
            f" dataclass derived from {base or 'one'}"
        )
    try:
        return make(cls, _trainer(cls, values) if key == "trainer" else values, key)
    except (TypeError, ValueError) as error:  # of a class of the user's own
        raise ConfigError(f"{key}: {cls.__name__} refuses its options: {error}") from error


def _trainer(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """``values`` as fields of ``cls``, a TrainerSpec, with Lightning's other arguments apart."""
    from loralab.training.arguments import split
    from loralab.training.trainer import TrainerSpec

    own = [field.name for field in fields(cls) if field.name not in ("decisive", "passed")]
    return split(values, tuple(own)) if issubclass(cls, TrainerSpec) else values


def _check_paths(node: Any, key: str) -> None:
    """Raises ConfigError or DataError for a path that is longer than any file system allows."""
    section = key.partition(".")[0]
    for name in identity.PATHS.get(section, ()) if isinstance(node, Mapping) else ():
        value = str(node.get(name) or "")
        longest = max(len(part.encode(errors="replace")) for part in value.split("/"))
        if longest > LONGEST_NAME or len(value) > LONGEST_PATH:
            text = f"{key}.{name}={value[:40]}... has {len(value)} characters, and no file has such a name"
            raise (DataError if section == "data" else ConfigError)(f"{text}; valid: an existing path")


def trial_id(config: DictConfig | Mapping[str, Any]) -> str:
    """10 hex digits over all settings that decide a trial's result: the same packed, alone, in any folder.

    ``config``: composed, or plain and resolved.
    """
    content = _content(config)
    try:
        _check_keys(content)
        return identity.trial_id({key: build(content[key], key) for key in SPECS if key in identity.USUAL}, content)
    except Exception:  # invalid settings: the error is reported when the specs are built
        return identity.unbuilt_id(content)


def trial_spec(
    config: DictConfig | Mapping[str, Any],
    folder: Path,
    overrides: list[str] | None = None,
    choices: Mapping[str, str] | None = None,
) -> "TrialSpec":
    """Every part of ``config`` built and checked. Raises ConfigError with the dotted key that is wrong."""
    content = _content(config)
    _check_keys(content)
    _check_scalars(content)
    specs = {key: build(content[key], key) for key in SPECS}
    specs["adapter"].check_quantization(specs["quantization"])
    # how many steps an epoch has is known with its rows: settled checks the steps behind the first one
    last = 0 if "max_epochs" in specs["trainer"].decisive else None
    specs["schedule"].check(specs["trainer"].max_steps, specs["optimizer"].lr, last)
    made = callbacks(content.get("callbacks") or {})
    metrics = _metrics(content.get("metrics") or {}, specs)
    watchable = _check_metric(content["metric"], content["metric_mode"], specs, metrics)
    stops = stopping(made, specs["trainer"], watchable) if made else {}
    _check_packing(specs)
    _check_processes(specs)
    if specs["data"].forgetting is not None and specs["model"].task == "sequence_classification":
        raise ConfigError(
            "data.forgetting: model.task=sequence_classification trains a new head, which has learned nothing"
            " to forget; valid: null, or model.task=causal_lm or seq2seq_lm"
        )
    from loralab.training.specs import TrialSpec  # imports torch and Lightning: after the checks

    return TrialSpec(
        id=identity.trial_id(specs, content),
        folder=folder,
        seed=content["seed"],
        metric=content["metric"],
        metric_mode=content["metric_mode"],
        **specs,
        callbacks={name: make for name, make in made.items() if name not in stops},
        stops=tuple(stops.values()),
        metrics=metrics,
        config=content,
        overrides=list(overrides or []),
        choices=dict(choices or {}),
        sweep=(content.get("sweep") or {}).get("name"),
    )


def _content(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    return plain(config) if isinstance(config, DictConfig) else cast(dict[str, Any], config)


def _check_keys(content: Mapping[str, Any]) -> None:
    valid = (*SPECS, *OTHERS)
    for key in valid:
        if key not in content:
            raise ConfigError(f"{key} is missing: ~{key} took it away; valid: all of {', '.join(valid)}")
    for key in content:
        if key not in valid:
            raise ConfigError(f"{key} is not an option; {nearest(key, valid)}")
    for key in ("sweep", "callbacks", "metrics"):
        if not isinstance(content[key], Mapping | None):
            raise ConfigError(f"{key}={content[key]!r} is no group of settings; valid: a mapping, or null")
    check_tags((content["sweep"] or {}).get("tags"))


def check_tags(tags: Any) -> None:
    """Raises ConfigError where W&B would refuse the tags of a sweep."""
    if tags is None:
        return
    if not isinstance(tags, list) or not all(isinstance(tag, str) and 1 <= len(tag) <= LONGEST_TAG for tag in tags):
        raise ConfigError(f"sweep.tags={tags!r}; valid: a list of texts of 1 to {LONGEST_TAG} characters, as in [lora]")


def _check_scalars(content: Mapping[str, Any]) -> None:
    if content["metric_mode"] not in ("min", "max"):
        raise ConfigError(f"metric_mode must be min or max, got {content['metric_mode']!r}")
    if type(content["seed"]) is not int or content["seed"] < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, got {content['seed']!r}")
    if not isinstance(content["metric"], str):
        raise ConfigError(f"metric must be the name of a metric, such as val/loss, got {content['metric']!r}")


def _metrics(nodes: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
    """{name: function that makes the metric} of the ``metrics`` group."""
    if not any(nodes.values()):
        return {}
    from loralab.forward.metrics import names

    task, data = _kind(specs["model"]), specs["data"]
    generated = data.generate_rows > 0 and task in ("causal_lm", "seq2seq_lm")
    known = [name.rpartition("/")[2] for name in names(task, True, False, True, True)]
    return dict(own_metrics(nodes, known, task, generated))


def _kind(model: Any) -> str:
    """The task of ``model``, or regression."""
    scores = model.task == "sequence_classification" and model.num_labels == 1
    return "regression" if scores else str(model.task)


def _check_metric(metric: str, mode: str, specs: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The names of what every validation on the way measures. Raises ConfigError for a metric that is not measured."""
    from loralab.forward.metrics import HIGHER, names

    model, data, trainer = specs["model"], specs["data"], specs["trainer"]
    if data.generate_rows and model.task == "sequence_classification":
        raise ConfigError(f"data.generate_rows={data.generate_rows}: a classifier generates no text; valid: 0")
    task = _kind(model)
    watchable = names(task, False, False, data.documents)
    watchable += [f"val/{name}" for name, make in own.items() if not of_texts(make.func)]
    if (trainer.patience is not None or trainer.keep_best) and metric not in watchable:
        key = "keep_best" if trainer.patience is None else "patience"
        raise ConfigError(
            f"trainer.{key} watches metric={metric!r}, which no validation on the way measures;"
            f" valid: {', '.join(watchable)}"
        )
    valid = names(task, data.generate_rows > 0, trainer.test, data.documents, data.multiple_choice)
    valid += [f"{split}/{name}" for split in ("val", *(["test"] if trainer.test else [])) for name in own]
    if metric.startswith(f"{FORGETTING}/"):
        raise ConfigError(
            f"metric={metric!r}: by scores on data.forgetting nothing is chosen or ranked; valid: {', '.join(valid)}"
        )
    if metric not in valid:
        raise ConfigError(f"metric={metric!r} is not measured by this run; {nearest(str(metric), valid)}")
    name = metric.rpartition("/")[2]
    higher = own[name]().higher_is_better if name in own else name in HIGHER
    best = "max" if higher else "min"
    if higher is not None and mode != best:
        which = "higher" if best == "max" else "lower"
        raise ConfigError(f"metric_mode={mode} would rank a worse {metric} first: {which} is better; valid: {best}")
    return watchable


def _check_packing(specs: Mapping[str, Any]) -> None:
    """Raises ConfigError for data.packing=true where rows cannot share a sequence whatever the base."""
    model, data, adapter = specs["model"], specs["data"], specs["adapter"]
    if not data.packing:
        return
    if model.task != "causal_lm":
        reason = f"model.task={model.task} has no sequences that rows could share; valid: causal_lm"
    elif data.documents:
        reason = "plain text is cut into full sequences already; valid: false"
    elif not adapter.tokenwise:
        reason = (
            f"adapter={adapter.method} needs rows of their own, with their padding; valid: lora, or data.packing=false"
        )
    elif model.compile != "none":
        reason = f"model.compile={model.compile} pads rows; valid: model.compile=none"
    elif specs["memory"].spiky_every is not None:
        reason = "memory.spiky_every pads rows, and packed ones have no padding; valid: memory.spiky_every=null"
    else:
        return
    raise ConfigError(f"data.packing=true: {reason}")


def _check_processes(specs: Mapping[str, Any]) -> None:
    """Raises ConfigError for a trial that several processes cannot train with the results of one."""
    trainer, data, quantization = specs["trainer"], specs["data"], specs["quantization"]
    if not trainer.strategy or (size := trainer.processes) == 1:
        return
    key = f"trainer.strategy={trainer.strategy}"
    if data.batch_size % size:
        nearest_sizes = sorted({max(size, data.batch_size // size * size), -(-data.batch_size // size) * size})
        raise ConfigError(
            f"data.batch_size={data.batch_size}: it is that of all {size} processes together, which do not divide it;"
            f" valid: {' or '.join(map(str, nearest_sizes))}, or another trainer.devices"
        )
    if not quantization.packable:
        raise ConfigError(
            f"{key}: quantization={quantization.name} takes scales or outlier columns over all rows of a pass, of which"
            " each process has its share; valid: another quantization, or trainer=auto"
        )
    if limits := [name for name in ("ballast", "cap", "snapshot", "spiky_every") if getattr(specs["memory"], name)]:
        raise ConfigError(f"{key}: memory.{limits[0]} is about the memory of one process; valid: null, or trainer=auto")
    if trainer.strategy != "fsdp":
        return
    spread = "which spreads the frozen base over devices"
    if specs["adapter"].changes_base:
        raise ConfigError(f"{key}, {spread}: adapter={specs['adapter'].method} trains the base itself; valid: lora")
    if quantization.dequantize == "resident":
        raise ConfigError(f"{key}, {spread}: quantization.dequantize=resident keeps dense weights; valid: per_use")
    if specs["model"].compile != "none":
        raise ConfigError(f"{key}, {spread}: its blocks are not compiled; valid: model.compile=none")
    if data.packing:
        raise ConfigError(f"{key}, {spread}: data.packing=true is computed another way; valid: data.packing=false")


def quantizers(config: DictConfig, config_dir: str | None = None) -> dict[str, Any]:
    """The schemes of a quantization study by name: ``study.schemes``, or the one that ``quantization=`` chooses.

    A scheme is {option: a file of conf/quantization, the user's or loralab's, any of its keys}; an option of
    the scheme's own name may be left out. Each spec is built, so that a wrong key is told before a weight is read.
    """
    content = plain(config)
    chosen = build(content["quantization"], "quantization")
    if chosen.name != "none":
        return {chosen.name: chosen}
    schemes = {str(name): dict(keys or {}) for name, keys in content["study"]["schemes"].items()}
    return {name: _scheme(name, keys, config_dir) for name, keys in schemes.items()}


def _scheme(name: str, keys: dict[str, Any], config_dir: str | None) -> Any:
    shipped = options(data_root() / "conf" / "quantization")
    with searched(config_dir):
        users = {option for folder in conf_folders().values() for option in options(folder / "quantization")}
    option = str(keys.pop("option", name))
    if option not in {*shipped, *users}:
        valid = nearest(option, sorted({*shipped, *users}))
        raise ConfigError(f"study.schemes.{name}.option={option!r} is unknown; {valid}")
    if option in users:  # which may have a defaults list
        stored: Any = compose([f"quantization={option}"], config_dir=config_dir)["quantization"]
    else:
        stored = OmegaConf.load(shipped[option])
    node = OmegaConf.merge(stored, keys)
    return build(cast(Any, OmegaConf.to_container(node)), f"study.schemes.{name}")
