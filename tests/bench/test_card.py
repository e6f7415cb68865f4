"""The measurements for a card, as far as a machine without one can go."""

import json
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

from loralab import reporting
from loralab.bench import ours, processes
from loralab.bench.card import __main__ as command
from loralab.bench.card import constants, paging, session, shapes, speed, stages
from loralab.bench.card.session import CardSession, Case, Skipped
from loralab.bench.measurements import Clock
from loralab.bench.processes import Late, ProcessError
from loralab.config import compose
from loralab.config.build import trial_spec
from loralab.planning import plan
from loralab.reporting import card, card_figures
from loralab.training.cursor import DataCursor

NAMES = ["machine", "tests", "speed", "plan", "paged", "resume", "halving", "workers"]
ROOT = Path(__file__).resolve().parents[2]
STATUSES = {"ok", "failed", "timeout", "skipped"}


@pytest.fixture
def open_session(tmp_path):
    def make(rehearsal=True, seconds=60.0):
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        (tmp_path / "out").mkdir(exist_ok=True)
        return CardSession(tmp_path / "out", rehearsal, work, dict.fromkeys([*NAMES, "ballast"], seconds))

    return make


@pytest.fixture
def read(tmp_path):
    return lambda: json.loads((tmp_path / "out" / "gpu.json").read_text())


@pytest.fixture
def open_short(open_session, monkeypatch, tmp_path):
    """A session whose processes may find the engines below, and end early."""
    monkeypatch.setattr(session, "FEWEST_S", 0.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "engines.py").write_text(ENGINES)

    def make(seconds=60.0):
        made = open_session(seconds=seconds)
        made.deadline = time.monotonic() + seconds
        return made

    return make


ENGINES = """
import os, subprocess, sys, time
from pathlib import Path

class Dies:
    answered = 0

    def __init__(self, setup):
        print("what is printed is no answer")

    def answer(self, request):
        self.answered += 1
        return {"x": self.answered} if self.answered == 1 else sys.exit("so it is")

class Sleeps(Dies):
    def answer(self, request):
        if self.answered:
            child = subprocess.Popen(["sleep", "60"])
            Path("pids.writing").write_text(f"{os.getpid()} {child.pid}")
            Path("pids.writing").replace("pids")
            time.sleep(60)
        self.answered += 1
        return {"x": self.answered}

class Unfit(Dies):
    def answer(self, request):
        from loralab.errors import ConfigError
        self.answered += 1
        if self.answered == 1:
            raise ConfigError("quantization: bitsandbytes cannot be imported (it has no binary)")
        return {"x": self.answered}

class Refuses(Dies):
    def answer(self, request):
        self.answered += 1
        return {"error": "not I"} if self.answered == 1 else {"x": self.answered}
"""


def runs(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().split()[2] != "Z"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def valid(found):
    """What everyone who reads gpu.json may rely on."""
    assert type(found["rehearsal"]) is bool
    assert type(found["stages"]) is dict
    for told in found["stages"].values():
        assert told["status"] in STATUSES
        assert type(told["seconds"]) is float
        assert (told["error"] is None) == (told["status"] == "ok")
    return found["stages"]


def test_without_a_card_it_says_so_and_measures_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert "REHEARSE=1" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interpreter_without_the_libraries_is_told_which(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in ("hydra", "bitsandbytes") else object())
    assert command.main(["--rehearse"]) == 2
    assert "has no hydra, bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ([], "loralab.bench.card"),
        (["REHEARSE=1"], "loralab.bench.card --rehearse"),
        (["REHEARSE=0"], "loralab.bench.card"),
        (["BALLAST=1"], "loralab.bench.card --ballast"),
        (["ARGS=--ballast"], "loralab.bench.card --ballast"),
    ],
)
def test_make_passes_on_what_is_asked(words, flags):
    # a make inside a make says which folder it enters
    make = ["make", "-n", "--no-print-directory", "gpu", "PYTHON=/usr/bin/python9", *words]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " ".join(said.split()).endswith(f"/usr/bin/python9 -m {flags}")
    assert ".venv" not in said


