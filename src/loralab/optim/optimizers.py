"""Specs around third-party optimizers and the learning-rate schedules: the bare classes accept nonsense."""

import ctypes
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cache
from typing import Annotated, Any, Literal

import torch
from annotated_types import Le, Len
from torch import Tensor, nn

from loralab.errors import ConfigError
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
PAGED_FROM = 100_000  # elements; bitsandbytes pages no smaller state tensor (Optimizer8bit.get_state_buffer)
FASTER = "lora_B"  # name of the parameters that ``lr_ratio`` is of
TRIAL = "loralab_trial"  # key of a parameter group: the number of its trial in the pack; without it, the group's own
MEMBERS = "loralab_members"  # attribute of a flat buffer: the parameters that are views of it


@spec("optimizer")
class AdamW:
    """Decoupled weight decay Adam (arXiv:1711.05101): torch's, or one of bitsandbytes' by ``name``."""

    name: Name = TORCH
    # beyond the bound, a step size overflows float32 inside torch, which would end the whole pack
    lr: Annotated[Positive, Le(1e30), "a positive number of at most 1e30"] = 1e-3
    weight_decay: NotNegative = 0.0
    betas: Annotated[list[Share], Len(2, 2), "two numbers in [0, 1)"] = field(default_factory=lambda: [0.9, 0.999])
    eps: Positive = 1e-8
    lr_ratio: Positive = 1.0  # of LoRA's B in linear layers, over everything else (LoRA+, arXiv:2402.12354)
    flat: bool = False  # one state buffer for all parameters of a dtype, so that small ranks page and take 8 bits

    @property
    def effective_name(self) -> str:
        """The optimizer that this machine can run: a paged one's unpaged twin where memory cannot be paged."""
        return UNPAGED.get(self.name, self.name) if cannot_page() else self.name

    def groups(self, named: Iterable[tuple[str, nn.Parameter]], trial: int = 0) -> list[dict[str, Any]]:
        """The parameter groups of one trial, the ``trial``-th of its pack: one, or with ``lr_ratio`` two, whose second
        are the ``lora_B`` of linear layers. Raises ConfigError where there are none."""
        given = list(named)
        if self.lr_ratio == 1.0:
            return [{**self.group([one for _, one in given]), TRIAL: trial}]
        faster = [one for name, one in given if name.rpartition(".")[2] == FASTER]
        if not faster:
            raise ConfigError(
                f"optimizer.lr_ratio={self.lr_ratio:g} is the rate of LoRA's B over that of A, and this adapter trains "
                "no B; valid: 1, or adapter=lora"
            )
        slower = [one for name, one in given if name.rpartition(".")[2] != FASTER]
        rate = self.lr * self.lr_ratio
        return [{**self.group(slower), TRIAL: trial}, {**self.group(faster), "lr": rate, TRIAL: trial}]

    def group(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """A parameter group with this spec's hyper-parameters; ``flat`` turns ``parameters`` into views of buffers."""
        return {
            "params": flatten(parameters) if self.flat else parameters,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": tuple(self.betas),
            "eps": self.eps,
        }

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """One optimizer over the groups of all trials of a pack."""
        kind: Any = torch.optim.AdamW
        if self.name != TORCH:
            kind = getattr(_bitsandbytes().optim, BITSANDBYTES[self.effective_name])
        buffers = [parameter for group in groups for parameter in group["params"]]
        if any(hasattr(parameter, MEMBERS) for parameter in buffers):
            kind = type(f"Flat{kind.__name__}", (_Flat, kind), {})
        # one kernel in place of ten a tensor; on CUDA it would do a loss scaler's work, which clipping forbids
        fused = {"fused": True} if self.name == TORCH and all(p.device.type == "cpu" for p in buffers) else {}
        optimizer: torch.optim.Optimizer = kind(groups, **fused)
        if self.name in UNPAGED:
            for group in groups:
                if doubt := _doubt(group["params"]):
                    _warn_once(f"optimizer={self.name} pages nothing: {doubt}")
            _page_after_resume(optimizer)
        return optimizer


def flatten(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """One buffer for each dtype, shape (n,); from now on the parameters are views of it, under their own names."""
    members: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        members.setdefault(parameter.dtype, []).append(parameter)
    return [_buffer(own) for own in members.values()]


def _buffer(members: list[nn.Parameter]) -> nn.Parameter:
    buffer = nn.Parameter(torch.cat([member.detach().reshape(-1) for member in members]))
    parts = torch.split(buffer.detach(), [member.numel() for member in members])
    for member, part in zip(members, parts, strict=True):
        member.data = part.view(member.shape)
    setattr(buffer, MEMBERS, members)
    return buffer


class _Flat(torch.optim.Optimizer):
    """Mixed into an optimizer over flat buffers: autograd and clipping see the parameters, the update the buffers."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:  # here, because clipping is part of Lightning's closure
            with torch.enable_grad():
                loss = closure()
        for buffer in self._buffers():
            members = getattr(buffer, MEMBERS)
            if any(member.grad is not None for member in members):  # none: a trial that left its pack
                buffer.grad = torch.cat([_gradient(member) for member in members])
                for member in members:
                    member.grad = None
        super().step()
        for buffer in self._buffers():
            buffer.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for buffer in self._buffers():
            for member in getattr(buffer, MEMBERS):
                member.grad = None

    def _buffers(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)


@spec("schedule")
class Schedule:
    """Learning rate over optimizer steps: linear warm-up, then constant, linear or cosine decay to zero."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Natural = 0
    warmup_ratio: Share = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("schedule.warmup_steps and schedule.warmup_ratio exclude each other: set one")

    def factor(self, max_steps: int) -> Callable[[int], float]:
        """step (0-based) -> share of lr. Step 0 of a warm-up of w steps runs at 1/w, so no step is lost at zero."""
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * max_steps)

        def at(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
            if self.kind == "linear":
                return 1.0 - progress
            if self.kind == "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            return 1.0

        return at


def describe(optimizer: torch.optim.Optimizer, name: str, index: int = 0) -> dict[str, Any]:
    """The ``optimizer`` part of the record of the ``index``-th trial: bytes of its own state, of
    them in 8 bits and really paged.

    All are counted as they are: from the dtype and the ``is_paged`` mark of each state tensor. ``paging`` is off (not
    asked for), on, nothing (asked for, and no tensor is), or not applicable (this machine cannot); ``note`` says why.
    """
    parameters = owned(optimizer, index)
    held = [optimizer.state[one] for one in parameters if one in optimizer.state]
    kept = [value for own in held for key, value in own.items() if isinstance(value, Tensor) and key != "step"]
    states = list({value.data_ptr(): value for value in kept}.values())  # 8-bit tensors share their tables of codes
    size = sum(value.nbytes for value in states)
    paged = sum(value.nbytes for value in states if getattr(value, "is_paged", False))
    found = {
        "name": name,
        "effective_name": name if paged else UNPAGED.get(name, name),
        "state_bytes": size,
        "eight_bit_bytes": sum(value.numel() for value in states if value.dtype == torch.uint8),
        "paged_bytes": paged,
        "paged_fraction": paged / size if size else 0.0,
        "paging": "on" if paged else "off",
        "note": None,
    }
    if name in UNPAGED and not paged:
        found["paging"] = "not applicable" if cannot_page() else "nothing"
        doubt = _doubt(parameters)
        found["note"] = f"optimizer={name} paged nothing: {doubt or 'no tensor of its state is marked as paged'}"
        if not doubt:  # else it was told before the first step
            log.warning("%s", found["note"])
    return found


State = dict[int, dict[str, Any]]  # {position of a parameter among its trial's: its state}


def trial_of(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of the trial that each parameter group is of."""
    return [group.get(TRIAL, number) for number, group in enumerate(groups)]


def owned(optimizer: torch.optim.Optimizer, index: int) -> list[nn.Parameter]:
    """What the optimizer updates of the ``index``-th trial: parameters, or flat buffers of them."""
    groups = optimizer.param_groups
    own = [group["params"] for group, trial in zip(groups, trial_of(groups), strict=True) if trial == index]
    return [parameter for parameters in own for parameter in parameters]


def rate(optimizer: torch.optim.Optimizer, index: int) -> float:
    """The learning rate of the ``index``-th trial under way; with ``lr_ratio``, of all but B."""
    groups = optimizer.param_groups
    return float(groups[trial_of(groups).index(index)]["lr"])


def states(optimizer: torch.optim.Optimizer) -> list[State]:
    """Of each trial, copied to the host; ``restore`` takes it back."""
    return [state_of(optimizer, index) for index in dict.fromkeys(trial_of(optimizer.param_groups))]


def state_of(optimizer: torch.optim.Optimizer, index: int) -> State:
    """Of one trial, copied to the host."""
    own, state = owned(optimizer, index), optimizer.state
    return {place: _hosted(state[one]) for place, one in enumerate(own) if one in state}


def _hosted(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}


def restore(optimizer: torch.optim.Optimizer, kept: Sequence[State]) -> None:
    """One of ``states`` for each trial, whose hyper-parameters stay; the optimizer moves it where it belongs."""
    whole = optimizer.state_dict()
    numbers: dict[int, list[int]] = {}
    for group, trial in zip(whole["param_groups"], trial_of(whole["param_groups"]), strict=True):
        numbers.setdefault(trial, []).extend(group["params"])
    places = [
        (number, state[i])
        for own, state in zip(numbers.values(), kept, strict=True)
        for i, number in enumerate(own)
        if i in state
    ]
    if places:
        optimizer.load_state_dict({**whole, "state": dict(places)})


def _doubt(parameters: Iterable[Tensor]) -> str:
    """Why nothing of these can be paged; empty where something can."""
    if reason := cannot_page():
        return f"{reason}; it runs as its unpaged twin"
    largest = max((parameter.numel() for parameter in parameters), default=0)
    if largest >= PAGED_FROM:
        return ""
    return (
        f"bitsandbytes pages no tensor under {PAGED_FROM:,} elements, and the largest here has {largest:,}: this run "
        "differs in nothing from its unpaged twin. optimizer.flat=true joins tensors, a larger adapter.r widens them"
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
        driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS; without it the device may not touch bitsandbytes' buffers
        failed = driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(value), 89, 0)
    except OSError as error:
        return f"the CUDA driver cannot be asked ({error})"
    return "" if not failed and value.value == 1 else "the device and the host cannot share managed memory"


def repage(optimizer: Any) -> int:
    """Pages state that a resume turned into ordinary tensors; returns how many tensors it moved.

    bitsandbytes' load_state_dict and Lightning's move to the device each make plain CUDA tensors of it; a deep copy
    even keeps the mark ``is_paged`` on memory that is not managed, so the page manager's own list decides.
    """
    functional, manager = _bitsandbytes().functional, optimizer.page_mng
    managed = {tensor.data_ptr() for tensor in manager.paged_tensors}
    moved = 0
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            old = state.get(key)
            if isinstance(old, Tensor) and old.numel() >= PAGED_FROM and old.data_ptr() not in managed:
                new = functional.get_paged(*old.shape, dtype=old.dtype, device=parameter.device)
                new.copy_(old.cpu())
                state[key] = new
                manager.paged_tensors.append(new)
                moved += 1
    return moved


def _page_after_resume(optimizer: torch.optim.Optimizer) -> None:
    """Before the first step, when a state, if any was, has been restored and moved for the last time."""
    if cannot_page():
        return

    started: list[bool] = []

    def at_first(*_: Any) -> None:
        if not started and (moved := repage(optimizer)):
            log.info("%d restored tensors of optimizer state are paged again", moved)
        started[:] = [True]

    optimizer.register_step_pre_hook(at_first)


def _bitsandbytes() -> Any:
    try:
        return import_bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            f"optimizer: bitsandbytes is missing or broken ({error}); pip install bitsandbytes, or optimizer=adamw"
        ) from error
