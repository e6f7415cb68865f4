"""The adapter of a run as PEFT opens it: most methods' files are PEFT's already, VeRA and BitFit are rewritten.

VeRA: PEFT cuts the matrices of all layers out of one pair (r, in) and (out, r). Where layers have several shapes, the
pair holds the matrices of each shape one below the other, and a layer's d is zero at those of the others, so that the
product is its own. BitFit: PEFT trains biases beside LoRA alone; A and B of one layer are zero.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import export, peft
from loralab.adapters.base import Adapter
from loralab.adapters.biases import BiasDelta
from loralab.adapters.files import WEIGHTS, read_state
from loralab.adapters.vera import SharedMatrices, VeRADelta
from loralab.adapters.virtual import name_unlike_peft
from loralab.artifacts.folders import new_folder, read_json
from loralab.artifacts.reopen import open_run, read_run, spec_of
from loralab.errors import ArtifactError, ConfigError, DiskError
from loralab.models.loading import skeleton
from loralab.quantization.base import base_linears, linear_shape
from loralab.records import card, fingerprints

log = logging.getLogger(__name__)

REWRITTEN = ("vera", "bitfit")
LACKING = {  # methods of loralab's own, and what opens them elsewhere
    "bottleneck": "it puts a non-linear function behind a layer, which no weight of the base can hold either",
    "intrinsic": "loralab merge writes the base with it merged, which transformers opens",
    "last_layer": "loralab merge writes the base with the trained blocks, which transformers opens",
    "full": "RUN/adapter is a whole model, which transformers opens as it is",
}


def export_run(run: Path, out: Path) -> list[str]:
    """Writes the adapter of the run in ``run`` as a PEFT folder ``out`` with a model card, and returns its files.

    Raises ConfigError where PEFT lacks the method or ``out`` holds something, ArtifactError where the run has no whole
    adapter, DiskError where ``out`` cannot be written.
    """
    record = read_run(run)
    own, method = run / "adapter", str(read_json(run / "adapter" / export.SPEC).get("method"))
    rewrite = not (own / peft.CONFIG).is_file()
    if rewrite and method not in REWRITTEN:
        raise ConfigError(_lacking(run, method))
    with new_folder(out) as partial:
        if rewrite:
            _rewrite(run, partial)
        else:
            _check(own, run, record)
            for name in (peft.CONFIG, WEIGHTS):
                _copy(own / name, partial / name)
        card.write(partial, record)
    return sorted(path.name for path in out.iterdir())


def _lacking(run: Path, method: str) -> str:
    reason = LACKING.get(method, "its class writes no file of PEFT's")
    return (
        f"adapter={method} is no method of PEFT's: {reason}; its files, in loralab's own format, are in "
        f"{run / 'adapter'}, which loralab generate {run} opens"
    )


def _check(own: Path, run: Path, record: Mapping[str, Any]) -> None:
    """Raises ArtifactError where the files are damaged or do not belong together; warns of what PEFT would not load."""
    config, state = read_json(own / peft.CONFIG), read_state(own / WEIGHTS)
    if broken := [name for name, value in state.items() if not bool(torch.isfinite(value).all())]:
        raise ArtifactError(f"{own / WEIGHTS}: {broken[0]} holds nan or infinite values; valid: finite ones")
    if config.get("peft_type") == "LORA":
        parameters = [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
        parts = [key.partition(".lora_")[0].removesuffix(".base_layer") for key in state]
        if lost := [name for name in [*config["target_modules"], *parameters] if f"{peft.PREFIX}{name}" not in parts]:
            raise ArtifactError(f"{own / WEIGHTS} holds nothing of {lost[0]}, which {own / peft.CONFIG} names")
    spec = spec_of(run, record)
    model = skeleton(spec.model, len(record["data"].get("id2label") or ()) or None)
    names = list(config.get("target_modules") or ())
    if others := peft.misread(model, names):
        log.warning(
            "PEFT does not load what was trained at %d of the %d layers (%s, ...): it takes them for a mixture's"
            " experts",
            *(len(others), len(names), others[0]),
        )
    if config.get("peft_type") in ("PROMPT_TUNING", "PREFIX_TUNING"):
        name_unlike_peft(spec.adapter, model)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    if fingerprints.file_digest(source) != fingerprints.file_digest(target):
        raise DiskError(f"{target} does not hold what was written to it")


def _rewrite(run: Path, folder: Path) -> None:
    opened = open_run(run)
    try:
        method = opened.spec.adapter.method
        config, state = (_vera if method == "vera" else _bitfit)(opened.adapter, opened.model)
        saved = dict(opened.adapter.saved_modules())
        for name, module in saved.items():
            own = module.state_dict()
            state.update({key: own[inside] for key, inside in peft.saved_keys(name, module).items()})
        config.update(peft.base_fields(opened.model), modules_to_save=list(saved) or None)
        peft.write(folder, config, {**peft.frozen_heads(opened.adapter), **state})
    finally:
        opened.close()


def _vera(adapter: Adapter, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    deltas = {name: delta for name, delta in adapter.adapted() if isinstance(delta, VeRADelta)}
    shapes = list({delta.shared: None for delta in deltas.values()})
    r = len(shapes[0].vera_A)
    state: dict[str, Tensor] = _stacked(shapes)
    for name, delta in deltas.items():
        first = r * shapes.index(delta.shared)
        d = torch.zeros(r * len(shapes))
        d[first : first + r] = delta.vera_lambda_d.detach().cpu()
        state[f"{peft.PREFIX}{name}.vera_lambda_d"] = d
        state[f"{peft.PREFIX}{name}.vera_lambda_b"] = delta.vera_lambda_b.detach()
    config = {
        "peft_type": "VERA",
        "r": r * len(shapes),
        "target_modules": list(deltas),
        "save_projection": True,
        "projection_prng_key": 0,  # the file holds the matrices
        "vera_dropout": 0.0,
        "fan_in_fan_out": peft.transposed(model, list(deltas)),
        "bias": "none",
    }
    return config, state


def _stacked(shapes: list[SharedMatrices]) -> dict[str, Tensor]:
    """The one pair that holds the matrices of all shapes, each in rows (of B: columns) of its own."""
    r = len(shapes[0].vera_A)
    a = torch.zeros(r * len(shapes), max(one.vera_A.shape[1] for one in shapes))
    b = torch.zeros(max(len(one.vera_B) for one in shapes), r * len(shapes))
    for place, one in enumerate(shapes):
        own = slice(r * place, r * (place + 1))
        a[own, : one.vera_A.shape[1]] = one.vera_A.cpu()
        b[: len(one.vera_B), own] = one.vera_B.cpu()
    return {"base_model.vera_A": a, "base_model.vera_B": b}


def _bitfit(adapter: Adapter, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    carrier = base_linears(model)[0]
    out_features, in_features = linear_shape(model.get_submodule(carrier))
    a, b = peft.lora_keys(carrier)
    state: dict[str, Tensor] = {a: torch.zeros(1, in_features), b: torch.zeros(out_features, 1)}
    for name, delta in adapter.adapted():
        if isinstance(delta, BiasDelta):
            bias: Any = model.get_submodule(name).bias
            state[peft.bias_key(name, name == carrier)] = bias.detach() + delta.bias_delta.detach()
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "target_modules": [carrier],
        "fan_in_fan_out": peft.transposed(model, [carrier]),
        "bias": "all",
    }
    return config, state
