"""What was measured on files that have changed since is no result: ``ls`` and every form of a report say so."""

import csv
import json
import subprocess
import sys
import time

import pytest

from loralab.cli import main
from loralab.records import record
from loralab.records.fingerprints import of_files, of_pretrained, of_tokenizer
from loralab.reporting.listing import listing, render
from loralab.reporting.report import report


@pytest.fixture
def lab(tmp_path, synthetic, write, monkeypatch):
    """Writes n finished trials on a base and data files of their own, named relative to the folder; returns it."""
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    base, data = tmp_path / "base", tmp_path / "train.jsonl"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "tokenizer.json").write_text("{}")
    data.write_text('{"text": "a"}\n')

    def make(count):
        for seed in range(count):
            stored_trial = synthetic("none", 2, seed)
            stored_trial["config"]["model"] = {
                "_target_": "loralab.models.pretrained.Pretrained",
                "name_or_path": "base",
            }
            stored_trial["config"]["data"] = {"_target_": "loralab.data.files.Files", "train": "train.jsonl"}
            stored_trial["base"]["fingerprint"] = of_pretrained(str(base))
            stored_trial["data"].update(source=of_files([data]), tokenizer=of_tokenizer(str(base)))
            write(tmp_path / "runs" / "s" / f"{seed:03}", {**stored_trial, "cwd": str(tmp_path)})
        return tmp_path

    return make


CHANGES = {
    "train.jsonl": "the data files have changed since",
    "base/model.safetensors": "the weights of",
    "base/tokenizer.json": "the tokenizer",
}


@pytest.mark.parametrize("file", CHANGES)
def test_a_changed_file_makes_a_trial_stale_in_every_listing(lab, file, capsys):
    root = lab(1)
    runs = root / "runs"
    (entry,) = listing(runs)
    assert (entry["completed"], entry["stale"], entry["changed"]) == (1, 0, [])
    (root / file).write_text("other")
    (entry,) = listing(runs)
    assert (entry["completed"], entry["failed"], entry["stale"], entry["value"]) == (0, 0, 1, None)
    assert CHANGES[file] in entry["changed"][0]
    text = " ".join(render([entry]).split())
    assert " stale " in text
    assert CHANGES[file] in text
    (trial,) = listing(runs / "s" / "000")
    assert trial["statuses"] == {"stale": 1}
    assert main.run(["ls", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["statuses"] == {"stale": 1}


def test_a_report_names_what_is_stale_and_takes_no_number_from_it(lab):
    root = lab(3)
    seed = root / "runs" / "s" / "001"
    stored = record.read(seed)
    stored["data"]["source"] = "0" * 16
    record.write(seed, stored)
    stored_trial = report(root / "runs" / "s")
    told = json.loads(stored_trial.files["results.json"].read_text())
    assert [one["status"] for one in told["trials"]] == ["completed", "stale", "completed"]
    (arm,) = told["arms"]
    assert (arm["n"], arm["statuses"]) == (2, ["completed", "stale", "completed"])
    rows = list(csv.DictReader(stored_trial.files["results.csv"].read_text().splitlines()))
    assert rows[1]["status"] == "stale"
    for text in (rows[1]["error"], told["trials"][1]["error"], stored_trial.table):
        assert "the data files have changed since" in " ".join(text.split())
    for name in ("index.html", "report.md"):
        assert "the data files have changed since" in stored_trial.files[name].read_text()
        assert "Not completed or stale" in stored_trial.files[name].read_text()
    assert "2 ok, 1 stale" in stored_trial.table


def test_files_of_the_same_name_in_another_folder_are_not_the_trials(lab, tmp_path, monkeypatch):
    root = lab(1)
    (root / "elsewhere" / "base").mkdir(parents=True)
    (root / "elsewhere" / "train.jsonl").write_text("other")
    (root / "elsewhere" / "base" / "model.safetensors").write_text("other")
    monkeypatch.chdir(root / "elsewhere")
    assert listing(root / "runs")[0]["statuses"] == {"completed": 1}
    (root / "train.jsonl").rename(root / "gone")
    assert listing(root / "runs")[0]["statuses"] == {"completed": 1}


def test_nothing_heavy_is_imported_for_it(lab):
    root = lab(1)
    code = "import sys; from loralab.cli.main import run; run(['ls', sys.argv[1]])"
    code += "; sys.exit(bool({'torch', 'pandas', 'scipy', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, str(root / "runs")], check=False).returncode == 0


def test_five_hundred_records_are_listed_in_under_three_seconds(lab):
    root = lab(1)
    one = root / "runs" / "s" / "000" / record.RESULT
    for seed in range(1, 500):
        (root / "runs" / "s" / f"{seed:03}").mkdir()
        (root / "runs" / "s" / f"{seed:03}" / record.RESULT).write_text(
            one.read_text().replace('"seed": 0', f'"seed": {seed}')
        )
    record.write_sweep(
        root / "runs" / "s", {"name": "s", "trials": [{"trial": "", "folder": f"{n:03}"} for n in range(500)]}
    )
    began = time.process_time()
    assert len(listing(root / "runs" / "s")) == 500
    assert time.process_time() - began < 3
