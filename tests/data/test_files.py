import gzip
import json

import pytest

from loralab.data.files import Files
from loralab.errors import ConfigError, DataError

ROWS = [{"mr": f"name[{index}]", "ref": f"This is {index}."} for index in range(40)]
TEMPLATES = {"prompt": r"{mr}\n", "target": "{ref}"}


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_rows_are_read_in_order_with_their_place(jsonl):
    splits = Files(train=str(jsonl), validation=str(jsonl), **TEMPLATES).splits()
    assert [row.prompt for row in splits.train] == [row["mr"] + "\n" for row in ROWS]
    assert splits.train[2].where == f"{jsonl}:3"
    assert (splits.name, splits.kind, splits.test) == ("rows.jsonl", "pairs", [])


def test_all_formats_give_the_same_rows(tmp_path, jsonl):
    text = "mr,ref\n" + "".join(f'{row["mr"]},"{row["ref"]}"\n' for row in ROWS)
    paths = [
        str(jsonl),
        write(tmp_path / "r.csv", text),
        write(tmp_path / "r.csv.gz", gzip.compress(text.encode())),
        write(tmp_path / "r.jsonl.gz", gzip.compress(jsonl.read_bytes())),
        write(tmp_path / "bom.csv", b"\xef\xbb\xbf" + text.encode().replace(b"\n", b"\r\n")),
    ]
    prints = {Files(train=path, validation=path, **TEMPLATES).splits().fingerprint for path in paths}
    assert len(prints) == 1


def test_paths_are_relative_to_the_current_folder(tmp_path, jsonl, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(Files(train="rows.jsonl", validation="rows.jsonl", **TEMPLATES).splits().train) == 40


def test_without_a_validation_file_a_tenth_is_held_out(jsonl):
    splits = Files(train=str(jsonl), **TEMPLATES).splits()
    assert (len(splits.train), len(splits.validation)) == (36, 4)
    assert splits == Files(train=str(jsonl), **TEMPLATES).splits()


def test_limit_takes_the_first_rows_of_each_split(jsonl):
    splits = Files(train=str(jsonl), validation=str(jsonl), limit=3, **TEMPLATES).splits()
    assert [row.target for row in splits.train] == [row["ref"] for row in ROWS[:3]]
    assert len(splits.validation) == 3


def test_quoted_commas_and_line_breaks_belong_to_the_cell(tmp_path):
    path = write(tmp_path / "r.csv", 'mr,ref\n"a, b","two\nlines"\nc,d\n')
    splits = Files(train=path, validation=path, **TEMPLATES).splits()
    assert (splits.train[0].prompt, splits.train[0].target) == ("a, b\n", "two\nlines")
    assert [row.where for row in splits.train] == [f"{path}:2", f"{path}:4"]


def test_a_cell_may_be_as_long_as_a_document(tmp_path):
    long = "word, " * 50_000
    path = write(tmp_path / "r.csv", f'mr,ref\nq,"{long}"\n')
    assert Files(train=path, validation=path, **TEMPLATES).splits().train[0].target == long


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_any_line_end_and_a_byte_order_mark_give_the_same_rows(tmp_path, end, bom):
    rows = [("a", "b"), ("c", "d")]
    objects = [json.dumps({"mr": q, "ref": a}) for q, a in rows]
    for name, lines in (("r.csv", ["mr,ref", "a,b", "c,d"]), ("r.jsonl", objects)):
        path = write(tmp_path / name, bom + end.join([*lines, ""]))
        splits = Files(train=path, validation=path, **TEMPLATES).splits()
        assert [(row.prompt, row.target) for row in splits.train] == [(q + "\n", a) for q, a in rows]


def test_cells_without_a_name_may_stand_beside_the_named(tmp_path):
    path = write(tmp_path / "r.csv", "mr,,ref,\na,1,b,2\n")
    assert Files(train=path, validation=path, **TEMPLATES).splits().train[0].target == "b"


SKIPPED = {
    "quote inside": ('mr,ref\na,b\n"c"d,e\nf,g\n', 1),
    "over two lines": ('mr,ref\na,b\nc,"d\ne"f,g\nf,g\n', 1),
    "cells": ("mr,ref\na,b\nc\nf,g\nh,i,j\n", 2),
    "open at the end": ('mr,ref\na,b\nf,g\nh,"i', 1),
    "not UTF-8": (b"mr,ref\na,b\nc,\xe9\nf,g\n", 1),
    "NUL": ("mr,ref\na,b\nc,\0\nf,g\n", 1),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_bad_row_of_a_csv_file_is_left_out_and_those_after_it_are_read(tmp_path, case):
    content, bad = SKIPPED[case]
    path = write(tmp_path / "r.csv", content)
    splits = Files(train=path, validation=path, on_bad_row="skip", **TEMPLATES).splits()
    assert [row.target for row in splits.train] == ["b", "g"]
    assert splits.skipped == 2 * bad  # in each of the two splits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mr,ref,mr\na,b,c\n", r"r\.csv:1: the header names column 'mr' twice \(cells 1 and 3\)"),
        ("mr,ref,x,x\na,b,c,d\n", r"r\.csv:1: the header names column 'x' twice \(cells 3 and 4\)"),
        ("mr;ref\na;b\n", r"r\.csv:1: column 'mr' is missing .*separated by ';'"),
        ('"mr"x,ref\na,b\n', r"r\.csv:1: the header is not CSV"),
        ('mr,ref\na,b\nc,"d\ne,f\ng,h\n', r"r\.csv:3: a quote .* never closed, so that all 5 lines"),
        ("mr,ref\na,b\n".encode("utf-16"), r"r\.csv:1: the text is UTF-16; valid: UTF-8"),
    ],
)
def test_what_is_wrong_with_a_whole_file_is_no_row_to_skip(tmp_path, content, message):
    path = write(tmp_path / "r.csv", content)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=message):
            Files(train=path, validation=path, on_bad_row=on_bad_row, **TEMPLATES).splits()


