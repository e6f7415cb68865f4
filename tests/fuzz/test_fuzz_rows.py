"""Random rows in data files: exit code 0 or 3 (2 where the file's name or kind is at fault), one paragraph, no hang."""

import gzip
import json
import os

import pytest
from cases import BYTES, ENDS, ROWS
from driven import fault, shortened
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

FOUND = []
QUICK, MANY = 30, 3000
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


@pytest.mark.parametrize(("kind", "content", "more"), FOUND, ids=str)
def test_what_was_once_found_is_answered(read, kind, content, more):
    assert read(kind, content, more, []) == read(kind, content, more, ["--preview"]) == ""


def test_random_rows_are_answered_in_one_paragraph(read):
    assert faults_of(read, QUICK, 0) == []


@pytest.mark.slow
def test_thousands_of_random_rows_are_answered_in_one_paragraph(read):
    found = faults_of(read, int(os.environ.get("FUZZ_CASES", MANY)), int(os.environ.get("FUZZ_SEED", 1)))
    assert found == [], "\n".join(map(repr, found))
