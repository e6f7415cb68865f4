"""``loralab count``: exact parameter counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loralab.cli.arguments import CONFIG_DIR, JSON, Arguments, Command, Flag
from loralab.errors import ConfigError

if TYPE_CHECKING:
    from loralab.training.specs import TrialSpec


def run(arguments: Arguments) -> int:
    """Counts on the meta device."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    spec = trial_spec(compose(arguments.overrides(), config_dir=arguments.config_dir), Path())
    from loralab.cli.terminal import table
    from loralab.planning.count import count as count_parameters

    if arguments.budget is not None:
        return _fitted(arguments, spec)
    counts = count_parameters(spec.model, spec.quantization, spec.adapter)
    rows = ((name, f"{value:,}") for name, value in counts.items())
    print(json.dumps(counts) if arguments.json else table(rows, right=[1]))
    return 0


def _fitted(arguments: Arguments, spec: "TrialSpec") -> int:
    """Prints the size of the adapter that is nearest to the budget, with its counts."""
    from loralab.cli.terminal import table
    from loralab.planning.budget import size_for
    from loralab.planning.count import count

    size, field = size_for(_whole(arguments.budget), spec.model, spec.adapter), spec.adapter.size_field
    counts = count(spec.model, spec.quantization, replace(spec.adapter, **{field: size}))
    rows = ((name, f"{value:,}") for name, value in {f"adapter.{field}": size, **counts}.items())
    print(json.dumps({f"adapter.{field}": size, **counts}) if arguments.json else table(rows, right=[1]))
    return 0


def _whole(text: str | None) -> int:
    if not (text or "").isdecimal() or not int(text or 0):
        raise ConfigError(f"--budget {text} is no number of parameters; valid: a whole number of at least 1")
    return int(text or 0)


BUDGET = Flag(("--budget",), "the adapter's rank, width or tokens with about N parameters", "N")
COUNT = Command(
    name="count",
    summary="exact parameter counts, without weights",
    about="Counts trainable, adapter, total and quantized parameters from shapes alone: no weights, no network\n"
    "for the named models.",
    usage="[k=v ...]",
    examples={
        "loralab count model=llama2_7b adapter.r=64": "of a model that does not fit here",
        "loralab count adapter.target_modules=[q_proj,v_proj] --json": "for a script",
        "loralab count --budget 300000": "the rank with that many parameters",
    },
    writes="nothing.",
    run=run,
    own_flags=(JSON, BUDGET, CONFIG_DIR),
)
