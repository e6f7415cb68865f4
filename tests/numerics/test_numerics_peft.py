"""One trial in loralab and in PEFT under the HF Trainer, from the same A, computes the same losses."""

import pytest

pytest.importorskip("peft")

from loralab.bench import ours, peers, setup
from loralab.bench.parts import one_trial


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False], ids=["none", "nf4_double"])
def test_fifty_steps_of_a_solo_run_have_the_losses_of_peft_within_1e_5(tmp_path, dense):
    worker = setup.prepare(tmp_path, "cpu", 1).worker
    worker |= {"dense": dense, "more_words": ["quantization=none"] if dense else []}
    trial = {**one_trial(50, 2), "same_start": True}
    peer = peers.WithTrainer(worker).answer(trial)
    mine = ours.Loralab(worker).answer(trial)
    assert mine["trainable_parameters"] == peer["trainable_parameters"]
    assert len(mine["losses"]) == len(peer["losses"]) == 50
    assert mine["losses"][-1] < mine["losses"][0] - 0.5
    assert max(abs(a - b) for a, b in zip(mine["losses"], peer["losses"], strict=True)) < 1e-5
