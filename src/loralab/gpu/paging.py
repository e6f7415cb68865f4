"""Paged against unpaged optimizers: with room, on a simulated smaller card and, on request, beside a ballast.

Managed memory is not given back before a process ends, so each paged run has a process of its own; unpaged ones share.
"""

from loralab.gpu.session import Row, Session
from loralab.gpu.shapes import common, sizes
from loralab.gpu.stages import complain, trained
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


def paged(session: Session, told: Row) -> None:
    """With room and under a cap."""
    _arms(session, told, PROCESSES)


def ballast(session: Session, told: Row) -> None:
    """A plain allocation takes the rest of the card, so that paged state has to leave it.

    Raises RuntimeError where the card has less free than ``SPARE`` times the managed memory that a run asks for.
    """
    if not session.rehearsal:
        asked, free = managed_bytes(session), free_bytes(session)
        if SPARE * asked > free:
            raise RuntimeError(f"{asked / GIB:.2f} GiB of managed memory on a card with {free / GIB:.2f} GiB free")
    _arms(session, told, BALLAST, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})


def managed_bytes(session: Session) -> float:
    """What a paged run asks for, by the one with room. Raises LookupError where there is none."""
    arms = session.found["stages"].get("paged", {}).get("arms", [])
    found = next((one["paged_bytes"] for one in arms if one.get("paged_bytes")), None)
    if found is None:
        raise LookupError("no paged run says how much managed memory a ballast would be beside")
    return float(found)


def free_bytes(session: Session) -> float:
    """Of the first card, as nvidia-smi had it before any stage; 0 where it did not answer."""
    words = session.found["stages"].get("machine", {}).get("nvidia_smi", "").splitlines()[:1] or [""]
    sizes = [part.strip().removesuffix(" MiB") for part in words[0].split(",")[-2:]]
    return (int(sizes[0]) - int(sizes[1])) * 2.0**20 if all(size.isdigit() for size in sizes) else 0.0


def _arms(
    session: Session, told: Row, processes: tuple[tuple[Arm, ...], ...], environment: dict[str, str] | None = None
) -> None:
    reason = "there is no CUDA device" if session.rehearsal else cannot_page()
    if session.rehearsal:
        told["stood_in"] = "each paged optimizer's unpaged twin, with all of the host's memory: nothing is paged"
    elif reason:
        raise RuntimeError(f"nothing can be paged here: {reason}")
    told["arms"] = []
    for arms in processes:
        cases = [_case(session, arm, told["arms"]) for arm in arms]
        for about, found in trained(session, f"paged_{'_'.join(arms[0])}", cases, environment):
            told["arms"].append({**about, **found})
            session.save()
    complain(told["arms"], ENDS)
    complain([one for one in told["arms"] if one["room"] == "roomy"])


def _case(session: Session, arm: Arm, found: list[Row]) -> tuple[Row, list[str]]:
    room, name = arm
    measured = sizes(session.rehearsal)
    words = [*measured.large.words(), *common(session.rehearsal), f"optimizer={name}", "optimizer.flat=true"]
    words += ["quantization=nf4_double", "adapter.r=256", "adapter.lora_alpha=256", "memory.solo=true"]
    words += ["plan.record=false", "trainer.max_steps=12", "callbacks.memory.every_n_steps=1"]
    words += ["memory.spiky_every=4", f"memory.spiky_length={measured.spiky_length}"]
    limits = [] if session.rehearsal else limit(room, name, found)
    return {"room": room, "optimizer": name}, [*words, *limits]


def limit(room: str, name: str, found: list[Row]) -> list[str]:
    """What takes memory away; a cap leaves half of the optimizer's state beside the peak of the paged run with room.

    The state in 8 bits is a quarter of that in 32. Raises LookupError where no run says how much that is.
    """
    if room == "roomy":
        return []
    if room == "ballast":
        return ["memory.ballast=auto"]
    pilot = next((one for one in found if (one["room"], one["optimizer"]) == ("roomy", "paged_adamw")), {})
    if pilot.get("status") != "completed" or not pilot.get("paged_bytes"):
        raise LookupError("no paged run with room that a cap could be sized by")
    state = pilot["state_bytes"] / (4 if UNPAGED.get(name, name) == "adamw_8bit" else 1)
    return [f"memory.cap={(pilot['measured_peak_bytes'] + state / 2) / GIB:.3f}"]
