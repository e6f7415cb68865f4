"""Rows of .parquet files are the rows of the same data in other formats."""

import builtins
import gzip
import json

import pytest

from loralab.data.chat import Chat
from loralab.data.files import Files
from loralab.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PAIRS = [{"q": f"question {i}", "n": i, "a": f"answer {i}"} for i in range(2500)]  # more than are read at once
CHATS = [
    {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]} for row in PAIRS
]
TEMPLATES = {"prompt": "{q} {n}", "target": "{a}"}


@pytest.fixture
def written(tmp_path):
    """Paths of the same rows as .parquet and .jsonl."""

    def write(rows):
        paths = tmp_path / "rows.parquet", tmp_path / "rows.jsonl"
        parquet.write_table(pyarrow.Table.from_pylist(rows), paths[0])
        paths[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(map(str, paths))

    return write


def test_files_and_conversations_are_those_of_jsonl(written):
    one, other = (Files(train=path, validation=path, **TEMPLATES).splits() for path in written(PAIRS))
    assert one.fingerprint == other.fingerprint
    assert one.train[2000].where.endswith("rows.parquet:2001")
    one, other = (Chat(train=path, validation=path).splits() for path in written(CHATS))
    assert one.fingerprint == other.fingerprint


def test_sharegpt_beside_messages_without_it(written):
    """A column of objects holds every key, null where a row has none."""
    theirs = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}]
    mixed = [{"messages": [*CHATS[0]["messages"], *theirs]}]
    one, other = (Chat(train=path, validation=path).splits() for path in written(mixed))
    assert one.fingerprint == other.fingerprint


def test_bad_rows_and_files_are_named(written, tmp_path):
    path, _ = written([*PAIRS[:3], {"q": "x", "n": 1, "a": None}])
    with pytest.raises(DataError, match=r"rows\.parquet:4: field 'a' is null"):
        Files(train=path, validation=path, **TEMPLATES).splits()
    with pytest.raises(DataError, match=r"rows\.parquet: column 'qq' is missing \(has: q, n, a\); did you mean q"):
        Files(train=path, validation=path, prompt="{qq}", target="{a}").splits()
    broken = tmp_path / "broken.parquet"
    broken.write_text("no such thing")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read as parquet"):
        Files(train=str(broken), validation=path, **TEMPLATES).splits()
    packed = tmp_path / "rows.parquet.gz"
    packed.write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match="this format is not read"):
        Files(train=str(packed), **TEMPLATES).splits()


def test_without_pyarrow_one_sentence_says_so(written, monkeypatch):
    path, _ = written(PAIRS[:3])
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"read by pyarrow, which is not installed; valid: pip install"):
        Files(train=path, validation=path, **TEMPLATES).splits()