def test_speed_comes_before_paging_and_the_ballast_last_and_only_on_request():
    assert list(command.stages(ballast=False)) == NAMES
    assert list(command.stages(ballast=True)) == [*NAMES, "ballast"]


def test_all_stages_end_within_nine_minutes_and_a_rehearsal_within_ten():
    for rehearsal, minutes in ((False, 9), (True, 10)):
        for ballast in (False, True):
            shares = command.budgets(list(command.stages(ballast)), command.MOST_S[rehearsal])
            assert sum(shares.values()) + processes.KILLED_S <= 60 * minutes
            assert min(shares.values()) > session.FEWEST_S


def test_a_session_of_stubs_writes_what_readers_rely_on(monkeypatch, tmp_path, read):
    def broken(session, told):
        told["half"] = 1
        raise ValueError("<broken>")

    def late(session, told):
        raise Late("3 s were left")

    def missing(session, told):
        raise Skipped("pytest is not installed")

    def short(session, told):
        valid(read())
        told["runs"] = [{"model": "m", "quantization": "none", "case": "", "predicted_over_measured": 1.02}]

    work = {"machine": broken, "tests": missing, "plan": short, "paged": late}
    monkeypatch.setattr(command, "stages", lambda ballast: work)
    assert command.measure(tmp_path / "out", True, False) == 1
    told = valid(read())
    assert [told[name]["status"] for name in work] == ["failed", "skipped", "ok", "timeout"]
    assert (told["machine"]["half"], told["machine"]["error"]) == (1, "ValueError: <broken>")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;broken&gt;" in page
    assert "<broken>" not in page
    assert "<svg" in page
    monkeypatch.setattr(command, "stages", lambda ballast: {"plan": short})
    assert command.measure(tmp_path / "out", False, False) == 0
    assert read()["rehearsal"] is False


def test_the_page_has_the_charts_of_speed_and_memory_and_crosses_what_died():
    side = {"step_s": 0.1, "tokens_per_s": 100.0, "over_peft": 2.0, "over_alone": 1.0}
    base = {"model": "llama 1B", "quantization": "nf4_double", "length": 128, "rows": 1, "notes": []}
    sides = [{**side, "name": "loralab", "trials": k, "over_peft": 2.0 * k} for k in (1, 4)]
    sides += [{**side, "name": "PEFT + HF Trainer", "trials": 1, "over_peft": 1.0}]
    sides += [{"name": "loralab", "trials": 64, "skipped": "too little"}]
    (figure,) = card_figures.speed([{**base, "sides": sides}])
    rows = figure.spec["datasets"]["rows"]
    assert [(row["group"], row["trials"], row["value"]) for row in rows] == [
        ("loralab, nf4_double", 1, 2.0),
        ("loralab, nf4_double", 4, 8.0),
        ("PEFT + HF Trainer, nf4_double", 1, 1.0),
    ]
    assert list(card_figures.speed([{**base, "sides": sides[3:]}])) == []
    (alone,) = card_figures.speed([{**base, "sides": [{**sides[0], "over_peft": None}]}])
    assert "times those of one trial a pass" in json.dumps(alone.spec)
    resident = [None, 0.5, 0.25]
    series = {"step": [1, 2, 3], "peak_gib": [1.0, 2.0, 3.0], "managed_resident_gib": resident}
    arms = [
        {"room": "cap", "optimizer": "paged_adamw", "status": "completed", "device": "cuda", "series": series},
        {"room": "cap", "optimizer": "adamw_32bit", "status": "out_of_memory", "device": "cuda", "series": series},
        {"room": "cap", "optimizer": "adamw_8bit", "status": "failed", "error": "it left no record"},
    ]
    (figure,) = card_figures.memory(arms)
    made = figure.spec["datasets"]
    assert [row["value"] for row in made["lines"]][:3] == [1.0, 2.5, 3.25]
    assert [(end["group"], end["step"]) for end in made["ends"]] == [("adamw_32bit", 3)]
    assert "allocator's peak" in figure.caption
    (figure,) = card_figures.memory([{**arm, "device": "cpu"} for arm in arms])
    assert "resident set" in figure.caption


