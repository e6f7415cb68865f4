"""Every arm of the latency table computes what it says it does, and wrong shapes and methods are refused."""

import json

import pytest
import torch

from loralab.bench import latency
from loralab.cli.main import run

WORDS = ["model=random", "model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, vocab_size: 4096}"]
WORDS += ["model.max_length=32", "trainer=cpu", "+sweep.budget=2048", "data=docstrings"]


@pytest.fixture
def logits(monkeypatch):
    """{arm: logits of each block}, with adapters that do something, in place of times."""
    found, arms = {}, []
    ready, attached = latency._ready, latency.attached

    def entering(base, arm, rows):
        arms.append(arm.name)
        return ready(base, arm, rows)

    def timed(base, given):
        with torch.no_grad():
            found.setdefault(arms[-1], []).append(base.model(**given).logits)
        return [0.25 if arms[-1] == latency.BASE else 0.5] * latency.BLOCK

    def trained(*args):
        adapter = attached(*args)
        generator = torch.Generator().manual_seed(5)
        for parameter in adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return adapter

    monkeypatch.setattr(latency, "_ready", entering)
    monkeypatch.setattr(latency, "_timed", timed)
    monkeypatch.setattr(latency, "attached", trained)
    return found


def test_a_merged_arm_computes_what_its_adapter_does_and_the_base_stays_the_base(logits):
    measured = latency.latency(WORDS, ("lora", "bottleneck", "prefix"), ((2, 16), (1, 2000)), passes=10)
    assert list(logits) == ["base", "base, again", "lora", "lora, merged", "bottleneck", "prefix"]
    assert all(torch.equal(blocks[0], block) for blocks in logits.values() for block in blocks)
    base, again, lora, merged, bottleneck, prefix = (blocks[0] for blocks in logits.values())
    assert torch.equal(base, again)
    assert (merged - lora).abs().max() < 1e-5
    for other in (lora, bottleneck, prefix):
        assert (other - base).abs().max() > 1e-2
    assert measured["left_out"] == [[1, 2000]]
    for row in measured["rows"]:
        assert (row["rows"], row["tokens"], row["passes"]) == (2, 16, 12)
        bare = row["arm"] == "base"
        assert (row["median_s"], row["over_base"]) == ((0.25, 1.0) if bare else (0.5, 2.0))
        assert (row["parameters"] == 0) == row["arm"].startswith("base")


def test_a_steady_drift_is_no_difference():
    """Each block takes a tenth longer than the one before; the arm itself is as fast as the base."""
    order = [True, False] * 4
    clock, own, bare = 1.0, [], []
    for first in order:
        for place in (0, 1):
            (bare if (place == 0) == first else own).append([clock])
            clock *= 1.1
    assert latency._over(own, bare) == pytest.approx([1.0] * 4)
    assert latency._over([[2 * one] for (one,) in own], bare) == pytest.approx([2.0] * 4)


def test_the_command_shows_each_arm(capsys):
    words = ["latency", *WORDS, "--methods", "lora", "--shapes", "1x8", "--passes", "10"]
    assert run([*words, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in measured["rows"]] == ["base", "base, again", "lora", "lora, merged"]
    assert all(0 < row["mean_s"] < 10 for row in measured["rows"])
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "1 x 8  lora, merged" in out
    assert "% (" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--shapes", "8"], "--shapes 8 is no shape; valid: ROWSxTOKENS"),
        (["--passes", "0"], "--passes 0 is no number of passes"),
        (["--methods", "lora,nothing"], "nothing"),
        (["--methods", "lora,qlora"], "method=qlora brings a base of its own"),
        (["adapter=vera", "--methods", "lora"], "adapter=vera would be measured under the name of each method"),
        (["--shapes", "1x2000"], "no shape fits: the base has room for 1008 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, text, capsys):
    assert run(["latency", *WORDS, *words]) == 2
    assert text in capsys.readouterr().err
