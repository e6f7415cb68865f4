"""What an executor's tasks leave: retried once where a process died, blamed rightly, closed once, never torn."""

import os
import signal
from collections import defaultdict

import pytest
from forked import Forked

from loralab.errors import ConfigError, Interrupted, OutOfMemory
from loralab.records import record
from loralab.records.lock import hold
from loralab.scheduling import executors, tasks
from loralab.scheduling.executors import End, Task
from loralab.scheduling.job import Job

SETTINGS = {"trainer": {}, "seed": 0, "metric": "val/loss"}


class Scripted:
    """An executor whose n-th task does what the n-th function says: it is given the task, and returns its End."""

    poll = 0.0

    def __init__(self, *acts):
        self.acts, self.started, self.stopped, self.ends, self.closed = list(acts), [], [], {}, 0

    def share(self, packs, weights):
        assert len(packs) == len(weights)
        return [Task(packs)]

    def retry(self, task, packs):
        return [Task([pack]) for pack in packs]

    def adopt(self, waiting):
        return []

    def start(self, tasks):
        for task in tasks:
            act = self.acts.pop(0)
            if isinstance(act, BaseException):
                raise act
            task.name, task.log, task.handle = f"task {len(self.started)}", "its.log", object()
            self.started.append([[job.trial for job in pack] for pack in task.packs])
            self.ends[task] = act(task)

    def over(self, tasks):
        return [(task, self.ends[task]) for task in tasks if self.ends[task] is not None]

    def stop(self, tasks, number):
        self.stopped.append(([task.name for task in tasks], number))

    def close(self):
        self.closed += 1


@pytest.fixture
def job(tmp_path):
    """A job whose record is written by hand."""

    def make(name, **changes):
        made = Job({**SETTINGS, **changes}, tmp_path / name, [f"adapter.r={name}"], {})
        made.trial = name
        return made

    return make


def leave(job, status, **fields):
    record.write(job.folder, {**record.blank(job.trial), "status": status, **fields})


def act(end, **statuses):
    """Leaves records of these trials and returns ``end``."""

    def acting(task):
        for job in [job for pack in task.packs for job in pack]:
            if job.trial in statuses:
                leave(job, statuses[job.trial])
        return end

    return acting


DIED, DONE = End("signal 9 ended it"), End("it ended with code 0")


@pytest.fixture
def run():
    """Runs packs; {trial: its final record}. Each is closed once."""

    def running(executor, *packs):
        closed, shown = defaultdict(list), []
        executors.run(
            executor,
            packs,
            [1] * len(packs),
            lambda job, stored: closed[job.trial].append(stored),
            lambda job, status: shown.append((job.trial, status)),
        )
        assert executor.closed == 1
        assert {len(records) for records in closed.values()} <= {1}
        executor.shown = shown
        return {trial: records[0] for trial, records in closed.items()}

    return running


def test_what_a_dead_process_ran_is_retried_alone_and_fails_with_the_reason_where_it_dies_again(job, run):
    a, b, c, d = map(job, "abcd")
    executor = Scripted(
        act(DIED, a="completed", b="running", c="running"),
        act(DIED, b="running"),
        act(DONE, c="completed"),
        act(DONE, d="completed"),
    )
    records = run(executor, [a], [b, c], [d])
    assert executor.started == [[["a"], ["b", "c"], ["d"]], [["b"]], [["c"]], [["d"]]]
    assert {trial: one["status"] for trial, one in records.items()} == {
        **{"a": "completed", "b": "failed"},
        **{"c": "completed", "d": "completed"},
    }
    assert (
        records["b"]["error"] == "its process died twice, at last as task 1: signal 9 ended it; what it said: its.log"
    )
    assert records["b"]["exit_code"] == 4
    assert record.read(b.folder) == records["b"]
    assert ("b", "running") in executor.shown
    assert ("b", "pending") in executor.shown


def test_a_process_that_dies_before_any_trial_begins_is_tried_twice(job, run):
    executor = Scripted(act(DIED), act(DIED), act(DIED))
    records = run(executor, [job("a"), job("b")])
    assert executor.started == [[["a", "b"]], [["a"]], [["b"]]]
    assert [one["status"] for one in records.values()] == ["failed", "failed"]


def test_the_second_death_may_be_for_want_of_memory(job, run):
    dies = End("Slurm ended it: out of memory", error=OutOfMemory)
    records = run(Scripted(act(dies, a="running"), act(dies, a="running")), [job("a")])
    assert (records["a"]["status"], records["a"]["exit_code"]) == ("out_of_memory", 6)


