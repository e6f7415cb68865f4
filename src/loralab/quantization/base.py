"""The base class of the quantization specs, the layers that they convert, and the size of a base model in bytes."""

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.errors import ConfigError, nearest
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.reads import read_weights
from loralab.spec import spec

log = logging.getLogger(__name__)

MIN_WARNED_SHARE = 0.01  # of a base's parameters
MATCH_TIMEOUT = 1.0  # seconds for a regular expression and one name


def check_block(name: str, block_size: int, out_features: int, in_features: int) -> None:
    """Raises ConfigError where a block is larger than the layer, which would be one scale per tensor in fact."""
    if block_size > out_features * in_features:
        raise ConfigError(
            f"quantization.block_size = {block_size} is larger than {name}, which has {out_features} x {in_features}"
            f" = {out_features * in_features} weights; valid: at most that, or quantization.skip_modules=[{name}]"
        )


@spec("quantization")
class Quantizer(ABC):
    """A quantization scheme, its fields the keys of the yamls; ``convert`` turns a dense layer into a frozen one."""

    skip_modules: list[str] = field(default_factory=list)  # stay dense: exact name, last part of it, or regex
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the dtype of the layer's input
    # per_use: the dense weight is computed for each use and freed; resident: it stays in memory; auto: resident where
    # it takes little of what is free (planning/resident.py). The numbers are the same to the bit
    dequantize: Literal["auto", "per_use", "resident"] = "auto"

    def __post_init__(self) -> None:
        for pattern in self.skip_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"quantization.skip_modules: {pattern!r} is not a regular expression: {error}"
                ) from None

    @property
    @abstractmethod
    def name(self) -> str:
        """The scheme's name in tables and records."""

    @property
    def packable(self) -> bool:
        """Whether the result of a row does not depend on the other rows of the batch. False for every class that does
        not define it itself: a parent's answer is on the parent's arithmetic."""
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "packable" not in vars(cls):
            cls.packable = False  # type: ignore[assignment, method-assign]

    @abstractmethod
    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Bits of the packed weight with its statistics, without code tables, from the shape alone."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        """weight (out, in) -> the frozen layer, which keeps no reference to ``weight``."""

    def check(self, name: str, out_features: int, in_features: int) -> None:  # noqa: B027 - most fit all
        """Raises ConfigError where this scheme cannot quantize a layer of that shape."""

    def convert(self, linear: nn.Module, name: str = "the layer") -> nn.Module:
        """nn.Linear or Conv1D -> the frozen layer, with the same bias object. Raises ConfigError, which names the layer
        by ``name``, for a weight that is no matrix, is empty, or is not finite."""
        self.check(name, *linear_shape(linear))
        weight = dense_weight(linear)
        if weight.dim() != 2 or not weight.numel():
            raise ConfigError(
                f"model: the weight of {name} has shape {tuple(weight.shape)}, which {self.name} cannot quantize;"
                " valid: a matrix (out_features, in_features) that is not empty"
            )
        if not isinstance(weight, FakeTensor) and not bool(torch.isfinite(weight).all()):
            raise ConfigError(
                f"model: the weight of {name}, {tuple(weight.shape)}, holds nan or infinite values, which {self.name}"
                f" cannot quantize; valid: finite weights, or quantization.skip_modules=[{name}]"
            )
        frozen = self.pack(weight.detach().contiguous(), getattr(linear, "bias", None))
        frozen.transposed = isinstance(linear, conv1d())
        return frozen.train(linear.training)


SAME_PRODUCT = frozenset({"FalconLinear"})  # subclasses whose own forward computes the product of nn.Linear


def conv1d() -> type[Any]:
    """transformers' Conv1D. Imported once a model is there: a wrong setting is refused without transformers."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D  # type: ignore[no-any-return]


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an nn.Linear, a Conv1D of transformers or a FrozenLinear; a subclass with another forward,
    such as a router that returns several tensors, is none."""
    if isinstance(module, FrozenLinear):
        return True
    kind = next((kind for kind in (nn.Linear, conv1d()) if isinstance(module, kind)), None)
    return kind is not None and (type(module).forward is kind.forward or type(module).__name__ in SAME_PRODUCT)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features); Conv1D stores its weight as (in, out)."""
    if isinstance(module, conv1d()):
        return int(module.nf), int(module.nx)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as a matrix (out, in), dequantized to the dtype from before quantization."""
    if isinstance(layer, FrozenLinear):
        return layer.dense(layer.dense_dtype)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(layer, conv1d()) else weight


def is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` is a FrozenLinear."""
    return isinstance(module, FrozenLinear)


def base_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of the base model, packed or not, in the model's order.

    Without the output embeddings, layers with tied weights, and everything outside ``model.base_model``, where
    transformers has classification heads.
    """
    inside = {id(module) for module in getattr(model, "base_model", model).modules()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # complete before the weights are tied
    tied_names = {*tied.keys(), *tied.values()}
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and id(module) in inside
        and module is not outputs
        and f"{name}.weight" not in tied_names
        and id(module.weight) not in embeddings
    ]


def quantizable(model: nn.Module, spec: Quantizer) -> list[str]:
    """Names of the layers to convert: the ``base_linears`` that are still dense.

    Without layers that the model keeps in float32 (T5's ``wo``), ``skip_modules``, and layers whose weight the model
    uses without calling them (Mamba's ``dt_proj``), for which it warns. Raises ConfigError for a wrong skip_modules.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    skipped = _skipped(linears, spec.skip_modules)
    float32 = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    float32 |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    names = [
        name
        for name in base_linears(model)
        if name not in skipped and name.rpartition(".")[2] not in float32 and not is_frozen(model.get_submodule(name))
    ]
    read = read_weights(model, {name: model.get_submodule(name) for name in names}) if spec.name != "none" else []
    if read:
        log.warning(
            "%d layers stay dense, because %s uses their weight without calling them: %s",
            *(len(read), type(model).__name__, ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in read}))),
        )
    return [name for name in names if name not in read]


def matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    """Those of ``names`` that the regular expression of ``key`` matches in full. Raises ConfigError where it is invalid
    or takes more than MATCH_TIMEOUT for a name, as ``(.*)*x`` does."""
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=MATCH_TIMEOUT)]
    except regex.error as error:
        raise ConfigError(f"{key}={pattern!r} is not a valid regular expression ({error})") from None
    except TimeoutError:
        raise ConfigError(
            f"{key}={pattern!r} takes more than {MATCH_TIMEOUT:g} s to match one name; valid: an expression without a"
            " repetition inside a repetition"
        ) from None


def _skipped(names: list[str], patterns: list[str]) -> set[str]:
    """Those of ``names`` that ``patterns`` name or match; ConfigError for a pattern without any."""
    skipped: set[str] = set()
    for pattern in patterns:
        matches = {n for n in names if pattern in (n, n.rpartition(".")[2])}
        matches |= {*matching(pattern, names, "quantization.skip_modules")}
        if not matches:
            last = {n.rpartition(".")[2] for n in names}
            raise ConfigError(
                f"quantization.skip_modules: {pattern!r} matches no linear layer; {nearest(pattern, last)}"
            )
        skipped |= matches
    return skipped


@dataclass(frozen=True)
class BaseSize:
    """The size of a base model."""

    parameters: int  # logical: a packed layer counts out * in (+ bias), shared parameters once
    quantized_parameters: int
    bytes: int  # storages of all parameters and buffers, and the code tables once
    bits_per_parameter: float  # of the quantized layers with statistics; without any, of the linear layers
    bits_per_parameter_overall: float = math.nan  # of all parameters, quantized or not
    out_of_reach: dict[str, int] = field(default_factory=dict)  # see ``out_of_reach_weights``

    @property
    def share_out_of_reach(self) -> float:
        return sum(self.out_of_reach.values()) / self.parameters if self.parameters else 0.0


def measure(model: nn.Module) -> BaseSize:
    """The size of ``model`` by the tensors that it stores; meta and fake tensors count as real ones."""
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    quantized = sum(layer.out_features * layer.in_features for layer in frozen)
    tables = [table for layer in frozen for table in layer.code_tables()]
    packed = 8 * _bytes(tensor for layer in frozen for tensor in layer.packed())
    parameters = sum(p.numel() for p in model.parameters()) + quantized
    return BaseSize(
        parameters=parameters,
        quantized_parameters=quantized,
        bytes=_bytes([*model.parameters(), *model.buffers(), *tables]),
        bits_per_parameter=packed / quantized if quantized else _dense_bits(model),
        bits_per_parameter_overall=(packed + 8 * _bytes(model.parameters())) / parameters if parameters else math.nan,
        out_of_reach=out_of_reach_weights(model),
    )


def warn_out_of_reach(weights: Mapping[str, int], parameters: int, bits: str = "") -> None:
    """Warns of ``weights``, see ``out_of_reach_weights``, where they have a share of MIN_WARNED_SHARE of all
    ``parameters``. ``bits``: an addition to the message, on the base's size.
    """
    share = sum(weights.values()) / parameters if parameters else 0.0
    if share >= MIN_WARNED_SHARE:
        log.warning(
            "%.1f%% of the base's parameters (%s of %s: %s) belong to no linear layer: they are not quantized; "
            "only adapter=full trains them, and LoRA's adapter.target_parameters those of experts%s",
            *(100 * share, f"{sum(weights.values()):,}", f"{parameters:,}", ", ".join(weights), bits),
        )


def out_of_reach_weights(model: nn.Module) -> dict[str, int]:
    """{name with * for each number: parameters} of the weights that can be neither quantized nor adapted.

    They belong to no linear layer: experts in one tensor of three dimensions, convolutions, matrices that a model
    multiplies itself. Embeddings, weights tied to them, norms and biases are not counted.
    """
    reached = {id(p) for m in model.modules() if is_linear(m) or isinstance(m, nn.Embedding) for p in m.parameters()}
    weights: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in reached:
            key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
            weights[key] = weights.get(key, 0) + parameter.numel()
    return weights


def packed_bytes(layer: nn.Module) -> int:
    """Bytes of one layer's weight as stored, with statistics, without code tables and bias."""
    if isinstance(layer, FrozenLinear):
        return _bytes(layer.packed())
    weight = dense_weight(layer)
    return weight.numel() * weight.element_size()  # its storage may be larger


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, shared ones once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _dense_bits(model: nn.Module) -> float:
    """Bits per weight of the linear layers, or without any of all parameters; nan without parameters."""
    linears = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, conv1d()))]
    weights = linears or list(model.parameters())
    elements = sum(w.numel() for w in weights)
    return 8.0 * sum(w.numel() * w.element_size() for w in weights) / elements if elements else math.nan
