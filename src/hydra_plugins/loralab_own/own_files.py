"""The user's own yaml files for Hydra: ./conf, --config-dir, and sweep files. Nothing heavy is imported here."""

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

WHOLE = ("experiment/", "method/")  # groups of settings of several groups, with or without the line @package _global_


class OwnFiles(SearchPathPlugin):  # type: ignore[misc]
    """Puts the user's folders before loralab's in the search path of loralab, and of no other application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        main = next((str(place.path) for place in search_path.get_path() if place.provider == "main"), "")
        if not main.endswith("conf"):
            return
        from loralab.config.places import conf_folders, data_root

        if Path(main.removeprefix("file://")) != data_root() / "conf":
            return
        before = SearchPathQuery(provider="main")
        for what, folder in conf_folders().items():
            search_path.prepend(what, f"own://{folder}", anchor=before)
        search_path.prepend("sweep files", f"sweeps://{Path.cwd()}", anchor=before)


class OwnSource(FileConfigSource):  # type: ignore[misc]
    """A folder with the user's options of groups. The file of a primary configuration of loralab's is not replaced:
    ./conf may be another application's too."""

    @staticmethod
    def scheme() -> str:
        return "own"

    def is_config(self, config_path: str) -> bool:
        from loralab.config.places import data_root

        name = self._normalize_file_name(config_path)
        is_primary = "/" not in name and (data_root() / "conf" / name).is_file()
        return bool(super().is_config(config_path)) and not is_primary

    def load_config(self, config_path: str) -> ConfigResult:
        from loralab.config.places import shown
        from loralab.errors import ConfigError

        result = super().load_config(config_path)
        if not OmegaConf.is_dict(result.config):
            file = shown(Path(self.path) / self._normalize_file_name(config_path))
            raise ConfigError(f"{file} holds a list; valid: a mapping, with _target_ and its keys")
        if config_path.startswith(WHOLE):
            result.header["package"] = "_global_"
        return result


class SweepSource(ConfigSource):  # type: ignore[misc]
    """The group ``sweeps``: files by their path, those of ./sweeps, and the package's."""

    @staticmethod
    def scheme() -> str:
        return "sweeps"

    def available(self) -> bool:
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        from loralab.config.sweep_files import load, locate, scale_of

        choice = _choice(config_path)
        path = locate(choice)
        if path is None:
            raise ConfigLoadError(f"Config not found: {config_path}")
        content, header = load(path, scale_of(choice)), {"package": "_global_"}
        return ConfigResult(provider=self.provider, path=self.full_path(), config=content, header=header)

    def is_group(self, config_path: str) -> bool:
        return config_path == "sweeps" or any(name.startswith(f"{_choice(config_path)}/") for name in _names())

    def is_config(self, config_path: str) -> bool:
        from loralab.config.sweep_files import locate

        return config_path.startswith("sweeps/") and locate(_choice(config_path)) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return ["sweeps"] if results_filter in (None, ObjectType.GROUP) else []
        inside = [name for name in _names() if name.startswith(_choice(f"{config_path}/"))]
        rest = [name.removeprefix(_choice(f"{config_path}/")) for name in inside]
        groups = {name.partition("/")[0] for name in rest if "/" in name}
        configs = {name for name in rest if "/" not in name}
        wanted = {None: groups | configs, ObjectType.GROUP: groups, ObjectType.CONFIG: configs}
        return sorted(wanted[results_filter])


def _choice(config_path: str) -> str:
    """``sweeps/paper/x`` -> ``paper/x``."""
    return config_path.removeprefix("sweeps/")


def _names() -> list[str]:
    from loralab.config.sweep_files import names

    return names()
