"""``loralab sweep``: the trials of a sweep file that are not finished yet."""

import os
import sys
from pathlib import Path

from loralab.cli.arguments import FRESH, HYDRA, Arguments, Command, Flag
from loralab.errors import ArtifactError, ConfigError, nearest


def run(arguments: Arguments) -> int:
    """The sweep of a name, or with --resume that of a folder."""
    from loralab.cli import hydra_run

    if arguments.resume is not None:
        overrides = begun_in(Path(arguments.resume).expanduser(), arguments)
    else:
        name = take_name(arguments)
        hydra_run.check_axes(arguments.overrides())
        overrides = sweep_arguments(name, arguments.overrides())
    return hydra_run.run(arguments, overrides, many=True)


def take_name(arguments: Arguments) -> str:
    """The sweep's name, taken from the words. Raises ConfigError where there is none, or no such sweep."""
    names = [word for word in arguments.words if "=" not in word and not word.startswith("~")]
    if len(names) != 1:
        command = f"loralab {arguments.command.name}"
        raise ConfigError(f"{command} needs the name of one sweep; valid: {', '.join(sweep_names())}")
    check_name(names[0])
    arguments.words.remove(names[0])
    return names[0]


def check_name(name: str) -> None:
    """Raises ConfigError where there is no such sweep."""
    if name not in sweep_names():
        raise ConfigError(f"there is no sweep {name!r}; {nearest(name, sweep_names())}")


def sweep_names() -> list[str]:
    """Of the files in sweeps/, without their ending."""
    from loralab.config.compose import data_root

    root = data_root() / "sweeps"
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def sweep_arguments(name: str, overrides: list[str]) -> list[str]:
    """Hydra's words for ``sweeps/NAME.yaml``: its axes, each replaced by an override of the same key."""
    from omegaconf import OmegaConf

    from loralab.config.compose import data_root

    stored = OmegaConf.load(data_root() / "sweeps" / f"{name}.yaml")
    axes = OmegaConf.select(stored, "hydra.sweeper.params") or {}
    overridden = {_key(word) for word in overrides}
    axis_words = [f"{key}={value}" for key, value in axes.items() if _key(key) not in overridden]
    return [f"+sweeps={name}", "hydra.sweeper.params=null", *axis_words, *overrides]


def begun_in(folder: Path, arguments: Arguments) -> list[str]:
    """The words of a begun sweep, those of its launcher among them. Its flags for Hydra are added to ``arguments``,
    and this process is in its working folder from now on: relative paths mean what they meant."""
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
    return [*overrides, f"hydra.sweep.dir={folder}"]


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
    summary="the question in sweeps/NAME.yaml, or --resume DIR; finished trials are skipped",
    about="Runs every trial of a sweep file that is not finished yet, in packs, and writes the report.\n"
    "Settings replace the file's axes and values; with --resume DIR no name is given, and they only say how it runs.",
    usage="NAME [k=v ...]",
    examples={
        "loralab sweep rank": "the file's own axes",
        "loralab sweep rank adapter.r=4,16 seed=0,1,2,3": "the same question, other axes",
        "loralab sweep --resume runs/rank": "after a crash: what is left",
    },
    writes="a sweep folder, hydra.sweep.dir (runs/NAME): sweep.json, a run folder a trial, and\n"
    "report/{index.html,results.csv,results.json,report.md}.",
    run=run,
    own_flags=(Flag(("--resume",), "finishes the sweep in this folder", "DIR"), FRESH, *HYDRA),
)
