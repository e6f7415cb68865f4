"""A sweep without training: command line, launcher, packs, records and report are real; the runner makes numbers up.

    python tests/records/simulated.py 10000 --folder /tmp/simulated

prints what 10,000 trials cost beside their training. None of the scores is a result of loralab.
"""

import argparse
import json
import logging
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

STEPS = 60
SEEDS = 4
RANKS = (1, 2, 4, 8, 16)
MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(4) for name in "qkvo"]
WORDS = ("logger=none", "callbacks=none", "plan.record=false", "data.limit=64", f"trainer.max_steps={STEPS}")
SPACE = ("hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "adapter.r=choice(1,2,4,8,16)")
PHASES = ("launch", "again", "report", "ls")


class Simulated:
    """In place of ``Runner``: rows are read, nothing is trained. ``seconds``: of its own, no part of the launcher's."""

    def __init__(self):
        from loralab.running.runner import Runner

        real = Runner()
        self.inputs, self.foresight, self.seconds, self.trials = real.inputs, real.foresight, 0.0, 0

    def run(self, specs):
        """The records of completed trials, which are written as a run writes them; at lr > 1 they diverge."""
        begun = time.process_time()
        records = [self._trial(spec, index, len(specs)) for index, spec in enumerate(specs)]
        self.seconds += time.process_time() - begun
        self.trials += len(specs)
        return records

    def _trial(self, spec, index, size):
        from loralab.records import record
        from loralab.running.attach import open_record

        stored = open_record(spec, index, size)
        noise = random.Random(f"{spec.id}{spec.seed}")
        loss = 3 + 0.1 * (math.log10(spec.optimizer.lr) + 2.5) ** 2 + 0.2 / spec.adapter.r + noise.gauss(0, 0.01)
        steps = range(1, STEPS + 1)
        rows = [{"step": s, "train/loss": loss + 0.9 * math.exp(-s / 14) + noise.gauss(0, 0.1)} for s in steps]
        rows += [{"step": STEPS, "val/loss": loss}]
        (spec.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (spec.folder / "adapter").mkdir(exist_ok=True)
        (spec.folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": spec.adapter.r}))
        (spec.folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1024))
        base, tokenizer, source = _fingerprints(json.dumps([spec.config["model"], spec.config["data"]]))
        stored["base"].update(name="tiny", fingerprint=base, parameters=3_700_000, quantized_parameters=3_000_000)
        stored["base"].update(bytes=12_000_000, bits_per_parameter=32.0, bits_per_parameter_overall=32.0)
        stored["adapter"].update(method="lora", trainable_parameters=6144 * spec.adapter.r, modules=MODULES)
        stored["optimizer"].update(name="adamw", effective_name="torch AdamW", state_bytes=49152 * spec.adapter.r)
        stored["memory"].update(device="cpu", alone_peak_bytes=60_000_000 + 100_000 * spec.adapter.r)
        stored["time"].update(startup_s=2.0, train_s=11.5 + noise.random(), wall_s=15.0, steps=STEPS, tokens=61_000)
        stored["time"].update(tokens_per_s=5200 + 300 * noise.random())
        stored["data"].update(name="docstrings", rows={"train": 64, "validation": 64}, targets="t" * 16, truncated=0)
        stored["data"].update(fingerprint="d" * 16, source=source, tokenizer=tokenizer)
        diverges = spec.optimizer.lr > 1
        stored["metrics"] = {} if diverges else {"val/loss": loss, "val/perplexity": math.exp(loss)}
        stored.update(status="diverged" if diverges else "completed", error="the loss is not finite" * diverges or None)
        stored["exit_code"] = 5 * diverges
        record.write(spec.folder, stored)
        return stored


@cache
def _fingerprints(nodes):
    """Of base, tokenizer and data, so that no record is stale."""
    from loralab.config import staleness

    model, data = json.loads(nodes)
    return staleness._base(model), staleness._tokenizer(model), staleness._data(data)


def axes(count):
    """Words of a grid of ``count`` trials: ranks and seeds, as many learning rates as it takes."""
    rates = -(-count // (len(RANKS) * SEEDS))
    lrs = ",".join(f"{1e-4 * 1000 ** (i / max(1, rates - 1)):.6g}" for i in range(rates))
    return [f"adapter.r={','.join(map(str, RANKS))}", f"optimizer.lr={lrs}", f"seed={','.join(map(str, range(SEEDS)))}"]


@contextmanager
def counted():
    """{what: how often} and {what: seconds} of what a launcher does for each trial or more often."""
    from loralab.records import record
    from loralab.scheduling.composing import Composed

    counts, seconds = Counter(), Counter()

    def wrapped(real, name):
        def call(*given, **named):
            begun = time.process_time()
            try:
                return real(*given, **named)
            finally:
                counts[name(*given)] += 1
                seconds[name(*given)] += time.process_time() - begun

        return call

    with ExitStack() as stack:
        for owner, attribute, name in (
            (record, "read", lambda *given: "records read"),
            (record, "read_sweep", lambda *given: "sweep.json read"),
            (record, "replace", lambda path, *_: f"{path.name} written"),
            (Composed, "load_sweep_config", lambda *given: "composed"),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, wrapped(getattr(owner, attribute), name)))
        yield counts, seconds


def launched(folder, words):
    """Runs ``train -m`` with ``words`` into ``folder``, without its report: what it took, in CPU seconds."""
    from loralab.cli import main
    from loralab.scheduling.session import Session

    runner = Simulated()
    with ExitStack() as stack:
        for name in ("loralab.cli.terminal.show_report", "loralab.cli.terminal.show_place"):
            stack.enter_context(mock.patch(name))
        stack.enter_context(mock.patch("loralab.reporting.wandb_report.after_sweep"))
        stack.enter_context(mock.patch.object(Session, "runner", return_value=runner))
        counts, seconds = stack.enter_context(counted())
        begun = time.process_time()
        code = main.run(["train", "-m", "hydra/launcher=packed", f"hydra.sweep.dir={folder}", *WORDS, *words])
        total = time.process_time() - begun
    return {
        **{"exit code": code, "trials run": runner.trials, "counts": dict(counts)},
        **{"total s": total, "made-up runs s": runner.seconds, "composing s": seconds["composed"]},
        "launcher s": total - runner.seconds - seconds["composed"],
    }


def phase(name, folder, count, words):
    """One of PHASES in this process; what it took. Launching is measured after a sweep of a few trials, so that what
    is loaded once counts for no trial."""
    from loralab.cli import main

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if name in ("launch", "again"):
            launched(folder / "few", axes(20))
        begun, wall = time.process_time(), time.monotonic()
        if name in ("launch", "again"):
            found = launched(folder / "s", words)
            found["launcher ms a trial"] = 1e3 * found["launcher s"] / count
            found["composing ms a trial"] = 1e3 * found["composing s"] / count
        else:
            found = {"exit code": main.run([name, str(folder / "s" if name == "report" else folder)])}
        found |= {"cpu s": time.process_time() - begun, "wall s": time.monotonic() - wall}
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {**found, "start to end cpu s": time.process_time(), "peak RSS MiB": int(peak) / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--search", action="store_true", help="points of a search in place of a grid")
    parser.add_argument("--phase", choices=PHASES)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    search = [*SPACE, f"hydra.sweeper.n_trials={given.count}", "hydra.sweeper.batch=16"]
    if given.phase:
        logging.disable(logging.INFO)
        print(json.dumps(phase(given.phase, given.folder, given.count, search if given.search else axes(given.count))))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--phase"]
    figures = {name: json.loads(subprocess.check_output([*command, name]).splitlines()[-1]) for name in PHASES}
    folder = given.folder / "s"
    figures["page MB"] = (folder / "report" / "index.html").stat().st_size / 1e6
    figures["sweep.json MB"] = (folder / "sweep.json").stat().st_size / 1e6
    figures["files"] = sum(len(files) for _, _, files in os.walk(folder))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
