"""A sweep of real processes is killed, or told to stop: nothing that is finished is lost or made again, what is left is
told at any moment, and the same numbers come out as without a kill.
"""

import json
import os
import random
import shlex
import signal
import time

import pytest
from processes import WATCHED, call, check_equal, check_repeated, end, record_of, start, until

from loralab.records import record
from loralab.reporting import listing

pytestmark = pytest.mark.slow
EVERY = 5
TRIALS = ["adapter.r=2,4", "seed=0,1,2"]
PACKS = ["hydra/launcher=packed", "hydra.launcher.token_budget=110", "data.limit=6"]  # of two trials


@pytest.fixture
def words(tiny_arguments):
    kept = [word for word in tiny_arguments if not word.startswith(("trainer.max_steps", "adapter.r"))]
    return [*kept, *WATCHED, f"+callbacks.checkpoint.every_n_steps={EVERY}", "trainer.max_steps=60"]


@pytest.fixture
def sweep(words):
    """The words of a sweep into a folder."""
    return lambda folder, *more: ["train", "-m", *words, *PACKS, *TRIALS, *more, f"hydra.sweep.dir={folder}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{settings: the folder of the same sweep without a break}, run once."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def run(command):
        key = tuple(word for word in command if not word.startswith("hydra.sweep.dir"))
        if key not in made:
            made[key] = root / str(len(made))
            words = [word if word in key else f"hydra.sweep.dir={made[key]}" for word in command]
            assert call(words, root, output=root / "output") == 0, (root / "output").read_text()
        return made[key]

    return run


def finished(folder):
    """{trial: when its completed record was written}."""
    found = {}
    for path in folder.glob("*/result.json"):
        if json.loads(path.read_text())["status"] == "completed":
            found[path.parent.name] = path.stat().st_mtime_ns
    return found


def check_listing(root, folder, count):
    """``loralab ls`` tells what the records tell, and of a dead process no trial is running."""
    (entry,) = listing.listing(root)
    inside = listing.listing(folder)
    assert entry["trials"] == len(inside) == count
    assert entry["completed"] == len(finished(folder)) == sum(one["completed"] for one in inside)
    assert entry["completed"] + entry["failed"] + entry["missing"] + entry["running"] == count
    return entry


def steps_in(folder):
    return sum(path.read_text().count("\n") for path in folder.glob("*/steps.log"))


def more_than(folder, before, running, count):
    """Waits until there is more of what ``count`` counts, or the process has ended."""
    until(lambda: running.poll() is not None or count(folder) > before)


def check_same(ours, theirs):
    assert finished(ours).keys() == finished(theirs).keys()
    for trial in finished(theirs):
        check_equal(ours / trial, theirs / trial)
        check_repeated(ours / trial, EVERY)


def test_killed_at_random_times_until_it_is_done(sweep, whole, tmp_path):
    """The kill comes by a clock of its own, after some steps or while it starts; ls is asked before and after each."""
    draw, command, kills, kept = random.Random(1), sweep("runs/killed"), 0, {}
    folder, resume = tmp_path / "runs" / "killed", ["sweep", "--resume", "runs/killed"]
    for attempt in range(40):
        running = start(command, tmp_path, output=tmp_path / "output")
        if attempt % 3 != 1:  # else while it starts: before a pack, or a checkpoint, is written
            more_than(folder, steps_in(folder) + 2 * EVERY, running, steps_in)
        time.sleep(draw.uniform(0, 0.5))
        if running.poll() is None:
            check_listing(tmp_path / "runs", folder, 6)
        end(running)
        kills += running.wait() == -9
        entry = check_listing(tmp_path / "runs", folder, 6)
        assert entry["running"] == 0
        now = finished(folder)
        assert kept.items() <= now.items()  # what was finished is neither lost nor written again
        kept, command = now, resume
        if len(kept) == 6 and running.returncode == 0:
            break
    assert running.returncode == 0, (tmp_path / "output").read_text()
    assert kills >= 3
    assert "Traceback" not in (tmp_path / "output").read_text()
    check_same(folder, whole(sweep("")))


def pids(folder):
    return {record_of(path.parent)["pid"] for path in folder.glob("*/result.json")}


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def steps_of_each(folder, count):
    """Whether as many trials are under way."""
    return lambda: len([path for path in folder.glob("*/steps.log") if path.read_text().count("\n") >= 3]) >= count


def test_a_killed_process_of_a_device_costs_no_trial_and_a_killed_sweep_leaves_none_behind(sweep, whole, tmp_path):
    command, folder = sweep("s"), tmp_path / "s"
    running = start(command, tmp_path, output=tmp_path / "output", LORALAB_DEVICES="0,1")
    until(steps_of_each(folder, 4))
    victim = min(pids(folder))
    os.kill(victim, signal.SIGKILL)
    until(lambda: "ended with code -9" in (tmp_path / "output").read_text() or running.poll() is not None)
    if running.poll() is None:
        end(running)
    running.wait()
    until(lambda: not any(map(alive, pids(folder))), seconds=20)  # those of the killed sweep end by themselves
    assert not {record_of(path.parent)["status"] for path in folder.glob("*/result.json")} & {"failed"}
    entry = check_listing(tmp_path, folder, 6)
    assert entry["running"] == 0
    kept = finished(folder)
    assert call(command, tmp_path, output=tmp_path / "output", LORALAB_DEVICES="0,1") == 0
    assert kept.items() <= finished(folder).items()
    check_same(folder, whole(sweep("")))


def test_the_command_may_be_given_again_while_what_a_killed_sweep_has_left_still_ends(sweep, whole, tmp_path):
    command, folder = sweep("s"), tmp_path / "s"
    running = start(command, tmp_path, output=tmp_path / "output", LORALAB_DEVICES="0,1")
    until(steps_of_each(folder, 4))
    end(running)
    assert call(command, tmp_path, output=tmp_path / "output") == 0, (tmp_path / "output").read_text()
    check_same(folder, whole(sweep("")))


@pytest.mark.parametrize("devices", ["", "0,1"])
@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143)]
)
def test_a_sweep_that_is_told_to_stop_says_how_to_go_on(sweep, whole, tmp_path, signals, code, devices):
    """As by Ctrl-C on a terminal, which tells every process of the group."""
    command, folder = sweep("s"), tmp_path / "s"
    more = {"LORALAB_DEVICES": devices} if devices else {}
    running = start(command, tmp_path, output=tmp_path / "output", **more)
    until(steps_of_each(folder, 1))
    for number in signals:
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            end(running, number)
        time.sleep(0.05)
    assert running.wait(60) == code
    said = (tmp_path / "output").read_text()
    assert "Traceback" not in said
    entry = check_listing(tmp_path, folder, 6)
    assert entry["running"] == 0
    left = 6 - entry["completed"]
    assert said.rstrip().splitlines()[-1].endswith(f"; {left} trials are left: loralab sweep --resume s")
    kept = finished(folder)
    assert call(["sweep", "--resume", "s"], tmp_path, output=tmp_path / "output") == 0
    assert kept.items() <= finished(folder).items()
    check_same(folder, whole(sweep("")))


