"""Between fit, validation and generation the base stays where it is; the rest of Lightning's teardown takes place."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from loralab.adapters.lora import LoRA
from loralab.quantization.four_bit import FourBit
from loralab.quantization.linear import FrozenLinear, resident_bytes
from loralab.running.runner import Runner
from loralab.training import generation, trainer
from loralab.training.module import FineTuner
from loralab.training.strategy import InPlace


@pytest.fixture
def moves(monkeypatch):
    """What the module of a run is asked to move to, and where generation takes place among that."""
    calls = []
    for name in ("cpu", "cuda", "to"):
        real = getattr(FineTuner, name)
        monkeypatch.setattr(
            FineTuner, name, lambda self, *a, real=real, name=name, **k: (calls.append(name), real(self, *a, **k))[1]
        )
    answers = generation.answers
    monkeypatch.setattr(generation, "answers", lambda *a, **k: (calls.append("generation"), answers(*a, **k))[1])
    return calls


def test_a_run_moves_its_module_nowhere(make_spec, make_data, moves):
    (done,) = Runner().run([make_spec(data=make_data(generate_rows=2), val_check_interval=2)])
    assert done["status"] == "completed"
    assert moves == ["generation"]


def test_teardown_leaves_the_module_and_does_all_the_rest():
    ended = []

    def part(name):
        return SimpleNamespace(teardown=lambda: ended.append(name))

    module = nn.Linear(2, 2, device="meta")  # Lightning's own move would raise: there is nothing to copy
    trained = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([trained])
    trained.grad = torch.ones(2)
    optimizer.step()
    strategy = InPlace("meta")
    strategy._lightning_module, strategy.optimizers = module, [optimizer]
    strategy._precision_plugin, strategy._accelerator = part("precision"), part("accelerator")
    strategy._checkpoint_io = part("checkpoints")
    strategy.teardown()
    assert ended == ["precision", "accelerator", "checkpoints"]
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert strategy.lightning_module is module
    assert trained.grad is None
    assert optimizer.state[trained]["exp_avg"].device.type == "cpu"

    with pytest.raises(NotImplementedError, match="meta tensor"):
        SingleDeviceStrategy.teardown(SimpleNamespace(optimizers=[], lightning_module=module))


def test_a_module_that_is_elsewhere_is_moved_before_a_fit():
    strategy = InPlace("meta")
    strategy.connect(nn.Linear(2, 2))
    strategy.model_to_device()
    assert {parameter.device.type for parameter in strategy.model.parameters()} == {"meta"}


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_a_run_has_the_same_bits_as_under_lightnings_own_strategy(
    make_spec, curve, weights, monkeypatch, tmp_path, scheme, vary
):
    quantization = {"quantization": FourBit()} if scheme == "nf4" else {}
    found = {}
    for name, kind in (("ours", InPlace), ("theirs", SingleDeviceStrategy)):
        monkeypatch.setattr("loralab.training.strategy.InPlace", kind)
        spec = make_spec(name, val_check_interval=2, adapter=LoRA(r=4, lora_dropout=0.1), **quantization)
        (done,) = Runner().run([spec])
        found[name] = [
            curve(tmp_path / name),
            curve(tmp_path / name, "val/loss"),
            done["metrics"],
            weights(spec.folder),
        ]
    assert found["ours"][:3] == found["theirs"][:3]
    for key, value in found["ours"][3].items():
        assert torch.equal(value, found["theirs"][3][key])


def test_dense_weights_that_are_kept_outlive_a_run_and_count_as_held(make_spec, monkeypatch):
    runner, held = Runner(), []
    real = runner.foresight.check
    monkeypatch.setattr(runner.foresight, "check", lambda *a: (held.append(a[3]), real(*a))[1])
    kept = []
    for name in ("one", "two"):
        (done,) = runner.run([make_spec(name, quantization=FourBit(dequantize="resident"))])
        assert done["status"] == "completed"
        layers = [layer for layer in runner.inputs._base.model.modules() if isinstance(layer, FrozenLinear)]
        kept.append([layer.resident.data_ptr() for layer in layers])
    assert kept[0] == kept[1]
    dense = resident_bytes(runner.inputs._base.model)
    assert dense == sum(4 * layer.in_features * layer.out_features for layer in layers)
    assert held == [0, runner.inputs._base.size.bytes + dense]


def test_a_kept_weight_follows_neither_another_device_nor_a_stale_code():
    layer = FourBit(dequantize="resident").convert(nn.Linear(64, 64, bias=False))
    layer(torch.ones(1, 64))
    assert layer.to("cpu").resident is not None
    assert layer.to("meta").resident is None


def test_lightning_gets_this_strategy_and_the_device():
    strategy = trainer.TrainerSpec(accelerator="cpu").build([], progress=False).strategy
    assert type(strategy) is InPlace
    assert strategy.root_device == torch.device("cpu")
