"""The command line taken apart: loralab's flags, which may stand anywhere, Hydra's, and key=value settings."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from loralab.errors import ConfigError, nearest

SWITCHES = ("json", "fresh", "debug", "evaluate", "preview", "quick", "help", "version")
VALUES = ("--resume", "--out")
HYDRA_SWITCHES = ("-m", "--multirun", "--resolve")
HYDRA_VALUES = ("--cfg", "-c", "--package", "-p", "--info", "-i")
TEXTS = (
    *("data.prompt", "data.target", "data.text", "data.label", "model.name_or_path", "model.tokenizer"),
    *("data.train", "data.validation", "data.test", "hydra.run.dir", "hydra.sweep.dir"),
)
MAPPINGS = ("adapter.rank_pattern", "adapter.alpha_pattern", "model.config")
PLAIN = re.compile(r"[\w/.:@+*%$ -]*", re.ASCII)  # what Hydra's grammar takes without quotes


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
        """Raises ConfigError at an unknown flag."""
        words, queue = cls(), list(arguments)
        while queue:
            word = queue.pop(0)
            name, equals, value = word.partition("=")
            if word == "-h" or (word.startswith("--") and word[2:] in SWITCHES):
                words.flags.add("help" if word == "-h" else word[2:])
            elif name in VALUES:
                setattr(words, name[2:], value if equals else (queue.pop(0) if queue else ""))
            elif word in HYDRA_SWITCHES:
                words.hydra.append(word)
            elif name in HYDRA_VALUES:
                words.hydra += [name, value if equals else (queue.pop(0) if queue else "")]
            elif word.startswith("-"):
                valid = [*(f"--{one}" for one in SWITCHES), *VALUES, *HYDRA_SWITCHES, "--cfg"]
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
        return bool({"-m", "--multirun"} & set(self.hydra))

    def overrides(self) -> list[str]:
        """Only settings. Raises ConfigError at anything else."""
        odd = [word for word in self.rest if "=" not in word and not word.startswith("~")]
        if odd:
            raise ConfigError(f"loralab {self.command}: {odd[0]!r} is not understood; settings are key=value")
        return self.rest

    def refuse(self, flags: dict[str, str]) -> None:
        """Raises ConfigError for a flag that this command would ignore; ``flags``: flag -> where it belongs."""
        for flag, where in flags.items():
            if flag in self.flags or (f"--{flag}" in VALUES and getattr(self, flag) is not None):
                raise ConfigError(f"loralab {self.command} has no --{flag}; valid: {where}")


def quoted(words: list[str]) -> list[str]:
    """Paths and templates in the quotes that Hydra's grammar wants and the shell has taken: ``data.prompt={mr}``."""
    return [_quoted(word) for word in words]


def _quoted(word: str) -> str:
    key, equals, value = word.partition("=")
    if key in MAPPINGS and value.startswith("{"):  # adds keys, which Hydra takes only with a plus
        return f"+{word}"
    if not equals or key.lstrip("+") not in TEXTS or PLAIN.fullmatch(value):
        return word
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return word
    listed = "," in value and not key.startswith(("data.prompt", "data.target", "data.text"))
    if listed and not Path(value).expanduser().exists():  # a sweep over several
        return word
    return key + equals + "'" + value.replace("'", "\\'") + "'"