@pytest.mark.parametrize("rehearsal", [True, False])
def test_each_stage_and_chart_of_a_rehearsal_says_so(rehearsal):
    run = {"model": "tiny llama", "quantization": "none", "case": "", "predicted_over_measured": 1.0}
    stages = {"plan": {"status": "ok", "seconds": 1.0, "runs": [run]}, "workers": {"status": "ok", "seconds": 1.0}}
    page = card.page({"rehearsal": rehearsal, "stages": stages})
    marks = page.count("rehearsal on a CPU with tiny shapes")
    assert marks == (4 if rehearsal else 0)  # the page's title, two stages, a chart


def test_a_measurement_names_the_commit_of_the_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants.subprocess, "check_output", lambda *a, **k: '{"checks": []}')
    found = constants.Constants({}).answer({"used_before": None})["environment"]["git"]
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert (found or "").removesuffix("-dirty") == done.stdout.strip()


def test_without_what_draws_the_page_the_measurements_are_kept(monkeypatch, tmp_path, read):
    monkeypatch.delattr(reporting, "card", raising=False)
    monkeypatch.setitem(sys.modules, "loralab.reporting.card", None)  # its import fails
    monkeypatch.setattr(command, "stages", lambda ballast: {"machine": lambda session, told: told.update(gpus=0)})
    assert command.measure(tmp_path / "out", True, False) == 0
    assert read()["stages"]["machine"]["gpus"] == 0
    assert not (tmp_path / "out" / "index.html").exists()


def test_a_stage_that_is_under_way_is_not_ok_on_disk(open_session, read):
    made = open_session()
    made.stage("machine", lambda session, told: session.save())
    made.stage("tests", lambda session, told: told.update(seen=read()["stages"]["tests"]["status"]))
    told = read()["stages"]["tests"]
    assert (told["status"], told["seen"]) == ("ok", "failed")


def test_an_answer_comes_when_it_is_asked_for_and_a_death_is_told_to_every_later_request(open_short):
    with open_short().worker("engines.Dies") as worker:
        worker.wait_until_ready()
        assert worker.ask({"n": 1})["x"] == 1
        for _ in range(2):
            with pytest.raises(ProcessError, match="exit code 1: what is printed is no answer\nso it is") as raised:
                worker.ask({"n": 2})
            assert raised.value.code == 1


def test_what_loralab_says_of_a_machine_is_a_paragraph_without_a_traceback_and_ends_no_process(open_short):
    with open_short().worker("engines.Unfit") as worker:
        with pytest.raises(ProcessError) as raised:
            worker.ask({"n": 1})
        assert str(raised.value) == "engines.Unfit: quantization: bitsandbytes cannot be imported (it has no binary)"
        assert worker.ask({"n": 2})["x"] == 2


def test_an_error_that_is_answered_ends_no_process(open_short):
    with open_short().worker("engines.Refuses") as worker:
        with pytest.raises(ProcessError, match="not I") as raised:
            worker.ask({"n": 1})
        assert raised.value.code is None
        assert worker.ask({"n": 2})["x"] == 2
        worker.finish()


def test_at_the_deadline_nothing_runs_on(open_short):
    made = open_short(seconds=1.5)
    begun = time.monotonic()
    with made.worker("engines.Sleeps") as worker:
        assert worker.ask({"n": 1})["x"] == 1
        with pytest.raises(Late, match="stopped in engines.Sleeps"):
            worker.ask({"n": 2})
    assert time.monotonic() - begun < 10
    time.sleep(0.2)
    assert not any(map(runs, (made.work / "pids").read_text().split()))  # the child of the killed process too


def test_a_process_that_would_have_too_little_time_is_not_started(open_session):
    made = open_session()
    made.deadline = time.monotonic() + session.FEWEST_S - 1
    with pytest.raises(Late, match="s were left"):
        made.worker("engines.Dies")


def test_tests_that_the_time_does_not_suffice_for_are_kept_as_far_as_they_came(open_session, monkeypatch, read):
    class Slow(Answering):
        def tail(self, characters):
            return "....s\n17 passed so far"

    def late(request):
        raise Late("stopped")

    made = open_session()
    monkeypatch.setattr(made, "worker", Slow(late))
    made.stage("tests", stages.tests)
    told = read()["stages"]["tests"]
    assert (told["status"], told["summary"]) == ("timeout", "17 passed so far")


