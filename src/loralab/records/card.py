"""The model card beside an adapter: README.md with the front matter that the Hugging Face hub reads.

All of it comes from the run's record, so that a card says nothing that the record does not.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loralab.errors import unwritable
from loralab.records import fingerprints
from loralab.records.record import rerun
from loralab.records.secrets import redact

CARD = "README.md"
TASKS = {  # loralab's word: (the hub's, transformers' class)
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "seq2seq_lm": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
}
SPLITS = {"val": "validation", "forgetting": "validation"}
GROUPS = ("adapter", "quantization", "optimizer", "schedule", "trainer")
OF_TRAINING = GROUPS[2:]  # no settings of an adapter that was trained elsewhere
LISTED = 8  # entries of a setting


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes ``folder``/README.md for the adapter that lies there, of the run of ``record``. Raises DiskError."""
    try:
        (folder / CARD).write_text(text(folder, record), encoding="utf-8")
    except OSError as error:
        raise unwritable(folder / CARD, error) from error


def text(folder: Path, record: Mapping[str, Any]) -> str:
    """The card of the adapter in ``folder``. Paths below the folder where the run was started are relative to it, those
    below the user's home begin with ~; secrets are masked."""
    record = {**record, **{key: redact(record[key], key) for key in ("config", "overrides")}}
    body = "\n\n".join(_sections(folder, record))
    return _short_paths(f"---\n{_front_matter(folder, record)}\n---\n\n{body}\n", record.get("cwd"))


def library(folder: Path) -> str:
    """What opens the files of ``folder``: peft, transformers or loralab."""
    if (folder / "adapter_config.json").is_file():
        return "peft"
    return "transformers" if (folder / "config.json").is_file() else "loralab"


def is_hub_id(name: str, cwd: str = "") -> bool:
    """Whether ``name`` can be the id of a model of the hub: nothing drawn, and no folder of this machine, relative to
    ``cwd`` or to the current one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name == fingerprints.SHIPPED:
        return True
    if not name or name == "random" or any(map(fingerprints.local_folder, (name, str(Path(cwd) / name)))):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _front_matter(folder: Path, record: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base, task = str(record["base"]["name"]), _task(record)
    results = list(_results(record))
    data = ModelCardData(
        base_model=base if is_hub_id(base, str(record.get("cwd") or "")) else None,
        library_name=library(folder),
        pipeline_tag=TASKS[task][0],
        tags=["loralab", *filter(None, (record["adapter"]["method"], _scheme(record)))],
        model_name=_title(record),
        eval_results=results or None,
    )
    yaml: str = data.to_yaml(line_break="\n")
    return yaml.rstrip("\n")


def _results(record: Mapping[str, Any]) -> Iterator[Any]:
    """The finite metrics as the hub's EvalResult."""
    from huggingface_hub import EvalResult

    other = record["data"].get("forgetting") or {}
    for key, value in _metrics(record).items():
        split, _, metric = key.rpartition("/")
        if split == "forgetting" and (metric == "increase" or metric.startswith("base_")):
            continue  # no score of this model
        name = str((other if split == "forgetting" else record["data"]).get("name") or "unknown")
        yield EvalResult(
            task_type=TASKS[_task(record)][0],
            dataset_type=name,
            dataset_name=name,
            dataset_split=SPLITS.get(split, split) or None,
            metric_type=metric,
            metric_name=key,
            metric_value=value,
        )


def _sections(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_title(record)}"
    yield f"Written by loralab from the record of trial {record['trial']}."
    yield "\n".join(f"- {name}: {value}" for name, value in _facts(record).items() if value)
    yield "## Results"
    yield _metric_table(record)
    yield "## Settings"
    groups = {
        group: record["config"].get(group) for group in GROUPS if _trained_here(record) or group not in OF_TRAINING
    }
    yield "\n".join(f"- {group}: {_settings(node)}" for group, node in groups.items() if node)
    yield "## How to load it"
    yield _loading(folder, record)
    if record["overrides"] and _trained_here(record):
        yield "## How to train it again"
        yield f"```console\n{rerun(record)}\n```"


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    base, data, adapter = record["base"], record["data"], record["adapter"]
    versions = record["environment"]["versions"] or {}
    environment = record["environment"]
    rows = ", ".join(f"{count} {split}" for split, count in (data["rows"] or {}).items())
    return {
        "base": _named(base["name"], base["fingerprint"]),
        "quantization of the base": f"{_scheme(record) or 'none'}{_bits(base)}",
        "method": f"{adapter['method']}, {adapter['trainable_parameters']} trained parameters",
        "note": str(adapter["note"] or ""),
        "data": _named(data["name"], data["fingerprint"]),
        "rows": rows,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "machine": ", ".join(str(environment[key]) for key in ("gpu", "cpu") if environment[key]),
    }


