"""A sweep on a real Slurm of one node without accounting: packs, kills, preemption, time limits, throttle, cancel.

Each test is minutes of a real cluster's ways, most of them waiting.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import cluster as one_node
import pytest
import torch

from loralab.records import record

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(one_node.missing()), reason=one_node.missing())]


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """The folder of a Slurm that runs; its commands find it by SLURM_CONF."""
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    one_node.start(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    one_node.stop(folder)
    os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


@pytest.fixture
def words(tiny_arguments):
    """A sweep of two trials, long enough to be disturbed; a checkpoint is written when it is."""
    kept = [word for word in tiny_arguments if not word.startswith(("callbacks", "trainer.max_steps"))]
    return ["train", "-m", *kept, "hydra.sweep.dir=s", "seed=0,1", "trainer.max_steps=400"]


@pytest.fixture
def launch(node, tmp_path):
    """Starts loralab in ``tmp_path``, by Slurm; what it says goes to the file ``said``."""
    started = []

    def start(words, **more):
        given = {"executor": "slurm", "cpus_per_task": "1", "mem_gb": "1.5", **more}
        asked = [f"hydra.launcher.{key}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "loralab.cli.main", *words, *(asked if words[0] == "train" else ())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (tmp_path / "said").open("w") as said:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
    subprocess.run(["scancel", "--user=root"], check=True)
    until(lambda: not slurm("squeue", "-h").strip(), 60)


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until(true, seconds=150.0):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {slurm('squeue')}"
        time.sleep(0.1)
    return found


def steps(folder):
    """The fewest steps that a trial of the sweep has logged; 0 before both have begun."""
    counts = [path.read_text().count("\n") for path in folder.glob("s/*/metrics.jsonl")]
    return min(counts) if len(counts) == 2 else 0


def records(folder):
    return {one["trial"]: one for one in map(record.read, record.find(folder / "s"))}


def queue(job=None):
    """{job: (state, times it was restarted)}."""
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-O", "JobArrayID:20,State:20,RestartCnt:10").splitlines()
    found = {one[0]: (one[1], int(one[2])) for one in map(str.split, lines)}
    return found if job is None else found[job]


def jobs(folder):
    """The job ids in the sweep folder, once there are any."""
    path = folder / "s" / "slurm.json"
    return [one["job"] for one in json.loads(path.read_text())["jobs"]] if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of the same sweep in one process, by the words."""
    made = {}

    def run(words):
        if not made:
            folder = tmp_path_factory.mktemp("undisturbed")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "loralab.cli.main", *words]
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            made["folder"] = folder
        return made["folder"]

    return run


def assert_equal_bits(folder, other, weights):
    ours, theirs = records(folder), records(other)
    assert ours.keys() == theirs.keys()
    for trial, one in theirs.items():
        assert ours[trial]["status"] == one["status"] == "completed"
        assert ours[trial]["metrics"] == one["metrics"]
        mine, its = weights(folder / "s" / trial), weights(other / "s" / trial)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in its)
        curves = [
            re.findall(r'"step": (\d+).*?"train/loss": ([-\d.e]+)', (place / "s" / trial / "metrics.jsonl").read_text())
            for place in (folder, other)
        ]
        assert curves[0] == curves[1]
        assert len({step for step, _ in curves[0]}) == len(curves[0]) == 400