def test_a_missing_file_says_what_the_folder_holds(tmp_path, jsonl):
    with pytest.raises(DataError, match=r"data\.validation=.*no such file.*holds rows\.jsonl"):
        Files(train=str(jsonl), validation=str(tmp_path / "val.jsonl"), **TEMPLATES).splits()
    with pytest.raises(DataError, match="is a folder"):
        Files(train=str(tmp_path), **TEMPLATES).splits()
    with pytest.raises(DataError, match="nor a folder"):
        Files(train=str(tmp_path / "no" / "rows.jsonl"), **TEMPLATES).splits()


GOOD = '{"mr": "a", "ref": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", GOOD + '{"mr": \n', r"r\.jsonl:2: not JSON"),
        ("r.jsonl", GOOD + "[1, 2]\n", r"r\.jsonl:2: not a JSON object but list"),
        ("r.jsonl", GOOD + '{"mr": "a"}\n', r"r\.jsonl:2: field 'ref' is missing \(has: mr\)"),
        ("r.jsonl", GOOD.encode() + b'{"mr": "\xe9"}\n', r"r\.jsonl:2: not UTF-8 \(byte 9 of the line is 0xe9\)"),
        ("r.jsonl", GOOD + '{"mr": "a", "ref": "b\\u0000"}\n', r"r\.jsonl:2: field 'ref' holds a NUL"),
        ("r.jsonl", GOOD + '{"mr": "a", "ref": "\\ud800"}\n', r"r\.jsonl:2: field 'ref' is not valid UTF-8"),
        ("r.jsonl", GOOD + '{"mr": NaN, "ref": "b"}\n', r"r\.jsonl:2: field 'mr' is nan, text or a finite number"),
        ("r.jsonl", GOOD + '{"mr": null, "ref": "b"}\n', r"r\.jsonl:2: field 'mr' is null"),
        ("r.jsonl", GOOD + "[" * 100_000 + "\n", r"r\.jsonl:2: not JSON \(nested too deeply\)"),
        ("r.jsonl", "", "train split is empty: 0 rows read"),
        ("r.csv", "mr,text\na,b\n", r"r\.csv:1: column 'ref' is missing \(has: mr, text\)"),
        ("r.csv", "mr,ref\na,b\nc\n", r"r\.csv:3: 1 cells, the header has 2"),
        ("r.csv", "mr,ref\na,b,c\n", r"r\.csv:2: 3 cells, the header has 2"),
        ("r.csv", b"mr,ref\na,\xe9\n", r"r\.csv:2: field 'ref' is not valid UTF-8"),
        ("r.csv", 'mr,ref\na,"b\n', r"r\.csv:2: not CSV"),
        ("r.csv", "", r"r\.csv:1: column 'mr' is missing \(has: nothing\)"),
        ("r.jsonl.gz", gzip.compress(GOOD.encode() * 999)[:-9], r"r\.jsonl\.gz:\d+: the gzip file is damaged"),
        ("r.jsonl.gz", GOOD, r"r\.jsonl\.gz:1: the gzip file is damaged"),
        ("r.json", "x", r"not read; valid: \.jsonl, \.csv, \.txt, \.parquet"),
        ("r.txt", "a\n\0\n", r"r\.txt:2: holds a NUL"),
        ("r.txt", b"a\nb\n\xe9\n", r"r\.txt:3: not UTF-8 \(byte 1"),
        ("r.txt", "\n\n", r"r\.txt: the file is empty"),
    ],
)
def test_a_fault_is_one_message_with_its_line(tmp_path, name, content, message):
    templates = {} if name.endswith(".txt") else TEMPLATES
    with pytest.raises(DataError, match=message):
        Files(train=write(tmp_path / name, content), **templates).splits()


