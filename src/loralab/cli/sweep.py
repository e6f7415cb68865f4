"""``loralab sweep``: the trials of a sweep file that are not finished yet."""

import os
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

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
        return resume(Path(arguments.resume).expanduser(), arguments)
    chosen = take_name(arguments)
    hydra_run.check_axes(arguments.overrides())
    return hydra_run.run(arguments, sweep_arguments(chosen, arguments.overrides()), many=True)


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

    chosen, overrides = at_scale(chosen, [_added(word) for word in overrides])
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


def _added(word: str) -> str:
    """A setting of how a sweep goes needs no plus, whether its file has one of that name or not."""
    from loralab.config.sweep_files import SETTINGS

    return f"++{word}" if word[0] not in "+~" and _key(word) in SETTINGS else word


def at_scale(chosen: str, overrides: list[str]) -> tuple[str, list[str]]:
    """The ``+sweeps=`` choice at the scale that ``overrides`` name by ``scale=``, and the other overrides. Raises
    ConfigError where the file does not have that scale."""
    from loralab.config import sweep_files

    scales = [word for word in overrides if _key(word) == "scale"]
    for word in scales:
        chosen = sweep_files.at_scale(chosen, word.partition("=")[2])
    return chosen, [word for word in overrides if word not in scales]


def resume(folder: Path, arguments: Arguments) -> int:
    """Finishes what every call of the sweep in ``folder`` has asked for; axes beside ``--resume`` are one more call,
    which runs last, of the files that the others were begun with. The exit code of the first call that has one."""
    from loralab.cli import hydra_run
    from loralab.records import record
    from loralab.scheduling.sweep_file import calls_of

    stored = record.read_sweep(folder)
    calls = calls_of(stored)
    if not calls:
        raise ArtifactError(f"{folder / 'sweep.json'} does not say how the sweep was called; run it by its name")
    axes, how = split(calls, arguments.overrides())
    if axes and arguments.failed:
        raise ConfigError(f"--failed runs nothing but failures again, and {axes[0]} adds trials; valid: one of them")
    if stored.get("tune"):
        axes = [_beside_begun(word, calls) if _key(word) == "seed" else word for word in axes]
    added = [{**calls[0], "overrides": replaced(calls[0]["overrides"], axes)}] if axes else []
    begun, calls = len(calls), [*calls, *added]
    if any(call.get("cwd") not in (None, str(Path.cwd())) for call in calls):
        folder = folder.absolute()
    codes = []
    for number, call in enumerate(calls, 1):
        own = copy(arguments)
        overrides = begun_in(folder, call, own, how)
        own.resume = arguments.resume if number <= begun else None  # trials that are added are not listed yet
        codes.append(hydra_run.run(own, overrides, many=True, shows=number == len(calls)))
    return next((code for code in codes if code), 0)


def _beside_begun(word: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The seeds of ``word`` behind those of ``calls``: a rate is chosen, and ended early, by all seeds of its row."""
    from loralab.scheduling.axes import values_of

    begun = [one for call in calls for one in call["overrides"] if _key(one) == "seed"]
    return f"seed={','.join(dict.fromkeys(seed for one in (*begun, word) for seed in values_of(one)))}"


def split(calls: Sequence[Mapping[str, Any]], words: list[str]) -> tuple[list[str], list[str]]:
    """(those of ``words`` that are new values of axes, which add trials; those that say how it runs, or are refused).
    ``calls``: of the begun sweep."""
    from loralab.cli.hydra_run import check_axes
    from loralab.config import identity

    begun = [word for call in calls for word in call["overrides"]]
    new = [word for word in words if word not in begun or not identity.decides(word)]
    swept = {*check_axes(words), *(key for call in calls for key in check_axes(call["overrides"]))}
    axes = [word for word in new if _key(word) in swept and not _key(word).startswith("hydra")]
    return axes, [word for word in new if word not in axes]


def begun_in(folder: Path, call: Mapping[str, Any], arguments: Arguments, how: list[str]) -> list[str]:
    """The words of a begun sweep's call, those of its launcher among them. Its flags for Hydra are added to
    ``arguments``, and this process is in its working folder from now on: relative paths mean what they meant."""
    from loralab.config.places import searched

    overrides = [*call["overrides"], *(str(word) for word in call.get("hydra_overrides") or [])]
    arguments.hydra = [*(str(flag) for flag in call.get("flags") or []), *arguments.hydra]
    overrides, here = resumed(overrides, how), Path.cwd()
    cwd = Path(str(call.get("cwd") or here))
    if cwd.is_dir() and not cwd.samefile(here):
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
    return replaced([word for word in overrides if _key(word) != "hydra.sweep.dir"], more)


def replaced(overrides: list[str], more: list[str]) -> list[str]:
    """``overrides`` with ``more`` in place of those of the same keys. A key that was added (``+KEY=``) stays one."""
    added = {_key(word) for word in overrides if word.startswith("+")}
    keys = {_key(word) for word in more}
    new = [f"++{word}" if word[0] not in "+~" and _key(word) in added else _added(word) for word in more]
    return [*(word for word in overrides if _key(word) not in keys), *new]


def _check_beside_resume(word: str, overrides: list[str]) -> None:
    from loralab.config import identity

    stored_word = next((begun for begun in overrides if _key(begun) == _key(word)), None)
    if _key(word).startswith("hydra.sweep"):
        raise ConfigError(f"--resume names the sweep and its folder, and {word} another; valid: without {_key(word)}")
    if word == stored_word or not identity.decides(word):
        return
    if stored_word is not None:
        raise ConfigError(f"{stored_word} and {word} contradict each other: --resume finishes the trials it began")
    raise ConfigError(
        f"{word} would make other trials of those that --resume finishes; valid: the sweep by its name with {word},"
        " and beside --resume values of axes, as in seed=4,5, which adds trials, or how it runs (hydra.launcher,"
        " logger, callbacks, plan)"
    )


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


SWEEP = Command(
    name="sweep",
    summary="the question in sweeps/NAME.yaml or a FILE.yaml; finished trials are skipped",
    about="Runs every trial of a sweep file that is not finished yet, in packs, and writes the report.\n"
    "A NAME is looked up in ./sweeps of the current folder, then among loralab's; a FILE ends in .yaml.\n"
    "Settings replace the file's axes and values; with --resume DIR no name is given: values of axes add trials, and\n"
    "others only say how it runs.",
    usage="NAME|FILE [k=v ...]",
    examples={
        "loralab sweep rank adapter.r=4,16 seed=0,1,2,3": "the file's question, with other axes than its own",
        "loralab sweep ./my_sweep.yaml": "a file of your own",
        "loralab sweep --resume runs/rank": "after a crash: what is left; seed=4,5 behind it adds two seeds",
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
