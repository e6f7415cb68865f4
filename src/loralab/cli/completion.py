"""Tab completion: commands, their flags and the sweeps' names here, settings by Hydra."""

import os
import re
from pathlib import Path

from loralab.errors import ConfigError

WANTED = re.compile(r"(install|uninstall|query)=(bash|fish|zsh)")


def complete(flags: list[str], overrides: list[str]) -> int:
    """Answers ``--shell-completion``: install and uninstall by Hydra, a query of the line in COMP_LINE by both.

    Raises ConfigError where the words say nothing of the kind.
    """
    from loralab.scheduling.session import Session

    requests = [word for word in overrides if WANTED.fullmatch(word)]
    if len(requests) != 1:
        raise ConfigError("--shell-completion needs one thing to do for one shell; valid: install=bash, or fish or zsh")
    if requests[0].startswith("query="):
        completions, line = candidates(os.environ.get("COMP_LINE", ""))
        if line is None:
            print(" ".join(completions))
            return 0
        os.environ["COMP_LINE"] = line
    Session(fresh=False, many=False).run([*flags, *overrides])
    return 0


def candidates(line: str) -> tuple[list[str], str | None]:
    """What may stand at the end of ``line``; or the line that Hydra completes: without the command and its flags."""
    from loralab.cli.main import COMMANDS
    from loralab.cli.sweep import sweep_names

    program, *words, last = line.split(" ") if " " in line else [line, ""]
    command = next((COMMANDS[word] for word in words if word in COMMANDS), None)
    if command is None:
        return sorted(COMMANDS), None
    if last.startswith("-"):
        return [flag.names[-1] for flag in command.flags], None
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    if command.name == "sweep" and "=" not in last and set(sweep_names()).isdisjoint(words):
        return sweep_names(), None
    if "k=v" not in command.usage:  # folders, which the shell completes
        return [], None
    return [], " ".join([Path(program).name, *settings, last])
