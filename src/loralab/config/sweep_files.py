"""Sweep files: where one lies, what it holds, and its axes as Hydra's words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loralab.config import scales
from loralab.config.places import conf_folders, data_root, options, own, shown
from loralab.config.words import PLAIN, in_quotes, own_classes
from loralab.errors import ConfigError, nearest

AXES = "hydra.sweeper.params"
NAMES = ("compare", "tune", "extend", "halving", "zip", "when", "claims", "question", "fixed", "tags", "name")
SETTINGS = tuple(f"sweep.{name}" for name in NAMES)  # how a sweep goes and what it is called, none of them of a trial


def names(folder: Path | None = None) -> list[str]:
    """Of the sweep files of ``folder`` (None: the current one) and of the package, without their ending."""
    here = own("sweeps", folder)
    return sorted({*options(data_root() / "sweeps"), *(options(here) if here else ())})


def choice(word: str) -> str:
    """What ``+sweeps=`` is given for ``word``: a name, or the path of a file that ends in .yaml.

    A file of ./sweeps gets its name; any other is called as ``word`` does, without the ending. Raises ConfigError where
    there is no such sweep.
    """
    if not word.endswith(".yaml"):
        if locate(word) is None or _is_path(word):
            raise ConfigError(_missing(word))
        return word
    path = Path(word).expanduser()
    if path.is_dir():
        inside = ", ".join(shown(file) for file in sorted(path.glob("*.yaml"))) or "it holds none"
        raise ConfigError(f"{word} is a folder; valid: a sweep file ({inside})")
    if not path.is_file():
        raise ConfigError(f"there is no file {word}; {_valid()}")
    name = next((name for name in names() if (found := locate(name)) and found.samefile(path)), None)
    if name is not None:
        return name
    plain = str(path.with_suffix(""))
    return plain if _is_path(plain) else f"./{plain}"


def locate(chosen: str, folder: Path | None = None) -> Path | None:
    """The file of a ``choice``, whatever its scale: of its path, in ./sweeps, below another folder that is searched, or
    in the package. None where there is none.

    ``folder``: the one that relative paths start in; None: the current one.
    """
    return _located(chosen, folder) or _located(scales.parted(chosen)[0], folder)


def scale_of(chosen: str, folder: Path | None = None) -> str | None:
    """The scale in a ``choice`` such as ``paper/lora_table6@paper``; None where it names none."""
    return None if _located(chosen, folder) else scales.parted(chosen)[1]


def at_scale(chosen: str, scale: str) -> str:
    """The ``choice`` of the same file at another scale. Raises ConfigError where the file does not have it."""
    path = locate(chosen)
    assert path is not None, chosen
    load(path, scale)
    return f"{chosen if scale_of(chosen) is None else scales.parted(chosen)[0]}@{scale}"


def _located(chosen: str, folder: Path | None) -> Path | None:
    if _is_path(chosen):
        path = (folder or Path.cwd()) / f"{chosen}.yaml"
        return path if path.is_file() else None
    searched = [conf / "sweeps" for conf in conf_folders().values()]  # as Hydra does
    places = [place for place in (own("sweeps", folder), *searched, data_root() / "sweeps") if place is not None]
    return next((path for place in places if (path := place / f"{chosen}.yaml").is_file()), None)


def own_files(choices: Mapping[str, str]) -> list[str]:
    """The user's files among ``choices`` ({group: option}), relative to the current folder where they lie below it."""
    files: list[Path] = []
    for group, option in choices.items():
        places = (folder / group / f"{option}.yaml" for folder in conf_folders().values())
        files += [path for path in places if path.is_file()][:1]
    sweep = locate(choices["sweeps"]) if choices.get("sweeps") else None
    if sweep is not None and not sweep.is_relative_to(data_root() / "sweeps"):
        files.append(sweep)
    return sorted({shown(path) for path in files})


def refuse_mode(choices: Iterable[tuple[str, str]], many: bool) -> None:
    """Raises ConfigError where a file of the user's among ``choices``, (group, option), sets ``hydra.mode`` to another
    than the command's; ``many``: it runs several trials."""
    for name in dict.fromkeys(file for group, option in choices for file in own_files({group: option})):
        content = OmegaConf.load(name)
        mode = OmegaConf.select(content, "hydra.mode") if isinstance(content, DictConfig) else None
        if mode is not None and str(mode) != ("MULTIRUN" if many else "RUN"):
            raise ConfigError(
                f"{name}: hydra.mode={mode} is ignored in a file, for the command says whether there is one run or"
                " several; valid: no hydra.mode, and loralab train, loralab train -m or loralab sweep"
            )


def load(path: Path, scale: str | None = None) -> DictConfig:
    """The content of a sweep file. What it leaves out is added: its name as ``sweep.name``, and ``hydra.sweep.dir``.

    ``scale``: of those under ``scales``, whose settings, axes and defaults go over the file's own; None: mini.
    Raises ConfigError with file and line where it is no YAML of settings, and for a scale that it does not have.
    """
    content = scales.merged(_read(path), scale, shown(path))
    for section in ("sweep", "hydra", "hydra.sweep", "hydra.sweeper", AXES):
        if not isinstance(node := OmegaConf.select(content, section), DictConfig | None):
            raise ConfigError(f"{shown(path)}: {section}={node!r} is no group of settings; valid: a mapping")
    name = name_of(path)
    folder = f"runs/{name}{'' if scale in (None, scales.USUAL) else f'-{scale}'}"
    for key, value in (("sweep.name", name), ("hydra.sweep.dir", folder)):
        if OmegaConf.select(content, key) is None:
            OmegaConf.update(content, key, value)
    return content


