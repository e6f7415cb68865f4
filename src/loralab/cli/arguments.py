"""The command line taken apart: the command word first, then argparse with the flags of that command, anywhere."""

import argparse
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from loralab.config.words import TEXTS
from loralab.errors import ConfigError, nearest


@dataclass(frozen=True)
class Flag:
    """``names``: the last is the one that messages use and that Hydra is given; ``value``: empty for a switch."""

    names: tuple[str, ...]
    help: str
    value: str = ""
    choices: tuple[str, ...] = ()
    hydra: bool = False  # handed on to Hydra as it is

    def checked(self, value: str) -> str:
        """Raises ConfigError where ``value`` is empty or none of the choices."""
        if not value:
            raise ConfigError(f"{self.names[-1]} needs a value; valid: {', '.join(self.choices) or self.usage}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.names[-1]} {value} is unknown; {nearest(value, self.choices)}")
        return value

    @property
    def usage(self) -> str:
        return f"{self.names[-1]} {self.value}"


class Arguments(argparse.Namespace):
    """What a command is called with: ``words`` are its settings and names, ``hydra`` the flags that are Hydra's."""

    command: "Command"
    words: list[str]
    hydra: list[str]
    help = version = debug = json = fresh = preview = evaluate = quick = base = requantize = no_measure = False
    watch = latex = wandb = decision = failed = allow_changes = False
    resume: str | None = None
    out: str | None = None
    budget: str | None = None
    prompt: str | None = None
    layers: str | None = None
    methods: str | None = None
    shapes: str | None = None
    passes: str | None = None
    onto: str | None = None
    dtype: str | None = None
    rows: str | None = None
    port: str | None = None

    @property
    def many(self) -> bool:
        return "-m" in self.hydra

    @property
    def source(self) -> str | None:
        """The run folder that ``--from`` names, a word of Python's; None without the flag."""
        return vars(self).get("from")

    @property
    def config_dir(self) -> str | None:
        """The folder that ``--config-dir`` names last; None without the flag."""
        return self._last("--config-dir")

    @property
    def config_name(self) -> str | None:
        """The primary configuration that ``--config-name`` names last; None without the flag."""
        return self._last("--config-name")

    def _last(self, name: str) -> str | None:
        values = [value for flag, value in pairwise(self.hydra) if flag == name]
        return values[-1] if values else None

    def overrides(self) -> list[str]:
        """The words, which must all be settings. Raises ConfigError at anything else."""
        for word in self.words:
            if word.startswith("=") or ("=" not in word and not word.startswith("~")):
                raise ConfigError(f"loralab {self.command.name}: {word!r} is not understood; settings are key=value")
            key, longest = word.partition("=")[0], sys.get_int_max_str_digits()
            if key not in TEXTS and longest and re.search(rf"\d{{{longest + 1}}}", word):
                raise ConfigError(f"{key} has too many digits; valid: at most {longest}")
        return self.words


@dataclass(frozen=True)
class Command:
    """A command with all that its help says."""

    name: str
    summary: str  # one line for ``loralab --help``
    about: str
    usage: str  # what stands behind the name, flags left out
    examples: Mapping[str, str]  # {command line: what it is for}
    writes: str
    run: Callable[[Arguments], int]
    own_flags: tuple[Flag, ...] = ()

    @property
    def flags(self) -> tuple[Flag, ...]:
        return (*self.own_flags, *COMMON)

    def parser(self) -> argparse.ArgumentParser:
        """With neither abbreviations nor exits: argparse's errors are raised, and unknown flags returned."""
        width = max(map(len, self.examples), default=0)
        examples = "\n".join(f"  {line:{width}}  {purpose}" for line, purpose in self.examples.items())
        parser = argparse.ArgumentParser(
            prog=f"loralab {self.name}",
            usage=" ".join(filter(None, ("loralab", self.name, self.usage, "[flags]"))),
            description=self.about,
            epilog=f"examples:\n{examples}\n\nwrites: {self.writes}",
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=34),
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        hydra = [flag for flag in self.own_flags if flag.hydra]
        own = [flag for flag in self.own_flags if not flag.hydra]
        for title, flags in (("flags", own), ("flags that go to Hydra", hydra), ("flags of every command", COMMON)):
            group = parser.add_argument_group(title)
            for flag in flags:
                _add(group, flag)
        parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        return parser

    def parse(self, words: list[str]) -> tuple[Arguments, list[str]]:
        """The arguments, and the unknown flags among ``words``. Raises ConfigError at a flag without its value."""
        arguments = Arguments(command=self, hydra=[])
        names = [name for flag in self.flags for name in flag.names]
        unknown = [word for word in words if re.match("-[^-]", word) and word.partition("=")[0] not in names]
        if unknown:  # which argparse may take for a shorter flag with its value
            return arguments, unknown
        try:
            _, unknown = self.parser().parse_known_intermixed_args(words, arguments)
        except argparse.ArgumentError as error:
            flag = next(flag for flag in self.flags if "/".join(flag.names) == error.argument_name)
            if flag.value:
                flag.checked("")
            return arguments, [word for word in words if word.startswith(tuple(f"{name}=" for name in flag.names))]
        return arguments, [word for word in unknown if word.startswith("-")]


