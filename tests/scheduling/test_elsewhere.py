"""Trials that another launcher runs, in other processes: sweep.json, records, exit code, what is skipped and lost."""

import logging
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from forked import Forked
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job
from omegaconf import open_dict

from loralab.cli import main
from loralab.records import record
from loralab.running.runner import Runner
from loralab.scheduling.session import Session

MODULES = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher"}


class Forking:
    """As joblib does it: a process for each trial, two at a time; a task that raises is a JobReturn that failed."""

    def __init__(self, context, task, config):
        self.context, self.task, self.config, self.launched = context, task, config, []

    def launch(self, job_overrides, initial_job_idx):
        self.launched += [list(words) for words in job_overrides]
        processes = [Forked(lambda words=words: self._run(words)) for words in job_overrides]
        codes = [process.wait() for process in processes]
        if any(code < 0 for code in codes):
            raise RuntimeError(f"a worker was terminated: {codes}")
        return [JobReturn(status=JobStatus.COMPLETED) for _ in codes]

    def _run(self, words):
        config = self.context.config_loader.load_sweep_config(self.config, list(words))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = "0", 0
        given = {"hydra_context": self.context, "task_function": self._task(), "config": config}
        done = run_job(**given, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir")
        return 0 if done.status == JobStatus.COMPLETED else 9

    def _task(self):
        """As unpickled: without what the parent had loaded."""
        session = Session.__new__(Session)
        session.__setstate__(self.task.__self__.__getstate__())
        return session.job


@pytest.fixture
def sweep(tiny_arguments, tmp_path, monkeypatch):
    """Runs ``train -m`` with the launcher above; returns (exit code, launcher)."""
    monkeypatch.chdir(tmp_path)
    made = []

    def instantiate(self, *, hydra_context, task_function, config):
        made.append(Forking(hydra_context, task_function, config))
        return made[-1]

    def run(*words, command="train"):
        monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)
        own = ["train", "-m", *tiny_arguments, "data.limit=4", "hydra.sweep.dir=s"] if command == "train" else ["sweep"]
        return main.run([*own, *words]), made[-1]

    level = logging.getLogger("loralab").level
    yield run
    logging.getLogger("loralab").setLevel(level)


def listed():
    return {entry["trial"]: entry["status"] for entry in record.read_sweep(Path("s"))["trials"]}


def test_sweep_json_records_and_exit_code_are_right_and_finished_trials_are_not_launched(sweep, capsys):
    code, launcher = sweep("adapter.r=2,0,4")
    out, err = capsys.readouterr()
    assert code == 2
    assert err.count("packing is off") == 1
    assert len(launcher.launched) == 3
    stored = [record.read(place) for place in record.find(Path("s"))]
    assert listed() == {one["trial"]: one["status"] for one in stored}
    assert sorted(listed().values()) == ["completed", "completed", "failed"]
    assert {one["pid"] for one in stored if one["status"] == "completed"}.isdisjoint({os.getpid()})
    assert [one["pack"]["size"] for one in stored if one["status"] == "completed"] == [1, 1]
    assert all("[" in line for line in err.splitlines() if "val/loss" in line)
    assert "2 ok" not in out
    assert "report: s/report/index.html" in out
    for one in stored:
        log = next(place for place in record.find(Path("s")) if place.name == one["trial"]) / "train.log"
        assert log.read_text().count(f"trial {one['trial']}: {one['status']}") == 1
    code, launcher = sweep("--resume", "s", command="sweep")
    assert code == 2
    assert [[word for word in words if word.startswith("adapter.r")] for words in launcher.launched] == [
        ["adapter.r=0"]
    ]
    capsys.readouterr()
    assert sweep("adapter.r=2,4")[0] == 0
    assert capsys.readouterr().err.count("finished before") == 2


def test_they_compute_what_the_launcher_of_packs_computes(sweep, tmp_path, curve, monkeypatch):
    assert sweep("adapter.r=2,4")[0] == 0
    forked = {place.name: curve(place) for place in record.find(Path("s"))}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    words = record.read_sweep(Path("s"))["overrides"]
    assert main.run(["train", "-m", *words, "hydra.sweep.dir=t", "hydra.launcher.pack=off"]) == 0
    assert {place.name: curve(place) for place in record.find(Path("t"))} == forked


