"""Random rows in data files: exit code 0 or 3 (2 where the file's name or kind is at fault), one paragraph, no hang."""

import gzip
import json
import os

import pytest
from cases import BYTES, ENDS, ROWS
from driven import fault, shortened
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

HARD = {
    "nothing": b"",
    "one end of a line": b"\n",
    "a mark of byte order": b"\xef\xbb\xbf" + b'{"q": "one ", "a": "two"}\n',
    "that mark within": b'{"q": "one ", "a": "two"}\n\xef\xbb\xbf{"q": "one ", "a": "two"}\n',
    "UTF-16": '{"q": "one ", "a": "two"}\n'.encode("utf-16"),
    "ends of other systems": b'{"q": "one ", "a": "two"}\r\n{"q": "one ", "a": "two"}\r',
    "NUL": b'{"q": "one\\u0000", "a": "two"}\n\x00\n',
    "half of a surrogate pair": b'{"q": "\\ud800", "a": "two"}\n',
    "that half as bytes": b'{"q": "\xed\xa0\x80", "a": "two"}\n',
    "a number of 5,000 digits": b'{"q": "one ", "a": ' + b"9" * 5000 + b"}\n",
    "no number": b'{"q": "one ", "a": NaN}\n',
    "10,000 brackets": b"[" * 10000,
    "5,000 objects": b'{"q":' * 5000,
}
QUICK, MANY = 20, 3000
GOOD = b'{"q": "one ", "a": "two"}\n'
KINDS = st.sampled_from(["jsonl"] * 4 + ["csv"] * 2 + ["txt", "jsonl.gz", "csv.gz"])
LINES = st.lists(st.one_of(st.tuples(ROWS, ENDS).map(lambda pair: line(*pair)), BYTES, st.just(GOOD)), max_size=4)
WORDS = st.sampled_from([[], [], ["data.on_bad_row=skip"], ["data.limit=1"], ["data.packing=true"]])


def line(row, end):
    return (json.dumps(row, ensure_ascii=len(str(row)) % 2 == 0) + end).encode("utf-8", errors="surrogatepass")


@pytest.fixture
def read(tiny_arguments, tmp_path, monkeypatch):
    """``fault`` of a run, or of a preview, over a file with these bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shortened(monkeypatch)

    def run(kind, content, more, command):
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") and content[:1] != b"\x00" else content)
        replaced = ("data.train=", "data.prompt=", "data.target=") if kind == "txt" else ("data.train=",)
        kept = [word for word in tiny_arguments if not word.startswith(replaced)]
        return fault(
            ["train", *command, *kept, f"data.train={path.name}", *more, "hydra.run.dir=run", *FRESH[: not command]]
        )

    return run


FRESH = ["--fresh"]


def faults_of(read, count, number):
    found = []

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(KINDS, LINES, WORDS, st.sampled_from([["--preview"], ["--preview"], []]))
    def search(kind, lines, more, command):
        if wrong := read(kind, b"".join(lines), more, command):
            found.append((kind, b"".join(lines), more, command, wrong))

    search()
    return found


@pytest.mark.parametrize("name", HARD)
def test_what_is_known_to_be_hard_to_read_is_answered_in_one_paragraph(read, name):
    for more in ([], ["data.on_bad_row=skip"]):
        assert [read(kind, HARD[name], more, ["--preview"]) for kind in ("jsonl", "csv", "txt")] == [""] * 3


def test_random_rows_are_answered_in_one_paragraph(read):
    assert faults_of(read, QUICK, 0) == []


@pytest.mark.slow
def test_thousands_of_random_rows_are_answered_in_one_paragraph(read):
    found = faults_of(read, int(os.environ.get("FUZZ_CASES", MANY)), int(os.environ.get("FUZZ_SEED", 1)))
    assert found == [], "\n".join(map(repr, found))
