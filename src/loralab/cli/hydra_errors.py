"""Hydra's and OmegaConf's errors as one paragraph with exit code 2 and the nearest valid key."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from loralab.errors import ConfigError, Interrupted, LoralabError, explain, nearest


def translate(error: BaseException, words: Sequence[str]) -> LoralabError | Interrupted:
    """``error`` as one of loralab's own; ``words``: the command line, whose groups decide which key is nearest."""
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return ConfigError("a group was set to null or a number; valid: group=OPTION with one of the options of conf/")
    if isinstance(error, ValueError) and "Invalid defaults list in" in str(error):
        return ConfigError(f"{error}; valid: defaults: with lines such as - override /adapter: lora")
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return ConfigError(f"a number has too many digits; valid: at most {sys.get_int_max_str_digits()}")
    if hasattr(error, "problem_mark"):  # YAML's
        from loralab.config.sweep_files import not_yaml

        return not_yaml(error) or explain(error)
    translated = explain(error)
    if type(translated) is not LoralabError or translated is error:
        return translated
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        return ConfigError(_on_one_line(_paragraph(error, words)))
    return translated


def _on_one_line(text: str) -> str:
    """``text`` with line ends and other characters that a terminal does not show as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _paragraph(error: BaseException, words: Sequence[str]) -> str:
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        return _not_understood(str(error.override))
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if ambiguous := re.search(r"Ambiguous value for argument '(.*?)' 1\.", text):
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]} holds several values, and this is one run; valid: a single value, -m (one trial for each),"
            f" {key}=[{value}] (a list), or {key}=\"'{value}'\" (a text)"
        )
    key = re.search(r"Could not (?:override|append to config.*?at|delete.*?from config) '([^']+)'", text)
    if key and "not in struct" in text:
        full = key.group(1).rstrip(".")
        return f"{full} {_neighbours(full, words)}"
    if absent := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        off = f"{absent[1]}=false, or " if absent[1].startswith("sweep.") else ""
        return f"~{absent[1]} takes away what is not there; valid: {off}a key that 'loralab train --cfg job' shows"
    inner = re.search(r"Could not override '([^']+)'.*Key '[^']+' not in '([^']+)'", text)
    if inner:
        return f"{inner.group(1)} is not an option of {inner.group(2)}; loralab train --cfg hydra shows what is"
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        return _missing_option(group.group(1), text)
    missing = re.search(r"Could not override '([^']+)'. No match in the defaults list", text)
    if missing:
        return f"{missing.group(1)} {_neighbours(missing.group(1), words)}"
    text = re.sub(r" (?:full_key|object_type|reference_type)[:=].*", "", text)[:600]
    where = str(getattr(error, "full_key", None) or "")
    return f"{where}: {text}" if where and where not in text else text


def _not_understood(word: str) -> str:
    """Of a setting that Hydra's grammar refuses."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w/@$:.-]*\w", key) or ".." in key:
        return f"{word!r} is not understood; valid: key=value, the key as {'loralab train --cfg job'!r} shows it"
    if value.startswith("="):
        return f"{word} is not understood: one = stands between key and value; valid: {key}={value.lstrip('=')}"
    if any(value.count(mark) % 2 for mark in "'\"") or any(value.count(a) != value.count(b) for a, b in PAIRS):
        return f"{word} is not understood: a bracket or a quote has no counterpart; valid: {key}=VALUE"
    return (
        f"{word} is not understood: {value!r} is no value of Hydra's grammar; valid: a number, a word, a [list], or"
        f" a text in quotes of its own, {key}=\"'...'\""
    )


PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))


def _missing_option(choice: str, text: str) -> str:
    from loralab.config.places import data_root
    from loralab.config.places import options as options_of

    group, _, option = choice.rpartition("/")
    listed = re.search(r"Available options in '[^']+': (.*?)(?: Config search path|$)", text)
    options = re.findall(r"[\w./-]+", listed.group(1) if listed else "")
    shipped = options_of(data_root() / ("" if group.startswith("sweeps") else "conf") / group)
    own = [name for name in options if name not in shipped]
    yours = f"; of your own files: {', '.join(own)}" if own else ""
    return f"{group}={option}: there is no such option; {nearest(option, options)}{yours}"


def _neighbours(full: str, words: Sequence[str]) -> str:
    """What may stand beside ``full``, in the configuration with the groups that the command line chose."""
    from omegaconf import DictConfig

    from loralab.config.compose import compose
    from loralab.config.places import conf_folders, data_root

    folders = [data_root() / "conf", *conf_folders().values()]
    groups = [w for w in words if any((place / w.lstrip("+").partition("=")[0]).is_dir() for place in folders)]
    chosen = [word for word in groups if "," not in word]
    try:
        node: Any = compose([word for word in chosen if "=" in word])
    except Exception:  # the wrong word may be one of those
        node = compose([])
    *parents, name = full.split(".")
    for parent in parents:
        if not isinstance(node, DictConfig) or parent not in node:
            name = parent
            break
        node = node._get_node(parent)
    keys = [str(key) for key in node if key not in ("hydra", "_target_")] if isinstance(node, DictConfig) else []
    if name in keys and parents:  # of the default's; a yaml file has chosen another, or put something else there
        group = parents[0]
        return (
            f"is not an option of the {group} that is chosen here; valid: one of its own, or another {group} that has"
            f" {name}: {group}=OPTION, in the defaults of a yaml file '- override /{group}: OPTION'"
        )
    if name in keys:
        return (
            f"cannot be that; valid: {full}=OPTION, and its keys one by one, as {'loralab train --cfg job'!r} has them"
        )
    if keys:
        return f"is not an option; {nearest(name, keys)}"
    if isinstance(node, DictConfig) and "_target_" in node:
        return f"is not an option: {str(node._target_).rpartition('.')[2]} has none"
    return f"is not set yet; +{full}=VALUE adds it"
