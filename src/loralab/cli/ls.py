"""``loralab ls``: sweeps and runs below a folder."""

import json
from pathlib import Path

from loralab.cli.arguments import JSON, Arguments, Command
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """Their state, read from the records."""
    from loralab.reporting import listing

    if len(arguments.words) > 1:
        raise ConfigError(
            f"ls lists one folder and was given {len(arguments.words)}; valid: the folder that holds them"
        )
    entries = listing.listing(Path(arguments.words[0]) if arguments.words else Path("runs"))
    print(json.dumps({"runs": entries}) if arguments.json else listing.render(entries))
    return 0


LS = Command(
    name="ls",
    summary="sweeps and runs below DIR (default: runs) and their state",
    about="Lists sweeps and single runs below a folder: how many trials are finished, failed, stale or missing.",
    usage="[DIR]",
    examples={"loralab ls": "all below runs/", "loralab ls elsewhere --json": "for a script"},
    writes="nothing.",
    run=run,
    own_flags=(JSON,),
)
