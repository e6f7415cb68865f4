"""What a base model must be before it is trained: readable, dense, whole, finite, and what its config.json says."""

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.data.hub import hub_reachable
from loralab.errors import ConfigError, LoralabError, is_disk_full, is_out_of_memory

log = logging.getLogger(__name__)

# in transformers' order
WEIGHT_FILES = [f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
# What other releases and other heads stored inside a base, and no base computes with.
HARMLESS = re.compile(
    r"(^|\.)(pooler\..*|position_ids|\w*inv_freq|masked_bias|(attn|attention)\.bias|embed_positions\.weights|version)$"
)
OFFLINE = (
    "the hub cannot be reached, its cache on this machine lacks the model, and there is no local folder of that name"
    " either; a local folder with the model's files works without a network"
)


@contextmanager
def explained(what: str, path: str = "") -> Iterator[None]:
    """Whatever transformers, the hub and the file formats raise becomes one paragraph with exit code 2.

    ``path``: the folder or hub id that was asked for, if any was.
    """
    offline = bool(path) and not Path(path).is_dir() and _offline()
    try:
        yield
    except LoralabError:
        raise
    except Exception as error:  # they raise dozens of unrelated kinds
        if is_out_of_memory(error) or is_disk_full(error):  # which have exit codes of their own
            raise
        reason = " ".join(str(error).split())
        damaged = isinstance(error, EOFError | KeyError) and what.endswith(".bin")
        if damaged or isinstance(error, pickle.UnpicklingError):  # torch's own text says how to run the code in it
            reason = "the weights are no pickle of plain tensors, and code in them is never run; valid: *.safetensors"
        elif "trust_remote_code" in reason:
            reason = "it brings Python code of its own; after reading that, model.trust_remote_code=true runs it"
        elif isinstance(error, OSError) and offline:
            reason = OFFLINE
        else:
            reason = f"{type(error).__name__}: {reason.split(' Model type should be one of')[0][:400]}"
            reason += "; there is no local folder of that name either" if path and not Path(path).is_dir() else ""
        raise ConfigError(f"{what}: {reason}") from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Neither transformers' bars nor its table of differences: ``refuse_differences`` says what matters."""
    from transformers.utils.logging import disable_progress_bar

    def no_table(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(no_table)
    try:
        yield
    finally:
        logger.removeFilter(no_table)


def find(key: str, name: str, path: str) -> Path | None:
    """The local folder of ``key=name``, None for a hub id. Raises ConfigError where it can be neither."""
    if not name:
        raise ConfigError(f"{key} is empty: a hub id or a local folder is needed")
    folder = Path(path)
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or folder.exists():
        raise ConfigError(f"{key}={name!r}: there is no such folder; valid: a local folder or a hub id")
    return None


@cache
def _offline() -> bool:
    """Asked once: huggingface_hub retries an unreachable hub for minutes, so from then on the cache alone is read."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not hub_reachable()
    return constants.HF_HUB_OFFLINE


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path} holds a JSON {type(stored).__name__}; valid: an object, {{...}}")
    return stored


def check_sizes(config: Any, where: str) -> None:
    """Sizes that transformers takes and no model can have; ``where``: what to put before the key."""
    names = getattr(config, "attribute_map", {})
    for size in SIZES:
        value = getattr(config, size, None)
        if isinstance(value, int | float | str) and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{where}{names.get(size, size)}={value!r}; valid: a whole number of at least 1")
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ConfigError(f"{where}num_key_value_heads={shared}; valid: a divisor of the {heads} attention heads")


def stored_scheme(stored: Mapping[str, Any]) -> str:
    """A config.json's ``quantization_config`` in words; its keys are those of transformers' BitsAndBytesConfig."""
    four, eight = (stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit") for bits in (4, 8))
    words = [str(stored.get("quant_method") or ("bitsandbytes" if four or eight else "unknown method"))]
    if eight:
        words.append("int8")
    elif four:
        words.append(str(stored.get("bnb_4bit_quant_type", "fp4")))
        words.append(f"double quantization {'on' if stored.get('bnb_4bit_use_double_quant') else 'off'}")
    telling = re.compile(r"^bits$|block_?size|group_size|version|^format$|^fmt$")
    return ", ".join([*words, *(f"{key}={value}" for key, value in stored.items() if telling.search(key))])


def refuse_differences(what: str, model: nn.Module, info: Mapping[str, Any], task: str) -> set[str]:
    """``info``: transformers' loading info. The names of new tensors, all outside the base; ConfigError for others."""
    kind, missing = type(model).__name__, set(info["missing_keys"])
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        cause = "its config.json" if key.startswith(prefix) else "model.num_labels or the data's labels"
        raise ConfigError(
            f"{what}: {key} is {tuple(stored)} in the checkpoint and {tuple(wanted)} by {cause}; valid: weights and"
            " sizes of the same model"
        )
    whole = _new_poolers(model, missing, prefix) if task == "sequence_classification" and prefix else ()
    if lost := sorted(key for key in missing if key.startswith(prefix) and not key.startswith(whole)):
        raise ConfigError(
            f"{what}: the checkpoint lacks {_listed(lost)}, which {kind} needs; "
            f"model.task={task} may be the wrong one, or config.json that of another model"
        )
    if extra := sorted(key for key in info["unexpected_keys"] if _of_base(model, key)):
        raise ConfigError(
            f"{what}: the checkpoint holds {_listed(extra)}, which {kind} has no place for by its config.json; "
            "valid: weights and config.json of the same model"
        )
    return missing


def _new_poolers(model: nn.Module, missing: set[str], prefix: str) -> tuple[str, ...]:
    """Beginnings of the names of a base's poolers that a checkpoint for another task does not hold at all."""
    base = model.base_model
    assert isinstance(base, nn.Module)
    children = {f"{prefix}{name}.": child for name, child in base.named_children() if "pooler" in name}
    return tuple(
        start
        for start, child in children.items()
        if all(f"{start}{key}" in missing for key, _ in child.named_parameters())
    )


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more tensors"


def _of_base(model: nn.Module, key: str) -> bool:
    """Whether a tensor that found no place belongs into the base; the names of some checkpoints lack its prefix."""
    base, prefix = model.base_model, model.base_model_prefix
    assert isinstance(base, nn.Module)
    inner = key.removeprefix(f"{prefix}.")
    if HARMLESS.search(key) or inner in dict(base.named_buffers()):
        return False
    return inner != key or key.partition(".")[0] in dict(base.named_children())


def beside_base(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that a checkpoint of the base alone does not hold: a head's."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    inside = {id(parameter) for parameter in base.parameters()}
    outside = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    return frozenset(outside if base is not model else ())


def lacks_pooler(model: nn.Module, path: str) -> set[str]:
    """The names of a classifier's pooler where the checkpoint, as far as it is on this machine, holds none."""
    from transformers.modeling_utils import load_state_dict

    names = {key for key, _ in model.named_parameters() if key.startswith(f"{model.base_model_prefix}.pooler.")}
    files = weight_files(path) if names else []
    stored = [key for file in files for key in load_state_dict(file, map_location="meta")]
    return names if stored and not any(re.search(r"(^|\.)pooler\.", key) for key in stored) else set()


def check_files(what: str, path: str, quantized: bool = False) -> list[torch.dtype]:
    """The dtypes of all stored tensors; empty where no file is here yet. Raises ConfigError where one cannot be read or
    holds a weight in integers: codes that transformers would take for numbers, unless config.json names their
    scheme (``quantized``)."""
    from transformers.modeling_utils import load_state_dict

    dtypes: list[torch.dtype] = []
    for file in weight_files(path):
        with explained(f"{what} cannot be loaded, {file.name}"):
            tensors = load_state_dict(file, map_location="meta")
        for name, tensor in tensors.items():
            if name.endswith(".weight") and not tensor.is_floating_point() and not quantized:
                raise ConfigError(
                    f"{what}: {name} is stored as {tensor.dtype} in {file.name}, and config.json names no quantization;"
                    " valid: weights in floating point"
                )
        dtypes += [tensor.dtype for tensor in tensors.values()]
    return dtypes


def name_narrowed(what: str, stored: Sequence[torch.dtype], model: nn.Module) -> None:
    """Warns of weights that were ``stored`` wider than they were loaded, since the config.json beside them says so: of
    dtype=auto, transformers believes the config and not the files."""
    loaded: torch.dtype = model.dtype  # type: ignore[assignment]
    wider = [dtype for dtype in stored if dtype.is_floating_point and dtype.itemsize > loaded.itemsize > 1]
    if wider:
        held, kept = (str(dtype).removeprefix("torch.") for dtype in (max(wider, key=lambda one: one.itemsize), loaded))
        log.warning(
            "%s: %d of its %d tensors are stored in %s and loaded in %s, since its config.json says dtype=%s; "
            "model.dtype=%s keeps them as they are",
            *(what, len(wider), len(stored), held, kept, kept, held),
        )


def weight_files(path: str) -> list[Path]:
    """The files that transformers reads for a local folder or for a hub id that is in the cache by now."""
    from huggingface_hub import try_to_load_from_cache

    for name in WEIGHT_FILES:
        found = str(Path(path) / name) if Path(path).is_dir() else try_to_load_from_cache(path, name)
        if isinstance(found, str) and Path(found).is_file():
            file = Path(found)
            if file.suffix != ".json":
                return [file]
            return [file.parent / part for part in sorted(set(read_json(file)["weight_map"].values()))]
    return []


def refuse_non_finite(what: str, model: nn.Module) -> None:
    """Raises ConfigError where a parameter holds nan or inf; two numbers a parameter, no copy of any."""
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() and parameter.numel() and parameter.element_size() > 1):
            continue
        ends = torch.stack(torch.aminmax(parameter.detach()))  # nan where any value is
        if not bool(torch.isfinite(ends).all()):
            raise ConfigError(
                f"{what}: {name}, {tuple(parameter.shape)} in {parameter.dtype}, holds nan or infinite values;"
                " valid: finite weights, and a model.dtype that can hold them"
            )
