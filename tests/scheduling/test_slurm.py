"""Slurm through stand-ins: what is submitted, adopted, requeued, cancelled and refused. The real one: tests/slurm."""

import json
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Forked

from loralab.cli import main
from loralab.errors import ArtifactError, ConfigError
from loralab.records import record
from loralab.scheduling import executor_settings, slurm, slurm_commands, slurm_task, tasks
from loralab.scheduling.executor_settings import Slurm
from loralab.scheduling.executors import Task
from loralab.scheduling.job import Job

WORDS = ["hydra.launcher.executor=slurm", "data.limit=6", "trainer.max_steps=3", "hydra.launcher.token_budget=110"]


class Cluster:
    """Slurm's commands and submitit: a job is a copy of this process."""

    def __init__(self):
        self.calls, self.jobs, self.submitted, self.states, self.refuses = [], {}, [], {}, {}

    def call(self, *words, given=None):
        self.calls.append(words)
        if words[0] in self.refuses:
            raise slurm_commands.SlurmError(self.refuses[words[0]])
        return getattr(self, f"_{words[0]}")(*words[1:])

    def _sinfo(self, *_):
        return "low*|8:00:00\nhigh|infinite\n"

    def _sbatch(self, *_):
        return ""

    def _scontrol(self, *words):
        return "MaxArraySize            = 1001\n" if words == ("show", "config") else ""

    def _scancel(self, *jobs):
        for job in jobs:
            self.jobs[job].send_signal(signal.SIGTERM)
            self.jobs[job].wait()
            self.states[job] = "CANCELLED"
        return ""

    def _squeue(self, *_):
        for job, process in self.jobs.items():
            code = process.poll()
            state = "RUNNING" if code is None else "COMPLETED" if code == 0 else "FAILED"
            if self.states.get(job) != "CANCELLED":
                self.states[job] = state
        return "".join(f"{job}|{state}|None\n" for job, state in self.states.items())

    def executor(self, folder):
        return Submitit(self, folder)


class Submitit:
    """submitit.SlurmExecutor."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, Path(folder)

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit_array(self, functions):
        number = 10 + len(self.cluster.submitted)
        self.cluster.submitted.append((self.parameters, functions))
        names = [f"{number}_{place}" for place in range(len(functions))] if len(functions) > 1 else [str(number)]
        for name, function in zip(names, functions, strict=True):
            pickled = pickle.dumps(function)
            (self.folder / f"{name}_submitted.pkl").write_bytes(pickled)
            array, _, place = name.partition("_")
            environment = {"SUBMITIT_FOLDER": str(self.folder), "SLURM_JOB_ID": array, "SLURM_NTASKS": "1"}
            environment |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": place} if place else {}
            self.cluster.jobs[name] = Forked(lambda pickled=pickled: _job(pickled), env=environment)
        paths = [SimpleNamespace(stderr=self.folder / f"{name}_0_log.err") for name in names]
        return [SimpleNamespace(job_id=name, paths=path) for name, path in zip(names, paths, strict=True)]


def _job(pickled):
    try:
        pickle.loads(pickled)()
    except SystemExit as left:
        return left.code
    return 0


def _late(signal_file, pickled):
    while not signal_file.exists():
        time.sleep(0.01)
    return _job(pickled)


@pytest.fixture
def cluster(monkeypatch):
    """A Slurm that this machine has, and submitit."""
    made = Cluster()
    monkeypatch.setattr(slurm_commands, "call", made.call)
    monkeypatch.setattr(slurm_commands.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm, "ASKED_EVERY", 0.05)
    monkeypatch.setattr(slurm.SlurmExecutor, "poll", 0.05)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(SlurmExecutor=made.executor, __spec__=object()))
    yield made
    for process in made.jobs.values():
        process.kill()
        process.wait()


@pytest.fixture
def sweep(tiny_arguments, tmp_path, monkeypatch):
    """Runs a sweep of packs of two; (exit code, records by trial)."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *words, own=WORDS):
        kept = [word for word in tiny_arguments if not word.startswith("trainer.max_steps")]
        code = main.run(["train", "-m", *kept, *own, f"hydra.sweep.dir={folder}", *words])
        return code, {one["trial"]: one for one in map(record.read, record.find(tmp_path / folder))}

    return run


