"""Launches, waits and the busy share of a step, counted from a profile of the device."""

from types import SimpleNamespace

import pytest
import torch

from loralab.bench.launches import on_card
from loralab.bench.measurements import Clock


def event(name, device="CPU", start=0, duration=0):
    made = {"name": name, "device_type": f"DeviceType.{device}", "start_ns": start, "duration_ns": duration}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in made.items()})


def test_overlapping_kernels_are_busy_once_and_a_graph_is_one_launch():
    events = [
        *[event("cudaLaunchKernel")] * 5,
        *[event("cuLaunchKernelEx"), event("cudaGraphLaunch"), event("aten::mm"), event("cudaMemcpyAsync")],
        *[event("cudaStreamSynchronize")] * 4,
        *[event("cudaDeviceSynchronize")] * 2,
        event("gemm", "CUDA", 0, 100),
        event("Memcpy HtoD", "CUDA", 50, 100),  # on another stream
        event("gemm", "CUDA", 60, 10),
        event("gemm", "CUDA", 400, 50),
    ]
    found = on_card(events, steps=2, seconds=800e-9)
    assert found == {"launches": 3.5, "waits": 2.0, "busy_share": pytest.approx(0.25), "profiled_steps": 2}


def test_the_profiled_steps_are_not_timed():
    clock, x = Clock("cpu", steps=6, profiled=2), torch.ones(3)
    for _ in range(6):
        x = torch.mul(x, x)
        clock()
    assert len(clock.steps()) == 3  # the first has no beginning, and two are profiled
    assert (clock.launches["launches"], clock.launches["profiled_steps"]) == (1.0, 2)


def test_without_a_profile_every_step_is_timed():
    clock = Clock("cpu", steps=3)
    for _ in range(3):
        clock()
    assert (len(clock.steps()), clock.launches) == (2, None)


def test_a_card_is_waited_for_at_the_end_alone(monkeypatch):
    """A host that waited after each step could not show what it does while the card is busy."""
    waits, recorded = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(len(recorded) ** 2)
            self.at = recorded[-1]

        def elapsed_time(self, other):
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(recorded)))
    clock = Clock("cuda", steps=4)
    for _ in range(4):
        clock()
    assert waits == []
    assert clock.steps() == [1.0, 3.0, 5.0]
    assert waits == [4]
