"""``loralab bench``: its parts one after the other, what is measured on disk at once."""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from loralab.bench import parts
from loralab.bench.decision import decision
from loralab.bench.layer import layers
from loralab.bench.measurements import Table
from loralab.bench.parts import FULL, QUICK, BenchmarkSize
from loralab.bench.processes import Row
from loralab.bench.setup import BenchmarkSetup, describe_machine, physical_cores, prepare
from loralab.errors import ConfigError, Interrupted
from loralab.records import record

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
    "decision": f"the best of eight rates of each of four ranks, three seeds, start-up included; {FIT} all linear "
    "layers. Peers' times are of measured trials times their number; by the same rule: times loralab's share of steps",
}
# whole, --quick; on 2 cores
MINUTES = {"layer": (0.5, 0.3), "step": (4, 0.8), "sweep": (19, 1.3), "prefix": (2.5, 0.6), "decision": (25, 4)}
WITH_PEFT = {"step": parts.step, "sweep": parts.sweep, "prefix": parts.prefix, "decision": decision}


def bench(names: Sequence[str] = (), quick: bool = False, out: Path = Path("runs/bench/bench.json")) -> Row:
    """Measures the parts ``names`` (none: all) and returns what ``out`` then holds."""
    chosen = [name for name in ABOUT if name in names or (not names and name != "decision")]
    if set(chosen) & set(WITH_PEFT) and find_spec("peft") is None:
        raise ConfigError("loralab bench needs peft, which is not installed: pip install 'loralab[bench]'")
    minutes = sum(MINUTES[name][int(quick)] for name in chosen)
    log.info("about %.0f min on two CPU cores; what is measured is in %s at once", max(1, minutes), out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = QUICK if quick else FULL
    if device == "cuda":  # where a pass has room for more trials
        sweeps = tuple(one_sweep._replace(share=1) for one_sweep in size.sweeps)
        size = replace(size, rates=(*size.rates, 5e-4, 7e-4, 1.5e-3, 2.5e-3), sweeps=sweeps)
    with tempfile.TemporaryDirectory() as folder:
        return measure(chosen, size, out, Path(folder).resolve(), device, physical_cores())


def measure(names: Sequence[str], size: BenchmarkSize, out: Path, folder: Path, device: str, threads: int) -> Row:
    """All parts on ``threads`` threads; one that fails says so, and the next goes on."""
    machine = describe_machine()
    result = {
        **{"schema": 1, "cpu": machine["cpu"], "gpu": machine["gpu"], "threads": threads},
        **{"versions": machine["versions"], "git": machine["git"]},
        **{"dtype": "bfloat16" if device == "cuda" else "float32", "extent": repr(size), "parts": {}},
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        setup = prepare(folder, device, threads) if set(names) & set(WITH_PEFT) else None
        for name in names:
            _measure_part(name, result, size, out, setup)
    finally:
        torch.set_num_threads(before)
    return result


def _measure_part(name: str, result: Row, size: BenchmarkSize, out: Path, setup: BenchmarkSetup | None) -> None:
    part: Row = {"about": ABOUT[name], "status": "running", "error": None, "seconds": None}
    begun = time.monotonic()

    def save() -> None:
        part["seconds"] = round(time.monotonic() - begun, 1)
        record.replace(out, result)

    table = Table(save)
    part["rows"] = table.rows
    result["parts"][name] = part
    try:
        if setup is None or name == "layer":
            layers(table, size.layer_rounds)
        else:
            WITH_PEFT[name](table, setup, size)
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
