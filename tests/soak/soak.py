"""Trials under fire: a sweep is killed by kill -9 at random times until it is done, and nothing is lost.

    python tests/soak/soak.py FOLDER [--trials 100] [--seed 0] [--least 5] [--most 60] [--minutes 40] [--steps 400]

The same command is called again after each kill. At the end it prints one JSON object: kills, seconds, the steps that
were trained and how often, and what is wrong; the exit code is 1 where anything is. Every number comes from what the
processes have left: records, metrics.jsonl and the steps that killer.Killer has counted.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from processes import WATCHED, check_repeated, end, record_of, rows, start, trained

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = [
    *("model=random", "model.max_length=64", "+model.config.num_key_value_heads=2"),
    *(f"+model.config.{key}={value}" for key, value in SIZES.items()),
    *("data=files", "data.train=rows.jsonl", "data.validation=rows.jsonl", "data.prompt={q}", "data.target={a}"),
    *("adapter.target_modules=[q_proj,v_proj]", "adapter.lora_dropout=0.1", "optimizer.weight_decay=0.01"),
    *("data.batch_size=2", "trainer=cpu", "logger=none", "callbacks=none", "plan.record=false"),
    *("hydra/launcher=packed", "hydra.launcher.token_budget=1000"),
]


def axes(trials):
    """Words of at least so many trials, a multiple of ten."""
    return ["adapter.r=2,4", "optimizer.lr=0.0005,0.001,0.002,0.004,0.008", f"seed=range({-(-trials // 10)})"]


def fire(command, folder, minutes, draw, bounds):
    """Calls ``command`` and kills it until it ends by itself; (its exit code, seconds each killed process lived)."""
    begun, lives = time.monotonic(), []
    while True:
        running, life = start(command, folder, output=folder / "output"), draw.uniform(*bounds)
        since = time.monotonic()
        while running.poll() is None and time.monotonic() - since < life:
            time.sleep(0.1)
        if running.poll() is None:
            end(running)
            running.wait()
            lives.append(round(life, 1))
            print(f"kill {len(lives)} after {life:.0f} s, {done(folder)} done", file=sys.stderr, flush=True)
        if running.returncode != -9 or time.monotonic() - begun > 60 * minutes:
            return running.returncode, lives


def done(folder):
    records = [json.loads(path.read_text()) for path in folder.glob("sweep/*/result.json")]
    return sum(stored["status"] == "completed" for stored in records)


def faults(folder, steps, every):
    """What is wrong with one trial; empty where nothing is."""
    record, found = record_of(folder), []
    if record["status"] != "completed":
        return [f"{folder.name} is {record['status']}: {record['error']}"]
    listed = [row["step"] for row in rows(folder) if "train/loss" in row]
    if listed != list(range(1, steps + 1)):
        found.append(f"{folder.name}: metrics.jsonl has a gap or a step twice")
    if any(not isinstance(row["train/loss"], float) for row in rows(folder) if "train/loss" in row):
        found.append(f"{folder.name}: a loss is not finite")
    try:
        reached = check_repeated(folder, every)
        if reached != steps:
            found.append(f"{folder.name}: {reached} of {steps} steps were trained")
    except AssertionError:
        found.append(f"{folder.name}: more was trained again than since the last checkpoint")
    if not (folder / "adapter" / "adapter_model.safetensors").is_file() or (folder / "checkpoints").exists():
        found.append(f"{folder.name}: its adapter is missing, or a checkpoint is left")
    return found


def run(folder, trials, seed, bounds, minutes, steps, every=10):
    """The report as a dictionary."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [{"q": f"add {n} to {n * n % 17}: ", "a": str(n + n * n % 17)} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    command = ["train", "-m", *WORDS, *WATCHED, f"+callbacks.checkpoint.every_n_steps={every}"]
    command += [f"trainer.max_steps={steps}", *axes(trials), "hydra.sweep.dir=sweep"]
    begun = time.monotonic()
    code, lives = fire(command, folder, minutes, random.Random(seed), bounds)
    seconds = time.monotonic() - begun
    runs = sorted(path.parent for path in folder.glob("sweep/*/result.json"))
    times = Counter()
    wrong = [] if code == 0 else [f"the command ended with {code}"]
    wrong += [] if len(runs) >= trials else [f"there are {len(runs)} of {trials} trials"]
    wrong += ["a traceback was shown"] if "Traceback" in (folder / "output").read_text() else []
    for place in runs:
        wrong += faults(place, steps, every)
        times.update(Counter(step for _, own in trained(place) for step in own).values())
    return {
        **{"trials": len(runs), "completed": done(folder), "kills": len(lives), "seconds": round(seconds)},
        **{"lives_s": lives, "steps": sum(times.values()), "steps_trained": sum(n * c for n, c in times.items())},
        **{"steps_by_times_trained": dict(sorted(times.items())), "wrong": wrong},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, default in (("trials", 100), ("seed", 0), ("least", 5), ("most", 60), ("minutes", 40), ("steps", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    bounds = (given.least, given.most)
    report = run(given.folder.absolute(), given.trials, given.seed, bounds, given.minutes, given.steps)
    print(json.dumps(report))
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
