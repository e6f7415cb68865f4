"""``loralab bench``: speed beside other libraries."""

import json
from pathlib import Path

from loralab.cli.arguments import JSON, Arguments, Command, Flag
from loralab.errors import ConfigError, nearest


def run(arguments: Arguments) -> int:
    """All parts or those named, in one run; a Markdown table, and JSON on disk."""
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.bench.measurements import render
    from loralab.bench.run import ABOUT, bench

    if arguments.decision:
        arguments.words.append("decision")
    for word in arguments.words:
        if word not in ABOUT:
            raise ConfigError(f"loralab bench: there is no part {word!r}; {nearest(word, ABOUT)}")
    out = Path(arguments.out or "runs/bench/bench.json").expanduser()
    measured = bench(arguments.words, arguments.quick, out)
    print(json.dumps(measured) if arguments.json else render(measured))
    return int(any(part["status"] != "completed" for part in measured["parts"].values()))


BENCH = Command(
    name="bench",
    summary="speed beside PEFT, Lightning and bitsandbytes",
    about="Measures loralab beside its peers in one run, on the same rows. Parts: layer, step, sweep, prefix, and\n"
    "decision, which takes long and runs only where it is named (--decision is the same).",
    usage="[PART ...]",
    examples={"loralab bench --quick": "a few minutes", "loralab bench step": "one part in full"},
    writes="runs/bench/bench.json, or the file that --out names; a Markdown table on stdout.",
    run=run,
    own_flags=(
        Flag(("--quick",), "fewer measurements"),
        Flag(("--out",), "the JSON file (runs/bench/bench.json)", "FILE"),
        Flag(("--decision",), "the part decision alone: the time to the best rate of each arm"),
        JSON,
    ),
)
