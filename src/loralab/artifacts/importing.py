"""An adapter of PEFT or loralib becomes a run folder: composed, attached to its base, checked against it, written."""

import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters import export
from loralab.adapters.attached import attached
from loralab.adapters.base import Adapter, new_heads
from loralab.adapters.files import WEIGHTS, read_state, write_state
from loralab.adapters.targets import within
from loralab.adapters.virtual import KEY
from loralab.artifacts.converted import converted, virtual_tokens
from loralab.artifacts.folders import new_folder, refuse_taken
from loralab.artifacts.foreign import Foreign, Method, method_of, read_peft, saved_modules
from loralab.artifacts.loralib import read_loralib
from loralab.config.build import trial_spec
from loralab.config.compose import compose, plain
from loralab.errors import ArtifactError, ConfigError, LoralabError
from loralab.models.loading import Base
from loralab.records import card, fingerprints
from loralab.records import record as records
from loralab.records.environment import environment
from loralab.running.inputs import Inputs
from loralab.training.specs import TrialSpec

METRIC = re.compile(r"((?:train|val|test)/\w+)=(.*)")
ALPHA = "adapter.lora_alpha"
LISTED = 3  # keys named in a message


@dataclass(frozen=True)
class Words:
    """``settings``: of the configuration; ``metrics``: the record's; ``lora_alpha``: of a loralib file, or None."""

    settings: list[str]
    metrics: dict[str, float]
    lora_alpha: float | None

    def names(self, *keys: str) -> bool:
        """Whether a setting has one of ``keys``."""
        return any(word.lstrip("+").partition("=")[0] in keys for word in self.settings)


def import_adapter(path: Path, out: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the adapter at ``path``, a folder of PEFT's or a file of loralib's, as the run folder ``out``, and returns
    its record. ``words``: ``key=value``, the base's settings and metrics such as ``val/accuracy=0.87``.

    Nothing is written where an error is raised: ConfigError for an option that loralab lacks, a base that is not named
    or cannot be loaded; ArtifactError where the files are damaged or do not fit the base; DiskError.
    """
    refuse_taken(out)
    loralib = not path.is_dir()
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder; valid: a PEFT adapter's folder, or a loralib state dict")
    chosen = _chosen(words, loralib)
    foreign = read_loralib(path, chosen.lora_alpha) if loralib else read_peft(path)
    with readable(foreign):
        method, labels = method_of(foreign), foreign.labels
    settings = [*_settings(foreign, method, chosen), *chosen.settings]
    content = plain(compose(settings), [])
    content["model"].update({"num_labels": 1} if labels == 1 else {})
    spec = _spec(content, out, foreign, method, words)
    base = Inputs().base(spec, labels)
    with readable(foreign):
        foreign, method = converted(foreign, method, base.model)
        saved = saved_modules(foreign, dict(base.model.named_modules()))
    method = replace(method, fields={**method.fields, "modules_to_save": saved})
    spec = _spec(content, out, foreign, method, words)
    adapter = _attached(foreign, spec, base, saved)
    record = _record(foreign, spec, base, adapter, chosen)
    with new_folder(out) as partial:
        size = export.save(adapter, partial / "adapter", spec.seed)
        record["adapter"]["bytes"] = size
        card.write(partial / "adapter", record)
        records.write(partial, record)
    adapter.detach()
    return record


@contextmanager
def readable(foreign: Foreign) -> Iterator[None]:
    """Within, values of another kind than PEFT writes are an ArtifactError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{foreign.weights.parent} cannot be used: a value of another kind than PEFT writes ({reason})"
        ) from error


def _chosen(words: Sequence[str], loralib: bool) -> Words:
    """Raises ConfigError for a word that is none, or sets what the file says."""
    metrics = {found[1]: found[2] for word in words if (found := METRIC.fullmatch(word))}
    alpha, settings = None, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"loralab import: {word!r} is not understood; settings are key=value")
        if key == ALPHA and loralib:
            alpha = _number(key, value)
        elif key.lstrip("+~").partition(".")[0] == "adapter":
            more = f"; valid: {ALPHA}, which loralib's files do not hold" if loralib else ""
            raise ConfigError(f"loralab import: {key} is what the files say, and cannot be set{more}")
        elif key not in metrics:
            settings.append(word)
    if alpha is not None and alpha <= 0:
        raise ConfigError(f"{ALPHA}={alpha:g} must be a positive number")
    return Words(settings, {key: _number(key, value) for key, value in metrics.items()}, alpha)


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{key}={value!r} must be a finite number")
    return number


