"""``loralab report``: the table and the page of what was run."""

from pathlib import Path

from loralab.cli.arguments import Arguments, Command
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """The report of a finished or half-finished sweep, or of a single run."""
    from loralab.cli.terminal import show_report

    if len(arguments.words) != 1:
        raise ConfigError("loralab report needs one folder: a sweep's or a run's")
    show_report(Path(arguments.words[0]))
    return 0


REPORT = Command(
    name="report",
    summary="table, page, CSV and JSON of a sweep or a run",
    about="Reads the records below a folder, finished or not, and writes the report anew. Every sweep ends by it.",
    usage="DIR",
    examples={
        "loralab report runs/rank": "of a sweep",
        "loralab report runs/train/2026-11-26_10-00-00": "of a single run",
    },
    writes="DIR/report/{index.html,results.csv,results.json,report.md}, and a table on stdout.",
    run=run,
)
