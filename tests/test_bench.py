"""The benchmark measures what it says it measures; how fast that is no test asks."""

import pytest
import torch

from loralab import bench


def test_both_layers_hold_the_same_weights_and_every_round_is_timed():
    pytest.importorskip("bitsandbytes")
    (row,) = bench.layers(((64, 128),), (4,))
    assert row["same_output"] < 1e-6
    assert row["ours_ms"] > 0
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert "128 -> 64" in bench.render({"cpu": "x", "gpu": None, "threads": 1, "layers": [row]})


def test_work_is_done_in_turn_and_warmed_up():
    order = []
    times = bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3)
    assert order == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_a_step_reaches_the_input():
    layer = torch.nn.Linear(4, 2)
    seen = []
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0]))
    bench._step(layer, torch.ones(3, 4))()
    assert torch.equal(seen[0], layer.weight.sum(dim=0).expand(3, -1))
