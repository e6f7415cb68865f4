"""``loralab quantize``: every scheme on the same weights: bits, bytes and errors.

One dense model is loaded. Scheme by scheme its layers are converted, compared with their own dense weights, and, to
evaluate, put in place of the dense layers for one pass over the data.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Len, MinLen
from torch import Tensor, nn

from loralab.analysis.code_use import CodeUse, outlier_damage
from loralab.analysis.evaluation import Evaluation
from loralab.data.base import DataSpec
from loralab.errors import ConfigError, DataError
from loralab.models import loading, pretrained
from loralab.models.feeding import encoded_rows
from loralab.numerics import outliers
from loralab.numerics.defined import defined, root
from loralab.quantization.base import Quantizer, dense_weight, packed_bytes, quantizable
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.loading import replace
from loralab.quantization.none import NoQuantization
from loralab.quantization.sequences import watch_if_needed
from loralab.spec import Count, Natural, Whole, spec
from loralab.training.trainer import TrainerSpec, quiet

log = logging.getLogger(__name__)

BULK = 3.0  # in standard deviations: what lies inside is the bulk
INPUTS = {
    "outlier_features": "{rows} rows of N(0, 1) in which 6 of 4096 features (at least one) hold a value of one sign"
    " between 6 and 60 at 75% of the rows: the outlier features of LLM.int8(), section 4",
    "normal": "{rows} rows of N(0, 1), which reach no outlier threshold",
    "captured": "what each layer is given for the first {rows} validation tokens, in their sequences, without padding",
}


@spec("study")
class StudySpec:
    """What is quantized, by which schemes. ``weights``: model, or the name of a synthetic distribution."""

    weights: Literal["model", "gauss", "one_outlier", "sparse_outliers", "outlier_columns", "student_t4"] = "model"
    # of a synthetic weight (out, in)
    shape: Annotated[list[Annotated[Whole, Ge(8)]], Len(2, 2), "two numbers of at least 8: (out, in)"] = field(
        default_factory=lambda: [2048, 2048]
    )
    rows: Count = 512  # of x, for the matmul error
    inputs: Literal["auto", "outlier_features", "normal", "captured"] = "auto"  # x; auto: captured to evaluate a model
    seed: Natural = 0  # of x and of synthetic weights
    # name -> {option of conf/quantization, other keys}
    schemes: Annotated[dict[str, Any], MinLen(1), "a mapping with at least one scheme, such as {nf4: {}}"] = field(
        default_factory=dict
    )

    def chosen(self, evaluate: bool) -> str:
        """Which inputs the matmul error is measured with. Raises ConfigError where there is nothing to capture
        or to evaluate."""
        if self.inputs == "captured" and not evaluate:
            raise ConfigError(
                "study.inputs=captured needs --evaluate, which runs the model on data; valid: auto, outlier_features,"
                " normal"
            )
        if self.weights != "model" and evaluate:
            raise ConfigError(f"--evaluate needs a model, and study.weights={self.weights} is a single matrix")
        return ("captured" if evaluate else "outlier_features") if self.inputs == "auto" else self.inputs


def layer_errors(weight: Tensor, frozen: nn.Module, inputs: Sequence[Tensor], sigma: float | None) -> dict[str, float]:
    """Sums over one layer, in float64 on the host.

    weight (out, in) float32; inputs: sequences (s, in); sigma of the bulk, None where all weights are 0.
    """
    dense = frozen.dense(torch.float32) if isinstance(frozen, FrozenLinear) else weight
    error, bulk = dense - weight, weight.abs() < BULK * (sigma or 0.0)
    sums = {
        "weights": weight.numel(),
        "bytes": packed_bytes(frozen),
        "error": _squares(error),
        "norm": _squares(weight),
        "bulk_error": _squares(error[bulk]),
        "bulk_norm": _squares(weight[bulk]),
        "zeroed": int(((dense == 0) & (weight != 0)).sum()),
        "largest": float(error.abs().max()),
        "product_error": 0.0,
        "product_norm": 0.0,
    }
    for x in inputs:
        exact = x @ weight.t()
        sums["product_norm"] += _squares(exact)
        if isinstance(frozen, FrozenLinear):
            sums["product_error"] += _squares(frozen.product(x, None) - exact)
    return sums


def summary(errors: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The figures over all layers that JSON, page and terminal show; None where ``undefined`` has the reason."""
    total = {key: sum(sums[key] for sums in errors.values()) for key in next(iter(errors.values()))}
    relative = root(total["error"], total["norm"])
    layers = {
        name: root(sums["error"], sums["norm"]) if math.isfinite(sums["error"]) else None
        for name, sums in errors.items()
    }
    worst = sorted(((name, value) for name, value in layers.items() if value is not None), key=lambda pair: -pair[1])
    values = {
        "bits_per_parameter": 8 * total["bytes"] / total["weights"],
        "bytes": total["bytes"],
        "weights": total["weights"],
        "relative_rmse": relative,
        "snr_db": -20 * math.log10(relative) if relative else None,
        "bulk_relative_rmse": root(total["bulk_error"], total["bulk_norm"]),
        "matmul_relative_error": root(total["product_error"], total["product_norm"]),
        "zeroed_share": total["zeroed"] / total["weights"],
        "largest_error": max([0.0, *(sums["largest"] for sums in errors.values())]),
        "worst_layers": [{"layer": name, "relative_rmse": value} for name, value in worst[:3]],
        "layers": layers,
    }
    overflow = not math.isfinite(total["product_norm"] + total["product_error"])
    reasons = {
        "relative_rmse": "every weight is 0",
        "snr_db": "infinite: the error is 0" if total["norm"] else "every weight is 0",
        "bulk_relative_rmse": "no weight other than 0 is within 3 sigma",
        "matmul_relative_error": "x W^T overflows float32" if overflow else "x W^T is 0, or no input is known",
    }
    result = defined(values, reasons)
    if undefined_layers := [name for name, value in layers.items() if value is None]:
        reason = "every weight is 0, or not finite when dequantized: " + ", ".join(undefined_layers)
        result["undefined"] = {**result.get("undefined", {}), "layers": reason}
    return result


