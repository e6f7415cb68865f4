"""The run record: what a trial leaves behind, written atomically, read strictly.

``result.json`` holds one trial, ``sweep.json`` lists the trials of a sweep. JSON has no NaN or infinity:
a number that is not finite is stored as null, and the record's ``status`` and ``error`` say what happened.
Records of schema 1 have other trial ids (hashes of the whole configuration) and may lack what came later.
"""

import json
import math
import os
import re
import shlex
import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, DivergedError, nearest, unwritable
from loralab.records import process
from loralab.records.schema import KEYS, unknown_keys, wrong_values
from loralab.records.secrets import MASK, masked, redact

SCHEMA = 2  # raised by a changed default of a spec too: it would give an old id to another trial
STATUSES = ("running", "completed", "failed", "out_of_memory", "diverged", "interrupted", "pruned")
RESULT = "result.json"
SWEEP = "sweep.json"

PHASES = ("load", "forward", "backward", "optimizer", "evaluation")
_NOT_RUN_FOLDERS = {"adapter", "checkpoints", "report", "wandb"}


def blank(
    trial: str,
    *,
    config: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    choices: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """A new record with every key of the schema; what is not known yet is null."""
    record: dict[str, Any] = {
        **{"schema": SCHEMA, "trial": trial, "status": "running", "error": None},
        **{"config": dict(config or {}), "overrides": list(overrides), "choices": dict(choices or {})},
        **{"seed": seed, "metrics": {}},
    }
    record.update({section: dict.fromkeys(keys) for section, keys in KEYS.items()})
    record["memory"]["by_phase"] = dict.fromkeys(PHASES)
    return record


def status(record: Mapping[str, Any]) -> str:
    """The record's own; interrupted where it says running and its process is gone from this machine."""
    gone = record["status"] == "running" and record.get("host") == socket.gethostname() and not _alive(record)
    return "interrupted" if gone else str(record["status"])


def _alive(record: Mapping[str, Any]) -> bool:
    pid = record.get("pid")
    if os.name != "posix" or not isinstance(pid, int):
        return True  # not known
    try:
        os.kill(max(pid, 0) or 2**31, 0)  # 0 and below would mean groups of processes
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return record.get("process") is None or process.mark(pid) in (None, record["process"])


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace ``folder/result.json`` at once: a reader sees the old record or the new one, never a half."""
    status = record.get("status")
    if status not in STATUSES:
        raise ValueError(f"record.status={status!r}: {nearest(str(status), STATUSES)}")
    if unknown := unknown_keys(record):
        raise ValueError(f"no record has {', '.join(unknown)}: records/schema.py says what one has")
    hidden = {key: redact(record[key], key) for key in ("config", "overrides") if key in record}
    if isinstance(record.get("error"), str):
        hidden["error"] = masked(record["error"])
    replace(folder / RESULT, {**record, **hidden})


def read_if_whole(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``, as ``read``; None where there is none that can be read."""
    try:
        return read(folder)
    except ArtifactError:
        return None


def read(folder: Path) -> dict[str, Any]:
    """The record in ``folder``, with every key of the schema, null where it lacks one. Raises ArtifactError."""
    path = folder / RESULT
    stored = _load(path)
    missing = [key for key in ("schema", "trial", "status") if key not in stored]
    if missing:
        raise ArtifactError(f"{path}: not a run record: {', '.join(missing)} missing")
    _check_schema(path, stored["schema"])
    if stored["status"] not in STATUSES:
        raise ArtifactError(f"{path}: status {stored['status']!r}; {nearest(str(stored['status']), STATUSES)}")
    record = _complete(path, stored)
    if record["status"] == "completed" and (lost := undefined(record)):
        record.update(status="diverged", error=f"{lost} is not finite", exit_code=DivergedError.exit_code)
    return record


def undefined(record: Mapping[str, Any]) -> str:
    """The name of a loss, or of the trial's metric, that is null, since it was not finite; empty where none is."""
    metrics = record["metrics"] if isinstance(record["metrics"], Mapping) else {}
    config = record["config"] if isinstance(record["config"], Mapping) else {}
    watched = [str(config.get("metric")), *(key for key in metrics if str(key).endswith("/loss"))]
    return next((key for key in watched if key in metrics and metrics[key] is None), "")


def find(root: Path) -> list[Path]:
    """Run folders (those with a result.json) at or below ``root``, sorted; a run holds no other runs."""
    runs = []
    for folder, below, files in os.walk(root):
        if RESULT in files:
            runs.append(Path(folder))
            below.clear()
        below[:] = sorted(name for name in below if name not in _NOT_RUN_FOLDERS and not name.startswith("."))
    return sorted(runs)


def shell_line(words: Iterable[str]) -> str:
    """``shlex.join``, with readable double quotes around a word that holds single ones and nothing that double quotes
    leave special."""
    return " ".join(map(_shell_word, words))


@lru_cache(maxsize=4096)  # trials of a sweep have most words in common
def _shell_word(word: str) -> str:
    return f'"{word}"' if "'" in word and not re.search(r'["$`!\\\n]', word) else shlex.quote(word)


def rerun(record: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """The command that runs a trial again, in the folder where it was started; ``more``: words behind its own."""
    flags, overrides, seed = list(record.get("flags") or ()), list(record["overrides"]), record["seed"]
    seeded = seed is None or any(word.lstrip("+").startswith("seed=") for word in overrides)
    command = shell_line(["loralab", "train", *flags, *overrides, *([] if seeded else [f"seed={seed}"]), *more])
    return f"{command}  # {MASK} hides a secret" if any(MASK in word for word in overrides) else command


def rerun_anywhere(record: Mapping[str, Any]) -> str:
    """``rerun`` for any folder: a trial with files or classes of the user's own begins with the way to them."""
    needed = record.get("flags") or record["code"].get("files") or record["code"].get("sources")
    return f"cd {shlex.quote(record['cwd'])} && {rerun(record)}" if needed and record.get("cwd") else rerun(record)


def write_sweep(folder: Path, sweep: Mapping[str, Any], redacted: bool = False) -> None:
    """Replace ``folder/sweep.json``: ``{name, question, axes, trials: [{trial, folder, status}]}``, a line a trial.
    ``redacted``: it comes from ``redact``, which takes most of the time for very many trials."""
    content = _plain({"schema": SCHEMA, **(sweep if redacted else redact(sweep))})
    trials = [f"\n  {json.dumps(entry, allow_nan=False)}" for entry in content.pop("trials", [])]
    head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
    replace_text(folder / SWEEP, f'{head},\n "trials": [{",".join(trials)}\n ]\n}}\n')


def read_sweep(folder: Path) -> dict[str, Any]:
    """The sweep in ``folder``; ``name``, ``question``, ``axes`` and ``trials`` are always there."""
    path = folder / SWEEP
    stored = {key: value for key, value in _load(path).items() if value is not None}
    _check_schema(path, stored.get("schema", SCHEMA))
    sweep = {"name": folder.resolve().name, "question": "", "axes": {}, "trials": [], **stored}
    kinds = {"name": str, "question": str, "axes": dict, "trials": list, "paper": dict, "calls": list}
    wrong = [key for key, kind in kinds.items() if key in sweep and not isinstance(sweep[key], kind)]
    listed = sweep["trials"] if isinstance(sweep["trials"], list) else []
    wrong += [f"trials[{index}]" for index, entry in enumerate(listed) if not _is_entry(entry)]
    if wrong:
        raise ArtifactError(
            f"{path}: damaged: {', '.join(wrong)}; name and question must be texts, axes an object, trials a list"
            " of {trial, folder, status}"
        )
    return sweep


def _is_entry(entry: Any) -> bool:
    """True if ``entry`` has the types of a trial in sweep.json."""
    kinds: dict[str, Any] = {"folder": str, "trial": str | None, "status": str | None}
    kinds |= {"overrides": list | None, "choices": dict | None}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(isinstance(word, str) for word in entry.get("overrides") or ())


def _check_schema(path: Path, schema: Any) -> None:
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(f"{path}: schema {schema!r}; this version reads 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: schema {schema} is newer than this loralab, which reads up to {SCHEMA}; upgrade loralab"
        )


def _complete(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    record = blank(str(stored["trial"]))
    if Path(record["trial"]).name != record["trial"]:  # files are named after it
        raise ArtifactError(f"{path}: damaged: {record['trial']!r} is no name of a trial")
    for key, value in stored.items():
        default = record.get(key)
        if isinstance(default, dict):
            if not isinstance(value, dict | None):
                raise ArtifactError(f"{path}: {key} is {value!r}; an object was expected")
            record[key] = {**default, **(value or {})}
        else:
            record[key] = value
    if wrong := wrong_values(record):
        raise ArtifactError(f"{path}: damaged: {', '.join(wrong)} of another kind than loralab writes")
    return record


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        loaded = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; expected the folder of a run or a sweep") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged or unreadable: {error}") from error
    if not isinstance(loaded, dict):
        raise ArtifactError(f"{path}: damaged: holds a {type(loaded).__name__}, not an object")
    return loaded


def _finite(text: str) -> float:
    """Raises ValueError for NaN and infinity: loralab writes null for them."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a number of JSON")
    return number


def replace(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as JSON; a reader sees the old file or the new one, never a half."""
    replace_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes ``text``; a reader sees the old file or the new one, never a half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # the folder itself is unreachable: the first error says so
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """The rename survives a power loss only once the folder is on disk (only POSIX opens folders)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(value: Any) -> Any:
    """JSON types only: paths become text, numbers that are not finite become null."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "item", None)):  # a 0-d tensor or a numpy scalar
        return _plain(value.item())
    raise TypeError(f"a {type(value).__name__} does not belong in a record: {value!r}")
