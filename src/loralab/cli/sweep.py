"""``loralab sweep``: the trials of a sweep file that are not finished yet."""

import os
import sys
from pathlib import Path

from loralab.cli.arguments import FRESH, HYDRA, Arguments, Command, Flag
from loralab.errors import ArtifactError, ConfigError


def run(arguments: Arguments) -> int:
    """The sweep of a name, or with --resume that of a folder."""
    from loralab.cli import hydra_run

    if arguments.failed and arguments.resume is None:
        raise ConfigError(
            "--failed runs the failures of a begun sweep again; valid: loralab sweep --resume DIR --failed"
        )
    if arguments.resume is not None:
        overrides = begun_in(Path(arguments.resume).expanduser(), arguments)
    else:
        chosen = take_name(arguments)
        hydra_run.check_axes(arguments.overrides())
        overrides = sweep_arguments(chosen, arguments.overrides())
    return hydra_run.run(arguments, overrides, many=True)


def take_name(arguments: Arguments) -> str:
    """The ``+sweeps=`` choice of the sweep that the words name, which is taken from them. Raises ConfigError where they
    name none, or one that does not exist."""
    from loralab.config import sweep_files

    names = [word for word in arguments.words if _is_file(word) or ("=" not in word and not word.startswith("~"))]
    if len(names) != 1:
        command = f"loralab {arguments.command.name}"
        valid = ", ".join(sweep_files.names())
        raise ConfigError(f"{command} needs the name of one sweep, or a .yaml file; valid: {valid}")
    arguments.words.remove(names[0])
    return sweep_files.choice(names[0])


def _is_file(word: str) -> bool:
    """Whether it is a file whose name has ``=`` in it, and no setting."""
    return word.endswith(".yaml") and Path(word).expanduser().is_file()


def sweep_arguments(chosen: str, overrides: list[str]) -> list[str]:
    """Hydra's words for the sweep file of a ``+sweeps=`` choice: its axes, each replaced by an override of the same
    key. Raises ConfigError where neither the file nor ``overrides`` has axes."""
    from loralab.cli.hydra_run import check_axes
    from loralab.config import sweep_files
    from loralab.config.places import shown

    chosen, overrides = at_scale(chosen, overrides)
    path = sweep_files.locate(chosen)
    assert path is not None, chosen
    axes = sweep_files.axes(path, sweep_files.scale_of(chosen))
    if axes is None and not check_axes(overrides):
        raise ConfigError(
            f"{shown(path)} has no axes; valid: hydra.sweeper.params with them, as in adapter.r: [2, 8], axes on the"
            " command line, as in seed=0,1, or params: {} for one trial"
        )
    overridden = {_key(word) for word in overrides}
    axis_words = [f"{key}={value}" for key, value in (axes or {}).items() if _key(key) not in overridden]
    return [sweep_files.word(chosen), "hydra.sweeper.params=null", *axis_words, *overrides]


def at_scale(chosen: str, overrides: list[str]) -> tuple[str, list[str]]:
    """The ``+sweeps=`` choice at the scale that ``overrides`` name by ``scale=``, and the other overrides. Raises
    ConfigError where the file does not have that scale."""
    from loralab.config import sweep_files

    scales = [word for word in overrides if _key(word) == "scale"]
    for word in scales:
        chosen = sweep_files.at_scale(chosen, word.partition("=")[2])
    return chosen, [word for word in overrides if word not in scales]


