"""The scales of a sweep file: the same question on a small base in minutes, and on the paper's own models.

``scales: {mini: {...}, paper: {...}}`` holds for each what the file itself may hold: defaults, settings, axes and what
``sweep`` says. The chosen one goes over the rest of the file: mappings key by key, lists whole, defaults behind the
file's own. A file is chosen at a scale as ``NAME@SCALE``.
"""

from typing import cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from loralab.errors import ConfigError, nearest

SCALES = "scales"
USUAL = "mini"  # what is run where no scale is named: it needs no network


def parted(chosen: str) -> tuple[str, str | None]:
    """``paper/lora_table6@paper`` -> its name and its scale; None where it names no scale."""
    name, at, scale = chosen.rpartition("@")
    return (name, scale) if at else (chosen, None)


def merged(content: DictConfig, scale: str | None, file: str) -> DictConfig:
    """``content`` of a sweep file with that of its ``scale`` over it, which ``sweep.scale`` then names; None: mini.
    A file without scales stays as it is.

    ``file``: as messages call it. Raises ConfigError where it has no such scale, or where one is no mapping.
    """
    if (listed := content.get(SCALES)) is None:
        if scale is None:
            return content
        raise ConfigError(f"scale={scale}: {file} has no scales; valid: the sweep without it")
    if not isinstance(listed, DictConfig) or not listed or not all(isinstance(x, DictConfig) for x in listed.values()):
        raise ConfigError(f"{file}: scales={listed!r} is no group of scales; valid: {{mini: {{...}}, paper: {{...}}}}")
    names = [str(name) for name in listed]
    chosen = USUAL if scale is None else scale
    if chosen not in names:
        raise ConfigError(f"scale={chosen} is none of {file}; {nearest(chosen, names)}")
    own, over = (dict(part.items_ex(resolve=False)) for part in (content, listed[chosen]))
    del own[SCALES]
    defaults = [*own.pop("defaults", []), *over.pop("defaults", [])]
    before = {"defaults": ListConfig(defaults)} if defaults else {}
    return cast(DictConfig, OmegaConf.merge(before, own, over, {"sweep": {"scale": chosen}}))
