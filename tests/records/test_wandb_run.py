"""What W&B shows of a trial, read from its offline file by W&B's own reader, is what the record says."""

import json
import os
import re
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
from forked import Forked
from lightning.pytorch import Callback
from wandb_file import read, run_file

import loralab
from loralab.errors import Interrupted
from loralab.memory.phases import PhaseMemory
from loralab.records import record, wandb_run
from loralab.records.wandb import Wandb
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint

KEY = "a1b2c3d4" * 5


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def rows_of(folder, left_out=wandb_run.RESIDENT):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in left_out} for row in lines]


def of_rows(history):
    """The history without W&B's own keys, and without tables."""
    return [{key: row[key] for key in row if not key.startswith("_")} for row in history if "step" in row]


def test_a_packed_sweep_in_wandb(tiny_arguments, tmp_path, monkeypatch):
    """History is metrics.jsonl, summary is result.json; names, group, tags and chosen names are there to filter by."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    words = [word for word in tiny_arguments if not word.startswith(("logger", "adapter.r=", "callbacks"))]
    words += ["logger.mode=offline", "logger.tags=[mine]", "+sweep.tags=[lora,rank]", "plan.record=true"]
    folder = tmp_path / "rank"
    records = loralab.sweep("rank", [*words, "adapter.r=2,4", "seed=0", "sweep.tune=null", f"hydra.sweep.dir={folder}"])
    assert [one["pack"]["size"] for one in records] == [2, 2]
    for stored in records:
        run = read(folder / stored["trial"])
        assert of_rows(run["history"]) == rows_of(folder / stored["trial"])
        assert not any(key in row for row in run["history"] for key in wandb_run.RESIDENT)  # a CPU's are not by phase
        assert run["run"]["display_name"] == f"r={stored['config']['adapter']['r']}"
        assert (run["run"]["run_group"], run["run"]["job_type"]) == ("rank", "train")
        assert sorted(run["run"]["tags"]) == ["lora", "mine", "rank"]
        assert run["config"]["trial"] == stored["trial"]
        assert run["config"]["choices"]["quantization"] == "nf4_double"
        chosen = {key: value for key, value in stored["config"]["adapter"].items() if value != {}}
        assert run["config"]["adapter"] == chosen  # W&B keeps no empty mapping
        seen = run["summary"]
        assert {key: seen[key] for key in stored["metrics"]} == stored["metrics"]
        assert seen["status"] == "completed"
        assert seen["bits_per_parameter"] == stored["base"]["bits_per_parameter"]
        assert seen["trainable_parameters"] == stored["adapter"]["trainable_parameters"]
        assert seen["memory/alone_peak_gib"] == stored["memory"]["alone_peak_bytes"] / 2**30
        assert seen["pack/size"] == 2
        assert seen["pack/tokens_per_s"] == stored["time"]["tokens_per_s"]
        assert seen["pack/train_s"] == stored["time"]["train_s"]
        assert not {"tokens_per_s", "train_s"} & set(seen)
        assert seen["optimizer/effective_name"] == stored["optimizer"]["effective_name"]
    check_report(folder, records)
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == []


def check_report(folder, records):
    """A run of the sweep's group has the page's tables, and its charts with the specifications of the page."""
    run = read(folder / "report")
    assert (run["run"]["run_group"], run["run"]["job_type"]) == ("rank", "report")
    assert run["run"]["display_name"] == "rank report"
    shown = {key: value for row in run["history"] for key, value in row.items()}
    kinds = {key.partition(".")[0]: value for key, value in shown.items() if key.endswith("._type")}
    assert kinds["report/results"] == kinds["report/trials"] == "table-file"
    media = run_file(folder / "report").parent / "files"
    table = json.loads((media / shown["report/results.path"]).read_text())
    losses = [one["metrics"]["val/loss"] for one in records]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["adapter.r"], row["mean"], row["n"]) for row in rows] == [(2, losses[0], 1), (4, losses[1], 1)]
    page = (folder / "report" / "index.html").read_text()
    on_page = dict(re.findall(r'"name":"(metric|curve_\w+)","title":"([^"]+)"', page))
    assert {"metric", "curve_train_loss"} <= set(on_page)
    for name, title in on_page.items():
        assert kinds[f"report/{name}"] == "html-file"
        html = (media / shown[f"report/{name}.path"]).read_text()
        assert f"<title>{title}</title>" in html
        spec = json.loads(re.search(r'<script type="application/json" id="spec">(.*?)</script>', html).group(1))
        figure = folder / "report" / "figures" / f"{name}.svg"
        assert figure.is_file()
        assert spec["layer"]
        if name == "metric":
            assert [row["value"] for row in spec["datasets"]["means"]] == losses
        assert not re.search(r'(src|href)="http', html)


class Killed(Callback):
    """Ends the process without a word after ``step`` steps."""

    pack_aware = True

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.trials[0].step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("killed_at", "resumed_from"), [(5, 4), (1, None)])
def test_a_killed_run_that_goes_on_is_one_run_with_each_row_once(make_spec, curve, killed_at, resumed_from):
    spec = make_spec(logger=Wandb(mode="offline"), max_steps=6, val_check_interval=2)
    callbacks = {"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=2), "memory": PhaseMemory}
    dying = make_spec(logger=Wandb(mode="offline"), max_steps=6, val_check_interval=2)
    dying.__dict__["callbacks"] = {**callbacks, "killed": lambda: Killed(killed_at)}
    spec.__dict__["callbacks"] = callbacks
    assert Forked(lambda: Runner().run([dying]) and 0).wait() == -signal.SIGKILL
    (first,) = spec.folder.glob("wandb/offline-run-*")
    (stored,) = Runner().run([spec])
    assert (stored["status"], stored.get("resumed_from")) == ("completed", resumed_from)
    run = read(spec.folder)  # one offline run is left
    assert run["run"]["run_id"] == first.name.rpartition("-")[2]
    history = of_rows(run["history"])
    assert history == rows_of(spec.folder)
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in history if "val/loss" in row] == [2, 4, 6]
    assert all(row["_step"] < after["_step"] for row, after in pairwise(run["history"]))
    assert run["exit_code"] == 0
    assert not (spec.folder / "wandb" / "id").exists()  # a fresh run is another one


class Stopped(Callback):
    """Ctrl-C after the first step."""

    pack_aware = True

    def on_train_batch_end(self, *_):
        raise Interrupted(signal.SIGINT)


def test_an_interrupted_run_is_not_shown_as_finished(make_spec):
    spec = make_spec(logger=Wandb(mode="offline"), callbacks={"stopped": Stopped})
    with pytest.raises(Interrupted):
        Runner().run([spec])
    assert read(spec.folder)["exit_code"] == 130
    assert (spec.folder / "wandb" / "id").exists()


class Online:
    """A run of which the server has the first ``step`` rows."""

    offline = False

    def __init__(self, step, run_id, folder):
        self.step, self.id, self.logged = step, run_id, []
        self.settings = SimpleNamespace(sync_dir=folder)

    def log(self, row, step, commit):
        self.logged.append((step, row))


def test_rows_that_the_server_has_are_not_sent_again(tmp_path, monkeypatch):
    from loralab.records import wandb as mirror

    asked = []

    def init(wandb, options, mode):
        asked.append(options)
        return Online(2, options["id"], tmp_path)

    monkeypatch.setattr(mirror, "_init", init)
    spec, labels = Wandb(mode="online"), wandb_run.Labels("name")
    spec.start(tmp_path, labels)
    resumed = spec.start(tmp_path, labels, resumed=True)
    assert [options.get("resume") for options in asked] == [None, "allow"]
    assert asked[0]["id"] == asked[1]["id"]
    for step in (1, 1, 2, 3):  # two rows of the first step
        resumed.log(step, {"train/loss": float(step)})
    assert resumed._run.logged == [(2, {"step": 2, "train/loss": 2.0}), (3, {"step": 3, "train/loss": 3.0})]


def named(folder, overrides, choices=None):
    stored = record.blank("0123456789", overrides=overrides, choices={"quantization": "nf4", **(choices or {})})
    return wandb_run.run_name(folder / "trial", stored)


def test_a_runs_name_is_its_axes_in_few_characters(tmp_path):
    words = ["+sweeps=rank", "quantization=nf4", "adapter.r=8", "seed=0", "hydra.sweep.dir=x", "model.max_length=64"]
    assert named(tmp_path, words[1:5]) == "nf4 r=8 seed=0"  # a single run
    assert named(tmp_path, ["hydra.run.dir=x"]) == "0123456789"
    record.write_sweep(tmp_path, {"axes": {"quantization": ["nf4", "none"], "adapter.r": [8, 2], "seed": [0, 1]}})
    assert named(tmp_path, words) == "nf4 r=8 seed=0"
    record.write_sweep(tmp_path, {"axes": {"a.x": [1, 2], "b.x": [1, 2], "c.lists": ["[a,b]", "[c]"]}})
    assert named(tmp_path, ["a.x=1", "+b.x=2", "c.lists=[a,b]"]) == "a.x=1 b.x=2 lists=[a,b]"
    long = named(tmp_path, [f"c.lists=[{'a' * 200}]"])
    assert len(long) == 128
    assert long.endswith("… 0123456789")


def test_speed_and_memory_have_plain_names_only_where_a_trial_ran_alone(synthetic):
    stored = synthetic("nf4_double", 2, 0)
    alone = wandb_run.summary(stored)
    assert alone["train_s"] == stored["time"]["train_s"]
    assert alone["memory/measured_peak_gib"] == stored["memory"]["measured_peak_bytes"] / 2**30
    stored["pack"]["size"] = 3
    packed = wandb_run.summary(stored)
    assert packed["pack/train_s"] == alone["train_s"]
    assert {"train_s", "tokens_per_s", "memory/measured_peak_gib"} & set(packed) == set()
    assert not any(value is None for value in packed.values())


def test_what_looks_like_a_secret_is_masked_in_name_and_configuration(tmp_path):
    config = {"model": {"token": "hf_abcdefghijkl"}, "trainer": {"max_steps": 0}, "sweep": None}
    stored = record.blank("t", config=config, overrides=["model.token=hf_abcdefghijkl"])
    labels = wandb_run.labels(tmp_path, stored)
    assert "abcdefghijkl" not in json.dumps([labels.name, labels.config])
    assert labels.job_type == "evaluate"
