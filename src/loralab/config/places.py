"""Where yaml files are looked up: ``--config-dir``, ./conf and ./sweeps of the current folder, then the package."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loralab.errors import ConfigError

_config_dir: ContextVar[str | None] = ContextVar("config_dir", default=None)  # of --config-dir, while one is in use


def data_root() -> Path:
    """The folder that holds conf/ and sweeps/: the package in a wheel, the repository in a checkout."""
    package = Path(__file__).parents[1]
    return package if (package / "conf").is_dir() else package.parents[1]


def own(name: str, folder: Path | None = None) -> Path | None:
    """The folder ``name`` (conf, sweeps) of ``folder``, None: the current one. None where there is none, and in the
    repository itself, where it is the package's."""
    place, packages = (folder or Path.cwd()) / name, data_root() / name
    return place if place.is_dir() and not place.samefile(packages) else None


def conf_folders() -> dict[str, Path]:
    """{what it is: folder} of the user's yaml files, in the order in which they are searched before the package's."""
    given, here = _config_dir.get(), own("conf")
    folders = {"--config-dir": Path(given).absolute()} if given is not None else {}
    return {**folders, **({"./conf": here} if here else {})}


@contextmanager
def searched(config_dir: str | None) -> Iterator[None]:
    """Within, ``config_dir`` is searched first; None: what was searched before. Raises ConfigError where there is no
    such folder."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder; valid: a folder of yaml files")
    token = _config_dir.set(config_dir) if config_dir is not None else None
    try:
        yield
    finally:
        if token is not None:
            _config_dir.reset(token)


def options(folder: Path) -> dict[str, Path]:
    """{option of a group: its yaml file}; empty where there is no such folder."""
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def shown(path: Path) -> str:
    """``path`` for a message: relative where it lies below the current folder."""
    absolute = Path(os.path.normpath(Path.cwd() / path))  # links stay as they are called
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
