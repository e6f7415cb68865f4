"""``loralab count``: exact parameter counts."""

import json
from pathlib import Path

from loralab.cli.arguments import CONFIG_DIR, JSON, Arguments, Command


def run(arguments: Arguments) -> int:
    """Counts on the meta device."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    spec = trial_spec(compose(arguments.overrides(), config_dir=arguments.config_dir), Path())
    from loralab.cli.terminal import table
    from loralab.planning.count import count as count_parameters

    counts = count_parameters(spec.model, spec.quantization, spec.adapter)
    rows = ((name, f"{value:,}") for name, value in counts.items())
    print(json.dumps(counts) if arguments.json else table(rows, right=[1]))
    return 0


COUNT = Command(
    name="count",
    summary="exact parameter counts, without weights",
    about="Counts trainable, adapter, total and quantized parameters from shapes alone: no weights, no network\n"
    "for the named models.",
    usage="[k=v ...]",
    examples={
        "loralab count model=llama2_7b adapter.r=64": "of a model that does not fit here",
        "loralab count adapter.target_modules=[q_proj,v_proj] --json": "for a script",
    },
    writes="nothing.",
    run=run,
    own_flags=(JSON, CONFIG_DIR),
)
