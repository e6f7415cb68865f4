"""What wandb's own reader finds in the offline file of a run folder."""

import json
import subprocess
import time

from wandb.util import get_core_path


def run_file(folder):
    """The only offline file of a run folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def read(folder):
    """{run, history, config, summary}, as ``wandb leet inspect`` reads them by this program."""
    return inspected(run_file(folder))


def inspected(path):
    """W&B's service writes the last rows a moment after the run has been finished."""
    for _ in range(100):
        found = _inspected(path)
        if found["state"] == "finished":
            break
        time.sleep(0.1)
    return found


def _inspected(path):
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
    asked = [[*command, *more, "--run-file", str(path)] for more in ([], ["--summary"])]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for words in asked]
    texts = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    lines = [json.loads(line) for line in texts[0].splitlines()]
    (run,) = [line["run"] for line in lines if line["type"] == "run"]
    history = [line["history"]["item"] for line in lines if line["type"] == "history"]
    return {"run": run, "history": history, **json.loads(texts[1])}
