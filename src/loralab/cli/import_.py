"""``loralab import``: an adapter of PEFT or loralib as a run folder."""

from pathlib import Path

from loralab.cli.arguments import Arguments, Command
from loralab.cli.export import OUT
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """One adapter into one run folder."""
    if not arguments.words or "=" in arguments.words[0]:
        raise ConfigError("loralab import needs PATH, the folder of a PEFT adapter or a loralib state dict")
    if arguments.out is None:
        raise ConfigError("loralab import needs --out DIR, a new folder")
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.artifacts.importing import import_adapter
    from loralab.training.trainer import quiet

    quiet()
    path, *words = arguments.words
    out = Path(arguments.out).expanduser()
    record = import_adapter(Path(path).expanduser(), out, words)
    adapter = record["adapter"]
    base = f"over {record['base']['name']}, quantization={record['choices'].get('quantization')}"
    print(f"{out}: {adapter['method']}, {adapter['trainable_parameters']:,} parameters, {adapter['note']}, {base}")
    return 0


IMPORT = Command(
    name="import",
    summary="an adapter of PEFT or loralib as a run folder",
    about="Reads adapter_config.json and adapter_model.safetensors of PEFT (LoRA, (IA)3, VeRA, prefix and prompt\n"
    "tuning), or a loralib state dict (RoBERTa's layout), attaches it to its base and writes a run folder, which\n"
    "loralab generate opens. The base is the one that PEFT's file names, or k=v. PEFT's files do not say how it\n"
    "was quantized: quantization=nf4 does. An option that loralab lacks is refused by its name.",
    usage="PATH --out DIR",
    examples={
        "loralab import my-adapter --out runs/mine quantization=nf4 model.name_or_path=./llama": "over NF4",
        "loralab import mnli.bin --out runs/mnli model=roberta_base adapter.lora_alpha=16": "of loralib",
        "loralab import my-adapter --out runs/mine val/accuracy=0.87": "with a number for its record",
    },
    writes="DIR, which must be new or empty: result.json and adapter/.",
    run=run,
    own_flags=(OUT,),
)