def test_a_late_stage_keeps_its_figures_and_the_next_one_starts(open_short, read):
    def plan(made, told):
        told["runs"] = []
        with made.worker("engines.Sleeps") as worker:
            told["runs"].append({"name": worker.ask({"n": 1})["x"]})
            worker.ask({"n": 2})

    made = open_short(seconds=1.0)
    made.stage("plan", plan)
    made.stage("paged", lambda s, told: None)
    told = valid(read())
    assert (told["plan"]["status"], told["plan"]["runs"], told["paged"]["status"]) == ("timeout", [{"name": 1}], "ok")


def test_a_terminated_session_leaves_no_process_and_says_how_far_it_came(tmp_path):
    out, mark = tmp_path / "out", tmp_path / "pids"
    text = f"""
import sys
from loralab.bench.card import __main__ as command
def stage(session, told):
    waits = "import os, time; open({str(mark)!r}, 'w').write(f'{{os.getppid()}} {{os.getpid()}}'); time.sleep(60)"
    with session.worker("loralab.bench.worker.Python") as worker:
        worker.ask({{"words": ["-c", waits], "folder": {str(tmp_path)!r}}})
command.stages = lambda ballast: {{"machine": stage}}
sys.exit(command.main(["--rehearse"]))
"""
    process = subprocess.Popen([sys.executable, "-c", text], env={**os.environ, "OUT": str(out)})
    for _ in range(300):
        if mark.is_file() and mark.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert valid(json.loads((out / "gpu.json").read_text()))["machine"]["status"] == "failed"
    assert not any(map(runs, mark.read_text().split()))


def test_a_process_that_dies_takes_its_waiting_runs_along_and_says_why(open_short, monkeypatch, make_spec):
    from loralab.records import record
    from loralab.running.runner import Runner

    made = open_short()
    monkeypatch.setattr(session, "trainer", lambda made: made.worker("engines.Dies"))
    for number, status in ((0, "completed"), (1, "running")):
        name = f"plan{number}"
        (entry,) = Runner().run([make_spec(name, folder=made.work / name, max_steps=1)])
        record.write(made.work / f"plan{number}", {**entry, "status": status})
    told = []
    session.run_all(made, "plan", told, [Case({"run": str(i)}, []) for i in range(3)])
    assert [(one["run"], one["status"]) for one in told] == [("0", "completed"), ("1", "failed"), ("2", "failed")]
    assert all("exit code 1: what is printed is no answer\nso it is" in one["error"] for one in told[1:])


def test_at_most_three_files_are_left_and_none_of_an_earlier_session(open_session, tmp_path, make_spec):
    from loralab.running.runner import Runner

    made = open_session()
    for name in ("one", "two"):
        Runner().run([make_spec(name, max_steps=1)])
        found, rows = made.keep(tmp_path / name, "plan", name)
        assert (found["status"], rows[0]["step"]) == ("completed", 1)
        assert not (tmp_path / name).exists()
    made.stage("machine", lambda s, told: None)
    out = tmp_path / "out"
    assert names(out) == ["gpu.json", "index.html", "records.jsonl"]
    kept = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["name"], one["record"]["status"]) for one in kept] == [
        ("plan", "one", "completed"),
        ("plan", "two", "completed"),
    ]
    open_session()
    assert names(out) == []


def test_a_cap_leaves_half_of_the_state_beside_the_paged_peak():
    pilot = {"status": "completed", "paged_bytes": 2**30, "state_bytes": 2**30, "measured_peak_bytes": 4 * 2**30}
    found = [{"room": "roomy", "optimizer": "paged_adamw", **pilot}]
    for name, cap in (("adamw_32bit", "4.500"), ("paged_adamw", "4.500"), ("paged_adamw_8bit", "4.125")):
        assert paging.limit("cap", name, found) == [f"memory.cap={cap}"]
    assert paging.limit("roomy", "adamw_32bit", []) == []
    with pytest.raises(LookupError):
        paging.limit("cap", "paged_adamw", [])


