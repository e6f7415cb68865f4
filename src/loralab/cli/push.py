"""``loralab push``: the adapter of a run to the Hugging Face hub."""

from pathlib import Path

from loralab.cli.arguments import Arguments, Command
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """One run into one repository."""
    if len(arguments.words) != 2:
        raise ConfigError("loralab push needs RUN, the folder of a run, and REPO, such as user/name")
    from loralab.artifacts.hub import push

    folder, repo = arguments.words
    print(push(Path(folder).expanduser(), repo))
    return 0


PUSH = Command(
    name="push",
    summary="the adapter of a run, with its card, to the Hugging Face hub",
    about="Uploads RUN/adapter to REPO, which is made where there is none, with the token that HF_TOKEN or\n"
    "hf auth login gives.",
    usage="RUN REPO",
    examples={
        "loralab push runs/train/TIME me/llama-docstrings": "public, as the hub's default is",
        "loralab push RUN mine": "below your own name",
    },
    writes="nothing here.",
    run=run,
)
