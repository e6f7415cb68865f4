"""Keeps for a whole test session what Hydra reads, parses and merges, each by all that it is made of."""

import functools
import pickle
from dataclasses import astuple, replace
from pathlib import Path

from hydra._internal import config_loader_impl
from hydra._internal.defaults_list import Overrides
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from loralab.config.places import data_root


def keep():
    """From here on. The values that words set are set by Hydra in every composition."""
    Plugins.instance()
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        source.load_config = _loaded_once(source.load_config)
    config_loader_impl.create_defaults_list = _listed_once(config_loader_impl.create_defaults_list)
    loader = config_loader_impl.ConfigLoaderImpl
    loader._compose_config_from_defaults_list = _merged_once(loader._compose_config_from_defaults_list)
    OverridesParser.parse_rule = _parsed_once(OverridesParser.parse_rule)


def _loaded_once(load_config):
    """For as long as the file stays as it is."""
    kept = {}

    @functools.wraps(load_config)
    def loaded(source, config_path):
        file = Path(source.path, source._normalize_file_name(config_path))
        stat = file.stat() if file.is_file() else None  # None: within a package
        key = source.provider, file, stat and (stat.st_mtime_ns, stat.st_size)
        if key not in kept:
            kept[key] = pickle.dumps(load_config(source, config_path))
        return pickle.loads(kept[key])

    return loaded


def _sources(repo, read):
    """What is searched, as a key; None where a test may write into it, or a sweep file by its path is ``read``."""
    found = [(source.scheme(), source.provider, source.path) for source in repo.get_sources()]
    folders = [path for scheme, _, path in found if scheme in ("file", "own")]
    folders += [path for scheme, _, path in found if scheme == "sweeps" and Path(path, "sweeps").is_dir()]
    if any("sweeps/." in name or "sweeps=." in name or "sweeps//" in name or "sweeps=/" in name for name in read):
        return None
    if not all(Path(path).is_relative_to(data_root()) for path in folders):
        return None
    return tuple(source for source in found if source[0] != "sweeps")  # the package's, wherever the test is


def _listed_once(create):
    """By the words that choose files: those that set values change no list."""
    kept = {}

    @functools.wraps(create)
    def listed(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        sources = _sources(repo, [word.input_line for word in overrides_list])
        if sources is None:
            return create(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        values = Overrides(repo, overrides_list).config_overrides
        others = {*map(id, values), *(id(word) for word in overrides_list if word.is_sweep_override())}
        choosing = tuple(word.input_line for word in overrides_list if id(word) not in others)
        key = sources, config_name, choosing, prepend_hydra, skip_missing
        if key not in kept:
            kept[key] = create(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        return replace(kept[key], config_overrides=values)

    return listed


def _merged_once(merge):
    kept = {}

    @functools.wraps(merge)
    def merged(loader, defaults, repo):
        sources = _sources(repo, [str(default.config_path) for default in defaults])
        if sources is None:
            return merge(loader, defaults, repo)
        key = sources, tuple(astuple(default) for default in defaults)
        if key not in kept:
            kept[key] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(kept[key])

    return merged


def _parsed_once(parse):
    kept = {}

    @functools.wraps(parse)
    def parsed(parser, text, rule):
        if (text, rule) not in kept:
            kept[text, rule] = pickle.dumps(parse(parser, text, rule))
        return pickle.loads(kept[text, rule])

    return parsed