def test_no_process_pages_twice_and_no_arm_has_a_ballast_unasked():
    for arms in (*paging.PROCESSES, *paging.BALLAST):
        paging_arms = [name for _, name in arms if name.startswith("paged")]
        assert len(paging_arms) <= 1
    assert all(room != "ballast" for arms in paging.PROCESSES for room, _ in arms)


@pytest.mark.parametrize(("free_mib", "runs"), [(8192, True), (4000, False)])
def test_a_ballast_needs_a_card_with_room_for_the_managed_memory(open_session, monkeypatch, free_mib, runs):
    made, asked = open_session(rehearsal=False), []
    monkeypatch.setattr(paging, "_arms", lambda *a, **k: asked.append(a))
    with pytest.raises(LookupError):
        paging.ballast(made, {})
    made.result["stages"] = {
        "machine": {"nvidia_smi": f"NVIDIA H100 80GB HBM3, 580.1, {free_mib + 3} MiB, 3 MiB"},
        "paged": {"arms": [{"paged_bytes": 0}, {"paged_bytes": 2**30}]},
    }
    if runs:
        paging.ballast(made, {})
    else:
        with pytest.raises(RuntimeError, match=r"1\.00 GiB of managed memory on a card with 3\.91 GiB free"):
            paging.ballast(made, {})
    assert bool(asked) == runs


def test_every_run_that_a_card_would_make_is_a_valid_configuration(open_session, monkeypatch):
    """A card's own words never run here: at least they are composed and checked as the command line does it."""
    made, words = open_session(rehearsal=False), []
    pilot = {"status": "completed", "error": None, "paged_bytes": 2**30, "state_bytes": 2**30}
    pilot.update(measured_peak_bytes=2**32, losses=[1.0], resumed_from=4, halved=[[8]], predicted_over_measured=1.0)
    monkeypatch.setattr(paging, "cannot_page", lambda: "")
    monkeypatch.setattr(session, "outcome", lambda *_: dict(pilot))

    class Noting:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, request):
            words.append(request["words"])
            if "kill_after" in request:
                raise ProcessError("it", -signal.SIGKILL, "")
            return {"seconds": 1.0}

    monkeypatch.setattr(made, "worker", Noting)
    card = "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 3 MiB"
    made.stage("machine", lambda session, told: told.update(nvidia_smi=card))
    for name in ("plan", "paged", "resume", "halving", "ballast"):
        made.stage(name, command.stages(ballast=True)[name])
        assert made.result["stages"][name]["status"] == "ok", made.result["stages"][name]["error"]
    assert len(words) == 10 + 6 + 3 + 1 + 2
    for one in words:
        spec = trial_spec(compose.compose(one), Path("nowhere"))
        assert (spec.trainer.accelerator, spec.trainer.precision) == ("gpu", "bf16-mixed")
        assert (spec.model.drawn_on, spec.model.dtype) == ("device", "bfloat16")
    caps = [word for one in words for word in one if word.startswith("memory.cap=")]
    assert caps == ["memory.cap=4.500", "memory.cap=4.500", "memory.cap=4.125", "memory.cap=4.125"]


def test_a_card_is_left_room_for_some_trials_of_a_pack_and_not_for_all(monkeypatch):
    asked = []

    def predict(specs, device):
        asked.append((len(specs), device, specs[0].model.max_length))
        return SimpleNamespace(predicted_peak_bytes=1000 * len(specs))

    monkeypatch.setattr(plan, "predict", predict)
    words = [*shapes.CPU.large.words("cpu"), "quantization=nf4_double"]
    engine = ours.Loralab({"device": "cpu", "folder": "nowhere", "words": words})
    specs = engine.specs({"trials": 8, "words": ["seed=0"]}, ours.StepTimes(None))
    assert ours.room(specs, 4) == plan.FRAGMENTATION * 6000
    assert asked == [(4, "cuda", 64), (8, "cuda", 64)]


def test_running_out_of_memory_is_a_result_only_where_it_is_asked():
    runs = [{"room": "cap", "optimizer": "adamw_32bit", "status": "out_of_memory", "error": "no room"}]
    session.check_ends(runs, paging.ENDS)
    with pytest.raises(RuntimeError, match="adamw_32bit: out_of_memory: no room"):
        session.check_ends(runs)


