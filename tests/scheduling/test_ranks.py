"""One run in several processes: its results, what is refused, and what the record says when one ends early."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loralab.cli import main
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import compose
from loralab.records import record
from loralab.scheduling import ranks

LOSS = 1e-5  # of a loss; seen: 2.4e-7
WEIGHT = 1e-4  # of an adapter's largest value


@pytest.fixture
def words(tiny_words, tmp_path):
    """Those of a run in ``size`` processes (0: one, by trainer=auto), in a folder below tmp_path."""

    def make(folder, size, *more):
        kept = [word for word in tiny_words if not word.startswith(("trainer=", "data.batch_size"))]
        together = ["trainer=ddp", f"trainer.devices={size}"] if size else ["trainer=auto"]
        own = ["data.batch_size=4", "trainer.max_steps=6", "seed=1", f"hydra.run.dir={tmp_path / folder}"]
        return ["train", *kept, *together, *own, *more]

    return make


def rows(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def assert_alike(whole, shared, weights):
    """Two runs give the same losses, norms, metrics and adapter up to the order of sums."""
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        before, now = rows(whole, key), rows(shared, key)
        assert [step for step, _ in now] == [step for step, _ in before]
        assert [value for _, value in now] == pytest.approx([value for _, value in before], rel=LOSS, abs=LOSS)
    one, several = record.read(whole), record.read(shared)
    assert several["trial"] == one["trial"]
    assert several["metrics"] == pytest.approx(one["metrics"], rel=LOSS)
    assert several["time"]["tokens"] == one["time"]["tokens"]
    assert (one["environment"]["processes"], several["environment"]["processes"]) == (1, 2)
    before, now = weights(whole), weights(shared)
    assert before.keys() == now.keys()
    for name, tensor in before.items():
        assert (now[name] - tensor).abs().max() <= WEIGHT * tensor.abs().max(), name


MORE = {  # dropout, accumulation, clipping, validations on the way of 7 rows, whose last batch is no full one
    "dense": ["adapter.lora_dropout=0.2", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"],
    "nf4": ["quantization=nf4", "trainer.gradient_clip_val=0.01", "optimizer.lr=1e-2", "trainer.val_check_interval=3"],
    "packed rows": ["data.packing=true", "trainer.max_steps=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "nf4", "packed rows"])
def test_two_processes_give_what_one_gives(words, tmp_path, weights, kind):
    assert main.run(words("one", 0, *MORE[kind])) == 0
    assert main.run(words("two", 2, *MORE[kind])) == 0
    assert_alike(tmp_path / "one", tmp_path / "two", weights)


@pytest.mark.slow
def test_a_classifier_is_scored_over_the_rows_of_both_processes(words, tmp_path, weights, request):
    files = request.getfixturevalue("rows")
    more = ["model.task=sequence_classification", "data.text={t}", "data.label=y"]
    more += [f"data.{split}={files['labels', split]}" for split in ("train", "validation")]
    for folder, size in (("one", 0), ("two", 2)):
        given = [word for word in words(folder, size) if not word.startswith(("data.prompt", "data.target"))]
        assert main.run([*given, *more]) == 0
    assert {"val/accuracy", "val/f1", "val/matthews"} < record.read(tmp_path / "two")["metrics"].keys()
    assert_alike(tmp_path / "one", tmp_path / "two", weights)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "nf4_double"])
def test_a_base_that_is_spread_over_two_processes_gives_what_one_gives(words, tmp_path, weights, scheme):
    """On CPUs; on cards it is unrun (tests/gpu/test_several_cards.py)."""
    more = [f"quantization={scheme}", "trainer.val_check_interval=3", "trainer.accumulate_grad_batches=2"]
    assert main.run(words("one", 0, *more)) == 0
    assert main.run(words("two", 2, *more, "trainer.strategy=fsdp")) == 0
    assert_alike(tmp_path / "one", tmp_path / "two", weights)


class Started:
    """``loralab train`` in a process of its own, and the processes that it starts."""

    def __init__(self, words, log):
        self.log = log.open("w")
        self.process = subprocess.Popen([sys.executable, "-m", "loralab.cli", *words], stderr=self.log)

    def ranks(self):
        """Their process ids by number, once both are there."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if b"loralab.scheduling.ranks" in command and parent == self.process.pid:
                found[int(command[-2])] = int(folder.name)
        return found

    def at_step(self, folder, step):
        """Waits until metrics.jsonl has so many losses and a checkpoint is there."""
        deadline = time.monotonic() + 300
        file = folder / "metrics.jsonl"
        while not (file.exists() and len(rows(folder, "train/loss")) >= step and (folder / KEPT).exists()):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self):
        return self.process.wait(200)


KEPT = "checkpoints/last.pt"
LONG = ["callbacks=default", "callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=60", "quantization=nf4"]