def test_a_process_that_dies_in_the_middle_is_interrupted_in_sweep_json_and_in_ls(sweep, capsys, monkeypatch):
    def dies(self, specs):
        stored = record.blank(specs[0].id)
        record.write(specs[0].folder, {**stored, "pid": os.getpid(), "host": socket.gethostname()})
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Runner, "run", dies)
    assert sweep("adapter.r=2")[0] == 4
    assert list(listed().values()) == ["interrupted"]
    capsys.readouterr()
    assert main.run(["ls", "s"]) == 0
    assert "interrupted" in capsys.readouterr().out


def test_a_process_that_dies_costs_its_trial_alone(sweep, capsys, monkeypatch):
    real = Session._run_alone

    def dies(self, job):
        if job.content["adapter"]["r"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, job)

    monkeypatch.setattr(Session, "_run_alone", dies)
    code, _ = sweep("adapter.r=2,4")
    err = capsys.readouterr().err
    assert code == 4
    assert "ended with RuntimeError: a worker was terminated: [0, -9]" in err
    assert "there is no result in s/" in err
    assert "loralab sweep --resume s" in err
    assert sorted(listed().values()) == ["completed", "failed"]
    monkeypatch.setattr(Session, "_run_alone", real)
    assert sweep("--resume", "s", command="sweep")[0] == 0
    assert sorted(listed().values()) == ["completed", "completed"]


def test_sweep_json_is_never_torn_while_others_write_their_records(sweep, monkeypatch):
    monkeypatch.setattr("loralab.scheduling.watching.POLL", 0.01)
    monkeypatch.setattr("loralab.scheduling.watching.SHARE", 1.0)  # else a slow look is followed by a long pause
    monkeypatch.setattr("loralab.scheduling.sweep_file.WRITTEN_EVERY", 0.0)
    seen, ended = [], threading.Event()

    def read():
        while not ended.wait(0.005):
            if Path("s/sweep.json").exists():
                seen.append(tuple(sorted(listed().values())))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert sweep("adapter.r=2,4")[0] == 0
    finally:
        ended.set()
        reader.join()
    assert {len(statuses) for statuses in seen} == {2}
    assert ("pending", "pending") in seen
    assert "running" in {status for statuses in seen for status in statuses}


def test_a_sweeper_that_does_not_read_the_records_of_other_processes_is_refused(sweep):
    session = Session(fresh=False, many=True)
    session.process = -1
    with pytest.raises(Exception, match="only hydra/sweeper=loralab, the default, has trials run in other processes"):
        session._run_in_sweep(None, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("joblib", ["hydra.launcher.n_jobs=2"]), ("submitit_local", [])])
def test_installed_launchers(tiny_arguments, tmp_path, monkeypatch, capsys, name, more):
    pytest.importorskip(MODULES[name])
    monkeypatch.chdir(tmp_path)
    words = [*tiny_arguments, "data.limit=4", "hydra.sweep.dir=s", f"hydra/launcher={name}", *more]
    assert main.run(["train", "-m", *words, "adapter.r=2,0"]) == 2
    assert sorted(listed().values()) == ["completed", "failed"]
    assert f"hydra/launcher={name}: packing is off" in capsys.readouterr().err
    assert main.run(["train", "-m", *words, "adapter.r=2,4"]) == 0
    assert capsys.readouterr().err.count("finished before") == 1


def test_a_search_asks_the_same_points_whoever_runs_them(sweep, tmp_path, monkeypatch):
    words = ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-1))"]
    words += ["hydra.sweeper.n_trials=3", "hydra.sweeper.batch=2"]
    real = Plugins.instantiate_launcher
    code, launcher = sweep(*words)
    assert code == 0
    assert len(launcher.launched) == 3
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(Plugins, "instantiate_launcher", real)
    here = {entry["trial"] for entry in record.read_sweep(tmp_path / "elsewhere")["trials"]}
    assert here == {place.name for place in record.find(tmp_path / "elsewhere")}
    assert record.read_sweep(tmp_path / "elsewhere")["search"]["complete"] == 3
