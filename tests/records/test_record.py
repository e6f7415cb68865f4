"""The record: complete, atomic, strict about damage, free of secrets."""

import errno
import json
import math
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loralab.errors import ArtifactError, DiskError
from loralab.records import process, record

HEX40 = "0123456789abcdef0123456789abcdef01234567"


def done(trial: str = "a1", **more):
    return {**record.blank(trial), "status": "completed", **more}


def test_a_blank_record_has_every_key_of_the_contract():
    blank = record.blank("a1", config={"seed": 3}, overrides=["seed=3"], choices={"adapter": "lora"}, seed=3)
    assert set(blank) >= {"schema", "trial", "status", "error", "config", "overrides", "choices", "seed"}
    assert set(blank) >= {"base", "adapter", "optimizer", "metrics", "memory", "time", "pack", "data", "environment"}
    assert set(blank["memory"]["by_phase"]) == {"load", "forward", "backward", "optimizer", "evaluation"}
    assert blank["status"] == "running"
    assert blank["base"]["bits_per_parameter"] is None


def test_two_blank_records_share_nothing_that_can_change():
    first, second = record.blank("a"), record.blank("b")
    first["memory"]["by_phase"]["load"] = 1
    first["metrics"]["val/loss"] = 2.0
    assert second["memory"]["by_phase"]["load"] is None
    assert second["metrics"] == {}


def test_a_record_comes_back_as_it_was_written(tmp_path):
    written = done(metrics={"val/loss": 1.25}, seed=0)
    record.write(tmp_path / "new" / "folder", written)
    assert record.read(tmp_path / "new" / "folder") == written


def test_numbers_that_are_not_finite_become_null_and_the_file_is_strict_json(tmp_path):
    record.write(tmp_path, done(metrics={"val/loss": math.nan, "a": [math.inf, -math.inf, 1.0]}))
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"val/loss": None, "a": [None, None, 1.0]}


def test_paths_tuples_and_scalars_with_item_become_plain_json(tmp_path):
    class Scalar:
        def item(self) -> float:
            return 0.5

    record.write(tmp_path, done(metrics={"x": Scalar()}, config={"train": Path("a/b"), "betas": (0.9, 0.95)}))
    back = record.read(tmp_path)
    assert back["metrics"]["x"] == 0.5
    assert back["config"] == {"train": "a/b", "betas": [0.9, 0.95]}


def test_what_cannot_be_stored_is_refused_and_the_old_record_stays(tmp_path):
    record.write(tmp_path, done(metrics={"x": 1}))
    with pytest.raises(TypeError, match="does not belong in a record"):
        record.write(tmp_path, done(metrics={"x": object()}))
    assert record.read(tmp_path)["metrics"] == {"x": 1}


def test_an_unknown_status_is_refused_when_written(tmp_path):
    with pytest.raises(ValueError, match="did you mean completed"):
        record.write(tmp_path, done(status="complete"))


@pytest.mark.skipif(process.mark(os.getpid()) is None, reason="this system does not tell when a process began")
def test_a_run_whose_number_another_process_has_now_is_not_running():
    known = {"host": socket.gethostname(), "pid": os.getpid(), "process": process.mark(os.getpid())}
    stored = {**record.blank("a1"), **known}
    assert record.status(stored) == record.status({**stored, "process": None}) == "running"
    boot, _, started = known["process"].partition(" ")
    for other in (f"{boot} {int(started) - 1}", f"another-boot {started}"):
        assert record.status({**stored, "process": other}) == "interrupted"


def test_a_full_disk_is_a_disk_error_and_leaves_the_old_record_and_no_debris(tmp_path, monkeypatch):
    record.write(tmp_path, done(metrics={"x": 1}))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"result\.json.*No space left"):
        record.write(tmp_path, done(metrics={"x": 2}))
    assert record.read(tmp_path)["metrics"] == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_that_is_a_file_is_a_disk_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DiskError, match="taken"):
        record.write(tmp_path / "taken", done())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "trial": "a", "sta', "damaged"),
        ("[]", "holds a list"),
        ('{"trial": "a", "status": "failed"}', "schema missing"),
        ('{"schema": 99, "trial": "a", "status": "failed"}', "newer than this loralab"),
        ('{"schema": "1", "trial": "a", "status": "failed"}', "schema '1'"),
        ('{"schema": 1, "trial": "a", "status": "ok"}', "status 'ok'"),
        ('{"schema": 1, "trial": "a", "status": "failed", "time": 3}', "time is 3"),
        ('{"schema": 1, "trial": "a", "status": "failed", "time": {"train_s": "x"}}', "time.train_s"),
        ('{"schema": 1, "trial": "a", "status": "failed", "pack": {"size": "2"}}', "pack.size"),
        ('{"schema": 1, "trial": "a", "status": "failed", "overrides": [1]}', "overrides"),
        ('{"schema": 1, "trial": "a", "status": "failed", "seed": [1]}', "seed"),
        ('{"schema": 1, "trial": 5, "status": "failed"}', "trial"),
        ('{"schema": 1, "trial": "a", "status": "failed", "metrics": {"x": NaN}}', "NaN"),
        ('{"schema": 1, "trial": "a", "status": "failed", "metrics": {"x": 1e999}}', "1e999"),
        ("[" * 100_000, "damaged"),
        ("\x80", "damaged"),
    ],
)
def test_a_damaged_record_is_an_artifact_error_that_names_the_file(tmp_path, text, message):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"result\.json") as caught:
        record.read(tmp_path)
    assert message in str(caught.value)


