"""``loralab export``: the adapter of a run as PEFT opens it."""

from pathlib import Path

from loralab.cli.arguments import Arguments, Command, Flag
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """One run into one folder."""
    if len(arguments.words) != 1:
        raise ConfigError("loralab export needs the folder of one run; loralab ls shows which there are")
    if arguments.out is None:
        raise ConfigError("loralab export needs --out DIR, a new folder")
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.artifacts.exporting import export_run
    from loralab.training.trainer import quiet

    quiet()
    out = Path(arguments.out).expanduser()
    files = export_run(Path(arguments.words[0]).expanduser(), out)
    print(f"{out}: {', '.join(files)}")
    return 0


OUT = Flag(("--out",), "where it is written: a new folder", "DIR")
EXPORT = Command(
    name="export",
    summary="the adapter of a run as a folder that PEFT opens",
    about="Writes PEFT's adapter_config.json and adapter_model.safetensors, and a model card. For LoRA with all its\n"
    "options, LoRA-FA, (IA)3, prefix and prompt tuning RUN/adapter is PEFT's already, and is copied; VeRA and\n"
    "BitFit are rewritten for PEFT. Methods that PEFT lacks are refused.",
    usage="RUN --out DIR",
    examples={
        "loralab export runs/train/TIME --out my-adapter": "for peft.PeftModel.from_pretrained(base, 'my-adapter')",
        "loralab export runs/rank/TRIAL --out my-adapter": "of a sweep's trial",
    },
    writes="DIR, which must be new or empty.",
    run=run,
    own_flags=(OUT,),
)