def test_speeds_are_compared_with_one_trial_a_pass_and_with_the_peer():
    sides = [
        {"name": "loralab", "trials": 1, "tokens_per_s": 100.0},
        {"name": "loralab", "trials": 16, "tokens_per_s": 800.0},
        {"name": "loralab", "trials": 64, "error": "out of memory"},
        {"name": "PEFT + HF Trainer", "trials": 1, "tokens_per_s": 50.0},
        {"name": "PEFT + Liger", "trials": 1, "tokens_per_s": 80.0},
    ]
    speed.compare({"sides": sides})
    assert [(one.get("over_alone"), one.get("over_peft"), one.get("over_liger")) for one in sides] == [
        (1.0, 2.0, 1.25),
        (8.0, 16.0, 10.0),
        (None, None, None),
        (0.5, 1.0, 0.625),
        (0.8, 1.6, 1.0),
    ]


def test_a_resumed_run_is_compared_step_by_step():
    def run(losses, **more):
        return {"losses": losses, "paged_bytes": 8, "resumed_from": None, **more}

    whole, told = run([2.0, 1.0]), {}
    stages.compare_resumed(told, run([2.0, 1.0], resumed_from=1), whole)
    assert (told["same_bits"], told["loss_difference"], told["resumed_from"]) == (True, 0.0, 1)
    stages.compare_resumed(told, run([2.0, 1.1], resumed_from=1), whole)
    assert (told["same_bits"], told["loss_difference"]) == (False, pytest.approx(0.1))
    for wrong, says in ((run([2.0, 1.0]), "began anew"), (run([2.0, 1.0], resumed_from=1, paged_bytes=0), "8 bytes")):
        with pytest.raises(RuntimeError, match=says):
            stages.compare_resumed({}, wrong, whole)


def test_a_run_is_killed_only_where_it_is_asked_for(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "kill", lambda *a: ended.append(a))
    trainer = SimpleNamespace(global_step=5)
    for kill_after in (None, 6):
        ours.StepTimes(Clock("cpu"), kill_after).on_train_batch_end(trainer)
    assert ended == []
    ours.StepTimes(Clock("cpu"), 5).on_train_batch_end(trainer)
    assert ended == [(os.getpid(), signal.SIGKILL)]


