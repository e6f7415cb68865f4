"""``python -m loralab.gpu``: everything that needs a CUDA card, in at most nine minutes and without a network.

Each part has its share of the time and is guarded: one that fails leaves its error in gpu.json, and the next goes on.
Every training is a process of its own, because managed memory is never given back before a process ends.
``--cpu``: the same parts with tiny shapes on the CPU, to see that they work.
"""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from loralab import models, record
from loralab.bench.ground import LLAMA_1B
from loralab.optimizers import UNPAGED, cannot_page
from loralab.reporting import card
from loralab.telemetry.ledgers import GIB

log = logging.getLogger(__name__)

SOURCE = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
BUDGETS = {"machine": 35, "tests": 85, "planner": 110, "paged": 220, "packed": 80}  # seconds; the unused is passed on
NO_CUDA = (
    "loralab.gpu: torch sees no CUDA device, and every part of this is about one: memory of a card, paged optimizers, "
    "speed. Run it on a machine with a card and a CUDA build of torch (nvidia-smi shows the card, `loralab doctor` "
    "what torch sees of it); `python -m loralab.gpu --cpu` goes through the same parts with tiny shapes on the CPU."
)
ABOUT = (
    "import json; from loralab.doctor import examine; from loralab.telemetry.environment import environment; "
    "print(json.dumps({'environment': environment(), 'doctor': examine()}))"
)

SMALL_LLAMA = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    "num_key_value_heads": 2,
}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {  # config, tokens of a row, rows
    "tiny llama": ({"model_type": "llama"}, 256, 8),
    "gpt2": ({"model_type": "gpt2"}, 512, 8),
    "llama 1B": (LLAMA_1B, 512, 4),
}
SMALL_SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny llama": (SMALL_LLAMA, 64, 2),
    "gpt2": ({"model_type": "gpt2", "vocab_size": 4096, "n_embd": 64, "n_layer": 2, "n_head": 2}, 64, 2),
}
SCHEMES = ("none", "nf4_double")
ARMS = (  # (room, optimizer, spiky), in the order of what is learnt from them
    *(("roomy", "adamw_32bit", True), ("roomy", "paged_adamw", True)),
    *(("cap", name, True) for name in ("adamw_32bit", "paged_adamw", "adamw_8bit", "paged_adamw_8bit")),
    *(("ballast", name, True) for name in ("adamw_32bit", "paged_adamw")),
    *(("cap", name, False) for name in ("adamw_32bit", "paged_adamw", "adamw_8bit", "paged_adamw_8bit")),
)
PAGED_RUN = (
    *("quantization=nf4_double", "adapter.r=256", "adapter.lora_alpha=256", "optimizer.flat=true"),
    *("memory.solo=true", "plan.record=false", "trainer.max_steps=12", "callbacks.memory.every_n_steps=1"),
)
SPIKY = ("memory.spiky_every=4", "memory.spiky_length=1024")
TRIALS = 8
FEWEST_S = 8.0  # a run with less time than this is not started


class Late(Exception):  # noqa: N818 - as Interrupted: not an error but an end
    """The part's time is spent."""