def test_a_process_told_to_stop_while_it_starts_says_so_without_a_traceback(sweep, tmp_path):
    for wait in (0.3, 1.0, 2.0, 3.0, 4.0):
        running = start(sweep("s"), tmp_path, output=tmp_path / "output", LORALAB_DEVICES="0,1")
        time.sleep(wait)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) in (130, -2)  # -2: before Python has begun with loralab
        assert "Traceback" not in (tmp_path / "output").read_text()


def test_one_run_that_is_told_to_stop_says_how_to_go_on(words, tmp_path):
    command = ["train", *words, "adapter.r=2"]
    running = start(command, tmp_path, output=tmp_path / "output")
    until(lambda: any(path.read_text().count("\n") >= 3 for path in tmp_path.glob("runs/train/*/steps.log")))
    end(running, signal.SIGTERM)
    assert running.wait(60) == 143
    last = (tmp_path / "output").read_text().rstrip().splitlines()[-1]
    assert "stopped by signal 15; it goes on from its checkpoint with: loralab train " in last
    again = shlex.split(last.partition(" with: loralab ")[2])
    assert call(again, tmp_path) == 0
    (folder,) = (tmp_path / "runs" / "train").iterdir()
    assert record_of(folder)["resumed_from"] >= 3
    assert call([*command, "hydra.run.dir=whole"], tmp_path) == 0
    check_equal(folder, tmp_path / "whole")
    check_repeated(folder, 1)


TUNED = ["+sweep.tune={optimizer.lr:[0.001,0.004,0.016]}", "+sweep.extend=1", "adapter.r=2,4", "seed=0,1"]
HALVED = [*TUNED[:1], "+sweep.extend=0", "+sweep.halving={rungs:[0.25,0.5]}", *TUNED[2:]]


@pytest.mark.parametrize("asked", [TUNED, HALVED], ids=["tuned", "halved"])
def test_a_search_killed_at_random_times_decides_what_it_would_have_decided(words, rows, tmp_path, asked):
    more = [f"data.test={rows['pairs', 'validation']}", "data.limit=null", "trainer.max_steps=24"]
    kept = [word for word in words if not word.startswith(("trainer.max_steps", "data.validation"))]
    kept += [f"data.validation={rows['pairs', 'train']}", "hydra/launcher=packed"]

    def command(folder):
        return ["train", "-m", *kept, *more, *asked, f"hydra.sweep.dir={folder}"]

    assert call(command("whole"), tmp_path, output=tmp_path / "output") == 0, (tmp_path / "output").read_text()
    draw, kills, folder = random.Random(len(asked)), 0, tmp_path / "again"
    for _ in range(30):
        running = start(command("again"), tmp_path, output=tmp_path / "output")
        more_than(folder, steps_in(folder), running, steps_in)
        time.sleep(draw.uniform(0, 1.0))
        end(running)
        kills += running.wait() == -9
        if running.returncode == 0:
            break
    assert running.returncode == 0, (tmp_path / "output").read_text()
    assert kills >= 3
    ours, theirs = record.read_sweep(folder), record.read_sweep(tmp_path / "whole")
    assert ours["decisions"] == theirs["decisions"]
    assert [(one["trial"], one["status"]) for one in ours["trials"]] == [
        (one["trial"], one["status"]) for one in theirs["trials"]
    ]
    for trial in finished(tmp_path / "whole"):
        check_equal(folder / trial, tmp_path / "whole" / trial)