class _HandOn(argparse.Action):
    """Appends the flag, by its last name, and its value to ``hydra``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.hydra = [*namespace.hydra, self.option_strings[-1], *([values] if isinstance(values, str) else [])]


def _add(group: Any, flag: Flag) -> None:
    options: dict[str, Any] = {"help": flag.help}
    if flag.value:
        options.update(type=flag.checked, metavar=flag.value)
    if flag.hydra:
        options.update(action=_HandOn, dest="hydra", **({} if flag.value else {"nargs": 0}))
    elif not flag.value:
        options.update(action="store_true")
    group.add_argument(*flag.names, **options)


COMMON = (
    Flag(("--debug",), "shows the traceback of an error"),
    Flag(("--version",), "loralab's version"),
    Flag(("-h", "--help"), "this text"),
)
JSON = Flag(("--json",), "one JSON object on stdout, everything else on stderr")
FRESH = Flag(("--fresh",), "runs finished trials again")
INFO = Flag(
    ("-i", "--info"),
    "what Hydra knows of the configuration: all (also without a value), config, defaults, defaults-tree, plugins or"
    " searchpath",
    "[WHAT]",
    choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    hydra=True,
)
CONFIG_DIR = Flag(
    ("-cd", "--config-dir"), "a folder of your own yaml files, searched before ./conf and loralab's", "DIR", hydra=True
)
HYDRA = (
    Flag(("--multirun", "-m"), "a trial for each combination of values, as in seed=0,1", hydra=True),
    Flag(
        ("-c", "--cfg"),
        "shows the composed configuration and runs nothing: job, hydra or all",
        "WHAT",
        choices=("job", "hydra", "all"),
        hydra=True,
    ),
    Flag(("--resolve",), "with --cfg: interpolations replaced by their values", hydra=True),
    Flag(("-p", "--package"), "with --cfg: this part alone, as in --package adapter", "PACKAGE", hydra=True),
    INFO,
    CONFIG_DIR,
    Flag(("-cn", "--config-name"), "another primary configuration than train", "NAME", hydra=True),
    Flag(("--hydra-help",), "Hydra's own help", hydra=True),
    Flag(("-sc", "--shell-completion"), "with install=bash: the script for tab completion, for eval", hydra=True),
)


def parse(words: Sequence[str], commands: Mapping[str, Command], default: Command, completing: Command) -> Arguments:
    """``words`` as one of ``commands`` takes them; as ``default`` does where they name none.

    ``completing``: the command that answers a shell's completion, which names none. Raises ConfigError at an unknown
    command, an unknown flag, or a flag that lacks its value.
    """
    words = _with_info(words)
    at = _command_at(words, commands.values())
    completes = not {"-sc", "--shell-completion"}.isdisjoint(words)
    command, rest = (completing if completes else default), words
    if at is not None and (words[at] in commands or not completes):
        if words[at] not in commands:
            raise ConfigError(f"loralab has no command {words[at]!r}; {nearest(words[at], commands)}")
        command, rest = commands[words[at]], [*words[:at], *words[at + 1 :]]
    arguments, unknown = command.parse(rest)
    if unknown:
        raise _unknown_flag(command, unknown[0], commands.values())
    return arguments


def _with_info(words: Sequence[str]) -> list[str]:
    """``--info`` needs no value, and a setting behind it is none."""
    following = [*words, ""][1:]
    alone = [word in INFO.names and value not in INFO.choices for word, value in zip(words, following, strict=True)]
    return [f"{word}={INFO.choices[0]}" if bare else word for word, bare in zip(words, alone, strict=True)]


def _command_at(words: Sequence[str], commands: Collection[Command]) -> int | None:
    """Where the first word stands that is neither a flag nor the value of one; None without any."""
    flags_with_value = {name for command in commands for flag in command.flags if flag.value for name in flag.names}
    for index, word in enumerate(words):
        if not word.startswith("-") and not (index and words[index - 1] in flags_with_value):
            return index
    return None


def _unknown_flag(command: Command, word: str, commands: Collection[Command]) -> ConfigError:
    """Whose flag it is; else the nearest of this command's."""
    name, program = word.partition("=")[0], f"loralab {command.name}".strip()
    owners = {other.name: flag for other in commands for flag in other.own_flags if name in flag.names}
    if owners and command.name not in owners:
        flag = next(iter(owners.values()))
        return ConfigError(f"{program} has no {flag.names[-1]}; valid: {', '.join(f'loralab {o}' for o in owners)}")
    valid = [name for flag in command.flags for name in flag.names if name.startswith("--") or len(flag.names) == 1]
    return ConfigError(f"loralab has no flag {word!r}; {nearest(name, valid)}")
