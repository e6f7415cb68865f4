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

MOST_WORDS = 4096  # that are kept as they were parsed


class Composed:
    """Stands in for Hydra's config loader. Nothing of a trial is kept, so that very many cost no memory."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader: Any = loader
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}  # the newest, so that axes are parsed once
        self._pickled: dict[tuple[str, ...], bytes] = {}  # by the overrides that choose files
        self._groups: dict[str, bool] = {}
        self._repository: Any = None  # all folders that are searched, those of hydra.searchpath too

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """What Hydra would compose. Where values cannot be set in a copy, Hydra composes and raises its own errors."""
        try:
            config = self._copy_with_values(
                master_config, [*map(str, master_config.hydra.overrides.hydra), *sweep_overrides]
            )
        except Exception:
            config = self.loader.load_sweep_config(master_config, sweep_overrides)
        else:
            OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def _copy_with_values(self, master: DictConfig, words: Sequence[str]) -> DictConfig:
        parsed = [self._parse(word) for word in words]
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
        name = str(master.hydra.job.config_name)
        if self._repository is None:
            hydra_words = [word for word in words if word.startswith("hydra.")]
            self._repository = self.loader._parse_overrides_and_create_caching_repo(name, hydra_words)[1]
        choosing = tuple(word for word, override in zip(words, parsed, strict=True) if self._chooses_files(override))
        config: DictConfig = pickle.loads(self._composed(name, choosing))
        values: list[Any] = [override for override in parsed if not self._chooses_files(override)]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        task: list[Any] = [override for override in parsed if not override.is_hydra_override()]
        with open_dict(config.hydra):
            config.hydra.overrides.task = [override.input_line for override in task]
            options = config.hydra.job.config.override_dirname
            separators = {key: options[key] for key in ("kv_sep", "item_sep", "exclude_keys")}
            config.hydra.job.override_dirname = get_overrides_dirname(task, **separators)
        return config

    def _parse(self, word: str) -> Override:
        if word not in self._parsed:
            if len(self._parsed) >= MOST_WORDS:
                self._parsed.clear()
            self._parsed[word] = self._parser.parse_override(word)
        return self._parsed[word]

    def _chooses_files(self, override: Override) -> bool:
        """True if it decides which files are read or how Hydra itself works, False if it sets a value."""
        if override.is_hydra_override() or override.package is not None:
            return True
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = bool(self._repository.group_exists(key))
        return self._groups[key] and not isinstance(override.value(), dict)

    def _composed(self, name: str, words: tuple[str, ...]) -> bytes:
        """The pickled configuration of the overrides that choose files: to unpickle it is faster than to compose."""
        if words not in self._pickled:
            config = self.loader.load_configuration(name, list(words), run_mode=RunMode.RUN)
            self._pickled[words] = pickle.dumps(config)
        return self._pickled[words]