class Session:
    """The parts' results so far, on disk after every change, and the processes that make them."""

    def __init__(self, out: Path, cpu: bool, work: Path) -> None:
        self.out, self.cpu, self.work = out, cpu, work
        self.deadline = self.begun = time.monotonic()
        self.found: Row = {
            **{"schema": 1, "device": "cpu" if cpu else "cuda", "date": datetime.now(UTC).isoformat("T", "seconds")},
            "parts": {},
        }

    def save(self) -> None:
        """gpu.json and the page, as they stand."""
        self.found["seconds"] = round(time.monotonic() - self.begun, 1)
        partial = self.out / ".gpu.json.partial"
        partial.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")
        partial.replace(self.out / "gpu.json")
        (self.out / "index.html").write_text(card.page(self.found), "utf-8")

    def part(self, name: str, work: Callable[["Session", Row], None]) -> None:
        """Runs ``work`` until its time, with all that earlier parts left, is spent; its error becomes its result."""
        names = list(BUDGETS)
        self.deadline = self.begun + sum(BUDGETS[one] for one in names[: names.index(name) + 1])
        started, told = time.monotonic(), self.found["parts"].setdefault(name, {"status": "running", "error": None})
        log.info("%s", name)
        try:
            self.save()
            work(self, told)
            told["status"] = "completed"
        except Late as late:
            told.update(status="out of time", error=str(late))
        except Exception as error:
            told.update(status="failed", error=f"{type(error).__name__}: {' '.join(str(error).split())[-2000:]}")
        told["seconds"] = round(time.monotonic() - started, 1)
        log.info("%s: %s after %.0f s%s", name, told["status"], told["seconds"], f": {told['error'] or ''}")
        self.save()

    def python(self, *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """``python WORDS`` with this source tree, ended where the part's time ends. Raises Late."""
        left = self.deadline - time.monotonic()
        if left < FEWEST_S:
            raise Late(f"{max(0.0, left):.0f} s were left")
        paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_OFFLINE": "1"}
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if self.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            return subprocess.run(
                [sys.executable, *words],
                cwd=cwd or self.work,
                env=environment,
                timeout=left,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise Late(f"stopped after {left:.0f} s: {' '.join(words)[:200]}") from None

    def train(self, name: str, *words: str) -> Row:
        """One run: what its record says. Its result.json is kept, its adapter is not."""
        done = self.python("-m", "loralab.cli", "train", *words, *self.common(), f"hydra.run.dir={name}")
        folder = self.work / name
        if not (folder / record.RESULT).is_file():
            return {"status": "failed", "error": done.stderr.strip()[-1000:], "exit_code": done.returncode}
        told = summary(record.read(folder), _rows(folder / "metrics.jsonl"))
        self.keep(folder, name)
        return {**told, "exit_code": done.returncode}

    def keep(self, folder: Path, name: str) -> None:
        """Copies a record out and frees the disk."""
        (self.out / "records" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / record.RESULT, self.out / "records" / name)
        shutil.rmtree(folder)

    def common(self) -> list[str]:
        device = (
            ["trainer=cpu"] if self.cpu else ["trainer=gpu", "trainer.precision=bf16-mixed", "model.dtype=bfloat16"]
        )
        data = ["data=files", "data.text='{text}'", "data.train=rows.jsonl", "data.validation=held_out.jsonl"]
        return [*data, *device, "logger=none"]


def summary(found: Row, rows: list[Row]) -> Row:
    """The numbers of a record that are about memory and time."""
    memory, spent, optimizer = found["memory"], found["time"], found["optimizer"]
    predicted, measured = memory["predicted_peak_bytes"], memory["measured_peak_bytes"]
    steps = [row for row in rows if "time/optimizer_s" in row and row["step"] > 2]  # the first two warm up
    whole = [sum(row.get(f"time/{phase}_s", 0.0) for phase in ("forward", "backward", "optimizer")) for row in steps]
    kept = ("reserved_by_phase", "by_phase", "ballast_bytes", "cap_bytes", "simulated", "spike_count")
    return {
        **{"status": found["status"], "error": found["error"]},
        **{"predicted_peak_bytes": predicted, "measured_peak_bytes": measured},
        "predicted_over_measured": predicted / measured if predicted and measured else None,
        "parameters": found["base"]["parameters"],
        "trainable_parameters": found["adapter"]["trainable_parameters"],
        **{key: optimizer.get(key) for key in ("effective_name", "state_bytes", "paged_bytes", "paging", "note")},
        **{key: memory[key] for key in kept if key in memory},
        **{key: value for key, value in memory.items() if key.startswith(("managed", "device_used", "host_"))},
        **{key: spent[key] for key in ("steps", "startup_s", "train_s", "wall_s", "tokens", "tokens_per_s")},
        "step_s": statistics.median(whole) if whole else None,
        "optimizer_step_s": statistics.median(row["time/optimizer_s"] for row in steps) if steps else None,
        "slowest_optimizer_step_s": max((row["time/optimizer_s"] for row in steps), default=None),
    }


def shape(config: dict[str, Any], length: int, rows: int) -> list[str]:
    """A random base and the batches it is fed, as words of the command line."""
    keys = [f"+model.config.{key}={value}" for key, value in config.items()]
    return ["model=random", "model.dropout=0", f"model.max_length={length}", f"data.batch_size={rows}", *keys]


def machine(session: Session, told: Row) -> None:
    """The card, the driver, the versions and what the doctor says of them."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
        told["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        told["nvidia_smi"] = f"not available ({error})"
    told["cuda"] = torch.version.cuda
    done = session.python("-c", ABOUT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    told.update(json.loads(done.stdout.splitlines()[-1]))


def tests(session: Session, told: Row) -> None:
    """The tests that need a card."""
    root = SOURCE.parent
    if importlib.util.find_spec("pytest") is None:
        told["note"] = "pytest is not installed"
        return
    if not (root / "tests" / "gpu").is_dir():
        told["note"] = "the tests are not part of this installation"
        return
    words = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]  # all that are marked
    done = session.python(*words, cwd=root)
    lines = done.stdout.strip().splitlines()
    told.update(exit_code=done.returncode, summary=lines[-1] if lines else "", output=done.stdout[-6000:])
    if done.returncode not in (0, 5):  # 5: none was collected
        raise RuntimeError(f"{told['summary']} {done.stderr[-500:]}")


def planner(session: Session, told: Row) -> None:
    """Predicted beside measured peaks of real trainings."""
    told["runs"] = []
    for name, (config, length, rows) in (SMALL_SHAPES if session.cpu else SHAPES).items():
        for scheme in SCHEMES:
            words = [*shape(config, length, rows), f"quantization={scheme}", "trainer.max_steps=4", "plan.record=true"]
            run = session.train(f"planner_{name}_{scheme}".replace(" ", "_"), *words)
            told["runs"].append({"model": name, "quantization": scheme, "length": length, "rows": rows, **run})
            session.save()


def paged(session: Session, told: Row) -> None:
    """Paged against unpaged optimizers: with room, on a simulated smaller card, and beside a ballast."""
    told["arms"] = []
    reason = cannot_page()
    roomy: dict[str, Row] = {}
    for room, name, spiky in ARMS:
        arm: Row = {"room": room, "optimizer": name, "batches": "spiky" if spiky else "normal"}
        told["arms"].append(arm)
        try:
            if session.cpu or reason:
                arm.update(status="not applicable", error=reason or "there is no CUDA device")
                continue
            limits = _limits(room, name, roomy)
            words = [*shape(LLAMA_1B, 192, 2), *PAGED_RUN, f"optimizer={name}", *(SPIKY if spiky else ()), *limits]
            arm.update(session.train(f"paged_{room}_{name}_{arm['batches']}", *words))
            if room == "roomy":
                roomy[name] = arm
        except (Late, LookupError) as error:
            arm.update(status="not run", error=str(error))
        finally:
            session.save()
    if all(arm["status"] == "not run" for arm in told["arms"]):
        raise Late(told["arms"][0]["error"])


def _limits(room: str, name: str, roomy: dict[str, Row]) -> list[str]:
    """What takes memory away; a cap leaves half of the optimizer's state beside the peak of the paged roomy run.

    The state in 8 bits is a quarter of that in 32. Raises LookupError where no roomy run says how much that is.
    """
    if room == "roomy":
        return []
    if room == "ballast":
        return ["memory.ballast=auto"]
    pilot = roomy.get("paged_adamw", {})
    if pilot.get("status") != "completed" or not pilot.get("paged_bytes"):
        raise LookupError("no roomy paged run that a cap could be sized by")
    state = pilot["state_bytes"] / (4 if UNPAGED.get(name, name) == "adamw_8bit" else 1)
    return [f"memory.cap={(pilot['measured_peak_bytes'] + state / 2) / GIB:.3f}"]


def packed(session: Session, told: Row) -> None:
    """Eight trials in one pass against the same eight one after the other, and one trial in PEFT."""
    config, length, rows = SMALL_SHAPES["tiny llama"] if session.cpu else (LLAMA_1B, 128, 2)
    steps = 6 if session.cpu else 20
    words = [*shape(config, length, rows), *session.common(), f"trainer.max_steps={steps}", "callbacks=none"]
    words += ["plan.record=false", "quantization=nf4_double", "hydra/launcher=packed"]
    told.update(trials=TRIALS, length=length, rows=rows, steps=steps)
    for name, pack in (("packed", "auto"), ("solo", "off")):
        seeds = f"seed={','.join(map(str, range(TRIALS)))}"
        sweep = [seeds, f"hydra.launcher.pack={pack}", f"hydra.sweep.dir={name}", "hydra.launcher.token_budget=65536"]
        done = session.python("-m", "loralab.cli", "train", "-m", *words, *sweep)
        told[name] = _throughput([record.read(folder) for folder in record.find(session.work / name)])
        session.save()
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip()[-1000:]}")
    told["packed_over_solo"] = told["packed"]["tokens_per_s"] / told["solo"]["tokens_per_s"]
    if importlib.util.find_spec("peft") is None:
        told["peft"] = {"note": "peft is not installed"}
        return
    done = session.python("-m", "loralab.gpu", "--peft", json.dumps([config, length, rows, steps, session.cpu]))
    told["peft"] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"note": done.stderr[-1000:]}


def _throughput(found: list[Row]) -> Row:
    """Tokens per second over all trials; those of one pass share its seconds."""
    if not found:
        raise RuntimeError("no trial left a record")
    failed = [one["error"] for one in found if one["status"] != "completed"]
    if failed:
        raise RuntimeError(failed[0])
    seconds = sum(one["time"]["train_s"] / one["pack"]["size"] for one in found)
    tokens = sum(one["time"]["tokens"] for one in found)
    sizes = sorted(one["pack"]["size"] for one in found)
    return {"tokens": tokens, "train_s": seconds, "tokens_per_s": tokens / seconds, "pack_sizes": sizes}


def peft_speed(config: dict[str, Any], length: int, rows: int, steps: int, cpu: bool) -> Row:
    """One trial in PEFT over a dense base in a plain loop, no Lightning: tokens per second after two steps."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    device, keys = ("cpu" if cpu else "cuda"), {**models.SMALL_LLAMA, **config}  # what model=random makes of them
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(keys.pop("model_type"), **keys), dtype=torch.float32 if cpu else torch.bfloat16
    )
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).to(device).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    ids = torch.randint(0, 4096, (rows, length), device=device)
    begun = 0.0
    for step in range(steps + 2):
        if step == 2:
            begun = _now(device)
        with torch.autocast(device, torch.bfloat16, enabled=not cpu):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = _now(device) - begun
    return {"tokens_per_s": steps * rows * length / seconds, "train_s": seconds, "note": "dense base, plain loop"}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def write_rows(folder: Path, words: int = 700) -> None:
    """Documents longer than any window here, so that every row is cut to the same length."""
    for name, first in (("rows", 0), ("held_out", 1000)):
        lines: Iterator[str] = (json.dumps({"text": f"row {first + i} holds word {i} " * words}) for i in range(8))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


PARTS: dict[str, Callable[[Session, Row], None]] = {
    **{"machine": machine, "tests": tests, "planner": planner, "paged": paged, "packed": packed},
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 where every part was completed, 1 where one was not, 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m loralab.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to see that the parts work")
    parser.add_argument("--peft", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.peft:
        sys.stdout.write(json.dumps(peft_speed(*json.loads(chosen.peft))) + "\n")
        return 0
    if not (chosen.cpu or torch.cuda.is_available()):
        sys.stderr.write(NO_CUDA + "\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    out = Path(os.environ.get("OUT") or "runs/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(out, chosen.cpu, Path(folder))
        write_rows(session.work)
        for name, work in PARTS.items():
            session.part(name, work)
    log.info("%s", out / "gpu.json")
    return int(any(told["status"] != "completed" for told in session.found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