def name_of(path: Path) -> str:
    """Its path below the folder of sweeps that it lies in, without the ending; else the file's name alone."""
    for place in (own("sweeps"), data_root() / "sweeps"):
        if place is not None and path.is_relative_to(place):
            return str(path.relative_to(place).with_suffix(""))
    return path.stem


def axes(path: Path, scale: str | None = None) -> dict[str, str] | None:
    """{key: its values in Hydra's grammar} of what the file varies at a ``scale``; None where it says nothing of axes,
    while ``params: {}`` says that there are none.

    A YAML list holds a value in each of its places, whatever its kind; a text is in Hydra's grammar already
    (``1,2,4``). Raises ConfigError for an axis without a value.
    """
    node = OmegaConf.select(load(path, scale), AXES)
    if node is None:
        return None
    given: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in given.items():
        if value in ([], "", {}):
            raise ConfigError(f"{shown(path)}: the axis {key} has no value; valid: at least one, as in {key}: [1, 2]")
    return {str(key): axis_values(value) for key, value in given.items()}


def axis_values(value: Any) -> str:
    """The values of an axis in Hydra's grammar: those of a list, one value, or a text that is in it already."""
    if isinstance(value, str):
        return value
    return ",".join(map(grammar, value)) if isinstance(value, list) else grammar(value)


def grammar(value: Any) -> str:
    """One value of YAML as Hydra's grammar has it: ``[q_proj,v_proj]``, ``{q_proj:4}``, null, true, 0.001, a text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(grammar, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else f"{'-' * (value < 0)}inf"
    text = str(value)
    if not isinstance(value, str) or _is_interpolation(text) or (PLAIN.fullmatch(text) and not _reads_otherwise(text)):
        return text
    return f"'{in_quotes(text)}'"


def named_classes(words: Iterable[str]) -> dict[str, set[str]]:
    """{group: its keys} of the groups whose class ``words``, or the sweep file that they choose, name in ``_target_``:
    the keys that either sets."""
    words = list(words)
    named, chosen = own_classes(words), chosen_by(words)
    path = locate(chosen) if chosen else None
    in_file = _classes_in(path, path.stat().st_mtime_ns) if path else {}
    for group, keys in in_file.items():
        split = [word.lstrip("+").partition("=")[0].split(".") for word in words]
        named[group] = {*keys} | {key[1] for key in split if key[0] == group and len(key) > 1}
    return named


@lru_cache(maxsize=64)
def _classes_in(path: Path, changed_ns: int) -> dict[str, frozenset[str]]:
    """{group: its keys} of the groups whose class a sweep file names; ``changed_ns``: a file that has changed is read
    anew."""
    content: Any = OmegaConf.to_container(_read(path), resolve=False)
    nodes = {group: node for group, node in content.items() if isinstance(node, Mapping) and "_target_" in node}
    return {str(group): frozenset(map(str, node)) for group, node in nodes.items()}


def word(chosen: str) -> str:
    """The word that makes Hydra read the sweep file of a ``choice``."""
    return f"+sweeps={chosen}" if PLAIN.fullmatch(chosen) else f"+sweeps='{in_quotes(chosen)}'"


def chosen_by(words: Sequence[str]) -> str | None:
    """The ``choice`` among ``words``; None where they name no sweep file."""
    values = [each.partition("=")[2] for each in words if each.lstrip("+").startswith("sweeps=")]
    if not values:
        return None
    value = values[-1]
    return value[1:-1].replace("\\'", "'") if value[:1] == value[-1:] == "'" else value


def _is_interpolation(text: str) -> bool:
    """Whether Hydra's grammar takes it for an interpolation; one with another inside must stand in quotes."""
    return text.startswith("${") and text.endswith("}") and "{" not in text[2:]


def _reads_otherwise(text: str) -> bool:
    """Whether YAML, and so Hydra, takes the bare text for a number, a boolean or null."""
    return bool(OmegaConf.create(f"- {text}")[0] != text)


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown(path)} is no text in UTF-8 ({error.reason}); valid: a sweep file in YAML") from error
    except Exception as error:
        if (refusal := not_yaml(error)) is not None:
            raise refusal from error
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"{shown(path)} cannot be read as a sweep file: {error.strerror or error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"{shown(path)} holds a list; valid: a mapping with sweep:, settings and hydra.sweeper.params"
        )
    if not content:
        raise ConfigError(f"{shown(path)} is empty; valid: a mapping with sweep:, settings and hydra.sweeper.params")
    return content


def not_yaml(error: BaseException) -> ConfigError | None:
    """What YAML refuses of a file, with file and line; None where ``error`` is no error of YAML's."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return None
    return ConfigError(f"{shown(Path(mark.name))}:{mark.line + 1}: no YAML: {getattr(error, 'problem', None)}")


def _is_path(chosen: str) -> bool:
    return chosen.startswith(("./", "../", "/"))


def _missing(name: str) -> str:
    if _is_path(name):
        return f"{name} is no name of a sweep; valid: the path of a file, {name.rstrip('/')}.yaml, or a name"
    if Path(f"{name}.yaml").is_file():
        return f"there is no sweep {name!r} in sweeps/; did you mean the file ./{name}.yaml? {_valid()}"
    return f"there is no sweep {name!r}; {_hint(name)}{_valid()}"


def _hint(name: str) -> str:
    return nearest(name, names()).partition("valid: ")[0]


def _valid() -> str:
    """Which sweeps there are here, and which in the package."""
    here, packages = own("sweeps"), ", ".join(options(data_root() / "sweeps"))
    if here is None:
        return f"valid: a .yaml file, or one of loralab's: {packages} (there is no folder ./sweeps here)"
    return f"valid: a .yaml file, in ./sweeps: {', '.join(options(here)) or 'nothing'}; loralab's: {packages}"
