"""``loralab wandb-upload``: runs into W&B anew, from their records."""

from pathlib import Path

from loralab.cli.arguments import Arguments, Command
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """Each run of the folders that are named."""
    if not arguments.words:
        raise ConfigError(
            "loralab wandb-upload needs the folder of a run or of a sweep; loralab ls shows which there are"
        )
    from loralab.cli.terminal import messages_to_stderr
    from loralab.records import record
    from loralab.records.wandb_upload import upload

    messages_to_stderr()
    for word in arguments.words:
        folder = Path(word).expanduser()
        for found in record.find(folder) or [folder]:  # a folder without a record is refused by its name
            place = upload(found)
            print(f"{found}: {f'wandb sync {place}' if Path(place).is_dir() else place}", flush=True)
    return 0


WANDB_UPLOAD = Command(
    name="wandb-upload",
    summary="runs into W&B anew, from metrics.jsonl and result.json",
    about="Makes a new run in W&B from each RUN, with the whole history, configuration and summary, whatever W&B had\n"
    "of it before; of a sweep's folder each of its trials. Online where a key is configured, else offline, with\n"
    "the line that uploads it; WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are obeyed.",
    usage="RUN ...",
    examples={
        "loralab wandb-upload runs/rank/TRIAL": "one trial",
        "loralab wandb-upload runs/rank": "all of a sweep, which was run with logger=none, say",
    },
    writes="RUN/wandb/.",
    run=run,
)
