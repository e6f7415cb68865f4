"""Conversations: files of rows with ``messages``, as chat models are trained on; the loss is on the assistant's turns.

ShareGPT's ``conversations`` of ``from`` and ``value`` are read as well. ``loralab.data.turns`` makes tokens of them.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from loralab.data.base import DataSpec, Row, Splits, make_splits
from loralab.data.fields import BadRow, Number, field_of, text_of, typename
from loralab.data.files import READERS, file_format, split_paths
from loralab.data.rows import Record, refuse_identical, report_bad_rows, split_off, warn_of_overlap
from loralab.errors import ConfigError, DataError, nearest
from loralab.records import fingerprints
from loralab.spec import Natural, Text, spec

log = logging.getLogger(__name__)

SHAREGPT = "conversations"
ROLES = {  # as a template calls them; a function call is written by the assistant, what it returns is the tool's
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},
}
SPELLINGS = (("role", "from"), ("content", "value"))
UNREAD = ("tool_calls", "reasoning_content", "thinking", "name", "weight")  # would change the text, or the loss
Messages = list[dict[str, str]]


@spec("data")
class Chat(DataSpec):
    """Paths are relative to the folder the command was started in."""

    train: str | None = None
    validation: str | None = None  # null: one training row in ten, chosen by hash
    test: str | None = None
    messages: Text = "messages"  # the field that holds a row's messages
    on_bad_row: Literal["error", "skip"] = "error"
    generate_rows: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generate_rows:
            raise ConfigError(
                f"data.generate_rows={self.generate_rows}: a conversation has no one prompt to complete; valid: 0"
            )

    def source(self) -> str | None:
        return fingerprints.of_files(list(split_paths(self).values()))

    def splits(self) -> Splits:
        if not self.train:
            raise ConfigError(
                "data.train is missing: the path of a file of conversations (.jsonl, .gz of one, .parquet)"
            )
        paths = split_paths(self)
        read = {split: self._rows(split, path) for split, path in paths.items()}
        rows, skipped = {split: part for split, (part, _) in read.items()}, sum(bad for _, bad in read.values())
        refuse_identical(paths["train"].name, rows["train"], "chat")
        if "validation" not in rows:
            rows["train"], rows["validation"] = split_off(rows["train"])
        splits = make_splits(paths["train"].name, rows, kind="chat", limit=self.limit, skipped=skipped)
        warn_of_overlap(splits)
        return splits

    def _rows(self, split: str, path: Path) -> tuple[list[Row], int]:
        """The good rows of a file, and how many are bad."""
        ending = file_format(path, f"data.{split}")
        if ending in (".csv", ".txt"):
            raise DataError(
                f"data.{split}={str(path)!r}: {ending} holds no conversations; valid: .jsonl, .gz of it, .parquet"
            )
        rows: list[Row] = []
        problems: list[str] = []
        for record in _warn_of_tools(READERS[ending](path, [])):
            try:
                rows.append(row_of(record, self.messages))
            except BadRow as problem:
                problems.append(f"{record.where}: {problem}")
        report_bad_rows(split, len(rows) + len(problems), problems, self.on_bad_row)
        return rows, len(problems)


def _warn_of_tools(records: Iterable[Record]) -> Iterator[Record]:
    """Yields ``records``; logs one warning at the first that lists tools."""
    warned = False
    for record in records:
        if record.fields.get("tools") and not warned:
            warned = True
            log.warning("%s: the field 'tools' is not read: the template is given no tools", record.where)
        yield record


def row_of(record: Record, key: str) -> Row:
    """One conversation up to the assistant's last turn, as JSON in ``prompt``; what the assistant writes in
    ``target``. Raises BadRow."""
    if record.problem:
        raise BadRow(record.problem)
    fields = record.fields
    values = field_of(fields, SHAREGPT if key not in fields and SHAREGPT in fields else key)
    if not isinstance(values, list):
        raise BadRow(f"field {key!r} is {_kind(values)}, a list of messages is wanted")
    messages = [message_of(value, f"message {number}") for number, value in enumerate(values, 1)]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRow(f"no turn of the assistant among {len(messages)} messages, so there is nothing to learn")
    target = "".join(messages[index]["content"] for index in turns)
    return Row(json.dumps(messages[: turns[-1] + 1], ensure_ascii=False), target, where=record.where)


def message_of(value: Any, place: str) -> dict[str, str]:
    """``role`` and ``content`` of a message in either spelling; ``place`` names it in errors. Raises BadRow."""
    if not isinstance(value, Mapping):
        raise BadRow(f"{place} is {_kind(value)}, an object with role and content is wanted")
    unread = [key for key in UNREAD if value.get(key) is not None]
    if unread:
        raise BadRow(f"{place} holds {unread[0]!r}, which is not read; valid: its text as content")
    role, content = (value[key] if value.get(key) is not None else value.get(other) for key, other in SPELLINGS)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{place} has the role {role!r}; {nearest(str(role), ROLES)}")
    if not isinstance(content, str) or isinstance(content, Number):
        raise BadRow(f"the content of {place} ({role}) is {_kind(content)}, text is wanted")
    content = text_of({f"content of {place}": content}, f"content of {place}")
    if ROLES[role] == "assistant" and not content.strip():
        raise BadRow(f"the content of {place} ({role}) is empty")
    return {"role": ROLES[role], "content": content}


def _kind(value: Any) -> str:
    return "a number" if isinstance(value, Number | int | float) and not isinstance(value, bool) else typename(value)
