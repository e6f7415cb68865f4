"""Several devices: a process for each, which sees its own alone, and the results of one process."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import Forked

from loralab.cli import main
from loralab.errors import ConfigError
from loralab.records import record
from loralab.running import runner
from loralab.scheduling import opening, workers
from loralab.scheduling.executor_settings import Local

WORDS = ["hydra/launcher=packed", "data.limit=6", "trainer.max_steps=3", "hydra.launcher.token_budget=110"]


@pytest.fixture
def sweep(tiny_arguments, tmp_path, monkeypatch):
    """Runs a sweep of packs of two on ``names`` (none: in this process); (exit code, records by trial)."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *words, names=""):
        monkeypatch.setenv(workers.STAND_IN, names)
        kept = [word for word in tiny_arguments if not word.startswith("trainer.max_steps")]
        code = main.run(["train", "-m", *kept, *WORDS, f"hydra.sweep.dir={folder}", *words])
        return code, {one["trial"]: one for one in map(record.read, record.find(tmp_path / folder))}

    return run


def copied(command, env):
    """The process of a device as a copy of this one."""
    return Forked(lambda: workers.main(Path(command[-1])), env=env)


@pytest.fixture
def start(monkeypatch):
    """Processes of devices are started by ``by[device]``, which is given the command and its ``env``."""
    real = subprocess.Popen

    def install(**by):
        def popen(command, **options):
            mine = "loralab.scheduling.workers" in command
            begin = by.get(f"device_{options['env']['CUDA_VISIBLE_DEVICES']}", real) if mine else real
            return begin(command, **options)

        monkeypatch.setattr(workers.subprocess, "Popen", popen)

    return install


