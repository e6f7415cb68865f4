"""``python -m loralab.bench.card``: the stages one after the other, in at most nine minutes; see ``make gpu``."""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "lightning", "transformers", "safetensors", "torchmetrics", "hydra", "omegaconf", "bitsandbytes")
# seconds; what a stage leaves is passed on to the next. The ballast is last, and its arms ask for 20 s each
BUDGETS = {
    **{"machine": 45, "tests": 60, "speed": 200, "plan": 75, "paged": 80, "resume": 35, "halving": 25, "workers": 25},
    "ballast": 20,
}
MOST_S = {False: 530.0, True: 580.0}  # of all stages; the rest is this program's own start
NO_CUDA = (
    "make gpu: torch sees no CUDA device, and every stage is about one: memory of a card, paged optimizers, speed. "
    "Run it on a machine with a card and a CUDA build of torch (nvidia-smi shows the card, `loralab doctor` what torch "
    "sees of it); `make gpu REHEARSE=1` goes through the same stages with tiny shapes on the CPU."
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 where every stage is ok or skipped, 1 where one is not, 2 where there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="python -m loralab.bench.card", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to see that the stages work")
    parser.add_argument("--ballast", action="store_true", help="also page beside an allocation that fills the card")
    chosen = parser.parse_args(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"make gpu: {sys.executable} has no {', '.join(missing)}. Name an interpreter that has them "
            "(make gpu PYTHON=...), add a folder of them (PYTHONPATH=...), or let `make setup` make an environment.\n"
        )
        return 2
    import torch

    if not (chosen.rehearse or torch.cuda.is_available()):
        sys.stderr.write(NO_CUDA + "\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no process is left behind
    return measure(Path(os.environ.get("OUT") or "runs/gpu").resolve(), chosen.rehearse, chosen.ballast)


def measure(out: Path, rehearsal: bool, ballast: bool) -> int:
    """Runs the stages and leaves gpu.json, index.html and records.jsonl in ``out``."""
    from loralab.bench.card.session import CardSession

    out.mkdir(parents=True, exist_ok=True)
    work = stages(ballast)
    with tempfile.TemporaryDirectory() as folder:
        session = CardSession(out, rehearsal, Path(folder), budgets(list(work), MOST_S[rehearsal]))
        for name, stage in work.items():
            session.stage(name, stage)
    logging.getLogger(__name__).info("%s", out / "gpu.json")
    return int(any(stage["status"] not in ("ok", "skipped") for stage in session.result["stages"].values()))


def stages(ballast: bool) -> dict[str, Callable[..., None]]:
    """In the order of what is wanted most; what may hang a card comes last, and only where it is asked for."""
    from loralab.bench.card import paging, speed, stages

    first = (stages.machine, stages.tests, speed.speed, stages.plan)
    then = (paging.paged, stages.resume, stages.halving, stages.workers)
    return {stage.__name__: stage for stage in (*first, *then, *([paging.ballast] if ballast else []))}


def budgets(names: list[str], most: float) -> dict[str, float]:
    """``most`` seconds, shared out in the proportions of BUDGETS."""
    total = sum(BUDGETS[name] for name in names)
    return {name: most * BUDGETS[name] / total for name in names}


if __name__ == "__main__":
    sys.exit(main())
