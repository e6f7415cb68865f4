"""The first pass is computed with adapters that do something, leaves no trace, and names what it did not reach."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from loralab.adapters.attached import attached
from loralab.adapters.base import Adapter, AdapterSpec, freeze
from loralab.adapters.full import Full
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA, LoRADelta
from loralab.adapters.perturbed import moderate, perturbed
from loralab.forward import stacked
from loralab.forward.prefix import Pass, Prefix
from loralab.forward.stacked import Forward, ForwardMode
from loralab.models import loading, pretrained
from loralab.quantization.four_bit import FourBit
from loralab.running.runner import Runner
from loralab.training import first_batch
from loralab.training.first_batch import FirstBatch
from loralab.training.module import FineTuner

OOMS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
MAMBA = {"model_type": "mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 258}


class Leaking(nn.Module):
    """Starts as nothing, and then adds to the rows of whoever is there."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(64))


@dataclass(frozen=True)
class Leaks(AdapterSpec):
    """Hooks onto the base by itself, past the slices of the trials."""

    packable = True

    def attach(self, model, seed=0):
        adapter = Adapter(model, self)
        adapter.own = Leaking()
        model.model.layers[0].register_forward_hook(lambda _, args, out: out + adapter.own.shift)
        return adapter


class Looking(LoRADelta):
    """Reads the token before, which of a flat batch may be another row's."""

    def forward(self, x, y, key):
        return super().forward(torch.roll(x, 1, dims=-2), y, key)


@dataclass(frozen=True)
class Untrue(LoRA):
    """Says what it does not keep."""

    packable = tokenwise = True
    makes = Adapter

    def delta(self, name, layer, device):
        return Looking(layer.in_features, layer.out_features, self.r, 1.0)


class Unused(nn.Module):
    def __init__(self, uses):
        super().__init__()
        self.uses = uses
        self.shift, self.spare = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, y, key):
        return y + self.shift if self.uses else y


@dataclass(frozen=True)
class Spare(AdapterSpec):
    packable = True
    uses: bool = True

    def attach(self, model, seed=0):
        freeze(model)
        adapter = Adapter(model, self)
        adapter.add("model.layers.1.mlp.up_proj", Unused(self.uses))
        return adapter


@pytest.fixture
def mamba(make_model, make_spec):
    """A trial on a tiny Mamba, whose blocks read the weight of dt_proj themselves."""

    def make(name="trial", **changes):
        model = pretrained.Random(
            tokenizer=make_model().tokenizer, config=MAMBA, max_length=64, attn_implementation="eager", dtype="float32"
        )
        return make_spec(name, model=model, max_steps=2, **changes)

    return make


