"""``loralab init``: a small lab of one's own."""

import shlex
from pathlib import Path

from loralab.cli.arguments import Arguments, Command
from loralab.errors import ConfigError, unwritable

TEMPLATE = Path(__file__).parents[1] / "template"


def run(arguments: Arguments) -> int:
    """Writes the template into a new or an empty folder, and prints what to do next."""
    if len(arguments.words) != 1:
        raise ConfigError("loralab init needs one folder, which is new or empty; valid: loralab init my-lab")
    folder = Path(arguments.words[0]).expanduser()
    written = write(folder)
    print(f"written to {folder}: {', '.join(written)}\n\nnext:\n  cd {shlex.quote(str(folder))}\n  loralab sweep first")
    print("  python -m pytest\n  and README.md, which has the rest")
    return 0


def write(folder: Path) -> list[str]:
    """Copies the template's files into ``folder``; returns their paths in it. Raises ConfigError where the folder holds
    anything, DiskError where it cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; valid: a folder that is new or empty")
    try:
        held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if held:
            more = f" and {len(held) - 3} more" if len(held) > 3 else ""
            raise ConfigError(
                f"{folder} is not empty: it holds {', '.join(held[:3])}{more}; valid: a folder that is new or empty"
            )
        files = sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        for path in files:
            place = folder / path.relative_to(TEMPLATE)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    except OSError as error:
        raise unwritable(folder, error) from error
    return [str(path.relative_to(TEMPLATE)) for path in files]


INIT = Command(
    name="init",
    summary="a small lab of your own: conf/, sweeps/, lab.py, tests/",
    about="Writes a folder with an adapter, a quantizer, a data set, a metric and a callback of your own in one\n"
    "Python file, the yaml files that name them, a sweep over them, and tests. Sweep and tests run as they lie.",
    usage="DIR",
    examples={"loralab init my-lab": "a new folder", "loralab init .": "the current one, where it is empty"},
    writes="DIR: lab.py, conf/, sweeps/, tests/, README.md.",
    run=run,
)
