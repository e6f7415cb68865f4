"""Managed memory through stand-ins of the driver: asked for where there is room, given back, never ended by exit(1)."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from loralab.errors import OutOfMemory
from loralab.memory.ledgers import GIB
from loralab.optim import managed, optimizers
from loralab.optim.managed import PAGED_FROM, release, unpaged_bytes
from loralab.optim.optimizers import AdamW
from loralab.running import fit
from loralab.running.runner import Runner
from loralab.training.module import FineTuner


@pytest.fixture
def card(monkeypatch):
    """A machine that can page: bitsandbytes' own way to a buffer, with ordinary tensors for managed ones, and a driver
    that notes what it is given back."""
    import bitsandbytes

    told = SimpleNamespace(freed=[], refused=0, available=64 * GIB)
    manager = bitsandbytes.functional.GlobalPageManager.get_instance()

    def get_paged(*shape, dtype, device):
        buffer = torch.zeros(*shape, dtype=dtype)
        buffer.is_paged, buffer.page_deviceid = True, 0
        return buffer

    def get_state_buffer(self, p, dtype=torch.float32):
        if not self.is_paged or p.numel() < 1e5:
            return torch.zeros_like(p, dtype=dtype)
        buffer = get_paged(*p.shape, dtype=dtype, device=p.device)
        self.page_mng.paged_tensors.append(buffer)
        return buffer

    def free(pointer):
        assert isinstance(pointer, ctypes.c_uint64)
        told.freed.append(pointer.value)
        return told.refused

    monkeypatch.setattr(optimizers, "cannot_page", lambda: "")
    monkeypatch.setattr(managed, "driver", lambda: SimpleNamespace(cuMemFree_v2=free))
    monkeypatch.setattr(managed, "Host", lambda: SimpleNamespace(available=lambda: told.available))
    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda *_: None)
    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(manager, "paged_tensors", [])
    told.manager = manager
    return told


def built(name="paged_adamw", sizes=(PAGED_FROM, PAGED_FROM - 1)):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    spec = AdamW(name, lr=1e-2)
    optimizer = spec.build([spec.group(parameters)])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return optimizer, parameters


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_what_a_trial_paged_is_given_back_once_and_what_another_paged_stays(card, name):
    (first, parameters), (other, _) = built(name), built(name)
    first.step()
    other.step()
    own = [first.state[parameters[0]][key].data_ptr() for key in ("state1", "state2")]
    assert len(card.manager.paged_tensors) == 4
    assert release(first) == 2 * PAGED_FROM * (1 if "8bit" in name else 4)
    assert card.freed == own
    assert list(first.state) == [parameters[1]]  # whose state was ordinary memory
    assert {tensor.data_ptr() for tensor in card.manager.paged_tensors} == {
        other.state[parameter][key].data_ptr() for parameter in list(other.state)[:1] for key in ("state1", "state2")
    }
    assert release(first) == 0
    assert card.freed == own


def test_an_optimizer_without_managed_memory_asks_no_driver(card):
    for name in ("adamw", "adamw_32bit", "paged_adamw"):
        optimizer, _ = built(name, (10,))
        optimizer.step()
        assert release(optimizer) == 0
        assert optimizer.state
    assert card.freed == []


def test_a_driver_that_takes_nothing_back_is_said(card, caplog):
    card.refused = 1
    optimizer, _ = built()
    optimizer.step()
    assert release(optimizer) == 0
    assert "the driver did not take back 2 of 2 buffers" in caplog.text


@pytest.mark.parametrize(("name", "item"), [("paged_adamw", 4), ("paged_adamw_8bit", 1)])
def test_state_that_the_host_has_no_room_for_is_out_of_memory_before_anything_is_changed(card, name, item):
    optimizer, parameters = built(name)
    wanted = 2 * PAGED_FROM * item
    assert unpaged_bytes(optimizer) == wanted
    card.available = wanted + managed.SPARE - 1
    with pytest.raises(OutOfMemory, match=r"the host has 1\.00 GiB available.*valid: .*paged_adamw_8bit"):
        optimizer.step()
    assert not optimizer.state
    assert card.manager.paged_tensors == []
    assert all(bool((parameter == 0).all()) for parameter in parameters)
    card.available += 1
    optimizer.step()
    assert unpaged_bytes(optimizer) == 0


def test_a_host_that_does_not_say_what_it_has_is_asked_for_memory(card):
    card.available = None
    optimizer, _ = built()
    optimizer.step()
    assert len(card.manager.paged_tensors) == 2


def test_a_restored_state_is_asked_for_too(card):
    optimizer, _ = built()
    optimizer.step()
    again, _ = built()
    again.load_state_dict(optimizer.state_dict())
    card.available = 0
    with pytest.raises(OutOfMemory):
        again.step()


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_every_fit_gives_back_what_its_optimizer_paged_once_its_record_has_the_bytes(make_spec, monkeypatch, ends):
    given = []

    def released(optimizer):
        given.append(len(optimizer.state))
        optimizer.state.clear()
        return 0

    def step(self, batches, index):
        if index == 2 and ends != "well":
            raise torch.OutOfMemoryError("no memory")
        return real(self, batches, index)

    real = FineTuner.training_step
    monkeypatch.setattr(FineTuner, "training_step", step)
    monkeypatch.setattr(fit.managed, "release", released)
    (stored,) = Runner().run([make_spec(max_steps=3)])
    assert stored["exit_code"] == (0 if ends == "well" else 6)
    assert len(given) == 1
    assert given[0] > 0
    assert stored["optimizer"]["state_bytes"] > 0
