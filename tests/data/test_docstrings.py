import gzip
import textwrap

import pytest

from loralab.data import docstrings, mining
from loralab.data.docstrings import CLOSER, OPENER, Docstrings, cache_path, load_or_mine, mine
from loralab.errors import DataError

TOTAL = '''
class Box:
    def total(self, values):
        """Add the values up.

        A second paragraph.
        """
        result = sum(values)  # a comment
        return result
'''


def path_in(split, number=0):
    """A relative path that falls into ``split``."""
    names = (f"module_{index}.py" for index in range(10_000))
    return [name for name in names if mining.split_of(name) == split][number]


def library(tmp_path, **sources):
    for split, source in sources.items():
        (tmp_path / path_in(split)).write_text(source)
    return tmp_path


@pytest.fixture
def no_shipped_keys(monkeypatch):
    monkeypatch.setattr(docstrings, "training_keys", lambda: set())


@pytest.mark.usefixtures("no_shipped_keys")
def test_a_pair_is_the_function_without_its_docstring_and_the_first_line(tmp_path):
    (row,) = mine(library(tmp_path, train=TOTAL))["train"]
    code = "def total(self, values):\n    result = sum(values)  # a comment\n    return result"
    assert row.prompt == code + OPENER
    assert row.target == "Add the values up." + CLOSER
    assert row.where == f"{path_in('train')}:3"


@pytest.mark.parametrize(
    "summary", ["Two words", "See the other one", "1 is no letter here", "Añadir los números", "word " * 26]
)
@pytest.mark.usefixtures("no_shipped_keys")
def test_an_unfair_question_is_left_out(tmp_path, summary):
    assert not mine(library(tmp_path, train=TOTAL.replace("Add the values up.", summary)))["train"]


@pytest.mark.usefixtures("no_shipped_keys")
def test_a_function_without_a_body_is_left_out(tmp_path):
    source = 'def total_of_everything_there_is(self, values, more):\n    """Add the values up."""\n'
    assert not mine(library(tmp_path, train=source))["train"]


@pytest.mark.parametrize(
    "edit", [("# a comment", "# other"), ("Add the values up.", "Sum all of it up."), ("    ", "  ")]
)
@pytest.mark.usefixtures("no_shipped_keys")
def test_a_held_out_copy_of_a_training_function_is_dropped(tmp_path, edit):
    rows = mine(library(tmp_path, train=TOTAL, test=TOTAL.replace(*edit)))
    assert (len(rows["train"]), len(rows["test"])) == (1, 0)


@pytest.mark.usefixtures("no_shipped_keys")
def test_an_edited_copy_under_the_same_docstring_is_dropped(tmp_path):
    rows = mine(library(tmp_path, train=TOTAL, validation=TOTAL.replace("result", "outcome")))
    assert (len(rows["train"]), len(rows["validation"])) == (1, 0)


@pytest.mark.usefixtures("no_shipped_keys")
def test_another_function_is_kept(tmp_path):
    other = TOTAL.replace("total", "product").replace("sum", "math.prod").replace("Add", "Multiply")
    assert len(mine(library(tmp_path, train=TOTAL, validation=other))["validation"]) == 1


def test_what_another_python_trained_on_is_dropped(tmp_path, monkeypatch):
    shipped = tmp_path / "keys.bin"
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    assert docstrings.write_training_keys(library(old, train=TOTAL), shipped) == 2
    monkeypatch.setattr(docstrings, "TRAINING_KEYS", shipped)
    assert not mine(library(new, test=TOTAL))["test"]  # the function moved to a file that is held out


def test_nothing_but_plain_source_is_mined(tmp_path):
    for folder in ("test", "site-packages", "encodings"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(TOTAL)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" + TOTAL.encode())
    assert not any(mine(tmp_path).values())


def test_the_standard_library_gives_thousands_of_pairs_and_no_function_twice():
    splits = Docstrings().splits()
    assert 4000 < len(splits.train) < 8000
    assert min(len(splits.validation), len(splits.test)) >= 100
    files = {split: {row.where.split(":")[0] for row in splits[split]} for split in ("train", "validation", "test")}
    assert files["train"].isdisjoint(files["validation"] | files["test"])
    keys = [
        mining.function_key(row.prompt.removesuffix(OPENER))
        for split in ("train", "validation", "test")
        for row in splits[split]
    ]
    assert len(keys) == len(set(keys))
    assert all(row.target.endswith(CLOSER) and CLOSER not in row.target[:-3] for row in splits.train)


def test_limit_takes_rows_from_all_over_the_library():
    splits = Docstrings(limit=50).splits()
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [50, 50, 50]
    assert len({row.where.split("/")[0] for row in splits.train}) > 15
    assert splits.fingerprint != Docstrings(limit=51).splits().fingerprint


@pytest.mark.usefixtures("no_shipped_keys")
def test_rows_are_cached_and_a_damaged_cache_is_mined_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "lib"
    root.mkdir()
    library(root, train=TOTAL)
    rows = load_or_mine(root)
    library(root, train="")
    assert load_or_mine(root) == rows  # from the cache: the library itself is empty by now
    damaged = cache_path(root).read_bytes()[:-20]
    for content in (damaged, b"", b"no gzip", gzip.compress(b"[]"), gzip.compress(b'{"train": [[1]]}')):
        cache_path(root).write_bytes(content)
        assert not load_or_mine(root)["train"]


@pytest.mark.usefixtures("no_shipped_keys")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_or_mine(library(tmp_path, train=TOTAL))["train"]) == 1


def test_a_python_without_its_sources_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mining, "stdlib_root", lambda: tmp_path)
    with pytest.raises(DataError, match="without its sources"):
        Docstrings().splits()


def test_text_in_strings_survives_the_dedent():
    source = 'class A:\n    def f(self):\n        return """\nflush left\n        deep\n"""\n'
    (function,) = mining.functions(source)
    assert function.code == 'def f(self):\n    return """\nflush left\n    deep\n"""'
    assert textwrap.dedent(function.code) == function.code
