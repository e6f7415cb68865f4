"""The words of a sweep: which contradict each other, and what a sweep's file and its earlier call add to them."""

from omegaconf import OmegaConf

from loralab.config import identity
from loralab.config.compose import data_root
from loralab.config.words import quoted
from loralab.errors import ConfigError


def check_axes(overrides: list[str]) -> None:
    """Raises ConfigError for an axis that a later word would quietly replace."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    parser, axes = OverridesParser.create(), dict[str, str]()
    for word in quoted(overrides):
        try:
            parsed = parser.parse_overrides([word])[0]
        except OverrideParseException:  # Hydra says what is wrong with it
            continue
        key = str(parsed.key_or_group)
        if key in axes:
            raise ConfigError(f"{axes[key]} and {word} contradict each other; valid: {key} once, with all its values")
        if parsed.is_sweep_override():
            axes[key] = word


def resumed(overrides: list[str], more: list[str]) -> list[str]:
    """The words of a begun sweep with those given beside ``--resume``, which may change how it runs, not what it asks.

    Raises ConfigError for a word that would make other trials of its, or move it.
    """
    for word in more:
        key = word.lstrip("+~").partition("=")[0]
        group, _, name = key.partition(".")
        before = next((one for one in overrides if one.lstrip("+~").partition("=")[0] == key), None)
        if key.startswith("hydra.sweep"):
            raise ConfigError(f"--resume names the sweep and its folder, and {word} another; valid: without {key}")
        if group.partition("/")[0] in identity.VOLATILE or name in identity.ASIDE.get(group, ()) or word == before:
            continue
        if before is not None:
            raise ConfigError(f"{before} and {word} contradict each other: --resume finishes the trials it began")
        raise ConfigError(
            f"{word} would make other trials of those that --resume finishes; valid: the sweep by its name with {word},"
            " and beside --resume only how it runs (hydra.launcher, logger, callbacks, plan)"
        )
    again = {word.lstrip("+~").partition("=")[0] for word in (*more, "hydra.sweep.dir")}
    return [*(word for word in overrides if word.lstrip("+~").partition("=")[0] not in again), *more]


def sweep_arguments(name: str, overrides: list[str]) -> list[str]:
    """Hydra's arguments for ``sweeps/NAME.yaml``: its axes, each replaced by an override of the same key."""
    stored = OmegaConf.load(data_root() / "sweeps" / f"{name}.yaml")
    axes = OmegaConf.select(stored, "hydra.sweeper.params") or {}
    given = {override.lstrip("+~").split("=")[0] for override in overrides}
    kept = [f"{key}={value}" for key, value in axes.items() if key not in given]
    return [f"+sweeps={name}", "hydra.sweeper.params=null", *kept, *overrides]
