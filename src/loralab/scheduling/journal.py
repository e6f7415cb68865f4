"""The file in which a search keeps what it asked and was told: Optuna's journal, written by one process alone."""

from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.journal"
STALE = "optuna.stale.journal"
NAME = "loralab"


def opened(folder: Path, direction: "optuna.study.StudyDirection", fresh: bool = False) -> "optuna.Study":
    """The search in ``folder``, begun where there is none; ``fresh``: an earlier one is kept under another name."""
    import optuna

    path = folder / JOURNAL
    if fresh and path.exists():
        names = (folder / (STALE if not n else f"optuna.stale.{n}.journal") for n in count())
        path.rename(next(name for name in names if not name.exists()))
    _mend(path)
    return optuna.create_study(storage=_storage(path), study_name=NAME, direction=direction, load_if_exists=True)


def copied(folder: Path, direction: "optuna.study.StudyDirection | None" = None, fresh: bool = False) -> "optuna.Study":
    """A copy in memory of the search in ``folder``, an empty one where there is none or for ``fresh``; nothing is
    written. ``direction``: None takes that of the search."""
    import optuna

    path = folder / JOURNAL
    copy = optuna.create_study(direction=direction)
    if fresh or not path.is_file():
        return copy
    with suppress(KeyError):  # it was begun, and killed before it was named
        begun = optuna.load_study(storage=_storage(path), study_name=NAME)
        copy.add_trials(begun.get_trials(deepcopy=False))
        for key, value in begun.user_attrs.items():
            copy.set_user_attr(key, value)
    return copy


def _storage(path: Path) -> "optuna.storages.JournalStorage":
    import optuna
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _mend(path: Path) -> None:
    """Removes what a killed process left: its lock, for which Optuna would wait half a minute, and a line that was cut
    short, behind which nothing could be read."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
