"""The W&B mirror: one run a trial in one process, offline without a key, never in the way of training."""

import json
import subprocess
import sys

import pytest

from loralab.errors import ConfigError
from loralab.loggers import wandb as mirror
from loralab.loggers.wandb import Wandb, key_configured
from loralab.run import Runner


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def history(folder):
    """What wandb's own reader finds in a run's file: {key: values}."""
    path = next(folder.glob("wandb/offline-run-*/run-*.wandb"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_trials_of_one_process_have_two_runs_with_their_own_numbers(make_spec, curve):
    specs = [make_spec(name, logger=Wandb(mode="auto"), seed=seed) for name, seed in (("one", 1), ("two", 2))]
    runner = Runner()
    for spec in specs:
        assert runner.run([spec])[0]["status"] == "completed"
    for spec, other in (specs, specs[::-1]):
        assert len(list(spec.folder.glob("wandb/offline-run-*"))) == 1
        logged = history(spec.folder)
        for value in curve(spec.folder):
            assert json.dumps(value) in logged
        assert json.dumps(curve(other.folder)[-1]) not in logged


def test_a_mirror_that_cannot_start_does_not_stop_a_run(make_spec, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no socket")

    monkeypatch.setattr(mirror, "_init", broken)
    record = Runner().run([make_spec(logger=Wandb(mode="online"))])[0]
    assert record["status"] == "completed"
    assert "no socket" in caplog.text


def test_a_mirror_that_breaks_on_the_way_does_not_stop_a_run(caplog):
    class Broken:
        def log(self, row):
            raise OSError("gone")

    run = mirror.Mirror(Broken())
    run.log(1, {"train/loss": 1.0})
    run.log(2, {"train/loss": 1.0})
    run.finish()
    assert caplog.text.count("gone") == 1


def test_an_unreachable_server_means_offline(monkeypatch, tmp_path, caplog):
    modes = []

    def init(wandb, options, mode):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("refused")
        return type("Run", (), {"id": "x", "log": lambda *a: None, "finish": lambda *a, **k: None})()

    monkeypatch.setattr(mirror, "_init", init)
    run = Wandb(mode="online").start(tmp_path, "name", None, {})
    assert modes == ["online", "offline"]
    assert run.run_id == "x"
    assert "wandb sync" in caplog.text


def test_a_key_is_found_in_the_environment_and_in_netrc(monkeypatch, tmp_path):
    assert not key_configured()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40)
    assert key_configured()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not key_configured()
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    assert key_configured()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match=r"logger\.mode='onlin' is unknown; did you mean online\?"):
        Wandb(mode="onlin")