@pytest.fixture(scope="module")
def uninterrupted():
    """The bytes of the adapter of a run of LONG in two processes, once there is one."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second", "starter"])
def test_whichever_process_is_killed_the_run_ends_and_the_same_command_goes_on(words, tmp_path, uninterrupted, victim):
    folder = tmp_path / "run"
    started = Started(words("run", 2, *LONG), tmp_path / "log")
    started.at_step(folder, 5)
    own = started.ranks()
    assert sorted(own) == [0, 1]
    os.kill({"first": own[0], "second": own[1], "starter": started.process.pid}[victim], signal.SIGKILL)
    code = started.end()
    gone = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in own.values()):
        assert time.monotonic() < gone
        time.sleep(0.05)
    stored = record.read(folder)
    assert record.status(stored) == "interrupted"
    assert (folder / KEPT).exists()
    if victim != "starter":
        assert code == 143
        assert f"process {1 if victim == 'first' else 2} of 2 was ended by signal 9" in stored["error"]
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert main.run(words("run", 2, *LONG)) == 0
    done = record.read(folder)
    assert done["status"] == "completed"
    assert done["resumed_from"] >= 4
    assert [step for step, _ in rows(folder, "train/loss")] == list(range(1, 61))
    if not uninterrupted:
        assert main.run(words("whole", 2, *LONG)) == 0
        uninterrupted.update(adapter=adapter(tmp_path / "whole"), losses=rows(tmp_path / "whole", "train/loss"))
    assert rows(folder, "train/loss") == uninterrupted["losses"]
    assert adapter(folder) == uninterrupted["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_and_leaves_a_checkpoint(words, tmp_path, number):
    long = [word for word in LONG if "every_n_steps" not in word]
    started = Started(words("run", 2, *long, "callbacks.checkpoint.every_n_steps=2"), tmp_path / "log")
    started.at_step(tmp_path / "run", 5)
    started.process.send_signal(number)
    assert started.end() == 128 + number
    stored = record.read(tmp_path / "run")
    assert (stored["status"], stored["exit_code"]) == ("interrupted", 128 + number)
    steps = torch.load(tmp_path / "run" / KEPT, weights_only=True)["step"]
    assert steps == len(rows(tmp_path / "run", "train/loss"))
    assert started.ranks() == {}


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_in_several_processes_in_a_sweep_runs_alone_and_says_so(words, tmp_path, capfd):
    given = [word for word in words("x", 2) if not word.startswith("hydra.run.dir")]
    assert main.run([given[0], "-m", *given[1:], "seed=0,1", f"hydra.sweep.dir={tmp_path / 's'}"]) == 0
    said = capfd.readouterr().err
    assert "2 of 2 trials run alone: trainer.strategy=ddp is one trial over several processes" in said
    assert "runs alone, in 2 processes, each with 2 of the 4 rows of a batch" in said
    assert [one["status"] for one in map(record.read, record.find(tmp_path / "s"))] == ["completed"] * 2


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["trainer.devices=3"], "data.batch_size=4: it is that of all 3 processes together, which do not divide it"),
        (["trainer.devices=8"], "valid: 8, or another trainer.devices"),
        (["quantization=llm_int8"], "takes scales or outlier columns over all rows of a pass"),
        (["memory.spiky_every=2"], "memory.spiky_every is about the memory of one process"),
        (["trainer.strategy=fsdp", "adapter=full"], "adapter=full trains the base itself"),
        (["trainer.strategy=fsdp", "quantization=nf4", "quantization.dequantize=resident"], "valid: per_use"),
        (["trainer.strategy=fsdp", "data.packing=true"], "valid: data.packing=false"),
        (["trainer.strategy=single_device"], "trainer.devices=2"),
    ],
)
def test_what_several_processes_cannot_train_is_refused_before_weights_load(words, tmp_path, capsys, more, text):
    named = {"adapter.r", *(word.partition("=")[0] for word in more)}
    kept = [word for word in words("run", 2) if word.partition("=")[0] not in named]
    assert main.run([*kept, *more]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_trial_is_the_same_on_any_number_of_processes(name):
    usual = trial_id(compose([]))
    for more in ([], ["trainer.devices=2"], ["+trainer.devices=4"]):
        assert trial_id(compose([f"trainer={name}", *more])) == usual


def test_no_memory_is_predicted_for_a_base_that_is_spread(capsys):
    assert main.run(["plan", "trainer=fsdp", "trainer.devices=2"]) == 2
    assert "valid: trainer=ddp" in capsys.readouterr().err


def test_without_a_gpu_the_number_of_processes_is_given_or_one():
    own = [trial_spec(compose(["trainer=ddp", *more]), Path()) for more in ([], ["trainer.devices=2"])]
    assert [spec.trainer.processes for spec in own] == [
        1 if not torch.cuda.is_available() else own[0].trainer.processes,
        2,
    ]
    assert own[1].own_share.data.batch_size == own[1].data.batch_size // 2
    assert trial_spec(compose(["trainer.devices=1"]), Path()).trainer.processes == 1


class Ended:
    """Processes that have ended with these codes."""

    def __init__(self, *codes):
        self.codes, self.processes = codes, codes


@pytest.mark.parametrize(
    ("codes", "cause"), [((0, 0), None), ((0, -9), None), ((1, -9), 1), ((-9, 1), 0), ((1, 6), 1), ((5, 5), 0)]
)
def test_the_process_that_says_why_is_the_cause(codes, cause):
    group = ranks._Group.__new__(ranks._Group)
    group.processes = [type("Process", (), {"poll": lambda self, code=code: code})() for code in codes]
    assert group.wait() == cause


def test_the_record_says_which_process_failed_and_why(synthetic, tmp_path):
    """The first process has only missed the second, which had no memory left."""
    job = ranks.Job({}, tmp_path / "run", [], {})
    job.trial = "abc"
    broken = {**synthetic("none", 2, 0), "status": "failed", "error": "connection closed", "exit_code": 1}
    full = {**broken, "status": "out_of_memory", "error": "out of memory: 2 GiB", "exit_code": 6}
    record.write(job.folder, broken)
    record.write(tmp_path / "1", full)
    stored = ranks._settled(job, tmp_path, Ended(1, 6), 1)
    assert stored == record.read(job.folder)
    assert (stored["status"], stored["exit_code"]) == ("out_of_memory", 6)
    assert stored["error"] == "process 2 of 2: out of memory: 2 GiB"
