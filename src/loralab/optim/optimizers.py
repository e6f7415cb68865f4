"""Specs of AdamW and of the learning-rate schedules; the state of each trial of a pack: record, copy, restore."""

import ctypes
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
from annotated_types import Le, Len
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from loralab.errors import ConfigError
from loralab.optim import managed, packed
from loralab.optim.groups import split_groups, trial_of, trial_parameters
from loralab.optim.managed import PAGED_FROM
from loralab.quantization.kernels import import_bitsandbytes
from loralab.spec import Natural, NotNegative, Positive, Share, spec

log = logging.getLogger(__name__)

Name = Literal["adamw", "adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
TORCH: Name = "adamw"
BITSANDBYTES = {
    "adamw_32bit": "AdamW32bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
UNPAGED: dict[str, Name] = {"paged_adamw": "adamw_32bit", "paged_adamw_8bit": "adamw_8bit"}
MEMBERS = "loralab_members"  # attribute of a flat buffer: the parameters that are views of it


@spec("optimizer")
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101): torch's, or one of bitsandbytes' by ``name``."""

    name: Name = TORCH
    # a larger lr overflows float32 inside torch, and the exception would end the whole pack
    lr: Annotated[Positive, Le(1e30), "a positive number of at most 1e30"] = 1e-3
    weight_decay: NotNegative = 0.0
    betas: Annotated[list[Share], Len(2, 2), "two numbers in [0, 1)"] = field(default_factory=lambda: [0.9, 0.999])
    eps: Positive = 1e-8
    lr_ratio: Positive = (
        1.0  # lr of LoRA's B in linear layers over that of all other parameters (LoRA+, arXiv:2402.12354)
    )
    why_alone = ""
    counts_steps = True  # each state says in which step it was made
    flat: bool = False  # one state buffer for all parameters of a dtype, so that small ranks page and take 8 bits

    @property
    def effective_name(self) -> str:
        """The optimizer that this machine can run: where memory cannot be paged, the unpaged one."""
        return UNPAGED.get(self.name, self.name) if cannot_page() else self.name

    def unpaged(self) -> "AdamW":
        """The same with all its state on the device."""
        return replace(self, name=UNPAGED.get(self.name, self.name))

    def check_traceable(self) -> None:
        """Nothing: it reads no value of a tensor."""

    @property
    def memory_key(self) -> tuple[Any, ...]:
        """Equal for optimizers with as much state."""
        return (self.name, self.flat, self.lr_ratio)

    @property
    def pack_key(self) -> tuple[Any, ...]:
        """Equal for trials that one optimizer may serve."""
        return (self.name, self.flat)

    def groups(self, named: Iterable[tuple[str, nn.Parameter]], trial: int = 0) -> list[dict[str, Any]]:
        """The parameter groups of the ``trial``-th trial of a pack: one group, or where ``lr_ratio`` is not 1 two, of
        which the second holds the ``lora_B``. Raises ConfigError where ``lr_ratio`` is set and there is no ``lora_B``.
        """
        return split_groups(self, named, trial)

    def group(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """A parameter group with this spec's hyper-parameters. With ``flat`` its parameters are the buffers of
        ``flatten``, and ``parameters`` become views of them."""
        return {
            "params": flatten(parameters) if self.flat else parameters,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": tuple(self.betas),
            "eps": self.eps,
        }

    def build(self, groups: list[dict[str, Any]], scaled: bool = False) -> torch.optim.Optimizer:
        """One optimizer over the groups of all trials of a pack; warns where a paged one can page none of its state.
        ``scaled``: it serves under a loss scaler.

        Raises ConfigError where ``name`` is one of bitsandbytes' and bitsandbytes cannot be imported."""
        if self.name == TORCH and not self.flat and packed.suits(groups):
            return packed.PackedAdamW(groups)
        kind: Any = torch.optim.AdamW
        if self.name != TORCH:
            kind = getattr(_bitsandbytes().optim, BITSANDBYTES[self.effective_name])
        buffers = [parameter for group in groups for parameter in group["params"]]
        if any(hasattr(parameter, MEMBERS) for parameter in buffers):
            kind = type(f"Flat{kind.__name__}", (_Flat, kind), {})
        # one kernel for ten per tensor; under a loss scaler it would unscale the gradients itself, after clipping
        fused = {"fused": True} if self.name == TORCH and not scaled else {}
        optimizer: torch.optim.Optimizer = kind(groups, **fused)
        if self.name in UNPAGED:
            for group in groups:
                if reason := _unpaged_reason(group["params"]):
                    _warn_once(f"optimizer={self.name} pages nothing: {reason}")
            if not cannot_page():
                managed.page(optimizer)
        return optimizer


def gather(optimizer: Any) -> None:
    """Lets a loss scaler find the gradients: those of flat buffers are their members' until the update."""
    if isinstance(optimizer, _Flat):
        optimizer.gather()


def flatten(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """One buffer (n,) for each dtype, which from now on holds the values: ``parameters`` become views of it."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    return [_buffer(members) for members in by_dtype.values()]


def _buffer(members: list[nn.Parameter]) -> nn.Parameter:
    buffer = nn.Parameter(torch.cat([member.detach().reshape(-1) for member in members]))
    parts = torch.split(buffer.detach(), [member.numel() for member in members])
    for member, part in zip(members, parts, strict=True):
        member.data = part.view(member.shape)
    setattr(buffer, MEMBERS, members)
    return buffer


class _Flat(torch.optim.Optimizer):
    """Mixed into an optimizer over flat buffers: autograd and clipping use the parameters, the update the buffers."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:  # here, because clipping is part of Lightning's closure
            with torch.enable_grad():
                loss = closure()
        self.gather()
        super().step()
        self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for buffer in self._buffers():
            buffer.grad = None
            for member in getattr(buffer, MEMBERS):
                member.grad = None

    def gather(self) -> None:
        """Makes one gradient of each buffer, of which its members' become views. The update does it, and a loss scaler
        needs it before."""
        for buffer in self._buffers():
            members = getattr(buffer, MEMBERS)
            if all(member.grad is None for member in members):  # the trial has left its pack
                buffer.grad = None
            elif buffer.grad is None:
                buffer.grad = torch.cat([_gradient(member) for member in members])
                parts = torch.split(buffer.grad, [member.numel() for member in members])
                for member, part in zip(members, parts, strict=True):
                    member.grad = part.view(member.shape)

    def _buffers(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)


@spec("schedule")
class Schedule:
    """Learning rate over optimizer steps: linear warm-up, then constant, or linear or cosine decay to zero."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Natural = 0
    warmup_ratio: Share = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("schedule.warmup_steps and schedule.warmup_ratio exclude each other: set one")

    def factor(self, max_steps: int, lr: float = 1.0) -> Callable[[int], float]:
        """A function: step (from 0) -> factor of lr, in [0, 1], the same for any ``lr``. A warm-up of w steps begins at
        1/w, not at 0, where the first step would change nothing."""
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * max_steps)

        def factor_at(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
            if self.kind == "linear":
                return 1.0 - progress
            if self.kind == "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            return 1.0

        return factor_at

    def check(self, max_steps: int, lr: float, last: int | None = None) -> None:
        """Nothing: every step has a rate."""


def describe(optimizer: torch.optim.Optimizer, name: str, index: int = 0) -> dict[str, Any]:
    """The ``optimizer`` part of the record of the ``index``-th trial: the bytes of its state, how many of them are
    8-bit codes, and how many are paged.

    They are counted on the state's tensors, by dtype and bitsandbytes' mark ``is_paged``. ``paging`` is "off" (``name``
    is no paged optimizer), "on", "nothing" (it is one, and no tensor is paged) or "not applicable" (this machine cannot
    page); ``note`` is the reason of the last two, else None. Logs a warning where ``build`` could not foresee it.
    """
    parameters = trial_parameters(optimizer, index)
    values = [item for p in parameters if p in optimizer.state for item in optimizer.state[p].items()]
    leaves = [(key, leaf) for key, value in values for leaf in tree_leaves(value)]
    tensors = [value for key, value in leaves if isinstance(value, Tensor) and key != "step"]
    tensors = list({tensor.data_ptr(): tensor for tensor in tensors}.values())  # 8-bit states share their code tables
    size = sum(tensor.nbytes for tensor in tensors)
    paged = sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))
    record = {
        "name": name,
        "effective_name": name if paged else UNPAGED.get(name, name),
        "state_bytes": size,
        "eight_bit_bytes": sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.uint8),
        "paged_bytes": paged,
        "paged_fraction": paged / size if size else 0.0,
        "paging": "on" if paged else "off",
        "note": None,
    }
    if name in UNPAGED and not paged:
        record["paging"] = "not applicable" if cannot_page() else "nothing"
        reason = _unpaged_reason(parameters)
        record["note"] = f"optimizer={name} paged nothing: {reason or 'no tensor of its state is marked as paged'}"
        if not reason:  # else ``build`` has warned
            log.warning("%s", record["note"])
    return record


State = dict[int, dict[str, Any]]  # of one trial: {position of a parameter in ``trial_parameters``: its state}


def states(optimizer: torch.optim.Optimizer) -> list[State]:
    """The optimizer state of each trial of the pack, copied to the host; ``restore`` takes them back."""
    return [state_of(optimizer, index) for index in dict.fromkeys(trial_of(optimizer.param_groups))]


def state_of(optimizer: torch.optim.Optimizer, index: int) -> State:
    """The optimizer state of one trial, copied to the host; empty before the first step."""
    parameters, state = trial_parameters(optimizer, index), optimizer.state
    return {i: _host_copy(state[parameter]) for i, parameter in enumerate(parameters) if parameter in state}


def _host_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = tree_map(
        lambda value: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value, dict(state)
    )
    return copied


def restore(optimizer: torch.optim.Optimizer, trial_states: Sequence[State]) -> None:
    """Gives each trial its state of ``states`` back; hyper-parameters stay, and the optimizer moves the tensors to the
    devices of its parameters."""
    state_dict = optimizer.state_dict()
    numbers: dict[int, list[int]] = {}
    for group, trial in zip(state_dict["param_groups"], trial_of(state_dict["param_groups"]), strict=True):
        numbers.setdefault(trial, []).extend(group["params"])
    by_number = {
        number: state[i]
        for own_numbers, state in zip(numbers.values(), trial_states, strict=True)
        for i, number in enumerate(own_numbers)
        if i in state
    }
    if by_number:
        optimizer.load_state_dict({**state_dict, "state": by_number})


def _unpaged_reason(parameters: Iterable[Tensor]) -> str:
    """Why none of the state of ``parameters`` can be paged; empty where some of it can."""
    if reason := cannot_page():
        return f"{reason}; the unpaged optimizer runs in its place"
    largest = max((parameter.numel() for parameter in parameters), default=0)
    if largest >= PAGED_FROM:
        return ""
    return (
        f"bitsandbytes pages no tensor under {PAGED_FROM:,} elements, and the largest here has {largest:,}, so this "
        "run is the same as with the unpaged optimizer; valid: optimizer.flat=true, which joins the tensors, or a "
        "larger adapter.r"
    )


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@cache
def cannot_page() -> str:
    """Why this machine cannot page optimizer state to the host; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        driver, value = managed.driver(), ctypes.c_int(0)
        # 89: CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, both may use managed memory at once
        failed = driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(value), 89, 0)
    except OSError as error:
        return f"the CUDA driver cannot be loaded ({error})"
    return "" if not failed and value.value == 1 else "the device and the host cannot share managed memory"


def _bitsandbytes() -> Any:
    try:
        return import_bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            f"optimizer: bitsandbytes is missing or broken ({error}); pip install bitsandbytes, or optimizer=adamw"
        ) from error
