"""``loralab quantize``: every scheme on the same weights, weighed and held against them.

One dense model is loaded. Scheme by scheme its layers are converted, compared with their own dense weights, and, to
evaluate, put in place of the dense layers for one pass over the data.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loralab import models
from loralab.data.base import DataSpec
from loralab.data.encoding import encode
from loralab.errors import ConfigError, DataError, nearest
from loralab.evaluation import Evaluation
from loralab.numerics import outliers
from loralab.quantization.base import Quantizer, dense_weight, packed_bytes, quantizable
from loralab.quantization.loading import replace
from loralab.quantization.none import NoQuantization
from loralab.trainers import TrainerSpec, quiet

log = logging.getLogger(__name__)

BULK = 3.0  # in standard deviations: what lies inside is the bulk
OUTLIER = 6.0


@dataclass(frozen=True)
class StudySpec:
    """What is quantized, by which schemes. ``weights``: model, or the name of a synthetic distribution."""

    weights: str = "model"
    shape: list[int] = field(default_factory=lambda: [2048, 2048])  # of a synthetic weight (out, in)
    rows: int = 512  # of x ~ N(0, 1), for the matmul error
    seed: int = 0  # of x and of synthetic weights
    schemes: dict[str, Any] = field(default_factory=dict)  # name -> {option of conf/quantization, other keys}

    def __post_init__(self) -> None:
        valid = ["model", *outliers.SYNTHETIC]
        if self.weights not in valid:
            raise ConfigError(f"study.weights={self.weights!r} is unknown; {nearest(self.weights, valid)}")
        if len(self.shape) != 2 or min(self.shape) < 8:
            raise ConfigError(f"study.shape={self.shape} must be two numbers of at least 8: (out, in)")
        if self.rows < 1 or self.seed < 0:
            raise ConfigError(f"study.rows={self.rows} must be at least 1, and study.seed={self.seed} at least 0")
        if not self.schemes:
            raise ConfigError("study.schemes is empty; valid: at least one, for example {nf4: {}}")


@dataclass
class Errors:
    """Sums over layers, all in float64 on the host."""

    weights: int = 0
    packed: int = 0  # bytes
    error: float = 0.0  # sum of (w' - w)^2
    norm: float = 0.0  # sum of w^2
    bulk_error: float = 0.0
    bulk_norm: float = 0.0
    product_error: float = 0.0
    product_norm: float = 0.0
    zeroed: int = 0
    largest: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)  # name -> relative RMSE

    def add(self, name: str, weight: Tensor, frozen: nn.Module, x: Tensor, sigma: float) -> None:
        """weight (out, in) float32; x (n, in) float32."""
        found = dense_weight(frozen).float()
        off = found - weight
        bulk = weight.abs() < BULK * sigma
        exact = x @ weight.t()
        product = frozen.product(x, None) if hasattr(frozen, "product") else exact  # type: ignore[operator]
        error, norm = _squares(off), _squares(weight)
        self.weights += weight.numel()
        self.packed += packed_bytes(frozen)
        self.error, self.norm = self.error + error, self.norm + norm
        self.bulk_error += _squares(off[bulk])
        self.bulk_norm += _squares(weight[bulk])
        self.product_error += _squares(product - exact)
        self.product_norm += _squares(exact)
        self.zeroed += int(((found == 0) & (weight != 0)).sum())
        self.largest = max(self.largest, float(off.abs().max()))
        self.layers[name] = math.sqrt(error / norm) if norm else 0.0

    def summary(self) -> dict[str, Any]:
        """What JSON, page and terminal show; ratios without a unit."""
        relative = _ratio(self.error, self.norm)
        worst = sorted(self.layers.items(), key=lambda pair: -pair[1])[:3]
        return {
            "bits_per_parameter": 8 * self.packed / self.weights,
            "bytes": self.packed,
            "weights": self.weights,
            "relative_rmse": relative,
            "snr_db": -20 * math.log10(relative) if relative else None,
            "bulk_relative_rmse": _ratio(self.bulk_error, self.bulk_norm),
            "matmul_relative_error": _ratio(self.product_error, self.product_norm),
            "zeroed_share": self.zeroed / self.weights,
            "largest_error": self.largest,
            "worst_layers": [{"layer": name, "relative_rmse": value} for name, value in worst],
            "layers": self.layers,
        }


class Study:
    """Weights, held dense, and what each scheme makes of them."""

    def __init__(self, spec: StudySpec, model: nn.Module, names: list[str], sigma: float | None = None) -> None:
        self.spec, self.model, self.names, self.sigma = spec, model, names, sigma

    def scheme(self, quantizer: Quantizer, score: Callable[[], dict[str, float]] | None = None) -> dict[str, Any]:
        """Convert every layer, compare, and with ``score`` evaluate the converted model. Raises ConfigError where
        the scheme does not fit a layer."""
        skipped = set(self.names) - set(quantizable(self.model, quantizer)) if quantizer.skip_modules else set()
        errors, dense, frozen = Errors(), {}, {}
        for number, name in enumerate(self.names):
            layer = self.model.get_submodule(name)
            if name in skipped:
                continue
            converted = quantizer.convert(layer, name)
            weight = dense_weight(layer).float()
            x = torch.randn(self.spec.rows, weight.shape[1], generator=self._random(number)).to(weight.device)
            errors.add(name, weight, converted, x, self.sigma or outliers.robust_sigma(weight))
            if score is not None:
                dense[name], frozen[name] = layer, converted
        result = errors.summary()
        if score is not None:
            self._swap(dense, frozen)
            try:
                result.update(score())
            finally:
                self._swap(frozen, dense)
        return result

    def census(self) -> dict[str, dict[str, Any]]:
        """Per layer: how far its weights are from a normal distribution's."""
        return {name: self._census(dense_weight(self.model.get_submodule(name)).float()) for name in self.names}

    def _census(self, weight: Tensor) -> dict[str, Any]:
        sigma = outliers.robust_sigma(weight) or 1.0
        scaled, columns = weight / sigma, weight.square().mean(dim=0).sqrt()
        return {
            "shape": list(weight.shape),
            "sigma": sigma,
            "max_over_sigma": float(scaled.abs().max()),
            "share_over_6_sigma": float((scaled.abs() > OUTLIER).float().mean()),
            "kurtosis": float(scaled.pow(4).mean() / scaled.square().mean().square()),  # 3 of a normal one
            "loudest_column": float(columns.max() / columns.median()),
        }

    def _random(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(10**6 * (self.spec.seed + 1) + number)  # never that of the weights

    def _swap(self, old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> None:
        replace(self.model, {id(layer): new[name] for name, layer in old.items()})


def study(
    spec: StudySpec,
    quantizers: Mapping[str, Quantizer],
    model_spec: models.Pretrained,
    data: DataSpec,
    trainer: TrainerSpec,
    evaluate: bool,
) -> dict[str, Any]:
    """The whole study as plain data. Raises ConfigError where no scheme fits."""
    quiet()
    if spec.weights != "model":
        if evaluate:
            raise ConfigError(f"--evaluate needs a model, and study.weights={spec.weights} is a single matrix")
        return _rows(_synthetic(spec), {"weights": spec.weights, "shape": list(spec.shape)}, quantizers)
    model_spec.check()
    tokenizer = model_spec.load_tokenizer() if evaluate else None
    encoded = None
    if evaluate and not data.from_base:
        encoded = encode(data.splits(), tokenizer, model_spec.task, model_spec.length)
    labels = len(encoded.splits.labels) or None if encoded else None
    base = models.load(model_spec, NoQuantization(), tokenizer, labels, trainer.device)
    model = base.model.to(trainer.device).requires_grad_(False)
    subject = Study(spec, model, quantizable(model, NoQuantization()))
    about: dict[str, Any] = {"weights": base.spec.name_or_path or "random", "fingerprint": base.fingerprint}
    if not evaluate:
        return _rows(subject, about, quantizers)
    encoded = encoded or data.sample(model, tokenizer, model_spec.task, model_spec.length)
    if not len(encoded.validation):
        raise DataError(f"data: the validation split of {encoded.splits.name} is empty, and --evaluate scores it")
    pad = tokenizer.pad_token_id if tokenizer else 0
    evaluation = Evaluation(model, model_spec.task, encoded, data.batch_size, pad)
    about["dense"] = evaluation.reference(subject.names)
    about["data"] = {
        "name": encoded.splits.name,
        "fingerprint": encoded.splits.fingerprint,
        "rows": len(encoded.validation),
        "targets": len(evaluation.dense_loss),
    }
    about["outlier_features"] = evaluation.outlier_features()
    return _rows(subject, about, quantizers, evaluation)


def _rows(
    subject: Study, about: dict[str, Any], quantizers: Mapping[str, Quantizer], evaluation: Evaluation | None = None
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
    for name, found in (evaluation.census() if evaluation else {}).items():
        layers[name].update(found)
    return {**about, "schemes": schemes, "layers": layers}


def _synthetic(spec: StudySpec) -> Study:
    out_features, in_features = spec.shape
    layer = nn.Linear(in_features, out_features, bias=False)
    random = torch.Generator().manual_seed(spec.seed)
    layer.weight = nn.Parameter(outliers.SYNTHETIC[spec.weights]((out_features, in_features), random), False)
    return Study(spec, nn.ModuleDict({spec.weights: layer}), [spec.weights], sigma=outliers.SIGMA)


def _squares(values: Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