def test_packs_are_array_tasks_that_are_throttled_and_each_has_its_gpu(words, launch, tmp_path, capfd):
    few = [word for word in words if "max_steps" not in word and not word.startswith("seed")]
    few += ["trainer.max_steps=3", "seed=0,1,2,3,4,5", "data.limit=6", "hydra.launcher.token_budget=110"]
    launcher = launch(few, array_parallelism=1, gpus_per_node=1)
    running = []
    while launcher.poll() is None:
        states = [state for state, _ in queue().values()]
        running.append(states.count("RUNNING"))
        time.sleep(0.2)
    said = (tmp_path / "said").read_text()
    assert launcher.returncode == 0, said
    assert max(running) == 1
    stored = records(tmp_path).values()
    assert [one["status"] for one in stored] == ["completed"] * 6
    assert {one["pack"]["size"] for one in stored} == {2}
    assert len({one["pid"] for one in stored}) == 3
    listed = [entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]]
    assert listed == ["completed"] * 6
    logs = [path.read_text() for path in sorted((tmp_path / "s" / "slurm").glob("*_log.err"))]
    assert [re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", text)[1] for text in logs] == ["0"] * 3
    print(*said.splitlines()[-6:], sep="\n")


def test_a_task_that_is_killed_goes_on_in_another_job_with_equal_bits(words, launch, tmp_path, weights, undisturbed):
    expected = undisturbed(words)
    launcher = launch([*words, "callbacks.checkpoint.every_n_steps=20"])
    until(lambda: steps(tmp_path) > 60)
    (job,) = jobs(tmp_path)
    os.kill(next(iter(records(tmp_path).values()))["pid"], signal.SIGKILL)
    assert launcher.wait(240) == 0, (tmp_path / "said").read_text()
    assert (
        f"Slurm's job {job} has ended: its state is FAILED; 2 of its trials run again"
        in (tmp_path / "said").read_text()
    )
    assert all(one["resumed_from"] >= 40 for one in records(tmp_path).values())
    assert_equal_bits(tmp_path, expected, weights)


def test_a_task_that_is_killed_twice_is_a_failed_record_and_no_launcher_that_hangs(words, launch, tmp_path):
    launcher = launch([*words[:-2], "seed=0", "trainer.max_steps=100000"])
    for _ in range(2):
        pid = until(lambda: [one["pid"] for one in records(tmp_path).values() if one["status"] == "running"])[0]
        os.kill(pid, signal.SIGKILL)
        until(
            lambda pid=pid: all(
                one.get("pid") != pid or one["status"] != "running" for one in records(tmp_path).values()
            )
        )
    assert launcher.wait(120) == 4
    (stored,) = records(tmp_path).values()
    assert stored["status"] == "failed"
    assert "its process died twice" in stored["error"]
    assert slurm("squeue", "-h") == ""


def restart_at_once(job):
    """Slurm keeps a requeued job for two minutes."""
    until(lambda: queue(job)[0] == "PENDING")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_preempted_task_is_requeued_and_ends_with_equal_bits(words, launch, tmp_path, weights, undisturbed):
    expected = undisturbed(words)
    launcher = launch(words, partition="low")
    until(lambda: steps(tmp_path) > 60)
    (job,) = jobs(tmp_path)
    urgent = slurm("sbatch", "--parsable", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5").strip()
    until(lambda: queue(job)[0] == "PENDING")
    interrupted = records(tmp_path).values()
    assert {one["status"] for one in interrupted} == {"interrupted"}
    until(lambda: {entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]} == {"interrupted"}, 10)
    until(lambda: queue(urgent)[0] == "COMPLETED")
    restart_at_once(job)
    assert launcher.wait(240) == 0, (tmp_path / "said").read_text()
    assert queue(job)[1] == 1
    assert all(one["resumed_from"] > 60 for one in records(tmp_path).values())
    assert_equal_bits(tmp_path, expected, weights)


def test_usr2_of_the_time_limit_requeues_too(words, launch, tmp_path, weights, undisturbed):
    expected = undisturbed(words)
    launcher = launch(words)
    until(lambda: steps(tmp_path) > 60)
    (job,) = jobs(tmp_path)
    slurm("scancel", "--signal=USR2", job)
    restart_at_once(job)
    assert launcher.wait(240) == 0, (tmp_path / "said").read_text()
    assert queue(job)[1] == 1
    assert_equal_bits(tmp_path, expected, weights)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_cancels_what_it_has_submitted(words, launch, tmp_path, number, code):
    launcher = launch([*words[:-1], "trainer.max_steps=100000"], pack="off")
    until(lambda: steps(tmp_path) > 5)
    assert len(jobs(tmp_path)) == 2
    launcher.send_signal(number)
    assert launcher.wait(120) == code
    assert slurm("squeue", "-h") == ""
    assert {one["status"] for one in records(tmp_path).values()} == {"interrupted"}
    assert len(list((tmp_path / "s").glob("*/checkpoints/last.pt"))) == 2
    assert "2 trials are left: loralab sweep --resume s" in (tmp_path / "said").read_text()


def test_a_launcher_that_was_killed_finds_its_jobs_again(words, launch, tmp_path, weights, undisturbed):
    expected = undisturbed(words)
    launcher = launch(words)
    until(lambda: steps(tmp_path) > 20)
    (job,) = jobs(tmp_path)
    launcher.kill()
    launcher.wait()
    again = launch(["sweep", "--resume", "s"])
    assert again.wait(240) == 0, (tmp_path / "said").read_text()
    assert (
        f"Slurm's job {job} of an earlier call waits or runs: its 2 trials are waited for"
        in (tmp_path / "said").read_text()
    )
    assert all("resumed_from" not in one for one in records(tmp_path).values())
    assert_equal_bits(tmp_path, expected, weights)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partition": "gpu"}, "hydra.launcher.partition=gpu does not exist; valid: high, low"),
        ({"cpus_per_task": 4096}, "sbatch refuses what hydra.launcher asks for"),
        ({"timeout_min": 481}, "more than partition low allows; valid: at most 480"),
    ],
)
def test_what_slurm_cannot_give_is_exit_2_and_nothing_is_submitted(words, launch, tmp_path, keys, message):
    assert launch(words, **keys).wait(60) == 2
    assert message in (tmp_path / "said").read_text()
    assert slurm("squeue", "-h") == ""
    assert not record.find(tmp_path / "s")
