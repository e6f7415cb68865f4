"""The command line: it names the commands, owns the exit code and says in one paragraph what went wrong.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from loralab.config.words import Words
from loralab.errors import ArtifactError, ConfigError, Interrupted, nearest

HELP = """loralab: what does this choice do to a LoRA or QLoRA fine-tune?

  loralab train  [k=v ...]        one run; with -m and k=a,b many
  loralab sweep  NAME [k=v ...]   the question in sweeps/NAME.yaml; finished trials are skipped (--fresh: rerun)
  loralab sweep  --resume DIR     finishes a half-finished sweep
  loralab report DIR              table, page, CSV and JSON of a sweep or a run
  loralab plan   [k=v ...]        predicted peak memory, without weights or GPU; plan.budget_gib=24: what would fit
  loralab count  [k=v ...]        exact parameter counts, without weights
  loralab quantize [k=v ...]      a model's weights under every scheme: bits, bytes, error; --evaluate: also loss, KL
  loralab ls     [DIR]            sweeps and runs below DIR (default: runs) and their state
  loralab doctor                  what this machine can do, and the fix for what it cannot
  loralab bench  [PART ...]       speed beside PEFT, Lightning and bitsandbytes; parts: layer, step, sweep, prefix

Settings are Hydra's k=v: model=, quantization=, adapter=, data=, optimizer=, schedule=, trainer=, logger=.
  loralab train quantization=nf4_double adapter.r=16 adapter.lora_alpha=32 optimizer.lr=2e-4
  loralab train --cfg job         the whole configuration, composed but not run
  loralab train --preview         the first rows as the model sees them; nothing is trained

Flags, anywhere: --json (count, plan, quantize, doctor, ls, bench), --evaluate, --fresh, --resume DIR,
  --quick and --out FILE (bench), --debug (tracebacks), --version, --help
Exit codes: 0 ok, 1 internal, 2 configuration, 3 data, 4 artifact, 5 diverged, 6 out of memory, 7 disk, 130, 143
"""


def main(arguments: list[str] | None = None) -> None:
    """The console script. Leaves with the contract's exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    debug = "--debug" in arguments
    # before torch is there: it warns on stderr of every block that is older than the profile of a step's memory
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        words = Words.parse(arguments)
        if "version" in words:
            from loralab import __version__

            print(f"loralab {__version__}")
            return 0
        if "help" in words or not words.command:
            print(HELP, end="")
            return 0 if "help" in words or not words.rest else 2
        if words.command not in COMMANDS:
            raise ConfigError(f"loralab has no command {words.command!r}; {nearest(words.command, COMMANDS)}")
        words.refuse({flag: "loralab " + w for flag, w in FLAGS.items() if words.command not in w.split(", ")})
        from loralab.scheduling.signals import listen

        listen()
        return COMMANDS[words.command](words)
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        return _explain(error, debug)