def _named(name: Any, fingerprint: Any) -> str:
    return f"{name}, fingerprint {fingerprint or 'unknown'}" if name else ""


def _bits(base: Mapping[str, Any]) -> str:
    bits = base["bits_per_parameter"]
    return f", {bits:.3f} bits per quantized parameter" if bits and base["quantized_parameters"] else ""


def _metric_table(record: Mapping[str, Any]) -> str:
    metrics = _metrics(record)
    if not metrics:
        return "None were measured."
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    seed = f"One run with one seed ({record['seed']}): no interval."
    origin = seed if _trained_here(record) else "Numbers that were given with the import."
    return f"| metric | value |\n|---|---:|\n{rows}\n\n{origin}"


def _settings(node: Any) -> str:
    values = {key: value for key, value in node.items() if key != "_target_" and value not in (None, "", [], {})}
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items()) or _class(node)


def _short(value: Any) -> str:
    long = isinstance(value, list) and len(value) > LISTED
    return f"{len(value)} entries ({value[0]}, ...)" if long else str(value)


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_") or "").rpartition(".")[2]


def _trained_here(record: Mapping[str, Any]) -> bool:
    return (record["time"] or {}).get("steps") is not None


def _loading(folder: Path, record: Mapping[str, Any]) -> str:
    kind, (_, auto), base = library(folder), TASKS[_task(record)], str(record["base"]["name"])
    if kind == "loralab" or (base == "random" and kind == "peft"):
        why = "The files are in loralab's own format" if kind == "loralab" else "The base is random weights, drawn anew"
        return f"{why}: `loralab generate RUN --prompt TEXT`, where RUN is the folder that holds `adapter/`."
    if kind == "transformers":
        return _python(f"from transformers import {auto}", f'model = {auto}.from_pretrained("this folder")')
    labels = len(record["data"]["id2label"] or ()) or record["config"].get("model", {}).get("num_labels")
    count = f", num_labels={labels}" if labels and _task(record) == "sequence_classification" else ""
    path, needed = _path(base)
    code = _python(
        *needed,
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f"base = {auto}.from_pretrained({path}{count}{_dtype(record)})",
        'model = PeftModel.from_pretrained(base, "this folder")',
    )
    if not _scheme(record):
        return code
    return (
        f"{code}\n\nThe base was quantized ({_scheme(record)}); over another one, such as this one, the outputs are "
        "not quite the same. `loralab.load(RUN)`, where RUN is the folder that holds `adapter/`, opens it on that base."
    )


def _dtype(record: Mapping[str, Any]) -> str:
    """The argument of from_pretrained, which would take the checkpoint's dtype, where the run had one of its own."""
    dtype = (record["config"].get("model") or {}).get("dtype")
    return f", dtype={dtype!r}" if dtype in ("float32", "float16", "bfloat16") else ""


def _path(base: str) -> tuple[str, list[str]]:
    """The base as Python's source has it, and the imports that this needs."""
    if base == fingerprints.SHIPPED:
        return "SHIPPED_FOLDER", ["from loralab.records.fingerprints import SHIPPED_FOLDER"]
    if base.startswith((f"{Path.home()}/", "~")):
        return f"Path({base!r}).expanduser()", ["from pathlib import Path"]
    return repr(base), []


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    metrics = record["metrics"] or {}
    return {
        str(name): value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def _task(record: Mapping[str, Any]) -> str:
    task = str((record["config"].get("model") or {}).get("task"))
    return task if task in TASKS else "causal_lm"


def _scheme(record: Mapping[str, Any]) -> str:
    """The option of the group quantization, or the name of the class; empty without quantization."""
    target = _class(record["config"].get("quantization") or {})
    name = (record["choices"] or {}).get("quantization") or target
    return "" if target == "NoQuantization" else name


def _title(record: Mapping[str, Any]) -> str:
    base = str(record["base"]["name"]).rstrip("/").rpartition("/")[2]
    return f"{record['adapter']['method']} on {base}"


def _short_paths(card: str, cwd: Any) -> str:
    if isinstance(cwd, str) and len(cwd) > 1:
        card = card.replace(f"{cwd.rstrip('/')}/", "")
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/)", "~", card) if len(home) > 1 else card
