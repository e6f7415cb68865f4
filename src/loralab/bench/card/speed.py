"""Speed of K trials in one pass, beside PEFT with the Hugging Face Trainer, and with Liger's kernels in it."""

from importlib.util import find_spec
from pathlib import Path

from loralab.bench.card.session import TOO_LITTLE, CardSession, Skipped
from loralab.bench.card.shapes import DENSE, Shape, Speed
from loralab.bench.measurements import OURS, WARM_UP, counted, summary
from loralab.bench.parts import TRAINER, one_trial
from loralab.bench.processes import ProcessError, Row, WorkerProcess

LIGER = "PEFT + Liger"
PROFILED = 2  # steps behind the timed ones, whose launches are counted


def speed(session: CardSession, stage: Row) -> None:
    """For each base a process of loralab, for all lengths and numbers of trials, then one of the peers, in the same
    dtype and on the same rows. Raises Skipped where the card has memory for none of the bases."""
    stage["bases"] = []
    if session.rehearsal:
        stage["stood_in"] = (
            "torch's operators, for kernels launched: a CPU makes them for one trial after the other; "
            "Liger's kernels need a card"
        )
    for number, speed in enumerate(session.sizes.speed):
        bases: list[Row] = [_base(speed, shape) for shape in speed.shapes]
        stage["bases"] += bases
        paths = [session.work / f"ids{number}_{shape.length}.json" for shape in speed.shapes]
        _measure_ours(session, speed, bases, paths, f"speed{number}")
        if any("tokens_per_s" in side for base in bases for side in base["sides"]):
            _measure_peers(session, speed, bases, paths)
        for base in bases:
            compare(base)
    sides = [(base, side) for base in stage["bases"] for side in base["sides"]]
    skipped = [side["skipped"] for _, side in sides if "skipped" in side]
    if skipped and len(skipped) == len(sides):
        raise Skipped(f"{TOO_LITTLE}: {skipped[0]}")
    errors = [
        f"{base['model']}, {base['quantization']}, {base['length']} tokens, {side['name']}, {side['trials']} trials: "
        + side["error"]
        for base, side in sides
        if "error" in side
    ]
    if errors:
        raise RuntimeError("; ".join(errors))


def _base(speed: Speed, shape: Shape) -> Row:
    about = {"model": shape.name, "quantization": speed.quantization, "length": shape.length, "rows": shape.rows}
    return {**about, "sides": [], "notes": []}


def _measure_ours(session: CardSession, speed: Speed, bases: list[Row], paths: list[Path], folder: str) -> None:
    first = speed.shapes[0]
    words = [*first.words(session.device), f"quantization={speed.quantization}", "callbacks=none", "plan.record=false"]
    setup = {"words": words, "folder": str(session.work / folder)}
    with session.worker("loralab.bench.ours.Loralab", setup) as worker:
        for base, path in zip(bases, paths, strict=True):
            for trials in speed.trials:
                own = {"words": [f"model.max_length={base['length']}"], "rows_to": str(path)}
                _ask(session, worker, base, {"name": OURS, "trials": trials}, own)


def _measure_peers(session: CardSession, speed: Speed, bases: list[Row], paths: list[Path]) -> None:
    if why := _without(session):
        for base in bases:
            base["notes"] += why
    if find_spec("peft") is None:
        return
    setup = {"config": speed.shapes[0].config, "pad": 0, "dense": speed.quantization == DENSE}
    with session.worker("loralab.bench.peers.WithTrainer", setup) as worker:
        for name in (TRAINER, LIGER):  # whose kernels stay in the base
            for base, path in zip(bases, paths, strict=True):
                if path.is_file() and (name == TRAINER or not why):
                    _ask(
                        session, worker, base, {"name": name, "trials": 1}, {"rows": str(path), "liger": name == LIGER}
                    )


def _without(session: CardSession) -> list[str]:
    """Why peers are not measured."""
    missing = [name for name in ("peft", "liger_kernel") if find_spec(name) is None]
    notes = [f"{name} is not installed" for name in missing]
    if not missing and session.device == "cpu":
        notes.append("Liger's kernels are Triton's, which need a card")
    return notes


def _ask(session: CardSession, worker: WorkerProcess, base: Row, side: Row, own: Row) -> None:
    """Adds a side; tokens/s are those of all its trials."""
    base["sides"].append(side)
    steps = WARM_UP + session.sizes.steps + PROFILED
    try:
        request = {**one_trial(steps, base["rows"]), "trials": side["trials"], "profiled": PROFILED}
        answer = worker.ask({**request, **own})
    except ProcessError as error:
        side["error"] = str(error)
        return
    if "skipped" in answer:
        side["skipped"] = answer["skipped"]
        return
    side.update({key: answer.get(key) for key in ("peak_bytes", "pack_sizes", "trainable_parameters")})
    side.update(answer.get("launches") or {})
    if answer.get("pack_sizes", [side["trials"]]) != [side["trials"]]:
        side["skipped"] = f"one pass ran out of memory, and the trials went on in packs of {answer['pack_sizes']}"
        return
    losses, time = answer["losses"], summary(counted(answer))
    first = next((one["losses"] for one in base["sides"] if one["name"] == side["name"] and "losses" in one), losses)
    side["loss_difference"] = max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))
    side.update(step_s=time["median"], quartiles_s=time["quartiles"], steps=time["measurements"], losses=losses)
    side.update(tokens_per_s=side["trials"] * base["rows"] * base["length"] / time["median"])
    side["whole_s"] = answer["seconds"]
    session.save()


def compare(base: Row) -> None:
    """Tokens a second of each side over those of loralab with one trial a pass, and over the peers'."""
    rates = {(side["name"], side["trials"]): side["tokens_per_s"] for side in base["sides"] if "tokens_per_s" in side}
    against = {"over_alone": (OURS, 1), "over_peft": (TRAINER, 1), "over_liger": (LIGER, 1)}
    for side in base["sides"]:
        if "tokens_per_s" in side:
            for key, peer in against.items():
                side[key] = side["tokens_per_s"] / rates[peer] if peer in rates else None