def test_perturbed_moves_every_parameter_the_same_each_time_and_gives_back_its_bits(load_base):
    adapter = LoRA(r=2, modules_to_save=["lm_head"]).attach(load_base().model)
    next(adapter.parameters()).data.view(-1)[:2] = torch.tensor([-0.0, float("nan")])
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    random, found = torch.get_rng_state(), []
    for _ in range(2):
        with perturbed(adapter, 1.0):
            found.append([parameter.detach().clone() for parameter in adapter.parameters()])
    bits = lambda one: one.view(torch.int32)  # noqa: E731
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(found[0], before, strict=True))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(adapter.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_is_trained_itself_is_not_copied(load_base):
    adapter = Full().attach(load_base().model)
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    with perturbed(adapter, 1.0):
        assert all(map(torch.equal, adapter.parameters(), before))


@pytest.mark.parametrize("lora_alpha", [1.0, 16.0, 1e4, 1e9])
def test_the_move_is_felt_and_moderate_whatever_alpha_is(load_base, inputs, lora_alpha):
    base = load_base()
    adapter = LoRA(r=4, lora_alpha=lora_alpha).attach(base.model)

    def loss():
        with torch.no_grad(), AdapterHooks.of(base.model).batch(BatchSlice(adapter, 2)):
            return float(base.model(**inputs(), labels=inputs()["input_ids"]).loss)

    start = loss()
    scale, moved = moderate(adapter, start, loss)
    assert scale > 0
    assert 1e-6 < abs(moved - start) / start <= 0.5
    assert loss() == start


def test_an_adapter_that_acts_on_the_rows_of_others_once_it_has_moved_runs_alone(make_spec, curve):
    specs = [make_spec(f"{i}", adapter=Leaks(), seed=i) for i in range(2)]
    records = Runner().run(specs)
    assert [one["status"] for one in records] == ["completed"] * 2, records[0]["error"]
    assert all("the base mixes rows" in one["pack"]["why"] for one in records)


def test_the_comparison_leaves_no_trace(make_spec, make_data, monkeypatch, curve, weights):
    def two(name):
        adapters = LoRA(r=2, lora_dropout=0.1), LoRA(r=4)
        return [make_spec(f"{name}{i}", adapter=own, seed=i) for i, own in enumerate(adapters)]

    states = []
    real = FirstBatch.on_train_start

    def watched(self, trainer, module):
        def now():
            held = [*module.adapters.parameters(), torch.get_rng_state()]
            return [one.detach().clone() for one in held], len(trainer.optimizers[0].state)

        states.append(now())
        real(self, trainer, module)
        states.append(now())

    monkeypatch.setattr(FirstBatch, "on_train_start", watched)
    Runner().run(compared := two("compared"))
    (before, optimizer), (after, optimizer_after) = states
    assert all(map(torch.equal, before, after))
    assert optimizer == optimizer_after == 0
    monkeypatch.setattr(FirstBatch, "on_train_start", lambda *_: None)
    Runner().run(plain := two("plain"))
    for one, other in zip(compared, plain, strict=True):
        assert curve(one.folder) == curve(other.folder)
        assert all(map(torch.equal, weights(one.folder).values(), weights(other.folder).values()))


def test_trials_that_go_on_in_the_same_process_are_not_compared_again(make_spec, monkeypatch):
    compared, real = [], first_batch._packed_and_alone
    monkeypatch.setattr(first_batch, "_packed_and_alone", lambda *given: compared.append(1) or real(*given))

    def specs(**steps):
        return [make_spec(f"{i}", seed=i, **steps) for i in range(2)]

    runner = Runner()
    assert {one["status"] for one in runner.run(specs(until=0.5))} == {"interrupted"}
    assert {one["status"] for one in runner.run(specs())} == {"completed"}
    assert len(compared) == 1
    runner.run([make_spec("1"), make_spec("2")])  # one of them has not been seen here
    assert len(compared) == 2


def test_an_adapter_that_is_not_what_it_says_keeps_its_padding(load_base, inputs, caplog):
    base = load_base()
    given = inputs()
    for spec, unpadded in ((LoRA(r=2), True), (Untrue(r=2), False)):
        adapter = attached(spec, base.model)
        chosen = Forward(base.model, "causal_lm")
        with caplog.at_level(logging.INFO, "loralab.forward.stacked"):
            chosen(given, given["input_ids"].clone(), [BatchSlice(adapter, 2)])
        assert chosen.mode.unpadded is unpadded
        adapter.detach()
    assert "is not computed without padding" in caplog.text


def test_of_a_pack_each_method_is_asked(load_base, inputs):
    base = load_base()
    adapters = [attached(spec, base.model) for spec in (LoRA(r=2), LoRA(r=4), Untrue(r=2))]
    given = {name: torch.cat([value, value[:1]]) for name, value in inputs().items()}
    chosen = Forward(base.model, "causal_lm")
    chosen(given, given["input_ids"].clone(), [BatchSlice(one, 1) for one in adapters])
    assert not chosen.mode.unpadded


@pytest.mark.parametrize("error", OOMS, ids=["device", "host"])
def test_out_of_memory_is_no_disagreement(load_base, inputs, monkeypatch, error):
    base = load_base()
    adapter = LoRA(r=2).attach(base.model)

    def full(*_):
        raise error

    monkeypatch.setattr(stacked, "flatten", full)
    chosen = Forward(base.model, "causal_lm")
    with pytest.raises(type(error), match="memory"):
        chosen(inputs(), inputs()["input_ids"], [BatchSlice(adapter, 2)])
    assert chosen.mode is None
    prefix = Prefix(base.model, [adapter])
    monkeypatch.setattr(prefix, "_leaving", full)
    with pytest.raises(type(error), match="memory"):
        prefix._why_not_narrowed({}, Pass(1, [("a",)], [3], flat=False))


def test_another_error_is_disagreement(load_base, inputs, monkeypatch):
    base = load_base()
    chosen = Forward(base.model, "causal_lm")
    monkeypatch.setattr(stacked, "flatten", lambda *_: torch.zeros(2) @ torch.zeros(3))
    chosen(inputs(), inputs()["input_ids"], [BatchSlice(LoRA(r=2).attach(base.model), 2)])
    assert chosen.mode == ForwardMode(fused_cross_entropy=True)


@pytest.mark.parametrize("error", OOMS, ids=["device", "host"])
def test_out_of_memory_in_the_comparison_halves_the_pack(make_spec, monkeypatch, error):
    real = FineTuner.losses

    def losses(self, batches, training):
        if len(self.trials) == 2 and training:
            raise error
        return real(self, batches, training)

    monkeypatch.setattr(FineTuner, "losses", losses)
    records = Runner().run([make_spec(f"{i}", seed=i, max_steps=2) for i in range(2)])
    assert [one["status"] for one in records] == ["completed"] * 2, records[0]["error"]
    assert [one["pack"]["halved"] for one in records] == [[2], [2]]


def test_layers_that_the_model_never_calls_are_named_and_kept(mamba, caplog):
    (record,) = Runner().run([mamba(adapter=LoRA(r=2))])
    assert record["status"] == "completed", record["error"]
    never = [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert record["adapter"]["never_called"] == never
    (message,) = [one for one in caplog.messages if "not at all" in one]
    assert "called 2 of the 8 adapted layers not at all" in message
    assert all(name in message for name in never)


def test_a_trial_whose_layers_are_never_called_is_a_configuration_error(mamba):
    (record,) = Runner().run([mamba(adapter=LoRA(r=2, target_modules=["dt_proj"]))])
    assert (record["status"], record["exit_code"]) == ("failed", 2)
    assert "MambaForCausalLM calls none of the 2 layers it adapts" in record["error"]


def test_of_a_pack_it_alone_fails(mamba, weights):
    specs = [
        mamba("sound", adapter=LoRA(r=2, target_modules=["in_proj"])),
        mamba("never", adapter=LoRA(r=2, target_modules=["dt_proj"])),
    ]
    records = Runner().run(specs)
    assert [(one["status"], one["exit_code"]) for one in records] == [("completed", 0), ("failed", 2)]
    assert any(value.any() for key, value in weights(specs[0].folder).items() if "lora_B" in key)


def test_every_layer_of_an_ordinary_model_is_called(make_spec, caplog):
    (record,) = Runner().run([make_spec(max_steps=1)])
    assert record["adapter"]["never_called"] == []
    assert not [one for one in caplog.messages if "not at all" in one or "no gradient" in one]


def test_an_expert_without_a_token_is_named_and_trains_when_one_comes(load_base, caplog, make_spec, monkeypatch):
    real = loading.load

    def load(*given):  # a Llama that calls its second block every other time
        base = real(*given)
        block, calls = base.model.model.layers[1], []
        whole = block.forward

        def sometimes(hidden, *args, **kwargs):
            calls.append(1)
            return hidden if base.model.training and len(calls) < 3 else whole(hidden, *args, **kwargs)

        block.forward = sometimes
        return base

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(stacked, "can_unpad", lambda _: False)
    monkeypatch.setattr(stacked, "frozen_head", lambda *_: None)
    (record,) = Runner().run([make_spec(adapter=LoRA(r=2, target_modules=["up_proj"]), max_steps=6)])
    assert record["status"] == "completed", record["error"]
    assert "called 1 of the 2 adapted layers not at all" in caplog.text
    assert record["adapter"]["never_called"] == []


def test_a_parameter_without_a_gradient_is_named(make_spec, caplog):
    (record,) = Runner().run([make_spec(adapter=Spare(), max_steps=1)])
    assert record["status"] == "completed", record["error"]
    assert "no gradient reached 1 of the adapter's 2 parameters in the first step" in caplog.text
    assert "deltas.model/layers/1/mlp/up_proj.0.spare" in caplog.text


def test_an_adapter_that_changes_nothing_is_a_configuration_error_alone_and_in_a_pack(make_spec):
    alone = Runner().run([make_spec("alone", adapter=Spare(uses=False), max_steps=1)])[0]
    specs = [
        make_spec("sound", adapter=Spare(), max_steps=1),
        make_spec("idle", adapter=Spare(uses=False), max_steps=1),
    ]
    sound, idle = Runner().run(specs)
    assert sound["status"] == "completed", sound["error"]
    for one in (alone, idle):
        assert (one["status"], one["exit_code"]) == ("failed", 2)
        assert "the loss depends on none of its 2 parameters" in one["error"]


def test_classes_of_one_name_share_neither_base_nor_data_nor_optimizer(make_spec, vary):
    """A user's own FourBit, Files or AdamW is not loralab's, whatever it prints."""
    spec = make_spec(quantization=FourBit())
    for field in ("quantization", "data", "optimizer"):
        kind = type(getattr(spec, field))
        heir = type(kind.__name__, (kind,), {"packable": True})
        own = vary(spec, **{field: heir(**vars(getattr(spec, field)))})
        assert repr(getattr(own, field)) == repr(getattr(spec, field))
        assert own.pack_key != spec.pack_key
    runner = Runner()
    halved = type("FourBit", (FourBit,), {"pack": lambda self, weight, bias: FourBit.pack(self, weight / 2, bias)})
    first = runner.run([vary(spec, id="first")])[0]
    second = runner.run([vary(spec, id="second", quantization=halved())])[0]
    assert first["metrics"]["val/loss"] != second["metrics"]["val/loss"]
