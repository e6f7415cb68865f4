"""``loralab plan``: predicted peak memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from loralab.cli.arguments import CONFIG_DIR, JSON, Arguments, Command
from loralab.errors import ConfigError

if TYPE_CHECKING:
    from loralab.planning.plan import Plan
    from loralab.training.specs import TrialSpec


def planned(overrides: list[str], config_dir: str | None = None) -> "tuple[TrialSpec, Plan]":
    """The spec of a run and its plan; of several processes those of one. Raises ConfigError."""
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    spec = trial_spec(compose(overrides, config_dir=config_dir), Path()).own_share
    if spec.trainer.spreads:
        raise ConfigError(
            "trainer.strategy=fsdp: no prediction is made for a base that is spread over devices; valid: trainer=ddp,"
            " where each has all of it, which is more"
        )
    from loralab.planning.foresee import check_packing, plan_here
    from loralab.planning.sizes import name_what_stays
    from loralab.training.trainer import quiet

    quiet()
    name_what_stays(spec.model)
    check_packing(spec)
    return spec, plan_here(spec, "cuda" if spec.plan.device == "auto" else spec.plan.device)


def run(arguments: Arguments) -> int:
    """Traces a training step, without weights, data or a GPU."""
    spec, predicted = planned(arguments.overrides(), arguments.config_dir)
    from loralab.planning import plan as planning
    from loralab.reporting.layout import terminal_width, wrapped

    if arguments.json:
        print(json.dumps(predicted.as_dict()))
        return 0
    print(render(predicted), flush=True)
    for line in assumed(spec, predicted):
        print("\n".join(wrapped(line, terminal_width())), flush=True)
    if spec.model.compile != "none":
        print(f"model.compile={spec.model.compile}: traced as it is computed without it, but for the padding")
    budget = spec.plan.budget_gib or 0.0
    for what in planning.WHATS if budget else ():  # each a few traces
        present = None if predicted.resident_bytes else predicted.device_bytes  # auto keeps nothing that is in the way
        fits = planning.largest(spec, budget * planning.GIB, what, predicted.device, present)
        print(f"largest {what} in {budget:g} GiB, the rest as it is: {fits:,}", flush=True)
    return 0


def assumed(spec: "TrialSpec", plan: "Plan") -> list[str]:
    """What the numbers hold for: lines of precision, dtypes and optimizer, and of dense weights that depend on a card
    that is not here."""
    import torch

    from loralab.planning.plan import GIB
    from loralab.planning.resident import SHARE, computed_in, dense_bytes

    precision, dtype = spec.trainer.precision_on(plan.device), str(computed_in(spec, plan.device))
    auto = " (auto)" if spec.trainer.precision == "auto" else ""
    lines = [
        f"one trial, trainer.precision={precision}{auto}: the base computes in {dtype.removeprefix('torch.')};"
        f" model.dtype={spec.model.dtype}, optimizer={spec.optimizer.name}"
    ]
    told = spec.plan.budget_gib or spec.memory.cap or torch.cuda.is_available()
    may_keep = spec.quantization.name != "none" and spec.quantization.dequantize == "auto" and spec.memory.continues
    if plan.device == "cuda" and may_keep and not told:
        dense = dense_bytes(spec, plan.device) / GIB
        lines.append(
            f"quantization.dequantize=auto: a card with {dense / SHARE:.3g} GiB free or more also keeps {dense:.3g} GiB"
            " of dense weights where they fit, which are not in these numbers; plan.budget_gib=N plans for its N GiB"
        )
    return lines


def render(plan: "Plan") -> str:
    """The plan for a terminal."""
    from loralab.cli.terminal import table
    from loralab.planning.plan import GIB

    totals = [("predicted peak", plan.predicted_peak_bytes, "allocated by torch")]
    if plan.device == "cuda":
        totals.append(("device", plan.device_bytes, "with context and fragmentation"))
    if plan.resident_bytes:
        totals.append(("dense weights", plan.resident_bytes, "kept beside the codes, part of the base below"))
    if plan.paged_bytes:
        totals.append(("pageable", plan.paged_bytes, "optimizer state, in none of the above"))
    rows = [(name, f"{size / GIB:.3f} GiB", note) for name, size, note in totals]
    for title, sizes in (("by phase", plan.by_phase), ("at the peak", plan.by_kind)):
        rows += [("", "", ""), (title, "", ""), *((f"  {name}", f"{b / GIB:.3f} GiB", "") for name, b in sizes.items())]
    fed = f"{plan.rows} row{'s' * (plan.rows != 1)} of {plan.length} tokens on {plan.device}"
    fits = ", ".join(f"{card}: {'yes' if fits else 'no'}" for card, fits in plan.fits.items())
    styles = {"by phase": "bold", "at the peak": "bold", "predicted peak": "bold"}
    return f"{fed}\n\n{table(rows, right=[1], styles=styles)}\n\nfits in {fits}"


PLAN = Command(
    name="plan",
    summary="predicted peak memory, without weights or GPU",
    about="Predicts the peak memory of a run by phase and by kind, for CUDA unless plan.device=cpu.\n"
    "plan.budget_gib=24 also finds the largest batch, length and rank that fit.",
    usage="[k=v ...]",
    examples={
        "loralab plan model=llama2_7b quantization=nf4_double adapter.r=64": "will it fit?",
        "loralab plan plan.device=cpu plan.budget_gib=4": "what would fit in 4 GiB",
    },
    writes="nothing.",
    run=run,
    own_flags=(JSON, CONFIG_DIR),
)
