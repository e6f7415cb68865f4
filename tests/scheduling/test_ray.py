"""Ray through a stand-in: what it is asked for, what its errors mean, what is refused. The real one: slow, below."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loralab.cli import main
from loralab.errors import ConfigError
from loralab.records import record
from loralab.scheduling import executors, ray_cluster
from loralab.scheduling.executor_settings import Ray


class WorkerCrashedError(Exception):
    pass


class TaskCancelledError(Exception):
    pass


class OutOfMemoryError(Exception):
    pass


class FakeRay:
    """The module ray; a task is done when it is asked for, and ends as ``outcomes`` say: a value or an exception."""

    __spec__ = object()
    exceptions = SimpleNamespace(TaskCancelledError=TaskCancelledError, OutOfMemoryError=OutOfMemoryError)

    def __init__(self):
        self.outcomes, self.options, self.given, self.ended, self.cancelled = [], None, None, 0, []

    def init(self, **given):
        self.given = given

    def shutdown(self):
        self.ended += 1

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(options=lambda name: SimpleNamespace(remote=self._submit))

    def _submit(self, content, log):
        return self.outcomes.pop(0), len(self.outcomes)

    def wait(self, references, num_returns, timeout):
        return references, []

    def get(self, reference):
        if isinstance(reference[0], Exception):
            raise reference[0]
        return reference[0]

    def cancel(self, reference):
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch):
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


def ends(ray, tmp_path, *outcomes):
    ray.outcomes = list(outcomes)
    executor = ray_cluster.RayExecutor(Ray(), tmp_path)
    tasks = [executors.Task([]) for _ in outcomes]
    executor.start(tasks)
    return [(end.verdict, end.error.exit_code) for _, end in executor.over(tasks)], executor, tasks


def test_every_outcome_of_a_task_has_its_verdict_and_ray_itself_retries_none(ray, tmp_path):
    outcomes = [0, 143, WorkerCrashedError("died"), TaskCancelledError(), OutOfMemoryError("node")]
    found, executor, tasks = ends(ray, tmp_path, *outcomes)
    assert found == [("died", 4), ("cancelled", 4), ("died", 4), ("cancelled", 4), ("died", 6)]
    assert ray.options == {"num_cpus": 1.0, "num_gpus": 0.0, "max_calls": 1, "max_retries": 0}
    executor.stop(tasks, signal.SIGINT)
    executor.close()
    assert (len(ray.cancelled), ray.ended) == (5, 1)


def test_a_local_cluster_that_can_never_run_a_task_is_refused_and_another_one_may_grow(ray, tmp_path, caplog):
    with pytest.raises(
        Exception, match=r"num_gpus=0\.5: no node of Ray's cluster has that; the largest has 2 CPUs and 0 G"
    ):
        ray_cluster.RayExecutor(Ray(num_gpus=0.5), tmp_path)
    assert ray.ended == 1
    ray_cluster.RayExecutor(Ray(num_gpus=0.5, address="auto"), tmp_path)
    assert "the tasks wait until one has" in caplog.text
    assert ray.given["address"] == "auto"


def test_a_cluster_that_asks_for_a_token_says_where_to_put_it(ray, tmp_path, monkeypatch):
    """Ray looks for one by itself only where it was given no address."""

    def refuses(**given):
        cause = RuntimeError("AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing")
        raise ConnectionError("Failed to connect to Ray cluster") from cause

    monkeypatch.setattr(ray, "init", refuses)
    with pytest.raises(ConfigError, match=r"address=head:6379: the cluster of Ray there asks.*RAY_AUTH_MODE=token"):
        ray_cluster.RayExecutor(Ray(address="head:6379"), tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["address=nowhere"], "hydra.launcher.address=nowhere is no address of a Ray cluster; valid: HOST:PORT"),
        (["address='ray://a:1'"], "is no address of a Ray cluster"),
        (["address='127.0.0.1:{port}'"], "no cluster of Ray answers there"),
        (["num_cpus=0"], "hydra.launcher.num_cpus must be a positive number"),
        (["partition=low"], "hydra.launcher.partition=low is a key of executor=slurm"),
    ],
)
def test_what_is_wrong_is_exit_2_and_nothing_is_started(
    ray, tiny_arguments, tmp_path, monkeypatch, capsys, keys, message
):
    monkeypatch.chdir(tmp_path)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        given = [f"hydra.launcher.{key.format(port=free.getsockname()[1])}" for key in keys]
        words = ["train", "-m", *tiny_arguments, "hydra.sweep.dir=s", "seed=0,1", "hydra.launcher.executor=ray", *given]
        assert main.run(words) == 2
    assert message in capsys.readouterr().err
    assert ray.given is None


def test_without_ray_it_is_exit_2_and_says_what_to_install(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    words = ["train", "-m", *tiny_arguments, "hydra.sweep.dir=s", "seed=0,1", "hydra.launcher.executor=ray"]
    assert main.run(words) == 2
    assert "hydra.launcher.executor=ray needs Ray; valid: pip install 'loralab[ray]'" in capsys.readouterr().err


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install ray")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture
def launch(tiny_arguments, tmp_path):
    """Starts loralab in ``tmp_path``; what it says goes to the file ``said``."""
    started = []
    kept = [word for word in tiny_arguments if not word.startswith(("callbacks", "trainer.max_steps"))]

    def start(*words, folder="s"):
        given = ["train", "-m", *kept, f"hydra.sweep.dir={folder}", *words]
        command = [sys.executable, "-m", "loralab.cli.main", *given]
        with (tmp_path / "said").open("w") as said:
            environment = {**os.environ, **ENVIRONMENT}
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def records(folder):
    return {one["trial"]: one for one in map(record.read, record.find(folder))}


def until(true, seconds=180.0):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
    return found


def steps(folder):
    counts = [path.read_text().count("\n") for path in folder.glob("*/metrics.jsonl")]
    return min(counts) if len(counts) == 2 else 0


@pytest.mark.slow
@needs_ray
def test_a_task_that_is_killed_is_retried_with_equal_bits_on_a_local_cluster(launch, tmp_path, weights):
    words = ["seed=0,1", "trainer.max_steps=400", "callbacks.checkpoint.every_n_steps=20"]
    assert launch(*words, folder="here").wait(180) == 0
    launcher = launch(*words, "hydra.launcher.executor=ray", folder="there")
    until(lambda: steps(tmp_path / "there") > 60)
    os.kill(next(iter(records(tmp_path / "there").values()))["pid"], signal.SIGKILL)
    assert launcher.wait(240) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert "Ray's task 1 has ended: WorkerCrashedError" in said
    here, there = records(tmp_path / "here"), records(tmp_path / "there")
    assert here.keys() == there.keys()
    for trial, one in here.items():
        assert there[trial]["status"] == "completed"
        assert there[trial]["resumed_from"] >= 40
        assert there[trial]["metrics"] == one["metrics"]
        ours, theirs = weights(tmp_path / "there" / trial), weights(tmp_path / "here" / trial)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    print(*said.splitlines()[-6:], sep="\n")


@pytest.fixture
def head(tmp_path_factory, monkeypatch):
    """The address of a cluster of two CPUs and two GPUs that are not there, with a token, started in another folder."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    folder = tmp_path_factory.mktemp("head")
    port = "6391"
    ray = str(Path(sys.executable).with_name("ray"))
    given = ["--head", f"--port={port}", "--num-cpus=2", "--num-gpus=2", "--include-dashboard=false"]
    given += ["--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder}"]
    done = subprocess.run([ray, "start", *given], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    yield f"{socket.gethostbyname(socket.gethostname())}:{port}"
    subprocess.run([ray, "stop", "--grace-period", "5"], capture_output=True, timeout=60)


@pytest.mark.slow
@needs_ray
def test_tasks_share_gpus_of_a_cluster_and_write_into_the_folder_of_the_launcher(launch, head, tmp_path, monkeypatch):
    words = [
        *("seed=0,1,2,3", "trainer.max_steps=3", "data.limit=6", "hydra.launcher.pack=off"),
        *("hydra.launcher.executor=ray", f"hydra.launcher.address='{head}'"),
        *("hydra.launcher.num_gpus=0.5", "hydra.launcher.num_cpus=0.5"),
    ]
    with monkeypatch.context() as without:
        without.delenv("RAY_AUTH_MODE")
        assert launch(*words).wait(120) == 2
    assert "the cluster of Ray there asks for its token" in (tmp_path / "said").read_text()
    launcher = launch(*words)
    assert launcher.wait(240) == 0, (tmp_path / "said").read_text()
    stored = records(tmp_path / "s").values()
    assert [one["status"] for one in stored] == ["completed"] * 4
    logs = [path.read_text() for path in (tmp_path / "s" / "ray").glob("*.log")]
    assert sorted(text.partition("CUDA_VISIBLE_DEVICES=")[2][0] for text in logs) == ["0", "0", "1", "1"]
    print(*(tmp_path / "said").read_text().splitlines()[-6:], sep="\n")


@pytest.mark.slow
@needs_ray
def test_ctrl_c_cancels_the_tasks_which_write_where_they_stand(launch, tmp_path):
    launcher = launch("seed=0,1", "trainer.max_steps=100000", "hydra.launcher.executor=ray")
    until(lambda: steps(tmp_path / "s") > 5)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(120) == 130, (tmp_path / "said").read_text()
    assert {one["status"] for one in records(tmp_path / "s").values()} == {"interrupted"}
    assert len(list((tmp_path / "s").glob("*/checkpoints/last.pt"))) == 2