def test_a_preemption_is_no_death(job, run):
    preempted = End("it was preempted", "excused")
    interrupted = act(preempted, a="interrupted", b="interrupted")
    executor = Scripted(interrupted, interrupted, interrupted, act(DONE, a="completed", b="completed"))
    records = run(executor, [job("a"), job("b")])
    assert executor.started == [[["a", "b"]]] * 4
    assert {one["status"] for one in records.values()} == {"completed"}


def test_what_goes_on_does_not_begin_anew(job, run):
    fresh, untouched = job("a"), job("b")
    fresh.fresh = untouched.fresh = True
    run(Scripted(act(DIED, a="running"), act(DONE, a="completed"), act(DONE, b="completed")), [fresh], [untouched])
    assert (fresh.fresh, untouched.fresh) == (False, True)


def test_what_was_cancelled_stays_interrupted_and_is_not_run_again(job, run):
    a, b = job("a"), job("b")
    executor = Scripted(act(End("it was cancelled", "cancelled"), a="running"))
    records = run(executor, [a, b])
    assert {(one["status"], one["exit_code"]) for one in records.values()} == {("interrupted", 143)}
    assert record.read(b.folder)["error"] == "task 0: it was cancelled; what it said: its.log"


def test_a_task_that_is_out_of_time_has_failed_at_once(job, run):
    end = End("it has reached its time limit", "failed", ConfigError)
    records = run(Scripted(act(end, a="interrupted", b="completed")), [job("a"), job("b")])
    assert {trial: (one["status"], one.get("exit_code")) for trial, one in records.items()} == {
        "a": ("failed", 2),
        "b": ("completed", None),
    }
    assert "task 0: it has reached its time limit" in records["a"]["error"]


def test_an_old_record_is_not_taken_for_a_new_one(job, run):
    old = job("a")
    leave(old, "completed", seed=7)
    records = run(Scripted(act(DIED), act(DONE, a="completed")), [old])
    assert records["a"]["seed"] is None


def test_a_trial_of_which_another_process_holds_the_folder_is_not_overwritten(job, run):
    taken = job("a")
    holder = Forked(lambda: _hold(taken))
    try:
        while not (taken.folder / "held").exists():
            assert holder.poll() is None
        records = run(Scripted(act(DONE), act(DONE)), [taken])
        assert "is in use by process" in records["a"]["error"]
        assert record.read(taken.folder)["status"] == "running"
    finally:
        holder.kill()
        holder.wait()


def _hold(job):
    with hold(job.folder):
        leave(job, "running")
        (job.folder / "held").touch()
        signal.pause()


def test_an_interruption_stops_the_tasks_by_its_signal_and_leaves_no_record_that_runs(job):
    class Interrupting(Scripted):
        def over(self, tasks):
            raise Interrupted(signal.SIGINT)

    a, b = job("a"), job("b")
    executor = Interrupting(act(None, a="running", b="completed"))
    with pytest.raises(Interrupted):
        executors.run(executor, [[a, b]], [1], lambda *_: None, lambda *_: None)
    assert executor.stopped == [(["task 0"], signal.SIGINT)]
    assert executor.closed == 1
    assert record.read(a.folder)["status"] == "interrupted"


def test_a_retry_that_cannot_be_submitted_fails_its_trials_alone(job, run):
    executor = Scripted(act(DIED, a="running", b="completed"), ConfigError("the queue is closed"))
    records = run(executor, [job("a"), job("b")])
    assert (records["a"]["status"], records["a"]["error"]) == ("failed", "the queue is closed")
    assert records["b"]["status"] == "completed"


def test_a_paused_trial_is_over_and_one_that_was_stopped_on_its_way_there_is_not(job):
    pausing = job("a", trainer={"until": 0.5})
    stored = {**record.blank("a"), "status": "interrupted"}
    assert not tasks.is_over(pausing, {**stored, "pauses": [{"until": 0.25, "metrics": {}}]})
    assert tasks.is_over(pausing, {**stored, "pauses": [{"until": 0.5, "metrics": {}}]})
    assert not tasks.is_over(job("b"), stored)


def test_a_task_that_starts_again_runs_what_is_not_over_and_does_not_begin_it_anew(job):
    jobs = a, b, c = [job(name) for name in "abc"]
    for one in jobs:
        one.fresh = True
    before = {"a": 0, "b": 0, "c": 0}
    leave(a, "completed")
    leave(b, "interrupted")
    assert tasks.left([[a, b], [c]], before) == [[b], [c]]
    assert (b.fresh, c.fresh) == (False, True)
    leave(b, "failed")
    os.utime(c.folder.parent)
    assert tasks.left([[a, b]], before) == []
