"""``loralab train``: one run, or many."""

from pathlib import Path

from loralab.cli.arguments import FRESH, HYDRA, Arguments, Command, Flag


def run(arguments: Arguments) -> int:
    """One run, or with -m many; with --preview none."""
    from loralab.cli import hydra_run

    overrides = arguments.overrides()
    hydra_run.check_axes(overrides)
    if arguments.preview:
        return preview(overrides, arguments.config_dir)
    return hydra_run.run(arguments, overrides, arguments.many)


def preview(overrides: list[str], config_dir: str | None = None) -> int:
    """Prints the first rows as the model sees them, and returns exit code 0; nothing is trained."""
    from loralab.cli.terminal import messages_to_stderr
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    messages_to_stderr()
    spec = trial_spec(compose(overrides, config_dir=config_dir), Path())
    from loralab.data.preview import preview as first_rows
    from loralab.running.inputs import encoded_data

    spec.model.check()
    tokenizer = spec.model.load_tokenizer()
    print(first_rows(encoded_data(spec.data, spec.model, tokenizer, "cpu"), tokenizer))
    return 0


TRAIN = Command(
    name="train",
    summary="one run; with -m and k=a,b many",
    about="Fine-tunes a frozen base with one adapter. Settings are Hydra's k=v; --cfg job shows every key.",
    usage="[k=v ...]",
    examples={
        "loralab train quantization=nf4_double adapter.r=16 optimizer.lr=2e-4": "one run",
        "loralab train -m adapter.r=4,16 seed=0,1": "four trials, in packs",
        "loralab train --preview data=files data.train=rows.jsonl": "the first rows as the model sees them",
    },
    writes="a run folder, hydra.run.dir (runs/train/TIME): result.json, metrics.jsonl, config.yaml, adapter/;\n"
    "with -m a sweep folder, hydra.sweep.dir, with sweep.json, a run folder a trial and report/.",
    run=run,
    own_flags=(Flag(("--preview",), "shows the first rows as the model sees them; nothing is trained"), FRESH, *HYDRA),
)