def seen(folder):
    """CUDA_VISIBLE_DEVICES of each process, from its own log."""
    logs = [path.read_text() for path in sorted(folder.glob("device-*.log"))]
    return [re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", text)[1] for text in logs]


def test_two_devices_give_what_one_process_gives_and_a_failing_trial_its_own_code(
    sweep, weights, tmp_path, capsys, start
):
    start(device_3=copied)  # that of device 5 is a new interpreter
    words = ["adapter.target_modules=[q_proj],[nope]", "seed=0,1,2,3"]
    code, apart = sweep("apart", *words, names="5,3")
    assert code == 2
    message = capsys.readouterr().err
    assert seen(tmp_path / "apart") == ["3", "5"]
    done = {trial: one for trial, one in apart.items() if one["status"] == "completed"}
    assert sorted(one["status"] for one in apart.values()) == ["completed"] * 4 + ["failed"] * 4
    pids = {one["pid"] for one in apart.values()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert sorted(one["pack"]["size"] for one in done.values()) == [2] * 4
    assert len(re.findall(r"^\[\d/8\] .*val/loss", message, re.MULTILINE)) == 4
    listed = [one["status"] for one in record.read_sweep(tmp_path / "apart")["trials"]]
    assert sorted(listed) == ["completed"] * 4 + ["failed"] * 4
    _, together = sweep("together", "adapter.target_modules=[q_proj]", words[1])
    assert done.keys() == together.keys()
    for trial, one in together.items():
        assert done[trial]["metrics"] == one["metrics"]
        ours, theirs = weights(tmp_path / "apart" / trial), weights(tmp_path / "together" / trial)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    code, after = sweep("apart", *words)  # finished ones are skipped
    assert code == 2
    assert all(after[trial] == one for trial, one in done.items())


def test_what_a_process_that_died_has_left_runs_once_more_in_another(sweep, start, capsys):
    begun = iter([lambda: os.kill(os.getpid(), signal.SIGKILL)])

    def once(command, env):
        return Forked(next(begun), env=env) if env["CUDA_VISIBLE_DEVICES"] == "1" else copied(command, env)

    def dying(command, env):
        start(device_0=copied, device_1=copied)
        return once(command, env)

    start(device_0=copied, device_1=dying)
    code, records = sweep("s", "seed=0,1,2,3", names="0,1")
    assert code == 0
    assert [one["status"] for one in records.values()] == ["completed"] * 4
    assert os.getpid() not in {one["pid"] for one in records.values()}
    message = capsys.readouterr().err
    assert re.search(r"process \d+ of device 1 has ended: signal 9 ended it; 2 of its trials run again", message)


def test_a_trial_that_kills_its_process_twice_has_failed_and_takes_no_other_down(sweep, start, tmp_path, capsys):
    def deadly(command, env):
        return Forked(lambda: _killed_by_seed_2(Path(command[-1])), env=env)

    start(device_0=deadly, device_1=deadly)
    code, records = sweep("s", "seed=0,1,2,3", names="0,1")
    assert code == 4
    by_seed = {one["seed"]: one for one in records.values()}
    assert {seed: one["status"] for seed, one in by_seed.items()} == {
        **{0: "completed", 1: "completed"},
        **{2: "failed", 3: "completed"},
    }
    assert "its process died twice, at last as process" in by_seed[2]["error"]
    assert "signal 9 ended it" in by_seed[2]["error"]
    assert sorted(entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]) == [
        *["completed"] * 3,
        "failed",
    ]
    assert not list((tmp_path / "s").glob("device-*.json"))


def _killed_by_seed_2(path):
    """The process of a device, which the kernel kills as soon as a trial of seed 2 is fitted."""
    real = runner.Runner._fit

    def fit(self, base, trials, started):
        if any(trial.spec.seed == 2 for trial in trials):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, base, trials, started)

    runner.Runner._fit = fit
    return workers.main(path)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_reaches_every_process_and_leaves_records(tiny_arguments, tmp_path, start, number, code):
    start(device_0=copied, device_1=copied)
    words = ["train", "-m", *tiny_arguments, *WORDS, "hydra.sweep.dir=s", "seed=0,1,2,3", "trainer.max_steps=100000"]
    options = {"env": {workers.STAND_IN: "0,1"}, "cwd": tmp_path, "stderr": tmp_path / "stderr"}
    running = Forked(lambda: main.run(words), **options)
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end and len(list(tmp_path.glob("s/*/metrics.jsonl"))) < 4:
            time.sleep(0.1)
        running.send_signal(number)
        assert running.wait() == code
    finally:
        running.kill()
    assert "4 trials are left: loralab sweep --resume s" in (tmp_path / "stderr").read_text()
    records = [record.read(folder) for folder in record.find(tmp_path / "s")]
    assert [one["status"] for one in records] == ["interrupted"] * 4
    for pid in {one["pid"] for one in records}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_devices_are_those_that_this_process_may_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.devices("cuda") == ["0", "1"]
    assert workers.devices("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert workers.devices("cuda") == ["4", "6"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert workers.devices("cuda") == []


@pytest.mark.parametrize(("names", "missing"), [("0,1,7", "7"), ("5", "5"), ("2, 3", "2, 3")])
def test_a_card_that_is_not_there_is_one_paragraph_before_any_process_starts(monkeypatch, names, missing):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(workers.STAND_IN, names)
    with pytest.raises(ConfigError) as raised:
        opening.executor(Local(), Path("nowhere"), "cuda", 1)  # of one pack too, which no process is started for
    said = f"names {missing}, and torch sees 2 CUDA devices; valid: some of 0,1, or LORALAB_DEVICES not set"
    assert str(raised.value) == f"LORALAB_DEVICES={names} {said}"


@pytest.mark.parametrize("names", ["1,0", "0,0", "GPU-8f5c,GPU-02aa"])
def test_some_of_the_cards_may_be_named_and_one_twice(monkeypatch, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(workers.STAND_IN, names)
    assert workers.devices("cuda") == names.split(",")


def jobs(tmp_path, count):
    return [[SimpleNamespace(trial=str(number), folder=tmp_path / "sweep" / str(number))] for number in range(count)]


def test_two_processes_on_one_card_have_files_of_their_own_and_each_its_share_of_the_cores(tmp_path, monkeypatch):
    (tmp_path / "sweep").mkdir()
    monkeypatch.setattr(workers, "_cores", lambda: 9)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workers.tasks, "content", lambda packs, before: {})
    begun = []

    def popen(command, env):
        begun.append((Path(command[-1]).name, env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]))
        return SimpleNamespace(pid=len(begun))

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    executor = workers.LocalExecutor(["0", "0"])
    tasks = executor.share(jobs(tmp_path, 2), [1, 1])
    executor.start(tasks)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    executor.start(executor.retry(tasks[1], tasks[1].packs))
    assert begun == [("device-0.json", "0", "4"), ("device-0-2.json", "0", "4"), ("device-0-2.json", "0", "3")]


def test_a_process_that_does_not_stop_is_killed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workers, "PATIENCE_S", 0.2)
    # it says when it is deaf: a signal before that would end it
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    process.stdout.readline()
    task = workers.Task([], handle=workers._Worker("0", "0-2", 1, process, tmp_path / "asked.json"))
    workers.LocalExecutor(["0"]).stop([task], signal.SIGTERM)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert f"process {process.pid} of device 0-2 does not stop" in caplog.text