def test_bad_rows_can_be_skipped(tmp_path):
    content = GOOD.encode() + b'{"mr": \n{"mr": "\xe9"}\n' + b'{"mr": "c", "ref": "d"}\n\n'
    path = write(tmp_path / "r.jsonl", content)
    splits = Files(train=path, validation=path, on_bad_row="skip", **TEMPLATES).splits()
    assert (len(splits.train), splits.skipped) == (2, 4)


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl"])
def test_the_bare_name_of_a_column_is_read_from_any_format(tmp_path, name):
    rows = [("good film", "yes"), ("bad film", "no")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    content = "\n".join(lines if name == "r.jsonl" else ["text,label", *(",".join(row) for row in rows)])
    path = write(tmp_path / name, content + "\n")
    splits = Files(train=path, validation=path, text="text", label="{label}").splits()
    assert [(row.prompt, row.target) for row in splits.train] == rows
    with pytest.raises(ConfigError, match=r"data\.text='txt' has no \{field\}.*did you mean text\?.*label, text"):
        Files(train=path, validation=path, text="txt", label="label").splits()


def test_plain_text_keeps_every_character(tmp_path):
    text = "first\r\n\n  second \nlast"
    path = write(tmp_path / "t.txt.gz", gzip.compress(text.encode()))
    splits = Files(train=path, validation=path).splits()
    assert splits.kind == "text"
    assert [row.target for row in splits.train] == [text]
    assert splits.bytes["train"] == len(text)


def test_the_last_tenth_of_a_text_is_held_out_and_limit_counts_lines(tmp_path):
    path = write(tmp_path / "t.txt", "".join(f"line {index}\n" for index in range(100)))
    splits = Files(train=path).splits()
    assert splits.validation[0].target.startswith("line 90\n")
    assert splits.train[0].target.endswith("line 89\n")
    assert Files(train=path, limit=2).splits().train[0].target == "line 0\nline 1\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data\.train is missing"),
        ({"train": "t.txt", "text": "{a}"}, "plain text"),
        ({"train": "t.txt", "validation": "r.jsonl"}, "cannot be mixed"),
        ({"train": "r.jsonl"}, r"give data\.prompt and data\.target"),
    ],
)
def test_a_wrong_combination_is_a_config_error(tmp_path, jsonl, monkeypatch, options, message):
    write(jsonl.parent / "t.txt", "a\nb\n")
    jsonl.rename(jsonl.with_name("r.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Files(**options).splits()


def test_documents_come_from_a_text_template_without_a_label(jsonl):
    splits = Files(train=str(jsonl), validation=str(jsonl), text="{ref}").splits()
    assert (splits.kind, splits.train[0].target) == ("text", "This is 0.")


def test_real_pairs_are_read(real_data):
    files = {split: str(real_data / "e2e_nlg" / f"{split}.jsonl.gz") for split in ("train", "validation", "test")}
    splits = Files(**files, **TEMPLATES).splits()
    assert [len(splits[split]) for split in files] == [4188, 484, 4693]
    assert all(row.prompt.endswith("\n") and row.target for row in splits.train)


def test_real_labels_are_read(real_data):
    files = {split: str(real_data / "rotten_tomatoes" / f"{split}.jsonl.gz") for split in ("train", "validation")}
    splits = Files(**files, text="{text}", label="label", labels=["negative", "positive"]).splits()
    assert len(splits.train) == 8529
    assert {(row.label, row.target) for row in splits.train} == {(0, "negative"), (1, "positive")}


def test_real_text_is_read(real_data):
    path = real_data / "us_speeches" / "train.txt.gz"
    splits = Files(train=str(path)).splits()
    whole = splits.train[0].target + splits.validation[0].target
    assert whole == gzip.decompress(path.read_bytes()).decode()
