"""``loralab report``: the table and the page of what was run."""

from pathlib import Path

from loralab.cli.arguments import Arguments, Command, Flag
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """The report of a finished or half-finished sweep, or of a single run."""
    from loralab.cli.terminal import messages_to_stderr, show_comparison, show_place, show_report

    if not 1 <= len(arguments.words) <= 2:
        raise ConfigError("loralab report needs one folder, a sweep's or a run's, or two sweeps to compare")
    if arguments.port is not None and not arguments.watch:
        raise ConfigError(f"--port {arguments.port} is of --watch, which is not given")
    if arguments.wandb and arguments.watch:
        raise ConfigError("--wandb and --watch do not go together; valid: --wandb when the sweep has ended")
    folder, *others = map(Path, arguments.words)
    if others and (arguments.watch or arguments.wandb or arguments.latex):
        raise ConfigError("--watch, --wandb and --latex are of one sweep; without them, two are compared")
    if arguments.latex and arguments.watch:
        raise ConfigError("--latex and --watch do not go together; valid: --latex when the sweep has ended")
    if arguments.watch:
        return _watch(folder, _port(arguments.port or "0"))
    if others:
        show_comparison(folder, others[0])
        return 0
    written = show_report(folder, ("svg", "png", "pdf"), arguments.latex)
    if arguments.wandb:
        from loralab.reporting import wandb_report

        messages_to_stderr()
        show_place(wandb_report.on_request(written))
    return 0


def _watch(folder: Path, port: int) -> int:
    """Serves the page until it is interrupted."""
    from loralab.reporting.watch import address, server

    with server(folder, port) as served:
        print(f"{address(served)} (for this machine alone; Ctrl-C ends it)", flush=True)
        served.serve_forever()
    return 0


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"--port {text} is no port; valid: 0 to 65535, 0 takes a free one")
    return int(text)


REPORT = Command(
    name="report",
    summary="table, page, CSV and JSON of a sweep or a run",
    about=(
        "Reads the records below a folder, finished or not, and writes the report anew. Every sweep ends by it.\n"
        "Of two sweeps A and B: rows of equal values, B less A over the seeds that both have."
    ),
    usage="DIR [DIR]",
    examples={
        "loralab report runs/rank": "of a sweep; of a run: its folder",
        "loralab report runs/rank runs/rank-new-torch": "of two sweeps, row by row",
        "loralab report --watch runs/rank": "a page in the browser that follows the sweep",
    },
    writes=(
        "DIR/report/{index.html,results.csv,results.json,report.md}, figures/*.{svg,png,pdf}\n"
        "(of more than 500 trials svg alone), a table on stdout;\n"
        "with --latex DIR/report/table.tex; of two A/report/compare_B/{index.html,compare.md,compare.json}."
    ),
    run=run,
    own_flags=(
        Flag(("--watch",), "serves the page to this machine, and writes it anew while the sweep runs"),
        Flag(("--wandb",), "logs tables and charts to W&B too, as the end of a sweep with logger=wandb does"),
        Flag(("--latex",), "writes the table as LaTeX (booktabs) too; later reports keep it up to date"),
        Flag(("--port",), "of --watch; 0, the default, takes a free one", "N"),
    ),
)
