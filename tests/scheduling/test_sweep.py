"""A sweep loses nothing: one failure stops no other trial, and what is finished is never run again."""

import json
import signal
import time

import pytest
from forked import Forked

from loralab.cli import hydra_run, main
from loralab.cli.sweep import resumed, sweep_arguments
from loralab.config.build import trial_id
from loralab.config.compose import compose
from loralab.records import record
from loralab.records.lock import hold
from loralab.scheduling.sweep_file import swept_axes
from loralab.training.module import FineTuner

FAST = ["hydra/launcher=packed", "data.limit=6"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a swéep with a space"


@pytest.fixture
def sweep(tiny_arguments, folder, monkeypatch, tmp_path):
    """Runs ``train -m`` or its likes in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*words, flags=()):
        return main.run(["train", "-m", *flags, *tiny_arguments, *FAST, f"hydra.sweep.dir='{folder}'", *words])

    return run


def statuses(folder):
    return [trial["status"] for trial in record.read_sweep(folder)["trials"]]


def times(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}


@pytest.mark.usefixtures("_no_output")
def test_a_failing_trial_stops_no_other_and_gives_the_exit_code(sweep, folder):
    assert sweep("adapter.target_modules=[q_proj],[nope],[v_proj]") == 2
    assert statuses(folder) == ["completed", "failed", "completed"]
    failed = next(r for r in map(record.read, record.find(folder)) if r["status"] == "failed")
    assert "'nope' matches no linear layer" in failed["error"]
    assert (folder / "report" / "index.html").is_file()


@pytest.fixture
def _no_output(capsys):
    """Keeps the sweeps' tables out of the test report."""
    yield
    capsys.readouterr()


def test_a_second_call_skips_what_is_finished_and_reruns_what_failed(sweep, folder):
    sweep("adapter.r=0,2,4")
    before = times(folder)
    left = folder / next(name for name in before if record.read(folder / name)["status"] == "completed") / "checkpoints"
    left.mkdir()  # by a process that was killed once it had written the record
    for name in ("last.pt", "previous.pt", ".last.pt.7"):
        (left / name).touch()
    assert sweep("adapter.r=0,2,4") == 2
    assert not left.exists()
    after = times(folder)
    kept = {name for name in before if before[name] == after[name]}
    assert len(kept) == 2
    assert all(record.read(folder / name)["status"] == "completed" for name in kept)


def test_fresh_reruns_everything(sweep, folder):
    sweep("adapter.r=2,4")
    before = times(folder)
    assert sweep("adapter.r=2,4", flags=["--fresh"]) == 0
    assert all(times(folder)[name] > before[name] for name in before)


def test_resume_finishes_a_folder_by_its_name_alone(sweep, folder):
    sweep("adapter.r=2,4")
    gone = next(iter(times(folder)))
    (folder / gone / "result.json").unlink()
    kept = next(name for name in times(folder) if name != gone)
    before = times(folder)[kept]
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    assert record.read(folder / gone)["status"] == "completed"
    assert times(folder)[kept] == before


@pytest.mark.usefixtures("_no_output")
def test_its_failures_alone_run_again_and_what_was_never_begun_stays_so(sweep, folder, capsys):
    assert sweep("adapter.target_modules=[q_proj],[nope],[v_proj]") == 2
    first, failed, last = (folder / trial["folder"] for trial in record.read_sweep(folder)["trials"])
    (last / "result.json").unlink()
    before = times(folder)
    assert main.run(["sweep", "--resume", str(folder), "--failed"]) == 2
    assert not (last / "result.json").exists()
    assert times(folder)[first.name] == before[first.name]
    assert times(folder)[failed.name] > before[failed.name]
    assert "1 trials have failed and run again; 1 others are not finished and stay so" in capsys.readouterr().err
    assert main.run(["sweep", "--resume", str(folder)]) == 2
    assert record.read(last)["status"] == "completed"


def test_failures_alone_are_of_a_begun_sweep(capsys):
    assert main.run(["sweep", "rank", "--failed"]) == 2
    assert "--failed runs the failures of a begun sweep again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.max_steps=3", "trainer.max_steps=2 and trainer.max_steps=3 contradict each other"),
        ("seed=1", "seed=1 would make other trials of those that --resume finishes; valid: "),
        ("hydra.sweep.dir=elsewhere", "--resume names the sweep and its folder, and hydra.sweep.dir=elsewhere another"),
    ],
)
def test_resume_takes_no_word_that_asks_something_else(sweep, folder, capsys, word, message):
    folder.mkdir()
    record.write_sweep(folder, {"overrides": ["adapter.r=2,4", "trainer.max_steps=2"]})
    assert main.run(["sweep", "--resume", str(folder), word]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_no_output")
def test_resume_keeps_the_order_of_trials_of_which_the_first_has_no_record(sweep, folder):
    """The first value of an axis is the baseline of its rows."""
    sweep("adapter.r=2,4")
    before = record.read_sweep(folder)
    (folder / before["trials"][0]["trial"] / "result.json").unlink()
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    assert record.read_sweep(folder)["axes"] == before["axes"] == {"adapter.r": ["2", "4"]}


@pytest.mark.usefixtures("_no_output")
def test_values_of_axes_beside_resume_add_trials_to_those_that_it_finishes(sweep, folder, capsys):
    """Each call leaves a trial open; the last --resume, by the folder alone, finishes those of all three."""
    sweep("adapter.r=2,4")

    def forget(count):
        for name in sorted(times(folder))[:count]:
            (folder / name / "result.json").unlink()

    forget(1)
    assert main.run(["sweep", "--resume", str(folder), "adapter.r=6,8", "--failed"]) == 2
    assert "--failed runs nothing but failures again, and adapter.r=6,8 adds trials" in capsys.readouterr().err
    assert main.run(["sweep", "--resume", str(folder), "adapter.r=6,8", "plan.record=false"]) == 0
    assert statuses(folder) == ["completed"] * 4
    sweep("adapter.r=2,4", "seed=0,1")
    assert statuses(folder) == ["completed"] * 6
    before = times(folder)
    forget(5)
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    stored = record.read_sweep(folder)
    assert {one["trial"] for one in stored["trials"] if one["status"] == "completed"} == before.keys()
    assert stored["axes"] == {"adapter.r": ["2", "4", "6", "8"], "seed": ["0", "1"]}
    asked = [[word for word in call["overrides"] if "=" in word and "," in word] for call in stored["calls"]]
    assert asked == [["adapter.r=2,4"], ["adapter.r=6,8"], ["adapter.r=2,4", "seed=0,1"]]
    assert main.run(["sweep", "--resume", str(folder), "logger=none", "adapter.r=2,4"]) == 0  # says nothing new
    again = record.read_sweep(folder)["calls"]
    assert [sorted(call["overrides"]) for call in again] == [sorted(call["overrides"]) for call in stored["calls"]]


def test_resume_takes_words_of_how_it_runs_in_place_of_those_before():
    begun = ["adapter.r=2,4", "logger=none", "trainer.max_steps=2"]
    words = ["logger=wandb", "hydra.launcher.pack=off", "trainer.test=true", "adapter.r=2,4"]
    assert resumed(begun, words) == ["trainer.max_steps=2", *words]


def test_what_a_sweep_was_begun_with_beyond_its_file_needs_no_plus_beside_resume():
    begun = ["rank", "+sweep.halving=true", "++logger.project=p"]
    words = ["sweep.halving=false", "logger.project=q", "+plan.x=1"]
    assert resumed(begun, words) == ["rank", "++sweep.halving=false", "++logger.project=q", "+plan.x=1"]
    assert resumed(begun, ["~sweep.halving"])[-1] == "~sweep.halving"
    assert resumed(["rank"], ["sweep.halving=true"]) == ["rank", "++sweep.halving=true"]


@pytest.mark.parametrize(("tune", "asked"), [({"optimizer.lr": [1, 2]}, "seed=0,1,4,5"), (None, "seed=4,5")])
def test_seeds_beside_resume_are_asked_for_with_those_begun_where_rates_are_chosen_by_them(
    tmp_path, monkeypatch, tune, asked
):
    """A seed alone would have rates of its own."""
    ran = []
    monkeypatch.setattr(hydra_run, "run", lambda arguments, words, **_: ran.append(words) or 0)
    begun = {"overrides": ["+sweeps=rank", "seed=range(0,2)", "adapter.r=2,4"], "trials": [], "tune": tune}
    record.write_sweep(tmp_path, begun)
    assert main.run(["sweep", "--resume", str(tmp_path), "seed=4,5"]) == 0
    assert [next(word for word in words if word.startswith("seed=")) for words in ran] == ["seed=range(0,2)", asked]


def test_what_two_calls_say_differently_of_how_a_sweep_goes_is_no_axis():
    calls = [[f"adapter.r={r}", "logger=none", "++sweep.halving=true", "+sweep.budget=3"] for r in (2, 4)]
    calls += [["adapter.r=8", "logger=wandb", "logger.mode=offline", "++sweep.halving=false", "+sweep.budget=5"]]
    assert swept_axes(calls) == {"adapter.r": ["2", "4", "8"], "sweep.budget": ["3", "5"]}
    assert swept_axes([["adapter.r=2", "logger=none"]]) == {"adapter.r": ["2"]}


def test_how_a_sweep_goes_is_set_without_a_plus_whatever_its_file_has():
    words = sweep_arguments("rank", ["sweep.halving=true", "sweep.tune={optimizer.lr:[1,2]}", "+sweep.extend=3"])
    assert words[-3:] == ["++sweep.halving=true", "++sweep.tune={optimizer.lr:[1,2]}", "+sweep.extend=3"]
    assert sweep_arguments("rank", ["sweep.halvin=true"])[-1] == "sweep.halvin=true"  # which Hydra refuses


@pytest.mark.usefixtures("_no_output")
def test_a_sweep_resumed_from_another_folder_reads_the_files_it_began_with(sweep, folder, rows, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for place, split in ((home, "train"), (elsewhere, "validation")):
        place.mkdir()
        (place / "rows.jsonl").write_bytes(rows["pairs", split].read_bytes())
    real = monkeypatch.chdir
    real(home)
    assert sweep("seed=0,1", "data.train=rows.jsonl") == 0
    first, second = sorted(times(folder))
    before = record.read(folder / first)["data"]["fingerprint"]
    (folder / first / "result.json").unlink()
    real(elsewhere)
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    assert record.read(folder / first)["data"]["fingerprint"] == before
    assert not (folder / second / "result.stale.json").exists()


@pytest.mark.usefixtures("_no_output")
def test_an_arm_that_cannot_run_stops_no_other_where_the_pack_is_foreseen(sweep, folder):
    arms = "adapter.target_modules=all-linear,[q_proj],[nope]"
    assert sweep(arms, "plan.record=true") == 2
    assert statuses(folder) == ["completed", "completed", "failed"]


def test_a_call_with_fewer_seeds_hides_no_finished_trial(sweep, folder):
    sweep("seed=0,1", "adapter.r=2,4")
    everything = {trial["trial"] for trial in record.read_sweep(folder)["trials"]}
    before = times(folder)
    assert sweep("seed=0", "adapter.r=2,8") == 0
    listed = record.read_sweep(folder)
    assert everything < {trial["trial"] for trial in listed["trials"]}
    assert listed["axes"] == {"seed": ["0", "1"], "adapter.r": ["2", "4", "8"]}
    assert all(times(folder)[name] == before[name] for name in before)


def test_a_second_sweep_is_kept_out_of_a_folder_in_use(sweep, folder, capsys):
    with hold(folder):
        assert sweep("adapter.r=2,4") == 4
    assert "is in use by process" in capsys.readouterr().err
    assert not record.find(folder)


def test_trials_that_would_share_a_folder_are_refused(sweep, folder, capsys):
    assert sweep("adapter.r=2,4", "hydra.sweep.subdir=x") == 2
    assert "hydra.sweep.subdir gives several trials one folder" in capsys.readouterr().err


def test_a_trial_named_twice_runs_once(sweep, folder):
    assert sweep("adapter.r=2,2", "seed=0,0") == 0
    assert len(record.read_sweep(folder)["trials"]) == len(record.find(folder)) == 1


def test_changed_data_files_are_noticed(sweep, folder, rows, tmp_path):
    copy = tmp_path / "train.jsonl"
    copy.write_bytes(rows["pairs", "train"].read_bytes())
    words = ["seed=0,1", f"data.train={copy}"]
    sweep(*words)
    before = times(folder)
    sweep(*words)
    assert times(folder) == before
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join(reversed(lines)))
    assert sweep(*words) == 0
    assert all(times(folder)[name] > before[name] for name in before)


def test_a_trial_in_bf16_changes_nothing_for_the_next_on_the_same_base(sweep, folder, tiny_arguments, tmp_path):
    sweep("trainer.precision=bf16-true,32-true")
    after = next(r for r in map(record.read, record.find(folder)) if r["config"]["trainer"]["precision"] == "32-true")
    alone = [*tiny_arguments, "data.limit=6", "trainer.precision=32-true", f"hydra.run.dir={tmp_path / 'alone'}"]
    assert main.run(["train", *alone]) == 0
    assert record.read(tmp_path / "alone")["metrics"] == after["metrics"]


def test_a_finished_run_is_not_overwritten(tiny_arguments, tmp_path, capsys):
    words = ["train", *tiny_arguments, f"hydra.run.dir={tmp_path / 'run'}"]
    assert main.run(words) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.suffix != ".log"}
    for other in (["adapter.r=3"], ["adapter.r=0"], ["data.train=missing.jsonl"]):
        assert main.run([*words, *other]) in (2, 4)
    assert main.run(words) == 0
    assert "finished before" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert main.run([*words, "adapter.r=3", "--fresh"]) == 0
    assert record.read(tmp_path / "run")["config"]["adapter"]["r"] == 3


