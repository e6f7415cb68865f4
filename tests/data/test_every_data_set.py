"""Every yaml of conf/data gives rows, the same each time, and a fingerprint that follows them.

A new one is found by itself; where it cannot run with its defaults offline, GIVEN says with what.
"""

import json
import shutil
import sys
import types

import pytest

from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.config.places import data_root
from loralab.data import hub, mining
from loralab.data.base import SPLITS

YAMLS = sorted(path.stem for path in (data_root() / "conf" / "data").glob("*.yaml"))
PAIRS = [{"q": f"question {i} ", "a": f"answer {i}"} for i in range(12)]
GIVEN = {
    "chat": ["data.train=chats.jsonl"],
    "files": ["data.train=rows.jsonl", "data.prompt='{q}'", "data.target='{a}'"],
    "hub": ["data.name=some/where", "data.prompt='{q}'", "data.target='{a}'"],
    "python_source": ["data.packages=[none]"],
    "samples": ["data.rows=4", "data.train_rows=3", "data.tokens=8"],
}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """What the data sets that read something find; ``rows(list)`` changes it."""
    monkeypatch.chdir(tmp_path)
    library = types.ModuleType("datasets")
    library.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)

    def write(content):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        chats = [
            {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}
            for row in content
        ]
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
        table = type("Table", (list,), {"features": {}})
        library.load_dataset = lambda path, name, split: table(content)

    write(PAIRS)
    return write


@pytest.fixture(scope="module")
def sampled(load_base):
    """Splits of a data set, drawn from a base where it asks for one."""
    base = load_base("llama")

    def read(spec):
        return spec.sample(base.model, base.tokenizer, "causal_lm", 64).splits if spec.from_base else spec.splits()

    return read


@pytest.fixture(scope="module")
def few_packages(tmp_path_factory):
    """A small part of the standard library."""
    folder, whole = tmp_path_factory.mktemp("library"), mining.stdlib_root()
    for name in ("asyncio", "email", "http", "importlib", "json", "logging", "xml"):
        shutil.copytree(whole / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(params=YAMLS)
def spec(request, rows, monkeypatch, few_packages):
    if request.param == "python_source":  # takes seconds over the whole of it
        monkeypatch.setattr(mining, "stdlib_root", lambda: few_packages)

    def make(*more):
        config = compose([f"data={request.param}", *GIVEN.get(request.param, []), *more])
        return build(plain(config)["data"], "data")

    return make


def test_every_yaml_is_found():
    assert {"chat", "docstrings", "files", "hub", "python_source", "samples"} <= set(YAMLS)


def test_its_splits_are_not_empty_and_stay_the_same(spec, sampled):
    one, again = (sampled(spec("data.limit=4")) for _ in range(2))
    assert one.train
    assert one.validation
    assert all(len(one[split]) <= 4 for split in SPLITS)
    assert all(row.prompt or row.target for split in SPLITS for row in one[split])
    assert one == again
    assert len(one.fingerprint) == 16


def test_other_rows_have_another_fingerprint(spec, sampled):
    four, three = sampled(spec("data.limit=4")), sampled(spec("data.limit=2"))
    assert four.train[:2] == three.train
    assert four.fingerprint != three.fingerprint


@pytest.mark.parametrize("name", sorted({"chat", "files", "hub"} & set(YAMLS)))
def test_one_changed_letter_in_its_source_is_another_fingerprint(name, rows):
    made = build(plain(compose([f"data={name}", *GIVEN[name]]))["data"], "data")
    before = made.splits().fingerprint
    rows([*PAIRS[:-1], {**PAIRS[-1], "a": PAIRS[-1]["a"] + "!"}])
    assert made.splits().fingerprint != before
    rows(PAIRS)
    assert made.splits().fingerprint == before
