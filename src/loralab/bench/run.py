"""``loralab bench``: its parts one after the other, what is measured on disk at once."""

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loralab.bench import parts
from loralab.bench.ground import Ground, prepare
from loralab.bench.layer import layers
from loralab.bench.parts import FULL, QUICK, Extent
from loralab.bench.table import Table
from loralab.bench.worker import Row
from loralab.errors import ConfigError, Interrupted
from loralab.records import record
from loralab.records.environment import environment

log = logging.getLogger(__name__)

FIT = (
    "NF4 double, the same rows in the same order, each batch padded to its longest row, AdamW at a constant rate, "
    "clipping at 1, LoRA on"
)
OWN = (
    "Peers are handed token ids and log, validate 16 rows and save nothing; loralab reads text, tokenizes, validates "
    "the same rows, and writes metrics, records, adapters"
)
ABOUT = {
    "layer": "one NF4 layer (double quantization), forward and backward",
    "step": f"a step of a single run, start-up left out; {FIT} all linear layers, r = 8, the same first A",
    "sweep": f"a whole sweep, start-up included; {FIT} all linear layers, r 2 to 16, lora_alpha = 2 r, four rates "
    f"(CUDA: eight). {OWN}, the table and the page of the sweep. A peer's time is scaled from measured_trials",
    "prefix": f"a whole sweep of 8 trials, start-up included; {FIT} the last block only. {OWN} and the sweep's page",
}
MINUTES = {
    "layer": (0.5, 0.3),
    "step": (4, 0.8),
    "sweep": (19, 1.3),
    "prefix": (2.5, 0.6),
}  # whole, --quick; on 2 cores
WITH_PEFT = {"step": parts.step, "sweep": parts.sweep, "prefix": parts.prefix}


def bench(names: Sequence[str] = (), quick: bool = False, out: Path = Path("runs/bench/bench.json")) -> Row:
    """Measures the parts ``names`` (none: all) and returns what ``out`` then holds."""
    chosen = [name for name in ABOUT if name in names or not names]
    if set(chosen) & set(WITH_PEFT) and find_spec("peft") is None:
        raise ConfigError("loralab bench needs peft, which is not installed: pip install 'loralab[bench]'")
    minutes = sum(MINUTES[name][int(quick)] for name in chosen)
    log.info("about %.0f min on two CPU cores; what is measured is in %s at once", max(1, minutes), out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extent = QUICK if quick else FULL
    if device == "cuda":  # where a pass has room for more trials
        sweeps = tuple(one._replace(share=1) for one in extent.sweeps)
        extent = replace(extent, rates=(*extent.rates, 5e-4, 7e-4, 1.5e-3, 2.5e-3), sweeps=sweeps)
    with tempfile.TemporaryDirectory() as folder:
        return measure(chosen, extent, out, Path(folder).resolve(), device, physical_cores())


def measure(names: Sequence[str], extent: Extent, out: Path, folder: Path, device: str, threads: int) -> Row:
    """All parts on ``threads`` threads; one that fails is told, and the next goes on."""
    found = _head(device, threads, extent)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ground = prepare(folder, device, threads) if set(names) & set(WITH_PEFT) else None
        for name in names:
            _part(name, found, extent, out, ground)
    finally:
        torch.set_num_threads(before)
    return found


def _part(name: str, found: Row, extent: Extent, out: Path, ground: Ground | None) -> None:
    part: Row = {"about": ABOUT[name], "status": "running", "error": None, "seconds": None}
    begun = time.monotonic()

    def save() -> None:
        part["seconds"] = round(time.monotonic() - begun, 1)
        record.replace(out, found)

    table = Table(save)
    part["rows"] = table.rows
    found["parts"][name] = part
    try:
        if ground is None or name == "layer":
            layers(table, extent.layer_rounds)
        else:
            WITH_PEFT[name](table, ground, extent)
        failed = [f"{row['what']}, {row['name']}" for row in table.rows if "error" in row]
        part.update(status="failed" if failed else "completed", error="; ".join(failed) or None)
    except (KeyboardInterrupt, Interrupted):
        part["status"] = "interrupted"
        raise
    except Exception as error:
        log.warning("%s: %s", name, error)
        part.update(status="failed", error=f"{type(error).__name__}: {error}")
    finally:
        save()


def _head(device: str, threads: int, extent: Extent) -> Row:
    machine = environment()
    return {
        "schema": 1,
        "cpu": machine["cpu"],
        "gpu": machine["gpu"],
        "threads": threads,
        "versions": {**machine["versions"], "peft": _version("peft"), "accelerate": _version("accelerate")},
        "git": machine["git"],
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "extent": repr(extent),
        "parts": {},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once (Linux; elsewhere the logical ones)."""
    usable: Any = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    info = Path("/proc/cpuinfo")
    cores = set()
    for block in info.read_text().split("\n\n") if info.is_file() else ():
        keys = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        if int(keys.get("processor", -1)) in usable:
            cores.add((keys.get("physical id"), keys.get("core id", keys.get("processor"))))
    return len(cores) or len(usable)
