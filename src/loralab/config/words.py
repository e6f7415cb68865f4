"""The command line taken apart: loralab's flags, which may stand anywhere, Hydra's, and key=value settings."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from loralab.errors import ConfigError, nearest

SWITCHES = ("json", "fresh", "debug", "evaluate", "preview", "quick", "help", "version")
VALUES = ("--resume", "--out")
HYDRA_SWITCHES = ("-m", "--resolve")
HYDRA_VALUES = {  # {flag: what may follow it}; no choices: any word
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": (),
}
SHORT = {"-h": "--help", "--multirun": "-m", "-c": "--cfg", "-i": "--info", "-p": "--package"}
HYDRAS = "loralab train, loralab sweep"  # the commands that run through Hydra
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
PLAIN = re.compile(r"(?! )[\w/.:@+*%$ -]*(?<! )", re.ASCII)  # what Hydra's grammar takes without quotes
LITERAL = re.compile(r"[-+]?\.?\d[\d_.]*(e[-+]?\d+)?|[-+]?(nan|inf)|true|false", re.IGNORECASE)  # and is no text to it


@dataclass
class Words:
    """``rest``: settings and names in their order; ``hydra``: Hydra's own flags with their values."""

    command: str = ""
    rest: list[str] = field(default_factory=list)
    hydra: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    resume: str | None = None
    out: str | None = None

    @classmethod
    def parse(cls, arguments: list[str]) -> "Words":
        """Raises ConfigError at an unknown flag, or one that lacks its value."""
        words, queue = cls(), list(arguments)
        while queue:
            word = queue.pop(0)
            name, equals, value = word.partition("=")
            name = SHORT.get(name, name)
            given = value if equals else None
            if name.removeprefix("--") in SWITCHES and name.startswith("--") and not equals:
                words.flags.add(name[2:])
            elif name in VALUES:
                setattr(words, name[2:], _value(name, given, queue))
            elif name in HYDRA_SWITCHES and not equals:
                words.hydra.append(name)
            elif name in HYDRA_VALUES:
                words.hydra += [name, _value(name, given, queue)]
            elif word.startswith("-"):
                valid = [*(f"--{one}" for one in SWITCHES), *VALUES, *HYDRA_SWITCHES, "--multirun", *HYDRA_VALUES]
                raise ConfigError(f"loralab has no flag {word!r}; {nearest(word, valid)}")
            elif not words.command:
                words.command = word
            else:
                words.rest.append(word)
        return words

    def __contains__(self, flag: str) -> bool:
        return flag in self.flags

    @property
    def many(self) -> bool:
        return "-m" in self.hydra

    @property
    def shows(self) -> bool:
        """Whether Hydra is asked to show something instead of running it."""
        return bool({"--cfg", "--info"} & set(self.hydra))

    def overrides(self) -> list[str]:
        """Only settings. Raises ConfigError at anything else."""
        odd = [word for word in self.rest if word.startswith("=") or ("=" not in word and not word.startswith("~"))]
        if odd:
            raise ConfigError(f"loralab {self.command}: {odd[0]!r} is not understood; settings are key=value")
        for word in self.rest:
            key, most = word.partition("=")[0], sys.get_int_max_str_digits()
            if key not in TEXTS and most and re.search(rf"\d{{{most + 1}}}", word):
                raise ConfigError(f"{key} has too many digits; valid: at most {most}")
        return self.rest

    def refuse(self, flags: dict[str, str]) -> None:
        """Raises ConfigError for a flag that this command would ignore; ``flags``: flag -> where it belongs."""
        for flag, where in flags.items():
            if flag in self.flags or (f"--{flag}" in VALUES and getattr(self, flag) is not None):
                raise ConfigError(f"loralab {self.command} has no --{flag}; valid: {where}")
        flags_of_hydra = [word for word in self.hydra if word in (*HYDRA_SWITCHES, *HYDRA_VALUES)]
        if flags_of_hydra and f"loralab {self.command}" not in HYDRAS:
            raise ConfigError(f"loralab {self.command} has no {flags_of_hydra[0]}; valid: {HYDRAS}")
        for flag, example in (("--package", "--cfg job --package adapter"), ("--resolve", "--cfg job --resolve")):
            if flag in self.hydra and "--cfg" not in self.hydra:
                raise ConfigError(
                    f"{flag} says how --cfg shows a configuration, and there is no --cfg; valid: {example}"
                )


def _value(flag: str, given: str | None, queue: list[str]) -> str:
    """What stands after the flag, taken from ``queue`` where it is a word of its own. Raises ConfigError."""
    choices = HYDRA_VALUES.get(flag, ())
    following = queue[0] if queue else ""
    if given is None and flag == "--info" and following not in choices:
        return choices[0]
    if given is None and queue and not following.startswith("-"):
        given = queue.pop(0)
    if not given:
        raise ConfigError(f"{flag} needs a value; valid: {', '.join(choices) or f'{flag} VALUE'}")
    if choices and given not in choices:
        raise ConfigError(f"{flag} {given} is unknown; {nearest(given, choices)}")
    return given


def own_classes(words: Iterable[str]) -> dict[str, set[str]]:
    """{group: its keys among ``words``} of the groups whose class they name, as in ``adapter._target_=mine.IA3``."""
    keys = [word.lstrip("+").partition("=")[0].split(".") for word in words]
    named = {key[0] for key in keys if len(key) == 2 and key[1] == "_target_"}
    return {group: {key[1] for key in keys if key[0] == group and len(key) > 1} for group in sorted(named)}


def forced(words: list[str]) -> list[str]:
    """With a class named, its keys need not be those of the yaml, and Hydra takes others only with two plus signs."""
    named = own_classes(words)
    return [f"++{word}" if word.partition(".")[0] in named and "=" in word else word for word in words]


def quoted(words: list[str]) -> list[str]:
    """Paths and templates in the quotes that Hydra's grammar wants and the shell has taken: ``data.prompt={mr}``."""
    return [_quoted(word) for word in words]


def _quoted(word: str) -> str:
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
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
        texts = ",".join(one if one[0] in "'\"" else f"'{one}'" for one in pair.groups())
        return f"{key}=[{texts}]"
    if "," in value and name not in UNLISTED and not exists:  # a sweep over several
        return word if re.search(r"[][(){}'\"]", value) else f"{key}={','.join(map(_part, value.split(',')))}"
    if name == "adapter.target_modules" and value.startswith("["):
        return word
    if "${" in value and (exists or "}" not in value):  # as it stands, no interpolation
        value = value.replace("${", "\\${")
    return f"{key}='{in_quotes(value)}'"


def _part(value: str) -> str:
    return value if PLAIN.fullmatch(value) else f"'{in_quotes(value)}'"


def in_quotes(text: str) -> str:
    """``text`` as Hydra wants it between single quotes: those inside escaped, backslashes before any doubled."""
    return re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a NUL
        return False