def test_a_task_whose_records_come_before_slurm_says_that_it_ended_is_forgotten(cluster, sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(Cluster, "_squeue", lambda self, *_: "".join(f"{job}|RUNNING|None\n" for job in self.jobs))
    assert sweep("s", "seed=0")[0] == 0
    assert not (tmp_path / "s" / slurm.FILE).exists()
    assert not list((tmp_path / "s" / slurm.FOLDER).glob("*.pkl"))


def test_a_pack_is_an_array_task_and_gives_what_this_process_gives(cluster, sweep, weights, tmp_path, capsys):
    import torch

    words = ["adapter.target_modules=[q_proj],[nope]", "seed=0,1,2"]
    code, there = sweep(
        *("s", *words, "hydra.launcher.partition=low", "hydra.launcher.mem_gb=1.5"),
        *("hydra.launcher.additional_parameters={constraint: a100}", "hydra.launcher.setup=[module load x]"),
    )
    assert code == 2
    ((parameters, functions),) = cluster.submitted
    assert len(functions) == 3
    assert parameters == {
        **{"job_name": "loralab-s", "time": 240, "ntasks_per_node": 1, "array_parallelism": 32, "signal_delay_s": 90},
        "setup": ["module load x"],
        "additional_parameters": {"requeue": True, "partition": "low", "mem": "1536M", "constraint": "a100"},
    }
    checked = next(words for words in cluster.calls if words[0] == "sbatch")
    assert checked[1:] == ("--test-only", "--partition=low", "--time=240", "--mem=1536M", "--constraint=a100")
    done = {trial: one for trial, one in there.items() if one["status"] == "completed"}
    assert sorted(one["status"] for one in there.values()) == ["completed"] * 3 + ["failed"] * 3
    assert sorted(one["pack"]["size"] for one in done.values()) == [1, 2, 2]
    assert os.getpid() not in {one["pid"] for one in there.values()}
    listed = [entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]]
    assert sorted(listed) == ["completed"] * 3 + ["failed"] * 3
    assert not (tmp_path / "s" / slurm.FILE).exists()
    assert not list((tmp_path / "s" / slurm.FOLDER).glob("*.pkl"))
    assert "Slurm's job 10_0: 2 trials in 1 pack" in capsys.readouterr().err
    _, here = sweep("here", "adapter.target_modules=[q_proj]", words[1], own=WORDS[1:])
    assert here.keys() == done.keys()
    for trial, one in here.items():
        assert done[trial]["metrics"] == one["metrics"]
        ours, theirs = weights(tmp_path / "s" / trial), weights(tmp_path / "here" / trial)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_job_is_submitted_once_more_and_a_job_that_dies_twice_does_not_hang(
    cluster, sweep, monkeypatch, capsys
):
    monkeypatch.setattr(slurm_task.tasks, "perform", lambda content, handlers: os.kill(os.getpid(), signal.SIGKILL))
    code, records = sweep("s", "seed=0,1")
    assert code == 4
    assert [len(functions) for _, functions in cluster.submitted] == [1, 2]
    assert {one["status"] for one in records.values()} == {"failed"}
    errors = {one["error"].partition(";")[0] for one in records.values()}
    assert errors == {
        f"its process died twice, at last as Slurm's job 11_{place}: its state is FAILED" for place in (0, 1)
    }


