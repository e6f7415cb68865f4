"""Many trials composed at the price of a few: Hydra composes each choice of groups once; values are set in copies."""

import pickle
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict


class Composed:
    """Hydra's loader, and what sweepers compose to check it, which the launcher then need not compose again."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader: Any = loader
        self.checked: dict[tuple[str, ...], list[DictConfig]] = {}
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}
        self._stems: dict[tuple[str, ...], bytes] = {}
        self._groups: dict[str, bool] = {}
        self._repository: Any = None  # all folders that are searched, those of hydra.searchpath too

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """For a sweeper, which keeps none of them."""
        config = self._compose(master_config, sweep_overrides)
        self.checked.setdefault(tuple(sweep_overrides), []).append(config)
        return config

    def take(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """A trial's own configuration: no two trials are given the same object."""
        kept = self.checked.get(tuple(overrides))
        return kept.pop() if kept else self._compose(master, overrides)

    def _compose(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """As Hydra would; whatever is not plain sailing is left to Hydra, its errors too."""
        try:
            config = self._set(master, [*map(str, master.hydra.overrides.hydra), *overrides])
        except Exception:
            config = self.loader.load_sweep_config(master, overrides)
        else:
            OmegaConf.copy_cache(from_config=master, to_config=config)
        return config

    def _set(self, master: DictConfig, words: Sequence[str]) -> DictConfig:
        parsed = [self._parse(word) for word in words]
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
        name = str(master.hydra.job.config_name)
        if self._repository is None:
            of_hydra = [word for word in words if word.startswith("hydra.")]
            self._repository = self.loader._parse_overrides_and_create_caching_repo(name, of_hydra)[1]
        steering = [self._steers(one) for one in parsed]
        stem = self._stem(name, tuple(word for word, first in zip(words, steering, strict=True) if first))
        config: DictConfig = pickle.loads(stem)
        values: list[Any] = [one for one, first in zip(parsed, steering, strict=True) if not first]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        own: list[Any] = [one for one in parsed if not one.is_hydra_override()]
        with open_dict(config.hydra):
            config.hydra.overrides.task = [one.input_line for one in own]
            told = config.hydra.job.config.override_dirname
            separators = {"kv_sep": told.kv_sep, "item_sep": told.item_sep, "exclude_keys": told.exclude_keys}
            config.hydra.job.override_dirname = get_overrides_dirname(own, **separators)
        return config

    def _parse(self, word: str) -> Override:
        if word not in self._parsed:
            self._parsed[word] = self._parser.parse_override(word)
        return self._parsed[word]

    def _steers(self, one: Override) -> bool:
        """Whether an override decides which files are read, or how Hydra itself works; else it sets a value."""
        if one.is_hydra_override() or one.package is not None:
            return True
        key = one.key_or_group
        if key not in self._groups:
            self._groups[key] = bool(self._repository.group_exists(key))
        return self._groups[key] and not isinstance(one.value(), dict)

    def _stem(self, name: str, words: tuple[str, ...]) -> bytes:
        """What Hydra composes of the overrides that steer; a copy of it is cheap to load, unlike one to make."""
        if words not in self._stems:
            made = self.loader.load_configuration(name, list(words), run_mode=RunMode.RUN)
            self._stems[words] = pickle.dumps(made)
        return self._stems[words]
