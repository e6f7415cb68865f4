"""Every method, those of conf/adapter and some from outside the package, keeps what an adapter promises.

A new yaml is found by itself. The classes below stand for a user's own: DoRA in PEFT's format, BitFit and a bottleneck
in loralab's.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from loralab.adapters import bottleneck, peft
from loralab.adapters.attached import attached
from loralab.adapters.base import Adapter, AdapterSpec, freeze, generator_for
from loralab.adapters.biases import BiasDelta
from loralab.adapters.export import load, save
from loralab.adapters.files import WEIGHTS, read_state
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA, LoRAAdapter, LoRADelta
from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.config.places import data_root
from loralab.optim.optimizers import AdamW
from loralab.planning.count import count
from loralab.quantization.base import dense_weight
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint

FAMILY = "phi"  # its layers and norms have biases


class DoRADelta(LoRADelta):
    """y = m (W x + s B A x) / ||W + s B A|| with the norm of each output held constant in backward."""

    def wrap(self, layer):
        weight = dense_weight(layer).detach().float()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", layer.bias if layer.bias is not None else weight.new_zeros(()), persistent=False)
        self.magnitude = nn.Parameter(weight.norm(dim=1))
        return self

    def forward(self, x, y, key):
        norm = (self.weight + self.delta_weight()).norm(dim=1).detach()
        ratio = self.magnitude / norm
        return y + (ratio - 1) * (y - self.bias) + ratio * super().forward(x, torch.zeros_like(y), key)


class DoRAAdapter(LoRAAdapter):
    def export(self, folder):
        peft.write(folder, {**self.peft_config(), "use_dora": True}, {**self.peft_state(), **self._magnitudes()})

    def restore(self, folder):
        stored = read_state(folder / WEIGHTS)
        own = {**self.peft_state(), **self._magnitudes()}
        assert set(stored) == set(own)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])

    def _magnitudes(self):
        key = f"{peft.PREFIX}{{}}.lora_magnitude_vector"
        return {key.format(name): delta.magnitude for name, delta in self.adapted()}


@dataclass(frozen=True)
class DoRA(LoRA):
    packable = tokenwise = layerwise = True
    makes = DoRAAdapter

    def delta(self, name, layer, device):
        out_features, in_features = dense_weight(layer).shape
        return DoRADelta(in_features, out_features, self.rank(name), self.scaling(name), 0.0, device).wrap(layer)


@dataclass(frozen=True)
class BitFit(AdapterSpec):
    packable = tokenwise = layerwise = True

    def attach(self, model, seed=0):
        freeze(model)
        adapter = Adapter(model, self)
        for name, module in model.named_modules():
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                adapter.add(name, BiasDelta(module.bias))
        return adapter


class BottleneckDelta(nn.Module):
    def __init__(self, size, width, generator):
        super().__init__()
        self.down = nn.Parameter(torch.randn(width, size, generator=generator) / size**0.5)
        self.up = nn.Parameter(torch.zeros(size, width))

    def forward(self, x, y, key):
        return y + nn.functional.gelu(y.float() @ self.down.T) @ self.up.T


@dataclass(frozen=True)
class Bottleneck(AdapterSpec):
    """Says nothing of itself, so it runs alone and with padding."""

    width: int = 4

    def attach(self, model, seed=0):
        adapter = Adapter(model, self)
        for name, _ in model.named_modules():
            if name.endswith((".mlp", ".self_attn.dense")):
                adapter.add(name, BottleneckDelta(model.config.hidden_size, self.width, generator_for(seed, name)))
        return adapter


YAMLS = sorted(path.stem for path in (data_root() / "conf" / "adapter").glob("*.yaml"))
METHODS = {
    **{"own dora": DoRA(r=4), "own bitfit": BitFit(), "own bottleneck": Bottleneck()},
    "dora": LoRA(r=4, use_dora=True),
    "embedding": LoRA(r=4, target_modules=["embed_tokens", "q_proj"]),
    "pissa": LoRA(r=4, init_lora_weights="pissa", lora_dropout=0.1),
    "adapterl": bottleneck.Bottleneck(variant="adapterl", bottleneck_size=4, dropout=0.1),
}


@pytest.fixture(params=[*YAMLS, *METHODS], scope="module")
def spec(request):
    name = request.param
    return METHODS[name] if name in METHODS else build(plain(compose([f"adapter={name}"]))["adapter"], "adapter")


@pytest.fixture
def fresh(load_base):
    """A base of its own, and the adapter of ``spec`` on it."""

    def make(spec, seed=0, scheme="none"):
        base = load_base(FAMILY, "none" if spec.changes_base else scheme)
        return SimpleNamespace(model=base.model, adapter=attached(spec, base.model, seed))

    return make


def logits(one, given):
    one.model.eval()
    with torch.no_grad(), AdapterHooks.of(one.model).batch(BatchSlice(one.adapter, 2)):
        return one.model(**given).logits


def trained(one, given, steps=3):
    """After a few real steps, of dropout too."""
    one.model.train()
    optimizer = torch.optim.AdamW(one.adapter.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        with AdapterHooks.of(one.model).batch(BatchSlice(one.adapter, 2, key=step)):
            one.model(**given).logits.logsumexp(-1).sum().backward()
        optimizer.step()
    return one


def test_every_yaml_is_found():
    assert {"lora", "full"} <= set(YAMLS)


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_training_starts_at_the_base_or_the_method_says_why_not(spec, fresh, load_base, inputs, scheme):
    one = fresh(spec, scheme=scheme)
    bare = load_base(FAMILY, "none" if spec.changes_base else scheme).model.eval()(**inputs()).logits
    assert torch.equal(logits(one, inputs()), bare) != bool(spec.start_differs)


def test_every_parameter_gets_a_gradient_and_moves_and_nothing_else_does(spec, fresh, inputs):
    one = fresh(spec)
    before = {name: value.clone() for name, value in one.adapter.state_dict().items()}
    base = {name: value.clone() for name, value in one.model.state_dict().items()}
    trained(one, inputs())
    still = [name for name, p in one.adapter.named_parameters() if p.grad is None or torch.equal(p, before[name])]
    assert not still
    if not spec.changes_base:
        assert all(parameter.grad is None for parameter in one.model.parameters())
        assert all(torch.equal(value, base[name]) for name, value in one.model.state_dict().items())


def test_the_state_goes_round(spec, fresh, inputs):
    one, other = trained(fresh(spec), inputs()), fresh(spec, seed=7)
    assert not torch.equal(logits(one, inputs()), logits(other, inputs()))
    other.adapter.load_state_dict(one.adapter.state_dict(), strict=True)
    assert torch.equal(logits(one, inputs()), logits(other, inputs()))


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_what_is_exported_gives_the_same_logits_in_loralab_and_where_else_it_is_known(
    spec, fresh, load_base, inputs, tmp_path
):
    one = trained(fresh(spec), inputs())
    ours = logits(one, inputs())
    size = save(one.adapter, tmp_path / "adapter", seed=0)
    files = list((tmp_path / "adapter").glob("*.safetensors"))
    assert size == sum(file.stat().st_size for file in files) > 4 * one.adapter.trainable_parameters()
    model = load_base(FAMILY).model
    again = SimpleNamespace(model=model, adapter=load(tmp_path / "adapter", model))
    assert again.adapter.spec == spec
    torch.testing.assert_close(logits(again, inputs()), ours, rtol=1e-6, atol=1e-6)
    if (tmp_path / "adapter" / "adapter_config.json").exists():
        theirs = PeftModel.from_pretrained(load_base(FAMILY).model, tmp_path / "adapter")
    elif (tmp_path / "adapter" / "config.json").exists():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        return
    with torch.no_grad():
        found = theirs.eval()(**inputs()).logits[:, -ours.shape[1] :]  # PEFT's begin with those of virtual tokens
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_it_trains_in_half_precision(spec, load_base, inputs, precision):
    """The base's logits keep their dtype, and every parameter gets a finite gradient in its own."""
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    model = load_base(FAMILY, dtype=dtype).model
    one = SimpleNamespace(model=model, adapter=attached(spec, model))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert logits(one, inputs()).dtype == torch.bfloat16
        trained(one, inputs())
    for name, parameter in one.adapter.named_parameters():
        assert parameter.dtype == (torch.float32 if not spec.changes_base else getattr(torch, dtype)), name
        assert parameter.grad.dtype == parameter.dtype
        assert bool(parameter.grad.isfinite().all()), name


