"""What only two CUDA cards can show: one trial over both of them gives what it gives on one."""

import subprocess
import sys

import pytest
import torch

from loralab.cli import main
from loralab.planning.plan import CONTEXT
from loralab.records import record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

QLORA = ["quantization=nf4_double", "quantization.quant_storage=bfloat16", "trainer.precision=32-true"]
QLORA += ["trainer.max_steps=6", "data.batch_size=4"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_qlora_over_two_cards_gives_the_losses_and_the_adapter_of_one(tiny_words, tmp_path, curve, weights, strategy):
    kept = [word for word in tiny_words if word.partition("=")[0] not in ("trainer", "trainer.max_steps")]
    for folder, trainer in (("one", ["trainer=gpu"]), ("two", [f"trainer={strategy}", "trainer.devices=2"])):
        assert main.run(["train", *kept, *QLORA, *trainer, f"hydra.run.dir={tmp_path / folder}"]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert curve(two) == pytest.approx(curve(one), rel=1e-4)
    assert record.read(two)["metrics"] == pytest.approx(record.read(one)["metrics"], rel=1e-4)
    before, now = weights(one), weights(two)
    for name, tensor in before.items():
        assert (now[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name


def test_packs_are_sized_by_the_fullest_card_and_this_process_makes_no_context_for_it():
    script = "import torch; from loralab.planning.foresee import free_bytes; print(free_bytes('cuda')); "
    script += "print(torch.cuda.is_initialized())"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert said[1] == "False"
    least = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    assert float(said[0]) == pytest.approx(least + CONTEXT, rel=0.1)
