"""Adds the quotes and plus signs that Hydra's grammar needs to the settings of the command line."""

import re
from collections.abc import Iterable
from pathlib import Path

TRAINER = {  # arguments of Lightning's Trainer that conf/trainer does not list
    *("max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch", "max_time", "limit_train_batches"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches", "fast_dev_run"),
    *("gradient_clip_algorithm", "deterministic", "benchmark", "detect_anomaly", "num_sanity_val_steps"),
    *("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "enable_autolog_hparams", "profiler"),
    *("default_root_dir", "use_distributed_sampler", "sync_batchnorm", "devices", "num_nodes", "strategy"),
    *("inference_mode", "reload_dataloaders_every_n_epochs", "barebones", "plugins", "model_registry"),
    *("logger", "callbacks"),
}
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
TEXTS = (
    *("data.prompt", "data.target", "data.text", "data.label", "model.name_or_path", "model.tokenizer"),
    *("data.train", "data.validation", "data.test", "data.name", "memory.snapshot", "adapter.target_modules"),
    *("logger.project", "logger.entity", "logger.group", "hydra.sweep.subdir", *FOLDERS),
)
UNLISTED = ("data.prompt", "data.target", "data.text", *FOLDERS)  # a comma is part of the text, never a sweep
_TEMPLATE = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\{[^{}]+\})"""
PAIR = re.compile(rf"\[\s*{_TEMPLATE}\s*,\s*{_TEMPLATE}\s*\]")  # two templates; [INST] {q} [/INST] is one
MAPPINGS = ("adapter.rank_pattern", "adapter.alpha_pattern", "model.config", "data.generation")
PLAIN = re.compile(r"(?! )[\w/.:@+*%$ -]*(?<! )", re.ASCII)  # valid for Hydra without quotes
LITERAL = re.compile(
    r"[-+]?\.?\d[\d_.]*(e[-+]?\d+)?|[-+]?(nan|inf)|true|false", re.IGNORECASE
)  # valid too, but not a text


def own_classes(words: Iterable[str]) -> dict[str, set[str]]:
    """{group: its keys among ``words``} of the groups whose class they name, as in ``adapter._target_=mine.IA3``."""
    keys = [word.lstrip("+").partition("=")[0].split(".") for word in words]
    named = {key[0] for key in keys if len(key) == 2 and key[1] == "_target_"}
    return {group: {key[1] for key in keys if key[0] == group and len(key) > 1} for group in sorted(named)}


def forced(words: list[str]) -> list[str]:
    """``words`` with ++ before the keys of a class named among them and before the Trainer's arguments: Hydra needs it
    for keys not in the yaml."""
    named = own_classes(words)
    return [
        f"++{word}" if (word.partition(".")[0] in named and "=" in word) or _is_trainers(word) else word
        for word in words
    ]


def _is_trainers(word: str) -> bool:
    group, _, rest = word.partition(".")
    return group == "trainer" and rest.partition("=")[0] in TRAINER and "=" in rest


def quoted(words: list[str]) -> list[str]:
    """``words`` with paths and templates in the quotes that Hydra needs and the shell removed: ``data.prompt={mr}``."""
    return [_quoted(word) for word in words]


def _quoted(word: str) -> str:
    key, equals, value = word.partition("=")
    name = key.lstrip("+").replace("data.forgetting.", "data.")  # whose keys are those of the group
    if key in MAPPINGS and value.startswith("{"):  # adds keys, which Hydra takes only with a plus
        return f"+{word}"
    if name in FOLDERS and value.startswith("~"):  # no shell expands it after an equals sign
        value = str(Path(value).expanduser())
    if not equals or name not in TEXTS or (PLAIN.fullmatch(value) and not LITERAL.fullmatch(value)):
        return key + equals + value
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return word
    exists = name not in UNLISTED[:3] and _exists(value)
    if name == "data.text" and (pair := PAIR.fullmatch(value)):
        texts = ",".join(text if text[0] in "'\"" else f"'{text}'" for text in pair.groups())
        return f"{key}=[{texts}]"
    if "," in value and name not in UNLISTED and not exists:  # a sweep over several values
        return word if re.search(r"[][(){}'\"]", value) else f"{key}={','.join(map(_part, value.split(',')))}"
    if name == "adapter.target_modules" and value.startswith("["):
        return word
    if "${" in value and (exists or "}" not in value):  # literal text, no interpolation
        value = value.replace("${", "\\${")
    return f"{key}='{in_quotes(value)}'"


def _part(value: str) -> str:
    return value if PLAIN.fullmatch(value) else f"'{in_quotes(value)}'"


def in_quotes(text: str) -> str:
    """``text`` as Hydra wants it between single quotes: those inside escaped, backslashes before any doubled."""
    return re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # name too long, no such user, a NUL
        return False
