"""The W&B mirror: one run a trial in one process, offline without a key, never in the way of training."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from loralab.errors import ConfigError
from loralab.records import metric_logger
from loralab.records import wandb as mirror
from loralab.records.loggers import Loggers
from loralab.records.metric_logger import Labels
from loralab.records.wandb import Wandb, key_configured
from loralab.running.runner import Runner


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
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


def test_a_folder_of_wandb_that_cannot_be_made_costs_no_row(make_spec, tmp_path, monkeypatch, curve):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "wandb"))
    spec = make_spec(logger=Wandb(mode="offline"))
    (done,) = Runner().run([spec])
    assert done["status"] == "completed", done["error"]
    assert len(curve(spec.folder)) == 4


def test_a_mirror_that_breaks_on_the_way_does_not_stop_a_run(caplog):
    class Broken:
        def log(self, row, step, commit):
            raise OSError("gone")

    run = mirror.Mirror(Broken())
    run.log(1, {"train/loss": 1.0})
    run.log(2, {"train/loss": 1.0})
    run.finish()
    assert caplog.text.count("gone") == 1


def test_an_unreachable_server_means_offline(monkeypatch, tmp_path, caplog):
    modes, ids = [], []

    def init(wandb, options, mode):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("refused")
        ids.append(options["id"])
        run = {"id": options["id"], "offline": True, "settings": SETTINGS}
        return type("Run", (), {**run, "log": lambda *a: None, "finish": lambda *a, **k: None})()

    monkeypatch.setattr(mirror, "_init", init)
    run = Wandb(mode="online").start(tmp_path, Labels("name"))
    assert modes == ["online", "offline"]
    assert "wandb sync" in caplog.text
    assert (tmp_path / "wandb" / "id").read_text() == run.run_id == ids[0]  # which a resumed run has
    assert Wandb(mode="offline").start(tmp_path, Labels("name")).run_id == run.run_id


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


SETTINGS = type("Settings", (), {"sync_dir": "somewhere"})


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Starts a mirror with a stub of W&B and returns what wandb.init was asked for, None where it was not."""

    def start(spec=None, folder=tmp_path / "run", name="r=8", group=None):
        asked = []

        def init(wandb, options, mode):
            asked.append({"mode": mode, **options})
            return type("Run", (), {"id": "x", "offline": mode == "offline", "settings": SETTINGS})()

        monkeypatch.setattr(mirror, "_init", init)
        (spec or Wandb()).start(folder, Labels(name, group))
        return asked[0] if asked else None

    return start


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "b" * 40}, "online"),
        ({"WANDB_API_KEY": "b" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "b" * 40, "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": "b" * 40, "WANDB_MODE": "disabled"}, None),
        ({"WANDB_API_KEY": "b" * 40, "WANDB_DISABLED": "true"}, None),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "shared"}, "shared"),
        ({"WANDB_MODE": ""}, "offline"),
    ],
)
def test_mode_auto_is_what_the_environment_says(monkeypatch, started, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = started()
    assert (asked and asked["mode"]) == expected


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_a_mode_in_the_configuration_wins_over_the_environment(monkeypatch, started, mode):
    monkeypatch.setenv("WANDB_MODE", "offline" if mode == "online" else "online")
    asked = started(Wandb(mode=mode))
    assert (asked["mode"] if asked else "disabled") == mode


def test_project_entity_group_tags_and_folder_come_from_the_environment_where_they_are_null(
    monkeypatch, started, tmp_path
):
    asked = started(group="rank")
    assert [asked[key] for key in ("project", "entity", "group", "tags", "name", "dir")] == [
        *("loralab", None, "rank", None, "r=8", str(tmp_path / "run"))
    ]
    variables = {"PROJECT": "p", "ENTITY": "e", "RUN_GROUP": "g", "TAGS": "a, b", "NAME": "mine", "DIR": "/elsewhere"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    asked = started(group="rank")
    assert [asked[key] for key in ("project", "entity", "group", "tags", "name", "dir")] == [
        *("p", "e", "g", ["a", "b"], "mine", "/elsewhere")
    ]
    asked = started(Wandb(project="own", entity="us", group="ours", tags=["t"]))
    assert [asked[key] for key in ("project", "entity", "group", "tags")] == ["own", "us", "ours", ["t"]]


def test_trials_of_a_sweep_keep_a_name_and_an_id_of_their_own(monkeypatch, started, tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    one, two = (started(folder=tmp_path / name, name=name) for name in ("seed=0", "seed=1"))
    assert (one["name"], two["name"]) == ("mine seed=0", "mine seed=1")
    assert one["id"] != two["id"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")  # an agent of W&B's names the one run that it has begun
    assert "id" not in started(folder=tmp_path / "by-agent")


@pytest.mark.parametrize(
    ("fields", "environment", "message"),
    [
        ({"tags": ["a" * 65]}, {}, "logger.tags: the tag 'aaaa"),
        ({"tags": [""]}, {}, "has 0 characters; valid: 1 to 64"),
        ({"project": "p" * 129}, {}, "logger.project has 129 characters"),
        ({"project": ""}, {}, "logger.project has 0 characters"),
        ({"project": "a/b"}, {}, "logger.project='a/b' holds /"),
        ({"group": "g" * 129}, {}, "logger.group has 129 characters"),
        ({}, {"WANDB_TAGS": "a," + "b" * 65}, "WANDB_TAGS: the tag 'bbbb"),
        ({}, {"WANDB_PROJECT": "a:b"}, "WANDB_PROJECT='a:b' holds :"),
        ({}, {"WANDB_MODE": "offlin"}, "WANDB_MODE='offlin' is unknown; did you mean offline?"),
    ],
)
def test_what_wandb_would_refuse_is_refused_before_training(monkeypatch, fields, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        Wandb(**fields)
    assert message in str(refused.value)
    Wandb(mode="disabled", **fields)  # nobody will be asked


def test_the_longest_tag_project_and_name_that_are_let_through_are_taken_by_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    spec = Wandb(tags=["t" * 64], project="p" * 128, group="g" * 128)
    run = spec.start(tmp_path / "run", Labels("n" * 300))
    assert run.run_id
    run.log(1, {"train/loss": 0.125})
    run.finish()
    written = history(tmp_path / "elsewhere")
    assert "t" * 64 in written
    assert "0.125" in written
    assert not list((tmp_path / "run").rglob("*.wandb"))


@pytest.mark.parametrize("variable", [None, "dir"])
def test_a_relative_folder_is_the_callers_though_wandbs_service_was_started_in_another(tmp_path, monkeypatch, variable):
    __import__("wandb").setup()
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    if variable:
        monkeypatch.setenv("WANDB_DIR", variable)
    run = Wandb(mode="offline").start(Path("run"), Labels("n"))
    run.log(1, {"train/loss": 0.125})
    run.finish()
    assert "0.125" in history(tmp_path / (variable or "run"))


def test_a_file_that_wandb_has_not_written_is_named(tmp_path, caplog):
    class Run:
        offline, settings = True, SimpleNamespace(sync_file=str(tmp_path / "run.wandb"))

        def finish(self, exit_code):
            assert exit_code == 0

    mirror.Mirror(Run()).finish()
    assert f"W&B has written no {tmp_path / 'run.wandb'}" in caplog.text
    assert "loralab wandb-upload" in caplog.text
    caplog.clear()
    (tmp_path / "run.wandb").write_text("")
    mirror.Mirror(Run()).finish()
    assert not caplog.text


def test_wandbs_own_variables_are_not_overruled(monkeypatch):
    class Init:
        Settings = __import__("wandb").Settings

        def init(self, **asked):
            self.settings = asked["settings"].model_dump(include=asked["settings"].model_fields_set)
            return type("Run", (), {"define_metric": lambda *_, **__: None})()

    wandb = Init()
    mirror._init(wandb, {}, "offline")
    assert (wandb.settings["silent"], wandb.settings["console"]) == (True, "off")
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    mirror._init(wandb, {}, "offline")
    assert "silent" not in wandb.settings
    assert "console" not in wandb.settings


@pytest.mark.parametrize(("spec", "begun"), [(Wandb(mode="offline"), 1), (Wandb(mode="disabled"), 0)])
def test_its_service_starts_beside_the_loading_where_it_is_used(monkeypatch, spec, begun):
    done = queue.SimpleQueue()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("loralab.records.wandb._set_up", lambda: done.put(threading.current_thread().name))
    metric_logger.prepare(Loggers((spec,)))
    metric_logger.prepare(object())  # a logger of the user's own
    assert [done.get(timeout=5) for _ in range(begun)] == ["wandb"] * begun
    assert done.empty()