def test_resume_of_a_folder_without_a_sweep_is_refused(tmp_path, capsys):
    assert main.run(["sweep", "--resume", str(tmp_path)]) == 4
    assert "sweep.json" in capsys.readouterr().err


@pytest.fixture
def start(tiny_arguments, folder, tmp_path):
    """Starts a sweep in a process of its own, which no test leaves behind; its messages are in tmp_path/stderr."""
    words = ["train", "-m", *tiny_arguments, f"hydra.sweep.dir='{folder}'"]
    started = []

    def run(*more):
        started.append(Forked(lambda: main.run([*words, *more]), cwd=tmp_path, stderr=tmp_path / "stderr"))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except Exception:
            pass
        time.sleep(0.05)
    pytest.fail("waited in vain")


def running_one(folder):
    """One trial is complete and another under way."""
    states = [record.read(found)["status"] for found in record.find(folder)]
    return "completed" in states and "running" in states


def test_after_kill_9_the_same_command_finishes_the_rest(start, sweep, folder, monkeypatch):
    words, real = ["seed=0,1,2", "hydra.launcher.pack=off"], FineTuner.training_step

    def first_trials_only(*given):
        while any(record.read(found)["status"] == "completed" for found in record.find(folder)):
            time.sleep(0.05)
        return real(*given)

    monkeypatch.setattr(FineTuner, "training_step", first_trials_only)
    killed = start(*FAST, *words)
    monkeypatch.setattr(FineTuner, "training_step", real)
    until(lambda: running_one(folder))
    assert len(statuses(folder)) == 3  # listed before they run
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before = times(folder)
    (done,) = {f.name for f in record.find(folder) if record.read(f)["status"] == "completed"}
    assert sweep(*words) == 0
    assert statuses(folder) == ["completed"] * 3
    after = times(folder)
    assert [name for name in before if after[name] == before[name]] == [done]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_sweep_with_its_code_and_keeps_what_is_done(start, folder, tmp_path, number, code):
    running = start("trainer.max_steps=2,100000", *FAST)
    until(lambda: running_one(folder))
    time.sleep(0.5)
    running.send_signal(number)
    assert running.wait() == code
    assert "1 trials are left: loralab sweep --resume" in (tmp_path / "stderr").read_text()
    assert statuses(folder) == ["completed", "interrupted"]
    states = [record.read(found)["status"] for found in record.find(folder)]
    assert sorted(states) == ["completed", "interrupted"]