def _settings(foreign: Foreign, method: Method, chosen: Words) -> list[str]:
    """Words that the file gives and the command line does not."""
    made = [f"adapter={method.option}"]
    name = str(foreign.config.get("base_model_name_or_path") or "")
    if not chosen.names("model", "model._target_"):
        if name == fingerprints.SHIPPED and not chosen.names("model.name_or_path"):
            made.append("model=tiny")
        elif chosen.names("model.name_or_path"):
            made.append("model=hf")
        elif name in ("", "random"):
            raise ConfigError(
                f"{foreign.weights} does not name its base; valid: model.name_or_path=, a hub id or a local folder, or"
                " model= with an option of that group"
            )
        else:
            made += ["model=hf", f"model.name_or_path={name}"]
    if not chosen.names("model.task"):
        if foreign.task is None:
            raise ConfigError(
                f"{foreign.weights} does not say what its base does; valid: model.task=causal_lm, seq2seq_lm or"
                " sequence_classification"
            )
        made.append(f"model.task={foreign.task}")
    return made


def _spec(content: dict[str, Any], out: Path, foreign: Foreign, method: Method, words: Sequence[str]) -> TrialSpec:
    """With the adapter of the file, whose wrong values are the file's fault."""
    try:
        adapter = {**content["adapter"], **method.fields}
        groups = {word.partition("=")[0]: word.partition("=")[2] for word in words if "." not in word.partition("=")[0]}
        choices = {"quantization": "none", **groups, "adapter": method.option}
        return trial_spec({**content, "adapter": adapter}, out, list(words), choices)
    except ConfigError as error:
        if not str(error).startswith("adapter."):
            raise
        raise ArtifactError(f"{foreign.weights.parent}: its configuration says {error}") from error


def _attached(foreign: Foreign, spec: TrialSpec, base: Base, saved: list[str]) -> Adapter:
    """The adapter with the values of the file. Raises ArtifactError where they do not fit the base."""
    where = f"{foreign.weights} does not fit {base.record()['name']} ({type(base.model).__name__})"
    if lacking := [name for name in new_heads(base.model) if not within(name, saved)]:
        raise ArtifactError(f"{where}: neither of them holds {lacking[0]}")
    try:
        with base.hooks.given(restoring=True):
            adapter = attached(spec.adapter, base.model, spec.seed)
    except ConfigError as error:
        raise ArtifactError(f"{where}: {error}") from error
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            adapter.export(folder)
            own = read_state(folder / WEIGHTS)
            state = foreign.state
            if KEY in own and KEY in state:
                with readable(foreign):
                    state = {**state, KEY: virtual_tokens(foreign, own[KEY])}
            _check_state(where, own, state)
            write_state({key: state[key].to(own[key].dtype) for key in own}, folder / WEIGHTS)
            adapter.restore(folder)
    except LoralabError:
        adapter.detach()
        raise
    return adapter


def _check_state(where: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raises ArtifactError where ``state`` lacks a tensor of ``own``, has more, or has one of another shape or not
    finite."""
    faults = [
        *_named("it lacks", sorted(set(own) - set(state))),
        *_named("it has more than the adapter of its configuration", sorted(set(state) - set(own))),
    ]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    faults += [f"{key} is {found}, not {wanted}" for key, (found, wanted) in shapes.items() if found != wanted][:1]
    faults += [f"{key} is not finite" for key, value in state.items() if not torch.isfinite(value).all()][:1]
    if faults:
        raise ArtifactError(f"{where}: {'; '.join(faults)}")


def _named(what: str, keys: list[str]) -> list[str]:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return [f"{what} {', '.join(keys[:LISTED])}{more}"] if keys else []


def _record(foreign: Foreign, spec: TrialSpec, base: Base, adapter: Adapter, chosen: Words) -> dict[str, Any]:
    """Of a completed run that trained nothing here."""
    trial = fingerprints.of([spec.id, foreign.note, fingerprints.file_digest(foreign.weights)])[: len(spec.id)]
    record = records.blank(trial, config=spec.config, overrides=spec.overrides, choices=spec.choices, seed=spec.seed)
    record.update(status="completed", exit_code=0, metrics=dict(chosen.metrics))
    record["base"], record["environment"] = base.record(), environment()
    record["code"]["sources"] = spec.sources()
    record["cwd"], record["pid"] = str(Path.cwd()), os.getpid()
    record["adapter"].update(
        method=spec.adapter.method,
        trainable_parameters=adapter.trainable_parameters(),
        modules=adapter.module_names,
        note=foreign.note,
    )
    record["data"].update(max_length=spec.model.length)
    config: Any = base.model.config
    if spec.model.task == "sequence_classification" and config.num_labels > 1:
        with readable(foreign):
            names = _class_names(foreign.config.get("id2label") or config.id2label, config.num_labels)
        record["data"].update(id2label=names, label2id={name: place for place, name in names.items()})
    return record


def _class_names(named: dict[Any, Any], count: int) -> dict[int, str]:
    found = {int(place): str(name) for place, name in named.items()}
    return found if sorted(found) == list(range(count)) else {place: f"LABEL_{place}" for place in range(count)}
