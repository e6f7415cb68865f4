import json
import sys
import types

import pytest

from loralab.data import hub
from loralab.data.hub import Hub
from loralab.errors import ConfigError, DataError

TEMPLATES = {"text": "{text}", "label": "label"}


class Table(list):
    """As much of a datasets.Dataset as is used."""

    features = types.MappingProxyType({"label": types.SimpleNamespace(names=["no", "yes"])})


@pytest.fixture
def library(monkeypatch):
    """Stands in for the datasets library; remembers what it was asked for."""
    module = types.ModuleType("datasets")
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module.calls = []

    def load_dataset(path, name, split):
        module.calls.append((path, name, split))
        if split == "absent":
            raise ValueError("Unknown split absent.\nmore")
        return Table([{"text": f"{split} {index}", "label": index % 2} for index in range(4)])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    return module


def test_without_the_library_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        Hub(name="a/b", **TEMPLATES).splits()


def test_without_a_name_nothing_is_loaded(library):
    with pytest.raises(ConfigError, match=r"data\.name is missing"):
        Hub(**TEMPLATES).splits()
    assert library.calls == []


def test_splits_and_the_names_of_labels_come_from_the_data_set(library):
    splits = Hub(name="a/b", config_name="c", validation="dev", test=None, **TEMPLATES).splits()
    assert library.calls == [("a/b", "c", "train"), ("a/b", "c", "dev")]
    assert splits.labels == ["no", "yes"]
    assert [row.target for row in splits.train] == ["no", "yes", "no", "yes"]
    assert splits.validation[1].where == "a/b[dev]:1"
    assert not splits.test


def test_names_that_are_given_win(library):
    assert Hub(name="a/b", labels=["bad", "good"], **TEMPLATES).splits().labels == ["bad", "good"]


def test_a_fault_of_the_library_is_one_line(library):
    with pytest.raises(DataError, match=r"split 'absent'\) cannot be loaded: Unknown split absent\.$"):
        Hub(name="a/b", test="absent", **TEMPLATES).splits()


def test_offline_the_cache_is_asked_and_its_miss_explained(library, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(DataError, match="cannot be reached and the cache holds no such data set"):
        Hub(name="a/b", test="absent", **TEMPLATES).splits()
    assert library.config.HF_HUB_OFFLINE


def test_an_unreachable_host_is_known_in_seconds(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub.hub_reachable()


def test_a_local_folder_is_loaded(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"text {index}", "label": ["no", "yes"][index % 2]} for index in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = Hub(name=str(tmp_path), validation="train", test=None, **TEMPLATES).splits()
    assert len(splits.train) == 4


@pytest.mark.parametrize("names", [["1", "2", "0"], ["no", "yes", "other"]])
def test_the_numbers_of_a_data_set_with_names_are_places_among_them(library, names):
    features = {"label": types.SimpleNamespace(names=names)}
    numbered = type("Numbered", (Table,), {"features": features})
    library.load_dataset = lambda path, name, split: numbered({"text": f"t{at}", "label": at} for at in (0, 1, 2, 1))
    splits = Hub(name="a/b", validation="dev", test=None, **TEMPLATES).splits()
    assert [row.label for row in splits.train] == [0, 1, 2, 1]
    assert [row.target for row in splits.train] == [names[at] for at in (0, 1, 2, 1)]
    library.load_dataset = lambda path, name, split: numbered({"text": f"t{at}", "label": at} for at in (0, -1))
    with pytest.raises(DataError, match=r"field 'label' is '-1', not one of the 3 labels"):
        Hub(name="a/b", validation="dev", test=None, **TEMPLATES).splits()