def test_a_trial_has_the_same_id_alone_in_a_sweep_and_in_another_folder(sweep, folder, tiny_arguments, tmp_path):
    sweep("adapter.r=2,4")
    alone = [*tiny_arguments, "data.limit=6", "adapter.r=4"]
    assert main.run(["train", *alone, f"hydra.run.dir={tmp_path / 'alone'}"]) == 0
    known = {trial["trial"] for trial in record.read_sweep(folder)["trials"]}
    assert record.read(tmp_path / "alone")["trial"] in known
    assert trial_id(compose(alone)) in known


def test_the_folder_of_a_run_is_exactly_the_one_named(tiny_arguments, tmp_path):
    target = tmp_path / "här" / "my run"
    assert main.run(["train", *tiny_arguments, f"hydra.run.dir='{target}'"]) == 0
    names = {path.name for path in target.iterdir()}
    assert {"result.json", "metrics.jsonl", "config.yaml", "train.log", "adapter"} <= names
    assert {path.name for path in (target / "adapter").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_spec.json")
    }
    assert json.loads((target / "result.json").read_text())["status"] == "completed"


@pytest.mark.usefixtures("_no_output")
def test_a_resumed_sweep_has_the_launcher_settings_and_the_search_path_it_began_with(
    tiny_arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    text = "_target_: loralab.adapters.lora.LoRA\nr: 3\nlora_alpha: 6\n"
    (tmp_path / "mine" / "adapter" / "small.yaml").write_text(text)
    words = ["train", "-m", "--config-dir", "mine", *tiny_arguments, "logger=none", "adapter=small", "seed=0,1"]
    assert main.run([*words, "hydra.launcher.pack=off", "hydra.sweep.dir=s"]) == 0
    begun = record.read_sweep(tmp_path / "s")
    for folder in record.find(tmp_path / "s"):
        (folder / "result.json").unlink()
    assert main.run(["sweep", "--resume", "s"]) == 0
    records = [record.read(folder) for folder in record.find(tmp_path / "s")]
    assert [stored["pack"]["size"] for stored in records] == [1, 1]
    assert {stored["choices"]["adapter"] for stored in records} == {"small"}
    resumed_once = record.read_sweep(tmp_path / "s")
    assert [resumed_once[key] for key in ("overrides", "hydra_overrides", "flags")] == [
        begun[key] for key in ("overrides", "hydra_overrides", "flags")
    ]
