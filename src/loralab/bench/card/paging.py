"""Paged against unpaged optimizers: with room, on a simulated smaller card and, on request, beside a ballast.

Managed memory is not given back before a process ends, so each paged run has a process of its own; unpaged ones share.
"""

from typing import Any

from loralab.bench.card.session import CardSession, Case, check_ends, run_all
from loralab.bench.card.stages import NF4, PER_USE, card_bytes
from loralab.bench.processes import Row
from loralab.memory.ledgers import GIB
from loralab.optim.optimizers import UNPAGED, cannot_page

Arm = tuple[str, str]  # (room, optimizer)
# a process each, in the order of what is learnt from them; the first says how large a cap has to be
PROCESSES: tuple[tuple[Arm, ...], ...] = (
    (("roomy", "paged_adamw"),),
    (("cap", "paged_adamw"),),
    (("cap", "adamw_32bit"), ("cap", "adamw_8bit"), ("roomy", "adamw_32bit")),
    (("cap", "paged_adamw_8bit"),),
)
BALLAST: tuple[tuple[Arm, ...], ...] = ((("ballast", "adamw_32bit"),), (("ballast", "paged_adamw"),))
SPARE = 4  # a driver that has to move more managed memory than the card has free can hang the card
ENDS = ("completed", "out_of_memory")  # running out of memory is what these arms are about


def paged(session: CardSession, stage: Row) -> None:
    """With room and under a cap."""
    _arms(session, stage, PROCESSES)


def ballast(session: CardSession, stage: Row) -> None:
    """A plain allocation takes the rest of the card, so that paged state has to leave it.

    Raises RuntimeError where the card has less free than ``SPARE`` times the managed memory that a run asks for, and
    LookupError where no run says how much that is.
    """
    if not session.rehearsal:
        stages = session.result["stages"]
        managed = max((arm.get("paged_bytes") or 0 for arm in stages.get("paged", {}).get("arms", [])), default=0)
        if not managed:
            raise LookupError("no paged run says how much managed memory a ballast would be beside")
        total, used = card_bytes(stages.get("machine", {}).get("nvidia_smi", "")) or (0, 0)
        if SPARE * managed > total - used:
            free = (total - used) / GIB
            raise RuntimeError(f"{managed / GIB:.2f} GiB of managed memory on a card with {free:.2f} GiB free")
    _arms(session, stage, BALLAST, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:False")


def _arms(session: CardSession, stage: Row, processes: tuple[tuple[Arm, ...], ...], **environment: Any) -> None:
    if session.rehearsal:
        stage["stood_in"] = "each paged optimizer's unpaged twin, with all of the host's memory: nothing is paged"
    elif reason := cannot_page():
        raise RuntimeError(f"nothing can be paged here: {reason}")
    stage["arms"] = []
    for arms in processes:
        cases = [_case(session, arm, stage["arms"]) for arm in arms]
        run_all(session, f"paged_{'_'.join(arms[0])}", stage["arms"], cases, **environment)
    check_ends(stage["arms"], ENDS)
    check_ends(arm for arm in stage["arms"] if arm["room"] == "roomy")


def _case(session: CardSession, arm: Arm, measured: list[Row]) -> Case:
    room, name = arm
    words = [*session.sizes.large.words(session.device), NF4, f"optimizer={name}", "optimizer.flat=true"]
    words += ["adapter.r=256", "adapter.lora_alpha=256", "memory.solo=true", "plan.record=false", PER_USE]
    words += ["trainer.max_steps=12", "callbacks.memory.every_n_steps=1"]
    words += ["memory.spiky_every=4", f"memory.spiky_length={session.sizes.spiky_length}"]
    return Case({"room": room, "optimizer": name}, words + ([] if session.rehearsal else limit(room, name, measured)))


def limit(room: str, name: str, measured: list[Row]) -> list[str]:
    """What takes memory away; a cap leaves half of the optimizer's state beside the peak of the paged run with room.

    The state in 8 bits is a quarter of that in 32. Raises LookupError where no run says how much that is.
    """
    if room != "cap":
        return ["memory.ballast=auto"] if room == "ballast" else []
    pilot = next((arm for arm in measured if (arm["room"], arm["optimizer"]) == ("roomy", "paged_adamw")), {})
    if pilot.get("status") != "completed" or not pilot.get("paged_bytes"):
        raise LookupError("no paged run with room that a cap could be sized by")
    state = pilot["state_bytes"] / (4 if UNPAGED.get(name, name) == "adamw_8bit" else 1)
    return [f"memory.cap={(pilot['measured_peak_bytes'] + state / 2) / GIB:.3f}"]
