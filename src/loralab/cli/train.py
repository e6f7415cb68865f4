"""``loralab train``: one run, or many; or that of a record again."""

from datetime import datetime
from pathlib import Path

from loralab.cli.arguments import FRESH, HYDRA, Arguments, Command, Flag
from loralab.errors import ArtifactError, ConfigError

RUN_DIR = "hydra.run.dir"


def run(arguments: Arguments) -> int:
    """One run, or with -m many; with --preview none, but its rows or the many are shown; with --from that of a record
    again."""
    from loralab.cli import hydra_run

    overrides = arguments.overrides()
    axes = hydra_run.check_axes(overrides)
    if arguments.source is not None:
        if axes_of_many := [word for word in axes.values() if RUN_DIR not in word]:
            raise ConfigError(f"--from makes one run again, and {axes_of_many[0]} means several; valid: one value")
        return again(arguments, overrides)
    if arguments.allow_changes:
        raise ConfigError("--allow-changes is about a record that is run again; valid: with --from RUN")
    if arguments.preview and not arguments.many:
        return preview(overrides, arguments.config_dir)
    return hydra_run.run(arguments, overrides, arguments.many)


def again(arguments: Arguments, overrides: list[str]) -> int:
    """Runs the trial of the record in ``--from`` once more, in a folder of its own, and returns the exit code.

    Raises ArtifactError where there is no whole record, where versions, base or data have changed since, and where the
    folder is the record's own.
    """
    from loralab.scheduling.rerun import Rerun
    from loralab.scheduling.session import Session

    if arguments.hydra or arguments.preview:
        flag = "--preview" if arguments.preview else arguments.hydra[0]
        raise ConfigError(f"--from takes the configuration of a record, and does not go with {flag}; valid: without it")
    named = [word.partition("=")[2] for word in overrides if _sets(word, RUN_DIR)]
    usual = f"runs/train/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    source = Path(str(arguments.source)).expanduser().absolute()
    folder = Path(named[-1] if named else usual).expanduser().absolute()  # before the record's folder is entered
    if folder.resolve() == source.resolve():
        raise ArtifactError(f"{folder} holds the record that is to be run again; valid: another {RUN_DIR}")
    words = [_placed(word) for word in overrides if not word.lstrip("+").startswith("hydra")]
    hydra = [word for word in overrides if word.lstrip("+").startswith("hydra") and not _sets(word, RUN_DIR)]
    rerun = Rerun.of(source, words, arguments.allow_changes)
    session = Session(fresh=arguments.fresh, many=False, again=rerun)
    return session.run([*rerun.arguments, *hydra, f"{RUN_DIR}={folder}"])


def _sets(word: str, key: str) -> bool:
    return word.lstrip("+").startswith(f"{key}=")


def _placed(word: str) -> str:
    """``word`` with the path of a file or folder that is there below the current folder, which is left."""
    from loralab.config.identity import PATHS

    key, _, value = word.partition("=")
    named = key.lstrip("+") in [f"{section}.{name}" for section, names in PATHS.items() for name in names]
    return f"{key}={Path(value).absolute()}" if named and value and Path(value).exists() else word


def preview(overrides: list[str], config_dir: str | None = None) -> int:
    """Prints the first rows as the model sees them, and returns exit code 0; nothing is trained."""
    from loralab.cli.terminal import messages_to_stderr
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    messages_to_stderr()
    spec = trial_spec(compose(overrides, config_dir=config_dir), Path())
    from loralab.data.preview import preview as first_rows
    from loralab.running.inputs import encoded_data

    spec.model.check()
    tokenizer = spec.model.load_tokenizer()
    print(first_rows(encoded_data(spec.data, spec.model, tokenizer, "cpu"), tokenizer))
    return 0


TRAIN = Command(
    name="train",
    summary="one run; with -m and k=a,b many",
    about="Fine-tunes a frozen base with one adapter. Settings are Hydra's k=v; --cfg job shows every key.",
    usage="[k=v ...]",
    examples={
        "loralab train quantization=nf4_double adapter.r=16 optimizer.lr=2e-4": "one run",
        "loralab train -m adapter.r=4,16 seed=0,1": "four trials, in packs",
        "loralab train --from runs/train/TIME": "the trial of that record again, exactly",
    },
    writes="a run folder, hydra.run.dir (runs/train/TIME): result.json, metrics.jsonl, config.yaml, adapter/;\n"
    "with -m a sweep folder, hydra.sweep.dir, with sweep.json, a run folder a trial and report/.",
    run=run,
    own_flags=(
        Flag(
            ("--from",),
            "runs the trial of a record again, with its whole configuration, and says whether the metrics are equal;"
            " refused where versions of libraries, base or data have changed. With k=v it is another trial, and said to"
            " be one",
            "RUN",
        ),
        Flag(("--allow-changes",), "with --from: runs all the same, and says what has changed"),
        Flag(("--preview",), "shows the first rows as the model sees them, with -m the trials; nothing is trained"),
        FRESH,
        *HYDRA,
    ),
)
