"""The real command in processes of its own, killed from within (killer.py) or from outside, and what it leaves."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from left_files import STATE, STEPS
from torch.utils._pytree import tree_flatten

HERE = Path(__file__).parent
WATCHED = [
    *("+callbacks.checkpoint._target_=loralab.training.checkpoint.Checkpoint", "+callbacks.checkpoint.minutes=null"),
    "+callbacks.killer._target_=killer.Killer",
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WANDB_SILENT": "true", "COLUMNS": "200"}


def start(words, cwd, kill_at="", output=None, **environment):
    """The command as a process that leads a group of its own."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "KILL_AT": kill_at, **environment}
    file = (output or Path(os.devnull)).open("a")
    command = [sys.executable, "-m", "loralab.cli", *words]
    return subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
    )


def call(words, cwd, kill_at="", seconds=300, **more):
    """The exit code of the command; -9 after a kill."""
    return start(words, cwd, kill_at, **more).wait(seconds)


def end(process, number=signal.SIGKILL):
    """Sends the signal to this process alone, not to those that it has started."""
    if process.poll() is None:
        os.kill(process.pid, number)


def until(condition, seconds=120.0, every=0.05):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if condition():
                return True
        except (OSError, ValueError, KeyError):  # it is being written
            pass
        time.sleep(every)
    raise TimeoutError(f"nothing came in {seconds} s")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record_of(folder):
    return json.loads((folder / "result.json").read_text())


def weights(folder):
    """{file: digest} of the adapter."""
    files = sorted(folder.glob("adapter*/*.safetensors"))
    return {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def optimizer(folder):
    """The last optimizer state, flat: (its structure, its values; tensors as bytes and types)."""
    leaves, structure = tree_flatten(torch.load(folder / STATE, weights_only=True))
    values = [
        (str(leaf.dtype), leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in leaves
    ]
    return str(structure), values


def trained(folder):
    """[(process, the steps that it trained)] in their order."""
    found = {}
    for line in (folder / STEPS).read_text().splitlines():
        pid, _, step = line.partition(" ")
        found.setdefault(pid, []).append(int(step))
    return list(found.items())


def check_equal(ours, theirs):
    """Everything that a run ends with is that of the uninterrupted run, to the bit."""
    assert record_of(ours)["status"] == record_of(theirs)["status"] == "completed"
    assert record_of(ours)["metrics"] == record_of(theirs)["metrics"]
    assert weights(ours) == weights(theirs)
    assert optimizer(ours) == optimizer(theirs)
    assert rows(ours) == rows(theirs)
    steps = [row["step"] for row in rows(ours) if "train/loss" in row]
    assert steps == list(range(1, record_of(ours)["time"]["steps"] + 1))
    assert not (ours / "checkpoints").exists()


def check_repeated(folder, every):
    """No process trained again more than ``every`` steps of an earlier one, and none left one out."""
    reached = 0
    for _, steps in trained(folder):
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert reached - every < steps[0] <= reached + 1
        reached = max(reached, steps[-1])
    return reached