def test_a_missing_record_says_what_was_expected(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        record.read(tmp_path)


def test_a_record_lacking_newer_keys_is_filled_up(tmp_path):
    (tmp_path / "result.json").write_text(
        '{"schema": 1, "trial": "a", "status": "failed", "time": {"steps": 3}, "base": null, "extra": 1}'
    )
    back = record.read(tmp_path)
    assert back["time"]["steps"] == 3
    assert back["time"]["tokens"] is None
    assert back["base"]["bits_per_parameter"] is None
    assert back["extra"] == 1


def test_runs_are_found_below_a_sweep_but_not_inside_runs_or_reports(tmp_path):
    for folder in ("b", "a", "deep/c"):
        record.write(tmp_path / folder, done())
    for folder in ("a/checkpoints/x", "a/inner", "report", "wandb/y", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "result.json").write_text("{}")
    assert record.find(tmp_path) == [tmp_path / "a", tmp_path / "b", tmp_path / "deep" / "c"]
    assert record.find(tmp_path / "a") == [tmp_path / "a"]
    assert record.find(tmp_path / "nothing") == []


def test_a_sweep_comes_back_and_has_its_keys(tmp_path):
    record.write_sweep(tmp_path / "rank", {"axes": {"adapter.r": [2, 8]}, "trials": []})
    sweep = record.read_sweep(tmp_path / "rank")
    assert sweep["name"] == "rank"
    assert sweep["axes"] == {"adapter.r": [2, 8]}
    assert sweep["question"] == ""


def test_what_a_sweep_leaves_null_has_its_default(tmp_path):
    (tmp_path / "sweep.json").write_text('{"name": null, "question": null, "axes": null, "trials": null}')
    sweep = record.read_sweep(tmp_path)
    assert sweep == {"name": tmp_path.name, "question": "", "axes": {}, "trials": []}


@pytest.mark.parametrize(
    "damage",
    [
        *({"axes": [1]}, {"trials": {}}, {"trials": [{"trial": "a"}]}, {"schema": 9}),
        *({"trials": [{"folder": 5}]}, {"trials": [{"folder": "a", "overrides": [1]}]}, {"name": 1}, {"question": [1]}),
    ],
)
def test_a_damaged_sweep_is_an_artifact_error(tmp_path, damage):
    (tmp_path / "sweep.json").write_text(json.dumps(damage))
    with pytest.raises(ArtifactError, match=r"sweep\.json"):
        record.read_sweep(tmp_path)


def test_secrets_are_masked_by_key_and_by_look():
    config = {
        "logger": {"api_key": "short", "hf_token": "x", "token": "y", "password": ""},
        "note": f"use hf_{'a' * 20} or {HEX40}",
        "url": "https://me:pw@example.org/x",
        "overrides": ["logger.api_key=abc", f"+note={HEX40}", "adapter.r=8"],
    }
    clean = record.redact(config)
    assert clean["logger"] == {"api_key": "***", "hf_token": "***", "token": "***", "password": ""}
    assert clean["note"] == "use *** or ***"
    assert clean["url"] == "https://***@example.org/x"
    assert clean["overrides"] == ["logger.api_key=***", "+note=***", "adapter.r=8"]


def test_what_only_sounds_secret_is_kept():
    config = {
        "tokenizer": "bpe",
        "token_budget": 4096,
        "pad_token": "</s>",
        "tokens": 3,
        "revision": HEX40,
        "target": "{mr}\\n",
        "sha": "a" * 64,
    }
    assert record.redact(config) == config


def test_a_written_record_holds_no_secret(tmp_path):
    key = "hf_" + "q" * 30
    record.write(tmp_path, done(config={"hub": {"token": "abc"}}, overrides=[f"x={key}"], error=f"401 for {key}"))
    text = (tmp_path / "result.json").read_text()
    assert key not in text
    assert "abc" not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_any_json_metrics_survive_writing(tmp_path_factory, metrics):
    folder = tmp_path_factory.mktemp("run")
    record.write(folder, done(metrics=metrics))
    assert record.read(folder)["metrics"] == metrics