def test_the_count_from_shapes_is_what_is_attached(spec, fresh, make_model):
    one = fresh(spec)
    found = count(make_model(FAMILY), NoQuantization(), spec)
    dense = sum(parameter.numel() for parameter in one.model.parameters())
    assert found["trainable_parameters"] == one.adapter.trainable_parameters()
    biases = [p for _, delta in one.adapter.adapted() if isinstance(delta, BiasDelta) for p in delta.parameters()]
    added = one.adapter.trainable_parameters() - sum(p.numel() for p in biases)  # those stand in the base's place
    assert found["total_parameters"] == dense + (0 if spec.changes_base else added)


def tensors(folder):
    return {
        key: value
        for file in sorted((folder / "adapter").glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def assert_same(ours, theirs, curve):
    for one, other in zip(ours, theirs, strict=True):
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            assert curve(one.folder, key) == curve(other.folder, key)
        left, right = tensors(one.folder), tensors(other.folder)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def completed(specs):
    records = Runner().run(specs)
    assert [one["status"] for one in records] == ["completed"] * len(specs), records[0]["error"]
    return records


def goes_another_way(spec, fresh):
    """Whether LoRA's rows would be computed otherwise beside it: with dense logits, or with padding."""
    return "lm_head" in fresh(spec).adapter.layers() or not spec.tokenwise


CHANGES = {"optimizer": AdamW(lr=2e-2), "val_check_interval": 2, "max_steps": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{adapter and seed: the trial that ran alone with them}, each run by the first test that compares with it."""
    return tmp_path_factory.mktemp("alone"), {}


@pytest.fixture
def alone(finished, make_spec):
    folder, found = finished

    def run(adapter, seed):
        key = repr(adapter), seed
        if key not in found:
            spec = make_spec(f"{len(found)}", FAMILY, adapter=adapter, seed=seed, **CHANGES)
            found[key] = replace(spec, folder=folder / spec.id)
            completed([found[key]])
        return found[key]

    return run


def test_packed_is_solo_bit_for_bit_with_deltas_that_are_not_zero(spec, fresh, make_spec, curve, alone):
    """Beside plain LoRA too, whose kernel takes a whole stack of its own kind."""
    adapters = [spec, LoRA(r=4, lora_dropout=0.1), spec]
    packed = [make_spec(f"{i}", FAMILY, adapter=own, seed=i, **CHANGES) for i, own in enumerate(adapters)]
    if not spec.packable:
        (refused, *_) = Runner().run(packed)
        assert (refused["status"], refused["exit_code"]) == ("failed", 2)
        assert "cannot share a pass" in refused["error"]
        return
    sizes = [one["pack"]["size"] for one in completed(packed)]
    assert sizes == ([2, 1, 2] if goes_another_way(spec, fresh) else [3, 3, 3])
    assert_same(packed, [alone(own, seed=i) for i, own in enumerate(adapters)], curve)


def test_a_run_that_broke_off_goes_on_with_the_same_bits(spec, make_spec, break_off, curve, alone):
    checkpoint = {"checkpoint": lambda: Checkpoint(None, 1)}
    again = make_spec("again", FAMILY, adapter=spec, callbacks=checkpoint, **CHANGES)
    break_off([again], step=2)
    assert completed([again])[0]["resumed_from"] == 2
    assert_same([again], [alone(spec, seed=0)], curve)
