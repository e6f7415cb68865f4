"""``loralab subspace``: which directions a run has learned, and which of them another run shares."""

import json
import logging
from pathlib import Path

from loralab.cli.arguments import JSON, Arguments, Command, Flag
from loralab.errors import ConfigError, LoralabError

log = logging.getLogger(__name__)


def run(arguments: Arguments) -> int:
    """Of one run its own figures, of two how alike their directions are."""
    folders = [Path(word) for word in arguments.words]
    if not 1 <= len(folders) <= 2:
        raise ConfigError(
            f"loralab subspace needs the folder of a run, or of two, and was given {len(folders)}; loralab ls shows "
            "which there are"
        )
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.analysis import subspace_files as files
    from loralab.analysis import subspace_runs as runs
    from loralab.artifacts.reopen import read_run
    from loralab.reporting import subspace
    from loralab.reporting.layout import terminal_width
    from loralab.running.inputs import Inputs
    from loralab.training.trainer import quiet

    stored = [read_run(folder) for folder in folders]  # all of them before the first base is loaded
    quiet()
    if len(folders) == 1:
        content, path = runs.measure(folders[0], Inputs(), arguments.layers), files.path_of(folders[0])
    else:
        content = runs.compare(folders[0], folders[1], Inputs(), arguments.layers)
        path = files.path_of(folders[0], stored[1])
    files.write(path, content)
    if arguments.json:
        print(json.dumps(content, allow_nan=False))
        return 0
    print((subspace.of_run if len(folders) == 1 else subspace.of_pair)(content, terminal_width()))
    print(f"\nwritten: {path}")
    return 0


def after_sweep(folder: Path) -> None:
    """The same for the trials of a sweep that asks for it (``sweep.subspace``); what goes wrong is a warning."""
    from loralab.records import record

    try:
        if record.read_sweep(folder).get("subspace") is not True:
            return
        from loralab.analysis.results import read_results
        from loralab.analysis.subspace_sweep import run as run_all

        run_all(read_results(folder))
    except LoralabError as error:
        log.warning("sweep.subspace: %s", error)
    except Exception as error:  # the records are there, and the report must be too
        log.warning("sweep.subspace: %s: %s", type(error).__name__, error)


SUBSPACE = Command(
    name="subspace",
    summary="directions that a run learned, or that two runs share",
    about="Of one run the singular values of each layer's update, its effective rank, how far it amplifies what W\n"
    "has already (LoRA, section 7.3) and its intruder dimensions; of two runs over one base how many directions\n"
    "they share (LoRA, section 7.2).",
    usage="RUN [RUN2]",
    examples={
        "loralab subspace runs/train/TIME": "the updates of a run",
        "loralab subspace RUN RUN2": "another rank or another seed beside it",
        "loralab subspace RUN --layers q_proj --json": "some layers, for a script",
    },
    writes="RUN/subspace.json, or of two runs RUN/subspace_TRIAL.json with the trial of RUN2.",
    run=run,
    own_flags=(
        Flag(
            ("--layers",), "only these layers: a name, the end of one, or a regular expression on all of it", "PATTERN"
        ),
        JSON,
    ),
)
