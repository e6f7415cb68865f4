"""The command line: it dispatches to the commands, owns the exit code and says in one paragraph what went wrong.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

import logging
import os
import sys
from collections.abc import Sequence

from loralab.cli.arguments import Arguments, Command
from loralab.cli.arguments import parse as parse_words
from loralab.cli.bench import BENCH
from loralab.cli.count import COUNT
from loralab.cli.doctor import DOCTOR
from loralab.cli.export import EXPORT
from loralab.cli.generate import GENERATE
from loralab.cli.import_ import IMPORT
from loralab.cli.init import INIT
from loralab.cli.latency import LATENCY
from loralab.cli.ls import LS
from loralab.cli.merge import MERGE
from loralab.cli.plan import PLAN
from loralab.cli.push import PUSH
from loralab.cli.quantize import QUANTIZE
from loralab.cli.report import REPORT
from loralab.cli.subspace import SUBSPACE
from loralab.cli.sweep import SWEEP
from loralab.cli.train import TRAIN
from loralab.cli.wandb_sweep import WANDB_SWEEP
from loralab.cli.wandb_upload import WANDB_UPLOAD
from loralab.errors import Interrupted
from loralab.quick_imports import own_process

COMMANDS = {
    command.name: command
    for command in (
        *(TRAIN, SWEEP, REPORT, PLAN, COUNT, QUANTIZE, GENERATE, MERGE, SUBSPACE, EXPORT, IMPORT, PUSH),
        *(LATENCY, LS, INIT, DOCTOR, BENCH, WANDB_SWEEP, WANDB_UPLOAD),
    )
}  # in the order of help
HELP = """loralab: what does this choice do to a LoRA or QLoRA fine-tune?

{commands}

Settings are Hydra's k=v: model=, quantization=, adapter=, data=, optimizer=, schedule=, trainer=, logger=.
  loralab train quantization=nf4_double adapter.r=16 adapter.lora_alpha=32 optimizer.lr=2e-4
  loralab train --cfg job         the whole configuration, composed but not run

loralab COMMAND --help speaks of that command. Flags may stand anywhere; of all commands: --debug, --version, --help
Tab completion: eval "$(loralab -sc install=bash)" (or fish, or zsh)
Exit codes: 0 ok, 1 internal, 2 configuration, 3 data, 4 artifact, 5 diverged, 6 out of memory, 7 disk, 130, 143"""

OWN_FAULT = "this is a fault of loralab's own, unless a line of your code is named above; --debug shows where"


def main(arguments: list[str] | None = None) -> None:
    """The console script. Leaves with the contract's exit code."""
    own_process()
    code = run(sys.argv[1:] if arguments is None else arguments)
    from loralab.signals import unlisten

    unlisten()
    sys.exit(code)


def run(words: list[str]) -> int:
    """Runs one command and returns its exit code."""
    # before torch is there: it warns on stderr of every block that is older than the profile of a step's memory
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return _dispatch(parse(words))
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        return _explain(error, words)


def parse(words: Sequence[str]) -> Arguments:
    """Raises ConfigError at an unknown command, an unknown flag, or a flag that lacks its value."""
    return parse_words(words, COMMANDS, default=OVERVIEW, completing=TRAIN)


def _dispatch(arguments: Arguments) -> int:
    if arguments.version:
        from loralab import __version__

        print(f"loralab {__version__}")
        return 0
    if arguments.command is OVERVIEW:
        return OVERVIEW.run(arguments)
    if arguments.help:
        print(arguments.command.parser().format_help(), end="")
        return 0
    from loralab.signals import listen

    listen()
    if arguments.debug:  # a trial's failure is its record's; where it came from is logged at this level
        logging.getLogger("loralab.running.runner").setLevel(logging.DEBUG)
    code = arguments.command.run(arguments)
    if code == 1 and not arguments.debug:
        print(OWN_FAULT, file=sys.stderr)
    return code


def _explain(error: BaseException, words: list[str]) -> int:
    """Prints what went wrong, with --debug its traceback too, and returns the exit code."""
    from loralab.cli.hydra_errors import translate
    from loralab.records.secrets import masked

    debug = "--debug" in words
    if debug:
        import traceback

        print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)

    translated = translate(error, words)
    print(f"loralab: {masked(str(translated))}", file=sys.stderr)
    if translated.exit_code == 1 and not debug:
        print(OWN_FAULT, file=sys.stderr)
    return translated.exit_code


def overview(arguments: Arguments) -> int:
    """Lists the commands."""
    usages = [f"loralab {command.name} {command.usage}" for command in COMMANDS.values()]
    width = max(map(len, usages))
    lines = [f"  {usage:{width}}  {command.summary}" for usage, command in zip(usages, COMMANDS.values(), strict=True)]
    print(HELP.format(commands="\n".join(lines)))
    return 0


OVERVIEW = Command(name="", summary="", about="", usage="", examples={}, writes="", run=overview)

if __name__ == "__main__":
    main()
