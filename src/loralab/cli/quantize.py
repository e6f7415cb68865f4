"""``loralab quantize``: a model's weights under every scheme."""

import json
from pathlib import Path

from loralab.cli.arguments import CONFIG_DIR, JSON, Arguments, Command, Flag


def run(arguments: Arguments) -> int:
    """A quantization study: JSON and a page in its run folder, a table here, also where the folder takes no more."""
    from loralab.config.build import build, quantizers
    from loralab.config.compose import compose, plain
    from loralab.records.lock import hold

    config = compose(arguments.overrides(), "quantize", arguments.config_dir)
    content, schemes = plain(config), quantizers(config, arguments.config_dir)
    keys = ("study", "model", "data", "trainer", "logger")
    spec, model, data, trainer, logger = (build(content[key], key) for key in keys)
    spec.chosen(arguments.evaluate)
    folder = Path(config.hydra.run.dir).absolute()
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.analysis.quantization import compare_schemes
    from loralab.records.environment import environment
    from loralab.records.metric_logger import Labels
    from loralab.records.secrets import redact
    from loralab.reporting import quantization

    with hold(folder):  # before the work: whether it can be written
        result = compare_schemes(spec, schemes, model, data, trainer, arguments.evaluate)
        machine = environment()
        result.update(machine=machine["gpu"] or machine["cpu"], versions=machine["versions"], config=content)
        print(json.dumps(result) if arguments.json else quantization.terminal(result), flush=True)
        index = quantization.write(folder, result)
        labels = Labels(f"quantize {result['weights']}", "quantize", "quantize", config=redact(content))
        mirror = logger.start(folder, labels)
        mirror.table("quantization/schemes", *quantization.wandb_table(result))
        mirror.summarize({"status": "completed"})
        mirror.finish()
    if not arguments.json:
        print(f"\nreport: {index}")
    return 0


QUANTIZE = Command(
    name="quantize",
    summary="a model's weights under every scheme: bits, bytes, error",
    about="Quantizes a model's weights, or synthetic ones, under every scheme and measures bits, bytes and error.",
    usage="[k=v ...]",
    examples={
        "loralab quantize": "the shipped base under all schemes",
        "loralab quantize --evaluate model=hf model.name_or_path=./my-llama": "also loss and KL on the data",
        "loralab quantize study.weights=gauss quantization=nf4": "one scheme on synthetic weights",
    },
    writes="hydra.run.dir (runs/quantize/TIME): quantize.json and report/index.html; a table on stdout.",
    run=run,
    own_flags=(Flag(("--evaluate",), "also the model's loss and KL divergence on the data"), JSON, CONFIG_DIR),
)