def _explain(error: BaseException, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    from loralab.cli.hydra_errors import translate

    known = translate(error)
    print(f"loralab: {known}", file=sys.stderr)
    if known.exit_code == 1 and not debug:
        print("this is a fault of loralab's own; --debug shows where", file=sys.stderr)
    return known.exit_code


def train(words: Words) -> int:
    """One run, or with -m many."""
    rest = words.overrides()
    _check_axes(rest)
    if "preview" in words:
        return preview(rest)
    return _run(words, words.many, rest)


def _check_axes(overrides: list[str]) -> None:
    from loralab.cli.arguments import check_axes

    check_axes(overrides)


def preview(overrides: list[str]) -> int:
    """The first rows as the model would see them; nothing is trained."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    _messages_to_stderr()
    spec = trial_spec(compose(overrides), Path())
    from loralab.data.preview import preview as first_rows
    from loralab.running.runner import encoded_data

    spec.model.check()
    tokenizer = spec.model.load_tokenizer()
    print(first_rows(encoded_data(spec.data, spec.model, tokenizer, "cpu"), tokenizer))
    return 0


def sweep(words: Words) -> int:
    """Every trial of a sweep file that is not finished yet."""
    from loralab.cli.arguments import sweep_arguments

    if words.resume is not None:
        rest = _begun(Path(words.resume).expanduser(), words.overrides())
    else:
        names = [word for word in words.rest if "=" not in word and not word.startswith("~")]
        if len(names) != 1:
            raise ConfigError("loralab sweep needs the name of one sweep; valid: " + ", ".join(_sweep_names()))
        words.rest.remove(names[0])
        if names[0] not in _sweep_names():
            raise ConfigError(f"there is no sweep {names[0]!r}; {nearest(names[0], _sweep_names())}")
        _check_axes(words.overrides())
        rest = sweep_arguments(names[0], words.overrides())
    return _run(words, True, rest)


def _begun(folder: Path, more: list[str]) -> list[str]:
    """The words of a sweep that was begun, in whose working folder this process is from now on: relative paths among
    them mean what they meant."""
    from loralab.cli.arguments import resumed
    from loralab.records import record

    stored = record.read_sweep(folder)
    overrides = [str(word) for word in stored.get("overrides") or []]
    if not overrides:
        raise ArtifactError(f"{folder / 'sweep.json'} does not say how the sweep was called; run it by its name")
    overrides, cwd = resumed(overrides, more), Path(str(stored.get("cwd") or Path.cwd()))
    if cwd.is_dir() and not cwd.samefile(Path.cwd()):
        folder = folder.absolute()
        os.chdir(cwd)
        print(f"the sweep was begun in {cwd}: relative paths are looked up there", file=sys.stderr)
    elif not cwd.is_dir():
        here = Path.cwd()
        print(f"the sweep was begun in {cwd}, which is gone: relative paths are looked up in {here}", file=sys.stderr)
    return [*overrides, f"hydra.sweep.dir={folder}"]


def _run(words: Words, many: bool, overrides: list[str]) -> int:
    """Through Hydra; the table and the page of what was a sweep."""
    from loralab.config.compose import shown
    from loralab.scheduling.sweep import Jobs

    flags = [word for word in words.hydra if word != "-m"]
    if words.shows:
        try:
            one = shown(_first_trial(overrides) if many else overrides)
            return Jobs(fresh=False, many=False).run([*flags, *one])
        except SystemExit:  # Hydra has said what it cannot show
            return 2
    if many and not any(word.startswith("hydra/launcher=") for word in overrides):
        overrides = [*overrides, "hydra/launcher=packed"]
    jobs = Jobs(fresh="fresh" in words, many=many)
    code = jobs.run([*(["-m"] if many else []), *flags, *overrides])
    if many and jobs.folder is not None:
        _show_report(jobs.folder)
    return code


def _first_trial(overrides: list[str]) -> list[str]:
    """The words of a sweep's first trial, for Hydra shows one configuration; stderr says which it is."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from loralab.config.words import quoted

    parsed = OverridesParser.create().parse_overrides(quoted(overrides))
    swept = [one for one in parsed if one.is_discrete_sweep()]
    words = [f"{one.get_key_element()}={next(iter(one.sweep_string_iterator()))}" for one in swept]
    if swept:
        print(f"the first trial's: {' '.join(words)}", file=sys.stderr)
    return [*(str(one.input_line) for one in parsed if not one.is_sweep_override()), *words]


def _show_report(folder: Path) -> None:
    from loralab.reporting.report import report as write_report

    made = write_report(folder)
    print(made.table)
    print(f"\nreport: {made.index}")


def _sweep_names() -> list[str]:
    from loralab.config.compose import data_root

    root = data_root() / "sweeps"
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def report(words: Words) -> int:
    """Tables and the page of a finished or half-finished sweep, or of a single run."""
    if len(words.rest) != 1:
        raise ConfigError("loralab report needs one folder: a sweep's or a run's")
    _show_report(Path(words.rest[0]))
    return 0


def count(words: Words) -> int:
    """Exact parameter counts on the meta device."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    spec = trial_spec(compose(words.overrides()), Path())
    from loralab.planning.count import count as count_parameters

    counts = count_parameters(spec.model, spec.quantization, spec.adapter)
    if "json" in words:
        print(json.dumps(counts))
    else:
        width = max(len(f"{value:,}") for value in counts.values())
        for name, value in counts.items():
            print(f"{name:22} {value:>{width},}")
    return 0


def plan(words: Words) -> int:
    """Predicted peak memory, without weights, data or a GPU."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    spec = trial_spec(compose(words.overrides()), Path())
    from loralab.planning import plan as planning
    from loralab.planning.sizes import name_what_stays
    from loralab.training.trainer import quiet

    quiet()
    name_what_stays(spec.model)
    device = "cuda" if spec.plan.device == "auto" else spec.plan.device
    found = planning.predict(spec, device)
    if "json" in words:
        print(json.dumps(found.as_dict()))
        return 0
    print(planning.render(found), flush=True)
    budget = spec.plan.budget_gib or 0.0
    for what in planning.WHATS if budget else ():  # each a bisection of traces: a minute or so for a large model
        fits = planning.largest(spec, budget * planning.GIB, what, device)
        print(f"largest {what} in {budget:g} GiB, the rest as it is: {fits:,}", flush=True)
    return 0


def quantize(words: Words) -> int:
    """A quantization study: JSON and a page in its run folder, a table here, also where the folder takes no more."""
    from loralab.config.build import build, quantizers
    from loralab.config.compose import compose, plain
    from loralab.records.lock import hold

    config = compose(words.overrides(), "quantize")
    content, schemes = plain(config), quantizers(config)
    keys = ("study", "model", "data", "trainer", "logger")
    spec, model, data, trainer, logger = (build(content[key], key) for key in keys)
    spec.chosen("evaluate" in words)
    folder = Path(config.hydra.run.dir).absolute()
    _messages_to_stderr()
    from loralab.analysis.study import study
    from loralab.records.environment import environment
    from loralab.reporting import quantization

    with hold(folder):  # before the work: whether it can be written
        result = study(spec, schemes, model, data, trainer, "evaluate" in words)
        machine = environment()
        result.update(machine=machine["gpu"] or machine["cpu"], versions=machine["versions"], config=content)
        print(json.dumps(result) if "json" in words else quantization.terminal(result), flush=True)
        index = quantization.write(folder, result)
        mirror = logger.start(folder, f"quantize {result['weights']}", "quantize", content)
        mirror.table("quantization/schemes", *quantization.wandb_table(result))
        mirror.finish()
    if "json" not in words:
        print(f"\nreport: {index}")
    return 0


def _messages_to_stderr() -> None:
    """As Hydra's logging of conf/ would have it, for a command that Hydra only composes."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("loralab").setLevel(logging.INFO)


def ls(words: Words) -> int:
    """Sweeps and runs below a folder."""
    from loralab.reporting import listing

    root = Path(words.rest[0]) if words.rest else Path("runs")
    found = listing.listing(root)
    print(json.dumps({"runs": found}) if "json" in words else listing.render(found))
    return 0


def doctor(words: Words) -> int:
    """What this machine can do."""
    from loralab.cli.doctor import examine, render

    if words.rest:
        raise ConfigError(f"loralab doctor takes no settings, got {words.rest[0]!r}; valid: loralab doctor [--json]")
    findings = examine()
    print(json.dumps({"checks": findings}) if "json" in words else render(findings))
    return 0


FLAGS = {  # where each means something
    "json": "count, plan, quantize, doctor, ls, bench",
    "evaluate": "quantize",
    "fresh": "train, sweep",
    "preview": "train",
    "resume": "sweep",
    "quick": "bench",
    "out": "bench",
}


def bench(words: Words) -> int:
    """Speed beside other libraries, in one run; a Markdown table, and JSON on disk."""
    _messages_to_stderr()
    from loralab.bench.run import ABOUT
    from loralab.bench.run import bench as measured
    from loralab.bench.table import render

    for word in words.rest:
        if word not in ABOUT:
            raise ConfigError(f"loralab bench: there is no part {word!r}; {nearest(word, ABOUT)}")
    found = measured(words.rest, "quick" in words, Path(words.out or "runs/bench/bench.json").expanduser())
    print(json.dumps(found) if "json" in words else render(found))
    failed = any(part["status"] != "completed" for part in found["parts"].values())
    return int(failed)


COMMANDS: dict[str, Callable[[Words], int]] = {
    "train": train,
    "sweep": sweep,
    "report": report,
    "count": count,
    "plan": plan,
    "quantize": quantize,
    "ls": ls,
    "doctor": doctor,
    "bench": bench,
}

if __name__ == "__main__":
    main()
