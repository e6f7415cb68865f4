"""What a step launches, by torch's profiler: kernels, copies, waits of the host, and how long the device was busy."""

import time
from collections.abc import Iterable
from typing import Any

from loralab.bench.processes import Row

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Launches:
    """Counts from its making on. On a CPU torch's operators stand in for launches, and the rest is None."""

    def __init__(self, cuda: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._cuda = cuda
        self._profile = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
        self._profile.start()
        self._begun = time.perf_counter()

    def stop(self, steps: int) -> Row:
        """What ``steps`` steps did, each; everything queued on the device has to be done."""
        seconds = time.perf_counter() - self._begun
        self._profile.stop()
        profiler: Any = self._profile.profiler
        events = profiler.kineto_results.events()  # the parsed ones take many times as long: 10^5 a step and more
        if self._cuda:
            return on_card(events, steps, seconds)
        operators = sum(event.name().startswith("aten::") for event in events)
        return {"launches": operators / steps, "waits": None, "busy_share": None, "profiled_steps": steps}


def on_card(events: Iterable[Any], steps: int, seconds: float) -> Row:
    """{launches, waits: of the host for the device, each a step; busy_share: of ``seconds``, in which the device did
    something; profiled_steps}. Two waits at the end of them all are not counted: ours, and the profiler's own."""
    launches = waits = 0
    spans: list[tuple[int, int]] = []
    for event in events:
        if str(event.device_type()).endswith("CUDA"):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        elif (name := event.name()) in LAUNCHES:
            launches += 1
        elif name in WAITS:
            waits += 1
    busy, end = 0, 0
    for begun, ended in sorted(spans):
        busy += max(0, ended - max(begun, end))
        end = max(end, ended)
    share = busy / 1e9 / seconds if seconds else None
    return {"launches": launches / steps, "waits": (waits - 2) / steps, "busy_share": share, "profiled_steps": steps}
