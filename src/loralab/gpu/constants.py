"""``python -m loralab.gpu.constants JOB ANSWERS``: the machine, and what its libraries take before any model is there.

On a card: bytes of CUDA's context, of the cuBLAS workspaces (of the thread that runs forward, of autograd's) and of
bitsandbytes' kernels, beside what plans assume. On a CPU, in their place, what the process grows by.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from loralab.cli.doctor import examine
from loralab.gpu.lab import Row, answer
from loralab.memory.ledgers import Host
from loralab.planning.plan import CONTEXT
from loralab.planning.workspace import THREADS, held_workspaces
from loralab.quantization.four_bit import FourBit
from loralab.records.environment import environment


def on_card(used_before: int | None) -> Row:
    """``used_before``: bytes in use on the card before this process came."""
    used = _used()
    found: Row = {"context_bytes": None if used_before is None else used - used_before}
    x = torch.ones(512, 512, dtype=torch.bfloat16, device="cuda")
    held = torch.cuda.memory_allocated()
    torch.mm(x, x)
    found["workspace_bytes"] = torch.cuda.memory_allocated() - held
    (x.clone().requires_grad_(True) @ x).sum().backward()  # type: ignore[no-untyped-call]
    found["workspaces_bytes"] = torch.cuda.memory_allocated() - held
    before = _used() - torch.cuda.memory_reserved()
    FourBit().convert(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16, device="cuda"))(x)
    torch.cuda.synchronize()
    found["kernels_bytes"] = _used() - torch.cuda.memory_reserved() - before
    found["planned"] = {"context_bytes": CONTEXT, "workspaces_bytes": held_workspaces(), "workspaces": THREADS}
    return found


def on_cpu() -> Row:
    """Resident bytes."""
    host = Host()
    before = host.resident()
    x = torch.ones(512, 512)
    torch.mm(x, x)
    product = host.resident()
    FourBit().convert(nn.Linear(512, 512, bias=False))(x)
    return {
        "first_product_bytes": product - before,
        "kernels_bytes": host.resident() - product,
        "planned": {"context_bytes": CONTEXT, "workspaces_bytes": held_workspaces(), "workspaces": THREADS},
    }


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def main(asked: Path, answers: Path) -> None:
    """JOB: {used_before}."""
    job = json.loads(asked.read_text("utf-8"))
    card = torch.cuda.is_available()
    answer(answers, {"constants": on_card(job["used_before"]) if card else on_cpu()})
    answer(answers, {"environment": environment(), "doctor": examine()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
