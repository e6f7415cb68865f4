"""Runs whose every allocation is recorded, and rows as long as a model takes them."""

import json
import time
from dataclasses import replace

import pytest
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from loralab.data.files import Files
from loralab.running.runner import Runner


@pytest.fixture
def long_rows(tmp_path):
    """A data spec whose every row is cut at ``length`` tokens; ``ragged``: three of four are half as long."""

    def make(task="causal_lm", length=64, ragged=False, batch_size=4):
        path = tmp_path / "rows.jsonl"
        lengths = [length // 2 - 4 if ragged and i % 4 else 2 * length for i in range(8)]
        rows = [
            {"t": chr(97 + i) * n, "y": ["no", "yes"][i % 2], "q": chr(97 + i) * n, "a": chr(97 + i) * n}
            for i, n in enumerate(lengths)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {
            "causal_lm": {"text": "{t}"},
            "seq2seq_lm": {"prompt": "{q}", "target": "{a}"},
            "sequence_classification": {"text": "{t}", "label": "y"},
        }[task]
        return Files(train=str(path), validation=str(path), batch_size=batch_size, **keys)

    return make


class _Start(Callback):
    pack_aware = True
    at = 0

    def on_train_start(self, trainer, pl_module):
        self.at = time.time_ns()


def _allocations(node):
    if node.tag.name == "Allocation":
        yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
    for child in node.children:
        yield from _allocations(child)


@pytest.fixture
def allocated():
    """Runs specs on the CPU; the most bytes its allocator had given out at once, from the first step on."""

    def measure(*specs):
        start = _Start()
        specs = [replace(spec, callbacks={"start": lambda: start}) for spec in specs]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            records = Runner().run(specs)
        assert [record["error"] for record in records] == [None] * len(records)
        tree = recorded.profiler.kineto_results.experimental_event_tree()
        level, peak, own = 0, 0, set()
        for moment, address, size in sorted((e for root in tree for e in _allocations(root)), key=lambda e: e[0]):
            if size < 0 and address not in own:
                continue  # left over from an earlier run
            (own.add if size > 0 else own.discard)(address)
            level += size
            peak = max(peak, level) if moment >= start.at else peak
        return peak

    return measure