@pytest.mark.slow
def test_jobs_of_an_earlier_call_are_waited_for_and_not_submitted_again(cluster, sweep, tmp_path, capsys, monkeypatch):
    assert sweep("s", "seed=0,1")[0] == 0
    (_, (function,)), folder = cluster.submitted[0], tmp_path / "s"
    for place in record.find(folder):
        (place / record.RESULT).unlink()
    job = Forked(lambda: _late(folder / "adopted", pickle.dumps(function)), env={"SLURM_JOB_ID": "77"})
    adopt = slurm.SlurmExecutor.adopt
    monkeypatch.setattr(slurm.SlurmExecutor, "adopt", lambda *given: ((folder / "adopted").touch(), adopt(*given))[1])
    cluster.jobs["77"] = job
    record.replace(folder / slurm.FILE, {"jobs": [{"job": "77", "log": "x", "before": function.content["before"]}]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORALAB_DEVICES", "")
        assert sweep("s", "seed=0,1", own=WORDS[1:])[0] == 4
    assert "for which executor=local does not wait" in capsys.readouterr().err
    assert sweep("s", "seed=0,1", "hydra.launcher.pack=off")[0] == 0
    assert len(cluster.submitted) == 1
    assert {one["pid"] for one in map(record.read, record.find(folder))} == {job.pid}
    assert "Slurm's job 77 of an earlier call waits or runs: its 2 trials are waited for" in capsys.readouterr().err
    assert not (folder / slurm.FILE).exists()


@pytest.mark.slow
def test_ctrl_c_cancels_the_jobs_which_write_where_they_stand(cluster, tiny_arguments, tmp_path):
    words = [word for word in tiny_arguments if not word.startswith(("callbacks", "trainer.max_steps"))]
    words = ["train", "-m", *words, *WORDS[:2], "trainer.max_steps=100000", "hydra.sweep.dir=s", "seed=0,1"]
    launcher = Forked(lambda: main.run(words), cwd=tmp_path, stderr=tmp_path / "stderr")
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and len(list(tmp_path.glob("s/*/metrics.jsonl"))) < 2:
            time.sleep(0.05)
        jobs = json.loads((tmp_path / "s" / slurm.FILE).read_text())["jobs"]
        assert [len(one["before"]) for one in jobs] == [2]
        assert {entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]} <= {"pending", "running"}
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait() == 130
    finally:
        launcher.kill()
    message = (tmp_path / "stderr").read_text()
    assert "scancel 10" in message
    assert "2 trials are left: loralab sweep --resume s" in message
    records = [record.read(place) for place in record.find(tmp_path / "s")]
    assert [one["status"] for one in records] == ["interrupted"] * 2
    assert all((tmp_path / "s" / one["trial"] / "checkpoints" / "last.pt").is_file() for one in records)
    assert not (tmp_path / "s" / slurm.FILE).exists()


@pytest.fixture
def executor(cluster, tmp_path):
    return slurm.SlurmExecutor(Slurm(), tmp_path)


def task_of(tmp_path, name, job_id):
    job = Job({"trainer": {}, "seed": 0}, tmp_path / name, [], {})
    job.trial = name
    task = Task([[job]], name=f"Slurm's job {job_id}")
    task.handle = job_id
    return task


@pytest.mark.parametrize(
    ("state", "verdict", "words"),
    [
        ("CANCELLED", "cancelled", "scancel"),
        ("PREEMPTED", "excused", "preempted"),
        ("TIMEOUT", "failed", "time limit of 240 minutes"),
        ("OUT_OF_MEMORY", "died", "hydra.launcher.mem_gb"),
        ("NODE_FAIL", "died", "NODE_FAIL"),
        (None, "died", "Slurm does not know it any more"),
    ],
)
def test_every_end_that_slurm_knows_has_its_verdict_without_accounting(
    cluster, executor, tmp_path, monkeypatch, state, verdict, words
):
    cluster.refuses["sacct"] = "Slurm accounting storage is disabled"
    cluster.states = {"5_0": state} if state else {}
    task = task_of(tmp_path, "a", "5_0")
    assert executor.over([task]) == []  # it may be on its way back into the queue
    time.sleep(0.06)
    ((ended, end),) = executor.over([task]) or _again(executor, task)
    assert ended is task
    assert end.verdict == verdict
    assert words in end.why


def _again(executor, task):
    time.sleep(0.06)
    return executor.over([task])


def test_a_job_that_waits_runs_or_comes_back_is_not_over_and_why_it_waits_is_said_once(
    cluster, executor, tmp_path, caplog
):
    task = task_of(tmp_path, "a", "5_0")
    for state in ("FAILED", "REQUEUED", "FAILED", "PENDING", "COMPLETING", "RUNNING"):
        cluster.states = {"5_0": state}
        time.sleep(0.06)
        assert executor.over([task]) == []
    cluster.refuses["squeue"] = "Unable to contact slurm controller"
    for _ in range(3):
        time.sleep(0.06)
        assert executor.over([task]) == []
    assert caplog.text.count("Slurm does not answer") == 1
    del cluster.refuses["squeue"]
    cluster._squeue = lambda *_: "5_0|PENDING|launch failed requeued held\n"
    for _ in range(2):
        time.sleep(0.06)
        assert executor.over([task]) == []
    assert caplog.text.count("waits in Slurm's queue: launch failed requeued held") == 1


def test_more_packs_than_an_array_may_have_tasks_are_several_to_a_task(executor, tmp_path):
    executor.largest = 2
    packs = [task_of(tmp_path, name, "1").packs[0] for name in "abcde"]
    assert [len(task.packs) for task in executor.share(packs, [1] * 5)] == [3, 2]


class Performed:
    """tasks.perform, which sends this process the given signals."""

    def __init__(self, *numbers):
        self.numbers, self.trained_on = numbers, False

    def __call__(self, content, handlers):
        try:
            for number in self.numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        except BaseException as stopped:
            return stopped.exit_code
        self.trained_on = True
        return 0


@pytest.fixture
def in_job(cluster, monkeypatch, tmp_path):
    """Calls a SlurmTask as if in the job 12_3; (exit code or None, jobs that were requeued)."""
    own = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "1"}
    for name, value in {**own, "SUBMITIT_FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}

    def call(performed, minutes=240, timeouts=5, state="RUNNING"):
        cluster.states, code = {"12_3": state}, None
        monkeypatch.setattr(slurm_task.tasks, "perform", performed)
        try:
            slurm_task.SlurmTask({}, minutes, 15, timeouts)()
        except SystemExit as left:
            code = left.code
        requeued = [words[2] for words in cluster.calls if words[:2] == ("scontrol", "requeue")]
        cluster.calls.clear()
        return code, requeued

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_task_that_is_told_to_make_room_is_requeued(in_job, tmp_path):
    assert in_job(Performed(signal.SIGUSR2)) == (140, ["12_3"])
    assert in_job(Performed(signal.SIGTERM)) == (143, ["12_3"])  # a partition's preemption
    assert "SLURM_NTASKS" not in os.environ
    assert not (tmp_path / "12_3_timeouts.txt").exists()


def test_a_task_that_is_cancelled_or_done_is_not_requeued(in_job):
    assert in_job(Performed(signal.SIGTERM), state="COMPLETING") == (143, [])
    assert in_job(Performed(signal.SIGINT)) == (130, [])
    assert in_job(Performed()) == (None, [])


def test_time_limits_are_counted_and_at_the_last_one_the_task_trains_on(in_job, tmp_path):
    assert in_job(Performed(signal.SIGUSR2), minutes=1, timeouts=2) == (140, ["12_3"])
    assert in_job(Performed(signal.SIGUSR2), minutes=1, timeouts=2) == (140, ["12_3"])
    assert (tmp_path / "12_3_timeouts.txt").read_text() == "2"
    last = Performed(signal.SIGUSR2)
    assert in_job(last, minutes=1, timeouts=2) == (None, [])
    assert last.trained_on


def test_a_task_that_slurm_does_not_requeue_ends(in_job, cluster):
    cluster.refuses["scontrol"] = "Job can not be requeued"
    assert in_job(Performed(signal.SIGUSR2))[0] == 140


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["partition=lwo"], "hydra.launcher.partition=lwo does not exist; valid: high, low"),
        (["timeout_min=481"], "hydra.launcher.timeout_min=481 is more than partition low allows; valid: at most 480"),
        (["signal_delay_s=100", "timeout_min=3"], "signal_delay_s=100 is more than half of the 180 s"),
        (["mem_gb=0"], "hydra.launcher.mem_gb must be a positive number of GiB or null, got 0"),
        (["num_gpus=0.5"], "hydra.launcher.num_gpus=0.5 is a key of executor=ray"),
        (["additional_parameters={signal: USR1}"], "additional_parameters.signal=USR1 is set by"),
        (
            ["executor=slrum"],
            "hydra.launcher.executor='slrum' is unknown; did you mean slurm? valid: local, ray, slurm",
        ),
        (["partiton=low"], "hydra.launcher.partiton is not an option of PackedLauncherConf"),
    ],
)
def test_wrong_keys_are_exit_2_before_anything_is_submitted(cluster, sweep, capsys, keys, message):
    given = [f"hydra.launcher.{key}" for key in keys]
    code, records = sweep("s", "seed=0,1", *given)
    assert (code, records, cluster.submitted) == (2, {}, [])
    assert message in capsys.readouterr().err


