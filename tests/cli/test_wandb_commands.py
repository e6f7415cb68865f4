"""``wandb-upload`` makes a run anew from the record; ``wandb-sweep`` writes a sweep that W&B's agents run."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_file import inspected, read

from loralab.cli.main import run
from loralab.cli.sweep import sweep_arguments
from loralab.cli.wandb_sweep import as_wandb
from loralab.config import sweep_files
from loralab.config.build import trial_id
from loralab.config.compose import compose
from loralab.errors import ConfigError
from loralab.records import record, wandb_run
from loralab.reporting import wandb_report
from loralab.reporting.report import report


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def test_a_run_is_uploaded_anew_from_its_record(tmp_path, synthetic, write, capsys):
    stored = synthetic("nf4_double", 8, 1)
    stored["config"]["logger"] = {"_target_": "loralab.records.wandb.Wandb", "mode": "disabled", "project": "mine"}
    stored["memory"]["spikes"] = [{"step": 3, "excess_bytes": 7}]
    write(tmp_path / "sweep" / "one", stored)
    write(tmp_path / "sweep" / "two", synthetic("none", 2, 0))
    assert run(["wandb-upload", str(tmp_path / "sweep")]) == 0
    assert run(["wandb-upload", str(tmp_path / "sweep" / "one")]) == 0  # beside the first, under another id
    printed = capsys.readouterr().out.splitlines()
    places = [line.partition(": wandb sync ")[2] for line in printed]
    assert len(set(places)) == 3
    for place in places[:1]:
        dry = [sys.executable, "-m", "wandb", "sync", "--dry-run", place]  # the line that was printed
        done = subprocess.run(dry, capture_output=True, text=True, timeout=60, check=True)
        assert "Would sync 1 run" in done.stdout + done.stderr
    (path,) = (tmp_path / "sweep" / "one" / "wandb").glob(f"{places[0].rpartition('/')[2]}/*.wandb")
    shown = inspected(path)
    *history, tables = shown["history"]
    rows = [{key: row[key] for key in row if not key.startswith("_")} for row in history if "step" in row]
    assert rows == list(map(json.loads, (tmp_path / "sweep" / "one" / "metrics.jsonl").read_text().splitlines()))
    assert any(key.startswith("memory/spikes") for key in tables)
    assert (shown["project"], shown["name"]) == ("mine", "nf4_double r=8 seed=1")
    expected = wandb_run.summary(record.read(tmp_path / "sweep" / "one"))
    assert {key: shown["summary"][key] for key in expected} == expected
    assert shown["config"]["trial"] == stored["trial"]


def test_a_report_is_logged_on_request(write_runs, capsys):
    """Of a sweep that was run without W&B, and again as the same run."""
    folder = write_runs({(2, 0): 2.5, (2, 1): 2.6, (8, 0): 2.4, (8, 1): 2.45}) / "runs"
    for _ in range(2):
        assert run(["report", "--wandb", str(folder)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("report in W&B: wandb sync ")
    shown = read(folder / "report")
    assert shown["name"] == "runs report"
    assert shown["summary"]["trials"] == 4
    paths = {key: value for row in shown["history"] for key, value in row.items() if key.endswith(".path")}
    assert {"report/results.path", "report/trials.path", "report/metric.path"} <= set(paths)
    (files,) = (folder / "report" / "wandb").glob("offline-run-*/files")
    table = json.loads((files / paths["report/results.path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["mean"] for row in rows] == pytest.approx([2.55, 2.425], abs=1e-12)
    assert len(json.loads((files / paths["report/trials.path"]).read_text())["data"]) == 4


def test_a_w_and_b_that_fails_or_hangs_stops_no_sweep(write_runs, monkeypatch, caplog):
    folder = write_runs({(2, 0): 2.5, (8, 0): 2.4}, change=logged_to_wandb) / "runs"
    written = report(folder)
    monkeypatch.setattr(wandb_report, "PATIENCE_SECONDS", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(wandb_report, "_logged", lambda *_: ended.wait(5))
    assert wandb_report.after_sweep(written) == ""
    assert f"again: loralab report --wandb {folder}" in caplog.text
    ended.set()
    monkeypatch.setattr(wandb_report, "PATIENCE_SECONDS", 30.0)
    monkeypatch.setattr(wandb_report, "_logged", lambda *_: 1 / 0)
    assert wandb_report.after_sweep(written) == ""
    assert "the report is not in W&B: division by zero" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_report.after_sweep(written) == ""
    with pytest.raises(ConfigError, match="disables W&B"):
        wandb_report.on_request(written)


def logged_to_wandb(trial, r, seed):
    trial["config"]["logger"] = {"several": {"_target_": "loralab.records.wandb.Wandb", "mode": "auto"}}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["report", "--wandb", "--watch", "x"], 2, "--wandb and --watch do not go together"),
        (["wandb-upload"], 2, "needs the folder of a run"),
        (["wandb-upload", "nowhere"], 4, "nowhere/result.json: no such file"),
        (["wandb-upload", "running"], 4, "is not finished"),
        (["wandb-upload", "ended"], 2, "WANDB_MODE or WANDB_DISABLED disables W&B"),
        (["wandb-sweep"], 2, "loralab wandb-sweep needs the name of one sweep"),
        (["wandb-sweep", "rnak"], 2, "did you mean rank"),
        (["wandb-sweep", "rank", "adapter.rr=1,2"], 2, "adapter.rr"),
        (["wandb-sweep", "rank", "optimizer.lr=interval(0,1)"], 2, "no values that a grid could try"),
        (["wandb-sweep", "rank", "adapter.r=2", "seed=0"], 2, "W&B's sweeps need an axis"),
        (["sweep", "rank", "+sweep.tags=lora"], 2, "sweep.tags='lora'; valid: a list of texts of 1 to 64"),
        (["sweep", "rank", f"+sweep.tags=[{'a' * 65}]"], 2, "valid: a list of texts of 1 to 64 characters"),
    ],
)
def test_what_cannot_be_is_refused_in_one_paragraph(words, code, said, tmp_path, monkeypatch, capsys, synthetic, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "running", {**synthetic("none", 2, 0), "status": "running"})
    write(tmp_path / "ended", synthetic("none", 2, 0))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run(words) == code
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize("name", ["rank", "target_modules", "double_quantization", "paged_optimizer", "method"])
def test_wandbs_agents_run_the_trials_of_the_sweep(name, capsys):
    """The commands that W&B's own code makes of the grid are trials with the ids that ``loralab sweep`` gives them."""
    assert run(["wandb-sweep", name]) == 0
    sweep = yaml.safe_load(capsys.readouterr().out)
    assert (sweep["method"], sweep["program"], sweep["metric"]["goal"]) == ("grid", "loralab", "minimize")
    axes = {key: values["values"] for key, values in sweep["parameters"].items()}
    by_agents = set()
    for combination in list(itertools.product(*axes.values()))[:6]:
        assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_.-]*", key) for key in axes)  # as W&B's schema wants
        chosen = {key: {"value": value} for key, value in zip(axes, combination, strict=True)}
        macros = create_sweep_command_args({"args": chosen})
        chunks = create_sweep_command(sweep["command"])
        words = [word for c in chunks for word in (macros["args_no_hyphens"] if c == "${args_no_hyphens}" else [c])]
        assert words[1:3] == ["loralab", "train"]
        by_agents.add(trial_id(compose([word for word in words[3:] if not word.startswith("hydra")])))
    by_sweep = set()
    arguments = [word for word in sweep_arguments(name, []) if not word.startswith("hydra")]
    swept = {("+" if key == "method" else "") + key: list(map(str, values)) for key, values in axes.items()}
    fixed = [word for word in arguments if word.partition("=")[0] not in swept]
    for combination in list(itertools.product(*swept.values()))[:6]:
        by_sweep.add(trial_id(compose([*fixed, *map("=".join, zip(swept, combination, strict=True))])))
    assert by_agents == by_sweep
    assert len(by_agents) == 6


def test_wandbs_agents_try_every_value_of_what_is_tuned_and_score_the_test_split(capsys):
    assert run(["wandb-sweep", "rank", "adapter.r=2,4", "sweep.tune={optimizer.lr:[1e-3,3e-3]}"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["parameters"]["optimizer.lr"] == {"values": [0.001, 0.003]}
    assert set(printed["parameters"]) == {"adapter.r", "seed", "optimizer.lr"}
    assert "trainer.test=true" in printed["command"]


def test_every_sweep_has_wandbs_keys_and_no_other():
    known = {"name", "description", "program", "method", "metric", "parameters", "command"}  # of W&B's schema
    for name in sweep_files.names():
        said = sweep_files.load(sweep_files.locate(name)).sweep
        if refused := next((key for key in ("zip", "when") if said.get(key)), None):
            with pytest.raises(ConfigError, match=f"^sweep.{refused} of {name} "):
                as_wandb(name, ["seed=0,1"])
            continue
        sweep = as_wandb(name, ["seed=0,1"])
        assert set(sweep) <= known
        assert all(values["values"] for values in sweep["parameters"].values())
        assert sweep["command"][-1] == "${args_no_hyphens}"