class SchemeComparison:
    """A model with dense weights, on which schemes are measured one after the other; each leaves it as it was."""

    def __init__(self, spec: StudySpec, model: nn.Module, names: list[str], sigma: float | None = None) -> None:
        """``sigma``: of the bulk, where it is known; else each layer's own."""
        self.spec, self.model, self.names, self.sigma = spec, model, names, sigma
        self.captured: Mapping[str, list[Tensor]] | None = None  # layer -> its inputs (s, in), sequence by sequence
        self._sigmas: dict[str, float | None] = {}
        self._peaks: dict[str, float] | None = None  # of each layer: its largest weight over its root mean square

    def scheme(self, quantizer: Quantizer, score: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
        """Convert every layer, compare, and with ``score`` evaluate the converted model. Raises ConfigError where
        the scheme does not fit a layer."""
        errors, dense, frozen, use = {}, {}, {}, CodeUse()
        for name in self.covered(quantizer):
            layer = self.model.get_submodule(name)
            weight = dense_weight(layer).float()
            converted = quantizer.convert(layer, name)
            errors[name] = layer_errors(weight, converted, self._inputs(name, weight), self._sigma(name, weight))
            use.add(weight, converted)
            if score is not None:
                dense[name], frozen[name] = layer, converted
        if not errors:
            raise ConfigError(
                f"quantization.skip_modules={quantizer.skip_modules} leaves no layer to quantize; valid: fewer of them"
            )
        damage = self._damage(quantizer, list(errors))
        result = {**summary(errors), **use.summary(), **({"outlier": damage} if damage else {})}
        if score is None:
            return result
        self._swap(dense, frozen)
        try:
            scored = score()
        finally:
            self._swap(frozen, dense)
        undefined = {**result.pop("undefined", {}), **scored.pop("undefined", {})}
        return {**result, **scored, **({"undefined": undefined} if undefined else {})}

    def _damage(self, quantizer: Quantizer, names: list[str]) -> dict[str, Any] | None:
        """What ``outlier_damage`` says of the layer whose largest weight is most standard deviations from 0."""
        if self._peaks is None:
            weights = {name: dense_weight(self.model.get_submodule(name)).float() for name in self.names}
            self._peaks = {name: float(w.abs().max() / w.square().mean().sqrt()) for name, w in weights.items()}
        peaks = {name: self._peaks[name] for name in names if math.isfinite(self._peaks[name])}
        if not peaks:
            return None
        name = max(peaks, key=lambda name: peaks[name])
        return outlier_damage(quantizer, name, self.model.get_submodule(name))

    def covered(self, quantizer: Quantizer) -> list[str]:
        """The names of the layers that the scheme quantizes."""
        taken = quantizable(self.model, quantizer) if quantizer.skip_modules else self.names
        return [name for name in self.names if name in set(taken)]

    def census(self) -> dict[str, dict[str, Any]]:
        """Per layer: how far its weights are from a normal distribution's."""
        return {name: outliers.census(dense_weight(self.model.get_submodule(name)).float()) for name in self.names}

    def _sigma(self, name: str, weight: Tensor) -> float | None:
        if name not in self._sigmas:
            self._sigmas[name] = self.sigma or outliers.robust_sigma(weight)
        return self._sigmas[name]

    def _inputs(self, name: str, weight: Tensor) -> list[Tensor]:
        """Sequences (s, in) float32 for the product; empty where no input of the layer was captured."""
        if self.captured is not None:
            return [x.to(weight.device, torch.float32) for x in self.captured.get(name, [])]
        # another seed than the one of the weights
        random = torch.Generator().manual_seed(10**6 * (self.spec.seed + 1) + self.names.index(name))
        draw = outliers.ACTIVATIONS[self.spec.chosen(evaluate=False)]
        return [draw(self.spec.rows, weight.shape[1], random).to(weight.device)]

    def _swap(self, old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> None:
        replace(self.model, {id(layer): new[name] for name, layer in old.items()})
        watch_if_needed(self.model)


def compare_schemes(
    spec: StudySpec,
    quantizers: Mapping[str, Quantizer],
    model_spec: pretrained.Pretrained,
    data: DataSpec,
    trainer: TrainerSpec,
    evaluate: bool,
) -> dict[str, Any]:
    """The whole comparison as plain data. Raises ConfigError where no scheme fits."""
    quiet()
    chosen = spec.chosen(evaluate)
    about: dict[str, Any] = {"inputs": {"kind": chosen, "of": INPUTS[chosen].format(rows=spec.rows)}}
    if spec.weights != "model":
        return _result(_synthetic(spec), {"weights": spec.weights, "shape": list(spec.shape), **about}, quantizers)
    model_spec.check()
    tokenizer = model_spec.load_tokenizer() if evaluate else None
    encoded = None
    if evaluate and not data.from_base:
        encoded = encoded_rows(data, model_spec, tokenizer)
        if encoded.splits.kind == "scores":
            raise ConfigError("model.num_labels=1: --evaluate compares predictions of classes or tokens, not scores")
    labels = len(encoded.splits.labels) or None if encoded else None
    base = loading.load(model_spec, NoQuantization(), tokenizer, labels, trainer.device)
    model = base.model.to(trainer.device).requires_grad_(False)
    subject = SchemeComparison(spec, model, quantizable(model, NoQuantization()))
    if not subject.names:
        raise ConfigError(
            f"model: {type(model).__name__} has no linear layer inside its base model, and schemes are compared on"
            " those; valid: a model with nn.Linear or Conv1D layers"
        )
    about = {"weights": base.spec.name_or_path or "random", "fingerprint": base.fingerprint, **about}
    if not evaluate:
        return _result(subject, about, quantizers)
    encoded = encoded or data.sample(model, tokenizer, model_spec.task, model_spec.length)
    if not len(encoded.validation):
        raise DataError(f"data: the validation split of {encoded.splits.name} is empty, and --evaluate scores it")
    pad = tokenizer.pad_token_id if tokenizer else 0
    evaluation = Evaluation(model, model_spec.task, encoded, data.batch_size, pad)
    about["dense"] = evaluation.reference(subject.names, spec.rows if chosen == "captured" else 0)
    subject.captured = evaluation.inputs if chosen == "captured" else None
    about["data"] = {
        "name": encoded.splits.name,
        "fingerprint": encoded.splits.fingerprint,
        "rows": len(encoded.validation),
        "targets": len(evaluation.dense_loss),
    }
    about["outlier_features"] = evaluation.outlier_features()
    return _result(subject, about, quantizers, evaluation)


def _result(
    subject: SchemeComparison,
    about: dict[str, Any],
    quantizers: Mapping[str, Quantizer],
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    schemes: dict[str, Any] = {}
    refused: ConfigError | None = None
    for name, quantizer in quantizers.items():
        try:
            schemes[name] = subject.scheme(quantizer, evaluation)
        except ConfigError as error:
            log.warning("%s: left out: %s", name, error)
            schemes[name], refused = {"error": str(error)}, error
            continue
        schemes[name]["settings"] = {"name": quantizer.name, **asdict(quantizer)}
        log.info("[%d/%d] %s", len(schemes), len(quantizers), name)
    if refused is not None and all("error" in row for row in schemes.values()):
        raise refused
    layers = subject.census()
    for name, counted in (evaluation.census() if evaluation else {}).items():
        layers[name].update(counted)
    return {**about, "schemes": schemes, "layers": layers}


def _synthetic(spec: StudySpec) -> SchemeComparison:
    out_features, in_features = spec.shape
    layer = nn.Linear(in_features, out_features, bias=False)
    random = torch.Generator().manual_seed(spec.seed)
    layer.weight = nn.Parameter(outliers.SYNTHETIC[spec.weights]((out_features, in_features), random), False)
    return SchemeComparison(spec, nn.ModuleDict({spec.weights: layer}), [spec.weights], sigma=outliers.SIGMA)


def _squares(values: Tensor) -> float:
    return float(values.double().square().sum())