def test_what_sbatch_refuses_is_exit_2_with_its_words(cluster, sweep, capsys):
    cluster.refuses["sbatch"] = "error: invalid account"
    assert sweep("s", "seed=0,1", "hydra.launcher.account=nobody")[0] == 2
    message = capsys.readouterr().err
    assert (
        "sbatch refuses what hydra.launcher asks for (--account=nobody --time=240): error: invalid account" in message
    )
    assert cluster.submitted == []


def test_a_machine_without_slurm_or_a_slurm_that_does_not_answer_is_exit_2(cluster, sweep, capsys, monkeypatch):
    cluster.refuses["sinfo"] = "Unable to contact slurm controller"
    assert sweep("s", "seed=0,1")[0] == 2
    assert "but Slurm does not answer: Unable to contact slurm controller" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sweep("s", "seed=0,1")[0] == 2
    assert "this machine has no Slurm: sbatch, squeue" in capsys.readouterr().err
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    assert sweep("s", "seed=0,1")[0] == 2
    assert "needs submitit; valid: pip install 'loralab[slurm]'" in capsys.readouterr().err


def test_a_key_of_slurm_is_refused_by_the_local_executor(sweep, capsys):
    assert sweep("s", "seed=0,1", "hydra.launcher.partition=low", own=[])[0] == 2
    message = capsys.readouterr().err
    assert (
        "hydra.launcher.partition=low is a key of executor=slurm, and hydra.launcher.executor=local; it has none"
        in message
    )


