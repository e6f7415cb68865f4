"""One trial in loralab and in PEFT under the HF Trainer, from the same A, computes the same losses."""

import pytest

pytest.importorskip("peft")

from loralab.bench import ground, ours, peers
from loralab.bench.parts import one_trial


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False], ids=["none", "nf4_double"])
def test_fifty_steps_of_a_solo_run_have_the_losses_of_peft_within_1e_5(tmp_path, dense):
    job = {**ground.prepare(tmp_path, "cpu", 1).job, "dense": dense, "medium": False}
    trial = {**one_trial(50, 2), "same_start": True}
    peer = peers.WithTrainer(job).trial(trial)
    mine = ours.Loralab(job).trial(trial)
    assert mine["trainable_parameters"] == peer["trainable_parameters"]
    assert len(mine["losses"]) == len(peer["losses"]) == 50
    assert mine["losses"][-1] < mine["losses"][0] - 0.5
    assert max(abs(a - b) for a, b in zip(mine["losses"], peer["losses"], strict=True)) < 1e-5
