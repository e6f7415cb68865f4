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
    from loralab.config.sweep_files import names

    program, *words, last = line.split(" ") if " " in line else [line, ""]
    command = next((COMMANDS[word] for word in words if word in COMMANDS), None)
    if command is None:
        return sorted(COMMANDS), None
    if last.startswith("-"):
        return [flag.names[-1] for flag in command.flags], None
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    if command.name == "sweep" and "=" not in last and not any(w in names() or w.endswith(".yaml") for w in words):
        return [*names(), *_files(last)], None
    if "k=v" not in command.usage:  # folders, which the shell completes
        return [], None
    return [], " ".join([Path(program).name, *settings, last])


def _files(begun: str) -> list[str]:
    """Sweep files and folders below which there may be some, where ``begun`` is the beginning of a path."""
    if not begun.startswith((".", "/")):
        return []
    folder = Path(begun).parent if not begun.endswith("/") else Path(begun)
    place = begun[: begun.rindex("/") + 1] if "/" in begun else ""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f"{place}{path.name}{'/' * path.is_dir()}" for path in found if path.is_dir() or path.suffix == ".yaml"]
