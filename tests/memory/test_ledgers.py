"""The CUDA branches through stand-ins of torch's functions; they are not run on a card here."""

import pytest
import torch

from loralab.memory import ledgers
from loralab.memory.ledgers import Cuda, Host, managed_bytes, other_processes

MIB = 2**20


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as a dict of numbers in MiB."""
    now = {"peak": 10, "reserved": 20, "current": 15, "free": 900, "retries": 0, "resets": 0}

    def stats():
        allocated, reserved = {"peak": now["peak"] * MIB}, {"peak": now["reserved"] * MIB}
        reserved["current"] = now["current"] * MIB
        kinds = {"allocated_bytes": {"all": allocated}, "reserved_bytes": {"all": reserved}}
        return {**kinds, "num_alloc_retries": now["retries"]}

    def reset():
        now["resets"] += 1

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: now["current"] * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (now["free"] * MIB, 1000 * MIB))
    monkeypatch.setattr(
        torch.cuda, "list_gpu_processes", lambda: "GPU:0\nprocess      41 uses     90.000 MB GPU memory"
    )
    return now


def test_a_reading_is_the_peak_since_the_last_and_starts_anew(cuda):
    card = Cuda()
    cuda["retries"] = 2
    reading = card.read()
    assert (reading.peak, reading.reserved, reading.used) == (10 * MIB, 20 * MIB, 100 * MIB)
    assert (cuda["resets"], card.retries, card.others) == (1, 2, 0)


def test_managed_bytes_on_the_card_are_what_the_driver_counts_and_torch_does_not(cuda):
    card = Cuda()  # 100 MiB used, 15 of them torch's: 85 MiB of context
    cuda["free"], cuda["current"] = 700, 75
    card.read()
    assert card.managed_resident(500 * MIB) == (300 - 75 - 85) * MIB
    assert card.managed_resident(100 * MIB) == 100 * MIB  # never more than there are
    cuda["free"] = 950
    assert card.managed_resident(100 * MIB) == 0


def test_context_and_kernels_that_are_loaded_later_are_no_managed_pages(cuda):
    card = Cuda()
    cuda["free"] = 650  # cuBLAS, cuDNN and bitsandbytes, loaded by the first pass
    card.read()
    assert card.managed_resident(500 * MIB) == 250 * MIB
    card.rebase()
    assert card.managed_resident(500 * MIB) == 0
    cuda["free"] = 600
    assert card.managed_resident(500 * MIB) == 50 * MIB


def test_the_driver_is_asked_where_it_is_wanted_alone(cuda, monkeypatch):
    card = Cuda()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("asked"))
    assert card.read(driver=False).used is None


def test_a_driver_that_does_not_answer_is_reported_once(cuda, monkeypatch, caplog):
    def refuse():
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    card = Cuda()
    assert [card.read().used for _ in range(3)] == [None] * 3
    assert card.managed_resident(5) is None
    assert caplog.text.count("operation not supported") == 1


def test_others_on_the_card_are_counted_and_said(cuda, monkeypatch, caplog):
    lines = "".join(f"\nprocess  {pid} uses  90.000 MB GPU memory" for pid in (41, 42, 43))
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda: "GPU:0" + lines)
    assert Cuda().others == 2
    assert "2 other processes use this card" in caplog.text


@pytest.mark.parametrize(
    "answer", ["pynvml module not found, please install nvidia-ml-py", OSError("libnvidia-ml.so.1")]
)
def test_unreadable_nvml_is_a_warning(monkeypatch, caplog, answer):
    def ask():
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch.cuda, "list_gpu_processes", ask)
    assert other_processes() is None
    assert "NVML cannot be read" in caplog.text


def test_an_idle_card_has_no_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda: "GPU:0\nno processes are running")
    assert other_processes() == 0


def test_only_state_that_is_marked_counts_as_managed():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert managed_bytes([optimizer]) == 0
    optimizer.state[parameter]["exp_avg"].is_paged = True
    assert managed_bytes([optimizer]) == 12


def test_where_proc_is_missing_the_peak_so_far_stands_in(monkeypatch):
    monkeypatch.setattr(ledgers, "PROC", ("/nowhere/statm", "/nowhere/meminfo"))
    host = Host()
    assert host.resident() > 2**20
    assert host.available() is None
