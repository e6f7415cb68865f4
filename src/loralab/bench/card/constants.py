"""What CUDA and the libraries take before any model is there, beside what plans assume; and what the doctor says.

On a card: bytes of CUDA's context, of the cuBLAS workspaces (of the thread that runs forward, of autograd's) and of
bitsandbytes' kernels. On a CPU, in their place, what the process grows by.
"""

import json
import subprocess
import sys

import torch
from torch import nn

from loralab.bench.processes import SOURCE, Row
from loralab.bench.setup import describe_machine
from loralab.memory.ledgers import Host
from loralab.planning.plan import CONTEXT
from loralab.planning.workspace import THREADS, held_workspaces
from loralab.quantization.four_bit import FourBit
from loralab.records.environment import git_state

DOCTOR = [sys.executable, "-m", "loralab.cli.main", "doctor", "--json"]


class Constants:
    """An engine with one answer."""

    def __init__(self, setup: Row) -> None:
        """Nothing is loaded."""

    def answer(self, request: Row) -> Row:
        """``used_before``: bytes in use on the card before this process came, None where nobody knows."""
        measured = on_card(request["used_before"]) if torch.cuda.is_available() else on_cpu()
        planned = {"context_bytes": CONTEXT, "workspaces_bytes": held_workspaces(), "workspaces": THREADS}
        doctor = subprocess.check_output(DOCTOR, stdin=subprocess.DEVNULL)
        findings = json.loads(doctor)["checks"]
        machine = {**describe_machine(), "git": git_state(SOURCE)}  # of the code that is measured
        return {"constants": {**measured, "planned": planned}, "environment": machine, "doctor": findings}


def on_card(used_before: int | None) -> Row:
    measured: Row = {"context_bytes": None if used_before is None else _used() - used_before}
    x = torch.ones(512, 512, dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.mm(x, x)
    measured["workspace_bytes"] = torch.cuda.memory_allocated() - before
    (x.clone().requires_grad_(True) @ x).sum().backward()  # type: ignore[no-untyped-call]
    measured["workspaces_bytes"] = torch.cuda.memory_allocated() - before
    before = _used() - torch.cuda.memory_reserved()
    FourBit().convert(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16, device="cuda"))(x)
    torch.cuda.synchronize()
    return {**measured, "kernels_bytes": _used() - torch.cuda.memory_reserved() - before}


def on_cpu() -> Row:
    """Resident bytes."""
    host, x = Host(), torch.ones(512, 512)
    before = host.resident()
    torch.mm(x, x)
    product = host.resident()
    FourBit().convert(nn.Linear(512, 512, bias=False))(x)
    return {"first_product_bytes": product - before, "kernels_bytes": host.resident() - product}


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