def begun_in(folder: Path, arguments: Arguments) -> list[str]:
    """The words of a begun sweep, those of its launcher among them. Its flags for Hydra are added to ``arguments``,
    and this process is in its working folder from now on: relative paths mean what they meant."""
    from loralab.config.places import searched
    from loralab.records import record

    stored = record.read_sweep(folder)
    overrides = [str(word) for word in stored.get("overrides") or []]
    if not overrides:
        raise ArtifactError(f"{folder / 'sweep.json'} does not say how the sweep was called; run it by its name")
    overrides += [str(word) for word in stored.get("hydra_overrides") or []]
    arguments.hydra = [*(str(flag) for flag in stored.get("flags") or []), *arguments.hydra]
    overrides, here = resumed(overrides, arguments.overrides()), Path.cwd()
    cwd = Path(str(stored.get("cwd") or here))
    if cwd.is_dir() and not cwd.samefile(here):
        folder = folder.absolute()
        os.chdir(cwd)
        print(f"the sweep was begun in {cwd}: relative paths are looked up there", file=sys.stderr)
    elif not cwd.is_dir():
        print(f"the sweep was begun in {cwd}, which is gone: relative paths are looked up in {here}", file=sys.stderr)
    with searched(arguments.config_dir):
        _check_sweep_file(overrides, folder)
    return [*overrides, f"hydra.sweep.dir={folder}"]


def _check_sweep_file(overrides: list[str], folder: Path) -> None:
    """Raises ConfigError where the sweep file that ``overrides`` name is gone."""
    from loralab.config import sweep_files

    chosen = sweep_files.chosen_by(overrides)
    if chosen is not None and sweep_files.locate(chosen) is None:
        raise ConfigError(
            f"the sweep file {chosen}, with which {folder} was begun, is gone from {Path.cwd()}; valid: the file in its"
            f" place, as it was; loralab report {folder} shows what is finished"
        )


def resumed(overrides: list[str], more: list[str]) -> list[str]:
    """The words of a begun sweep with those given beside ``--resume``, which may change how it runs, not what it asks.

    Raises ConfigError for a word that would make other trials of its, or move it.
    """
    for word in more:
        _check_beside_resume(word, overrides)
    replaced = {_key(word) for word in (*more, "hydra.sweep.dir")}
    return [*(word for word in overrides if _key(word) not in replaced), *more]


def _check_beside_resume(word: str, overrides: list[str]) -> None:
    from loralab.config import identity

    group, _, name = _key(word).partition(".")
    stored_word = next((begun for begun in overrides if _key(begun) == _key(word)), None)
    if _key(word).startswith("hydra.sweep"):
        raise ConfigError(f"--resume names the sweep and its folder, and {word} another; valid: without {_key(word)}")
    if (
        group.partition("/")[0] in identity.VOLATILE
        or name in identity.VOLATILE_KEYS.get(group, ())
        or word == stored_word
    ):
        return
    if stored_word is not None:
        raise ConfigError(f"{stored_word} and {word} contradict each other: --resume finishes the trials it began")
    raise ConfigError(
        f"{word} would make other trials of those that --resume finishes; valid: the sweep by its name with {word},"
        " and beside --resume only how it runs (hydra.launcher, logger, callbacks, plan)"
    )


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


SWEEP = Command(
    name="sweep",
    summary="the question in sweeps/NAME.yaml or a FILE.yaml; finished trials are skipped",
    about="Runs every trial of a sweep file that is not finished yet, in packs, and writes the report.\n"
    "A NAME is looked up in ./sweeps of the current folder, then among loralab's; a FILE ends in .yaml.\n"
    "Settings replace the file's axes and values; with --resume DIR no name is given, and they only say how it runs.",
    usage="NAME|FILE [k=v ...]",
    examples={
        "loralab sweep rank adapter.r=4,16 seed=0,1,2,3": "the file's question, with other axes than its own",
        "loralab sweep ./my_sweep.yaml": "a file of your own",
        "loralab sweep --resume runs/rank": "after a crash: what is left",
    },
    writes="a sweep folder, hydra.sweep.dir (runs/NAME): sweep.json, a run folder a trial, and\n"
    "report/{index.html,results.csv,results.json,report.md}.",
    run=run,
    own_flags=(
        Flag(("--preview",), "shows what it would run, arm by arm; nothing is trained"),
        Flag(("--resume",), "finishes the sweep in this folder", "DIR"),
        Flag(("--failed",), "with --resume: runs again what has failed, and nothing else"),
        FRESH,
        *HYDRA,
    ),
)