def test_a_damaged_list_of_jobs_is_refused_and_kept(tmp_path):
    (tmp_path / slurm.FILE).write_text('{"jobs": [{"job":')
    with pytest.raises(ArtifactError, match="damaged"):
        slurm.queued(tmp_path)


def test_fresh_does_not_run_beside_a_job_that_has_the_trial(cluster, executor, tmp_path):
    cluster.states = {"5": "PENDING"}
    record.replace(tmp_path / slurm.FILE, {"jobs": [{"job": "5", "log": "", "before": {"a": 0}}]})
    job = task_of(tmp_path, "a", "5").packs[0][0]
    job.fresh = True
    with pytest.raises(ArtifactError, match="trial a is in Slurm's job 5, which waits or runs"):
        executor.adopt([job])


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("infinite", float("inf")), ("30", 30), ("5:30", 5.5), ("8:00:00", 480), ("2-12:00:00", 3600), ("0:30", 0.5)],
)
def test_time_limits_of_sinfo(limit, minutes):
    assert slurm_commands._minutes(limit) == minutes


def test_defaults_of_short_and_long_tasks_leave_time_for_a_checkpoint():
    assert [Slurm(timeout_min=minutes).delay for minutes in (1, 4, 240)] == [15, 60, 90]
    assert executor_settings.checked("slurm", {"gpus_per_node": 1}).device == "cuda"
    assert executor_settings.checked("slurm", {"additional_parameters": {"gres": "gpu:1"}}).device == "cuda"
    assert executor_settings.checked("slurm", {"mem_gb": 10}).memory_gib == 8
    with pytest.raises(ConfigError, match="executor='x' is unknown"):
        executor_settings.checked("x", {})
    assert tasks.content([], {})["cwd"] == str(Path.cwd())
