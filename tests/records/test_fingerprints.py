"""A fingerprint is of the bytes on disk, every one of them, and is read again only where they may have changed."""

import json
import os
import threading
import time

import pytest

from loralab.data.docstrings import Docstrings
from loralab.data.files import Files
from loralab.data.hub import Hub
from loralab.models import loading, pretrained
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.records import fingerprints
from loralab.records.fingerprints import file_digest, of_pretrained, of_random, of_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, on disk and in the process."""
    monkeypatch.delenv("LORALAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_digests", {})
    return tmp_path / "cache" / "loralab" / "digests"


@pytest.fixture
def folder(tmp_path):
    """A base of two shards, written long ago."""
    made = tmp_path / "base"
    made.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (made / name).write_bytes(os.urandom(200_000))
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "tokenizer.json").write_text("{}")
    (made / "README.md").write_text("words")
    return made


@pytest.fixture
def settled(monkeypatch):
    """As if every file were old enough to be known by its times."""
    monkeypatch.setattr(fingerprints, "SETTLED", -1e9)


def test_one_byte_in_the_middle_of_a_shard_changes_it(folder):
    before = of_pretrained(str(folder))
    shard = folder / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[100_001] ^= 1
    shard.write_bytes(content)
    assert len(before) == 16
    assert of_pretrained(str(folder)) != before


def test_what_does_not_decide_the_weights_does_not_change_it_and_the_rest_does(folder):
    before = of_pretrained(str(folder))
    (folder / "README.md").write_text("other words")
    (folder / "tokenizer.json").write_text("[]")
    assert of_pretrained(str(folder)) == before
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}')
    assert of_pretrained(str(folder)) != before


def test_it_is_the_same_wherever_the_folder_lies(folder, tmp_path):
    before = of_pretrained(str(folder))
    folder.rename(tmp_path / "elsewhere")
    assert of_pretrained(str(tmp_path / "elsewhere")) == before


def test_a_file_is_read_once_and_again_when_it_may_have_changed(folder, settled, monkeypatch):
    read = []
    real = fingerprints.hashlib.file_digest
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", lambda f, kind: read.append(f.name) or real(f, kind))
    path = folder / "model-00001-of-00002.safetensors"
    first = file_digest(path)
    assert file_digest(path) == first
    monkeypatch.setattr(fingerprints, "_digests", {})  # another process
    assert file_digest(path) == first
    assert len(read) == 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=times)  # of the same size, its times set back
    assert file_digest(path) != first
    assert len(read) == 2


def test_a_file_that_was_written_just_now_is_not_taken_for_known(folder, cache):
    file_digest(folder / "config.json")
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": "zz"}', '{"sha256": 5}', "\x00", "null"])
def test_a_damaged_cache_is_read_over(folder, cache, settled, damage):
    path = folder / "config.json"
    right = file_digest(path)
    (kept,) = cache.iterdir()
    kept.write_text(damage)
    fingerprints._digests.clear()
    assert file_digest(path) == right
    assert json.loads(kept.read_text())["sha256"] == right


def test_a_cache_that_cannot_be_written_is_no_matter(folder, settled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_digest(folder / "config.json") == file_digest(folder / "config.json")


def test_many_writers_at_once_leave_one_whole_file(folder, cache, settled):
    path, found = folder / "config.json", []

    def take():
        for _ in range(20):
            fingerprints._digests.clear()
            found.append(file_digest(path))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [json.loads(kept.read_text())["sha256"] for kept in cache.iterdir()] == [found[0]]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache with one model in it; returns a function that adds a commit of it."""
    from huggingface_hub import constants

    home = tmp_path / "hub" / "models--someone--base"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def commit(name, **files):
        snapshot = home / "snapshots" / name
        snapshot.mkdir(parents=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "blobs").mkdir(exist_ok=True)
        for file, blob in {"config.json": "c0", **files}.items():
            (home / "blobs" / blob).write_text(blob)
            (snapshot / file).symlink_to(home / "blobs" / blob)
        (home / "refs" / "main").write_text(name)
        return snapshot

    return commit


def test_a_hub_model_is_its_commit_and_the_hashes_of_its_files(hub, monkeypatch):
    assert of_pretrained("someone/base") is None
    assert of_tokenizer("someone/base") is None
    hub("1111", **{"model.safetensors": "a1"})
    monkeypatch.setattr(fingerprints, "file_digest", None)  # nothing is read for it
    first = of_pretrained("someone/base")
    assert len(first) == 16
    hub("2222", **{"model.safetensors": "a2"})
    assert of_pretrained("someone/base") != first
    assert of_tokenizer("someone/base") is not None


def test_a_hub_model_of_which_a_file_is_missing_is_not_known(hub):
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    snapshot = hub("3333", **{"model.safetensors.index.json": "i", "model-1.safetensors": "b1"})
    (snapshot / "model.safetensors.index.json").resolve().write_text(json.dumps(index))
    assert of_pretrained("someone/base") is None
    (snapshot / "model-2.safetensors").write_text("no link: hashed by its bytes")
    assert len(of_pretrained("someone/base")) == 16


def test_random_weights_are_their_architecture_and_their_seed(folder):
    spec = {"name_or_path": "", "config": {"hidden_size": 64}, "task": "causal_lm", "draw": 0}
    assert of_random(spec) == of_random({**spec, "max_length": 7})
    assert len({of_random(spec), of_random({**spec, "draw": 1}), of_random({**spec, "config": {}})}) == 3
    named = {**spec, "name_or_path": str(folder)}
    before = of_random(named)
    (folder / "config.json").write_text("{}")
    assert of_random(named) != before


def test_a_loaded_base_has_the_fingerprint_of_its_files_whatever_the_quantizer():
    spec = pretrained.Pretrained()
    loaded = [loading.load(spec, quantizer, None) for quantizer in (NoQuantization(), FourBit())]
    assert [base.fingerprint for base in loaded] == [of_pretrained("loralab/tiny")] * 2
    assert loaded[0].record()["fingerprint"] == spec.fingerprint()


def test_weights_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    import shutil

    from loralab.errors import ConfigError

    shutil.copytree(pretrained.SHIPPED_FOLDER, tmp_path / "copy")
    real = pretrained.Pretrained.weights

    def weights(self, *arguments):
        model = real(self, *arguments)
        (tmp_path / "copy" / "config.json").write_text((tmp_path / "copy" / "config.json").read_text() + " ")
        return model

    monkeypatch.setattr(pretrained.Pretrained, "weights", weights)
    with pytest.raises(ConfigError, match="changed while they were read"):
        loading.load(pretrained.Pretrained(name_or_path=str(tmp_path / "copy")), NoQuantization(), None)


def test_data_is_known_by_what_it_is_read_from(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("{}\n")
    spec = Files(train=str(path), text="{a}")
    before = spec.source()
    assert len(before) == 16
    path.write_text("{} \n")
    assert spec.source() != before
    assert Files(train=str(tmp_path / "gone.jsonl"), text="{a}").source() is None
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "inner" / "a.parquet").write_text("1")
    hub = Hub(name=str(tmp_path / "set"))
    before = hub.source()
    (tmp_path / "set" / "inner" / "a.parquet").write_text("2")
    assert hub.source() != before


def test_docstrings_are_known_by_their_rows(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")  # mining takes a while
    assert Docstrings().source() == Docstrings(limit=3, batch_size=1).source()
    begun = time.monotonic()
    Docstrings().source()
    assert time.monotonic() - begun < 0.1
