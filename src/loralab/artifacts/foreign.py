"""PEFT's configuration as loralab's adapter; what loralab lacks is refused by its name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loralab.adapters import peft
from loralab.adapters.files import WEIGHTS, read_state
from loralab.artifacts.folders import read_json
from loralab.errors import ArtifactError, ConfigError, nearest

OPTIONS = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "VERA": "lora",  # with d and b multiplied into A and B: loralab draws VeRA's matrices otherwise
}
TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq_lm", "SEQ_CLS": "sequence_classification"}
LOW_RANK = ("target_modules", "layers_to_transform", "bias")
TAKEN = {  # by loralab under the same name
    "LORA": (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("exclude_modules", "target_parameters", *LOW_RANK),
    ),
    "IA3": ("target_modules", "feedforward_modules"),
    "PREFIX_TUNING": ("num_virtual_tokens",),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "VERA": ("r", *LOW_RANK),
}
DEFAULTS: dict[str, dict[str, Any]] = {"LORA": {"r": 8, "lora_alpha": 8}, "VERA": {"r": 256}}  # PEFT's
STARTS = {  # init_lora_weights of files whose A and B stand beside the base as it is
    *(True, False, None, "gaussian", "orthogonal", "eva"),
    *("pissa", "loftq"),  # beside another base: see converted.py
}
OF_THE_START = (  # of training, or named by another option that is refused
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "init_ia3_weights", "init_weights", "d_initial", "vera_dropout"),
    *("projection_prng_key", "save_projection", "prompt_tuning_init", "prompt_tuning_init_text"),
    *("tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection", "encoder_hidden_size"),
    *("num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"),
)
OF_THE_FILE = (
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version"),
    *("fan_in_fan_out", "modules_to_save", "id2label", "label2id"),  # the kind of a layer says whether it is turned
)


@dataclass(frozen=True)
class Foreign:
    """An adapter that another library wrote.

    ``config``: PEFT's; ``state``: the tensors by PEFT's names; ``weights``: the file they come from; ``note``: what a
    record says of its origin.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    weights: Path
    note: str

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])

    @property
    def prefix(self) -> str:
        """What PEFT puts before the names of the base's modules."""
        return "base_model." if self.kind.endswith("_TUNING") else peft.PREFIX

    @property
    def whole(self) -> tuple[str, ...]:
        """The ends of the names of modules that it trains whole, besides a classifier's head."""
        named = self.config.get("modules_to_save") or ()
        return (named,) if isinstance(named, str) else tuple(named)

    @property
    def task(self) -> str | None:
        """model.task; None where the configuration names none."""
        named = self.config.get("task_type")
        if named is not None and named not in TASKS:
            raise ConfigError(f"task_type={named} is none that loralab trains; {nearest(str(named), TASKS)}")
        return None if named is None else TASKS[named]

    @property
    def labels(self) -> int | None:
        """Classes of its head; None where it has none."""
        if self.task != "sequence_classification":
            return None
        last = rf"(.*\.)?({'|'.join(peft.HEADS)})(\.out_proj)?\.weight"
        widths = [len(value) for key, value in self.state.items() if re.fullmatch(last, key)]
        return widths[-1] if widths else len(self.config.get("id2label") or ()) or None


@dataclass(frozen=True)
class Method:
    """``option``: of the group adapter; ``fields``: its keys."""

    option: str
    fields: dict[str, Any] = field(default_factory=dict)


def read_peft(folder: Path) -> Foreign:
    """What PEFT's save_pretrained wrote as ``folder``. Raises ArtifactError."""
    path = folder / peft.CONFIG
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {peft.CONFIG}; valid: a folder that PEFT's save_pretrained wrote")
    config = read_json(path)
    if not isinstance(config.get("peft_type"), str):
        raise ArtifactError(f"{path}: peft_type={config.get('peft_type')!r}; {nearest('', OPTIONS)}")
    if not (folder / WEIGHTS).is_file():
        raise ArtifactError(f"{folder} holds no {WEIGHTS}; valid: a folder that PEFT's save_pretrained wrote")
    version = config.get("peft_version")
    note = f"imported from {folder} (PEFT{f' {version}' if version else ''}, {config['peft_type']})"
    return Foreign(config, read_state(folder / WEIGHTS), folder / WEIGHTS, note)


def method_of(foreign: Foreign) -> Method:
    """The adapter that computes what ``foreign`` does. Raises ConfigError for what loralab lacks."""
    config, kind = foreign.config, foreign.kind
    if kind not in OPTIONS:
        raise ConfigError(
            f"{foreign.weights.parent}: peft_type={kind} is no method of loralab's; {nearest(kind, OPTIONS)}"
        )
    _refuse_unknown(foreign)
    given = {**DEFAULTS.get(kind, {}), **{key: config[key] for key in TAKEN[kind] if config.get(key) is not None}}
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "target_parameters"):
        if isinstance(given.get(key), list):
            given[key] = sorted(given[key]) or None
    if kind in ("LORA", "VERA"):
        given = _low_rank(foreign, given)
    return Method(OPTIONS[kind], given)


def _low_rank(foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
    if given.get("bias") == "vera_only":
        given["bias"] = "lora_only"
    given.setdefault("target_modules", None)
    if foreign.kind == "VERA":
        return {**given, "lora_alpha": float(given["r"])}
    start = foreign.config.get("init_lora_weights")
    if start not in STARTS:
        raise ConfigError(
            f"{foreign.weights.parent}: init_lora_weights={start} trains A and B beside a changed base, which loralab"
            " lacks; valid: an adapter that PEFT has converted for the unchanged base (save_pretrained with"
            " path_initial_model_for_weight_conversion)"
        )
    return given


def _refuse_unknown(foreign: Foreign) -> None:
    """Raises ConfigError for an option that is set and that loralab lacks."""
    known = {*TAKEN[foreign.kind], *OF_THE_FILE, *OF_THE_START}
    others = {key: value for key, value in foreign.config.items() if key not in known}
    if others.get("revision") == "main":
        others.pop("revision")
    unknown = [key for key, value in others.items() if not _is_unset(value)]
    if unknown:
        key = unknown[0]
        raise ConfigError(
            f"{foreign.weights.parent / peft.CONFIG}: {key}={_short(others[key])} is an option that loralab"
            " lacks; valid: an adapter without it"
        )


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _short(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)[:80]


def saved_modules(foreign: Foreign, names: Mapping[str, Any]) -> list[str]:
    """Those of the modules ``names`` that the adapter holds whole: whose name ends in an entry of its modules_to_save,
    and of a classifier its head (PEFT's rule)."""
    heads = peft.HEADS if foreign.task == "sequence_classification" else ()
    entries = (*foreign.whole, *heads)
    found: list[str] = []
    for name in names:
        if name.endswith(entries) and not any(name.startswith(f"{whole}.") for whole in found):
            found.append(name)
    return found
