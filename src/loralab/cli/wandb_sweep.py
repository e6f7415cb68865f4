"""``loralab wandb-sweep``: a sweep in W&B's own format, for ``wandb sweep`` and ``wandb agent``."""

from collections.abc import Mapping
from typing import Any

from loralab.cli.arguments import Arguments, Command
from loralab.errors import ConfigError

FOLDER = "hydra.run.dir=${hydra.sweep.dir}/${loralab.trial_id:}"  # the trial's, as in loralab sweep


def run(arguments: Arguments) -> int:
    """Prints the yaml."""
    from omegaconf import OmegaConf

    from loralab.cli.sweep import take_name

    name = take_name(arguments)
    print(OmegaConf.to_yaml(OmegaConf.create(as_wandb(name, arguments.overrides()))), end="")
    return 0


def as_wandb(name: str, overrides: list[str]) -> dict[str, Any]:
    """The sweep ``name`` with ``overrides`` as W&B's configuration of a grid. Its agents run ``loralab train`` with one
    trial each, in the folders that ``loralab sweep`` would use. Raises ConfigError."""
    from loralab.cli.hydra_run import check_axes
    from loralab.cli.sweep import sweep_arguments
    from loralab.config.compose import compose, plain, plain_sweep
    from loralab.config.sweep_files import axis_values

    check_axes(overrides)
    axes, fixed = _divided(sweep_arguments(name, overrides))
    if not axes:
        raise ConfigError(f"the sweep {name} has one trial, and W&B's sweeps need an axis; valid: one as in seed=0,1")
    _check_is_grid(name, plain_sweep(compose([word for word in fixed if not word.startswith("hydra")])))
    firsts = [f"{key}={values[0]}" for key, values in axes.items()]
    config = plain(compose([word for word in [*fixed, *firsts] if not word.startswith("hydra")]), [*fixed, *firsts])
    sweep = config["sweep"] or {}
    if tune := sweep.get("tune"):  # the report chooses among all values, which the agents have to try
        tuned, added = _divided([f"{key}={axis_values(values)}" for key, values in tune.items()])
        axes, fixed = {**axes, **tuned}, [*fixed, *added, "trainer.test=true"]
    return {
        "name": sweep.get("name") or name,
        **({"description": sweep["question"]} if sweep.get("question") else {}),
        "program": "loralab",
        "method": "grid",
        "metric": {"name": config["metric"], "goal": "maximize" if config["metric_mode"] == "max" else "minimize"},
        "parameters": {key: {"values": values} for key, values in axes.items()},
        "command": ["${env}", "loralab", "train", *fixed, FOLDER, "${args_no_hyphens}"],
    }


def _divided(words: list[str]) -> tuple[dict[str, list[int | float | str]], list[str]]:
    """(the axes among ``words``, the other words). Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from loralab.config.words import quoted

    axes: dict[str, list[int | float | str]] = {}
    fixed: list[str] = []
    for override in OverridesParser.create().parse_overrides(quoted(words)):
        if override.is_interval_sweep():
            raise ConfigError(f"{override.input_line} has no values that a grid could try; valid: a list of them")
        if override.is_sweep_override():
            key = str(override.input_line).partition("=")[0]
            values = [_number(value) for value in override.sweep_string_iterator()]
            axes[key.lstrip("+")] = values
            if key.startswith("+"):  # no name in W&B's eyes: it is added here, and each trial chooses
                fixed.append(f"{key}={values[0]}")
        else:
            fixed.append(str(override.input_line))
    return axes, fixed


def _check_is_grid(name: str, sweep: Mapping[str, Any]) -> None:
    """Raises ConfigError where ``sweep``, what the sweep file says, asks for more than every combination of axes."""
    if dependent := [key for key in ("zip", "when") if sweep.get(key)]:
        raise ConfigError(
            f"sweep.{dependent[0]} of {name} ties axes to each other, and W&B's grid has every combination; valid: a"
            " sweep without it, or loralab sweep"
        )


def _number(text: str) -> int | float | str:
    """W&B plots numbers on an axis; a text that is none stays as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


WANDB_SWEEP = Command(
    name="wandb-sweep",
    summary="the sweep of a name in W&B's format, for wandb agent",
    about="Prints the axes of a sweep file as W&B's sweep configuration. Each agent then runs one trial after the\n"
    "other by loralab train, unpacked, in the folders that loralab sweep uses.",
    usage="NAME [k=v ...]",
    examples={
        "loralab wandb-sweep rank > rank.yaml": "then: wandb sweep rank.yaml, and wandb agent with the id it prints",
        "loralab wandb-sweep rank adapter.r=4,16": "other axes",
    },
    writes="nothing; the yaml goes to stdout.",
    run=run,
)