def test_rows_are_cut_to_one_length_but_for_the_ragged(tmp_path):
    shapes.write_rows(tmp_path)
    words = {
        name: [len(json.loads(line)["text"].split()) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("rows", "held_out", "ragged")
    }
    assert min(words["rows"] + words["held_out"]) > shapes.CARD.most_tokens == 1024
    assert words["ragged"][0] > max(shape.length for shape in shapes.CARD.plan)
    assert max(words["ragged"][1:]) < shapes.CPU.plan[0].length * 5


def test_what_a_card_is_measured_at_is_what_is_claimed_of_it():
    """1B at 128 and 512 tokens, NF4 and bf16, K = 1, 4, 16, 64; 7B in NF4."""
    found = [(one.quantization, [s.length for s in one.shapes], one.trials) for one in shapes.CARD.speed]
    assert found == [
        ("nf4_double", [128, 512], (1, 4, 16, 64)),
        ("none", [128, 512], (1, 4, 16, 64)),
        ("nf4_double", [512], (1, 4, 8)),
    ]
    assert all(shape.config is one.shapes[0].config for one in shapes.CARD.speed for shape in one.shapes)


class Answering:
    """A process in whose place ``answers`` are: by the name of its engine, of each request."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, engine, setup=None, **_):
        self.engine = engine
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, request):
        self.asked.append((self.engine, request))
        if path := request.get("rows_to"):
            Path(path).write_text("{}")
        return self.answer(request)


def test_peers_are_measured_on_the_rows_of_loralab_and_liger_last(open_session, monkeypatch):
    def answer(request):
        return {
            **{"losses": [2.0, 1.0], "steps": [0.5] * 5, "seconds": 3.0, "pack_sizes": [request["trials"]]},
            "launches": {"launches": 10.0, "waits": 1.0, "busy_share": 0.9, "profiled_steps": 2},
        }

    made, worker, told = open_session(), Answering(answer), {}
    made.device = "cuda"
    monkeypatch.setattr(made, "worker", worker)
    monkeypatch.setattr(speed, "find_spec", lambda name: object())
    speed.speed(made, told)
    base = told["bases"][0]
    names = [(side["name"], side["trials"]) for side in base["sides"]]
    assert names == [*(("loralab", k) for k in (1, 4, 16, 64)), ("PEFT + HF Trainer", 1), ("PEFT + Liger", 1)]
    assert [side["tokens_per_s"] for side in base["sides"]] == [64.0, 256.0, 1024.0, 4096.0, 64.0, 64.0]
    assert (base["sides"][2]["over_liger"], base["sides"][2]["launches"], base["notes"]) == (16.0, 10.0, [])
    peers = [request for engine, request in worker.asked if engine.endswith("WithTrainer")]
    assert [one["liger"] for one in peers[:4]] == [False, False, True, True]  # its kernels stay
    written = {request["rows_to"] for engine, request in worker.asked if engine.endswith("Loralab")}
    assert {one["rows"] for one in peers} == written


def test_a_pass_that_was_divided_has_no_speed(open_session, monkeypatch):
    def answer(request):
        sizes = [request["trials"]] if request["trials"] < 64 else [32]
        return {"losses": [1.0], "steps": [0.5] * 5, "seconds": 3.0, "pack_sizes": sizes}

    made, told = open_session(), {}
    monkeypatch.setattr(made, "worker", Answering(answer))
    speed.speed(made, told)
    side = next(side for side in told["bases"][0]["sides"] if side["trials"] == 64)
    assert side["skipped"] == "one pass ran out of memory, and the trials went on in packs of [32]"
    assert "tokens_per_s" not in side


LITTLE = "it needs about 9.1 GiB, and 4.0 GiB are free"


def test_a_card_with_too_little_memory_for_a_stage_skips_it_with_a_line_and_the_next_one_runs(
    open_session, monkeypatch, read
):
    made = open_session()
    monkeypatch.setattr(made, "worker", Answering(lambda request: {"skipped": LITTLE}))
    for name in ("speed", "plan", "paged", "resume", "halving"):
        made.stage(name, command.stages(ballast=False)[name])
    monkeypatch.undo()
    made.stage("machine", lambda session, told: None)
    for name, told in read()["stages"].items():
        expected = ("ok", None) if name == "machine" else ("skipped", f"this card has too little memory: {LITTLE}")
        assert (told["status"], told["error"]) == expected, name


def test_what_fits_is_measured_beside_what_does_not():
    runs = [{"case": "7B", "status": "skipped", "error": LITTLE}, {"case": "1B", "status": "completed", "error": None}]
    session.check_ends(runs)
    with pytest.raises(Skipped, match="too little memory: it needs"):
        session.check_ends(runs[:1])
    with pytest.raises(RuntimeError, match="1B: failed: no"):
        session.check_ends([runs[0], {"case": "1B", "status": "failed", "error": "no"}])


@pytest.mark.parametrize(("free", "says"), [(2**28, r"it needs about 0\.6 GiB, and 0\.2 GiB are free"), (2**40, "")])
def test_a_run_that_will_not_fit_is_not_begun(tmp_path, free, says):
    words = [*shapes.CPU.large.words("cpu"), "quantization=nf4_double"]
    engine = ours.Loralab({"device": "cpu", "folder": str(tmp_path), "words": words, "free_bytes": free})
    specs = engine.specs({"trials": 2, "words": ["seed=0"]}, ours.StepTimes(None))
    assert re.fullmatch(says, engine.too_little(specs))
    if says:
        assert list(engine.answer({"trials": 2, "words": ["seed=0"]})) == ["skipped"]
        assert list(tmp_path.iterdir()) == []


def test_the_rows_that_peers_are_given_are_those_that_the_trial_is_fed_in_their_order(tmp_path):
    shapes.write_rows(tmp_path)
    rows = [f"data.train={tmp_path}/rows.jsonl", f"data.validation={tmp_path}/held_out.jsonl"]
    words = [*shapes.CPU.speed[0].shapes[0].words("cpu"), *rows, "trainer.max_steps=10"]
    engine = ours.Loralab({"device": "cpu", "folder": str(tmp_path), "words": words})
    (spec,) = engine.specs({"words": ["seed=0"]}, ours.StepTimes(None))
    engine._write_rows(spec, tmp_path / "ids.json")
    written = json.loads((tmp_path / "ids.json").read_text())
    data = engine.runner.inputs.rows(spec)
    cursor = DataCursor(data, "causal_lm", 0, spec.seed, 1, 1, None, (0, 1))
    fed = [cursor.peek(step)["tensors"]["input_ids"][0].tolist() for step in range(10) if not cursor.seek(step)]
    assert [ids for ids, _ in written["train"]] == fed
    assert {len(ids) for ids, _ in written["train"]} == {32}


def test_the_series_of_a_run_has_its_spikes_and_what_left_the_card():
    rows = [
        {"step": 1, "memory/forward_peak_gib": 1.0, "memory/backward_peak_gib": 2.0, "memory/optimizer_peak_gib": 1.5},
        {"step": 2, "memory/backward_peak_gib": 5.0, "memory/managed_gib": 1.0, "memory/managed_resident_gib": 0.25},
        {"step": 3, "train/loss": 1.0},
    ]
    found = session.series(rows)
    assert found["series"] == {"step": [1, 2], "peak_gib": [2.0, 5.0], "managed_resident_gib": [None, 0.25]}
    assert found["evicted_bytes"] == 0.75 * 2**30
    assert session.series(rows[:1])["evicted_bytes"] is None


def test_workers_have_to_be_two_and_to_train_what_one_does():
    def run(losses, processes):
        return {"losses": losses, "processes": processes}

    told = {}
    stages.compare_workers(told, run([2.0, 1.0], 2), run([2.0, 1.001], 1))
    assert told["loss_difference"] == pytest.approx(1e-3, rel=0.01)
    with pytest.raises(RuntimeError, match="ran in 1 processes"):
        stages.compare_workers({}, run([2.0], 1), run([2.0], 1))
    with pytest.raises(RuntimeError, match="losses differ by 0.05"):
        stages.compare_workers({}, run([2.1], 2), run([2.0], 1))


@pytest.mark.slow
def test_a_rehearsal_on_a_cpu_has_every_stage_ok(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path)}
    words = ["make", "gpu", "REHEARSE=1", f"PYTHON={sys.executable}"]
    begun = time.monotonic()
    assert subprocess.run(words, cwd=ROOT, env=environment).returncode == 0
    assert time.monotonic() - begun < 600
    found = json.loads((tmp_path / "gpu.json").read_text())
    told = valid(found)
    assert found["rehearsal"] is True
    assert list(told) == NAMES
    assert {one["status"] for one in told.values()} == {"ok"}
    packed, longer, dense = told["speed"]["bases"]
    assert [one["trials"] for one in packed["sides"]] == [one["trials"] for one in longer["sides"]] == [1, 4, 16, 64, 1]
    assert [one["trials"] for one in dense["sides"]] == [1, 4, 1]
    sides = [side for base in told["speed"]["bases"] for side in base["sides"]]
    assert max(side["loss_difference"] for side in sides) < 1e-4
    assert all(side["launches"] > 100 and side["steps"] == shapes.CPU.steps for side in sides)
    assert (told["workers"]["loss_difference"], told["workers"]["runs"][0]["processes"]) == (0.0, 2)
    assert all(len(arm["series"]["step"]) == 12 for arm in told["paged"]["arms"])
    assert all(run["predicted_over_measured"] == pytest.approx(1, rel=0.05) for run in told["plan"]["runs"])
    assert {"", "ragged"} <= {run["case"] for run in told["plan"]["runs"]}
    assert told["resume"]["same_bits"] is True
    assert told["halving"]["runs"][0]["pack_sizes"] == [stages.TRIALS // 2] * stages.TRIALS
    assert all("stood_in" in told[name] for name in ("machine", "tests", "speed", "paged", "halving", "workers"))
    assert names(tmp_path) == ["gpu.json", "index.html", "records.jsonl"]
