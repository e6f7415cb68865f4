"""EVA: A is what the layers' inputs vary along on the trial's first training rows, held against PEFT's and an SVD."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch.utils.data import DataLoader

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.data.batches import collate, permutation
from loralab.errors import ConfigError
from loralab.models.feeding import encoded_rows
from loralab.quantization.four_bit import FourBit
from loralab.running.runner import Runner
from loralab.training import layer_inputs
from loralab.training.layer_inputs import LayerInputs

SPEC = LoRA(r=4, init_lora_weights="eva")


@pytest.fixture
def fed(load_base, make_model, make_data):
    """A base and what enters its layers on the rows of its task."""

    def make(family="llama", scheme="none", seed=0):
        base = load_base(family, scheme)
        task = base.spec.task
        kind = "labels" if task == "sequence_classification" else "ragged"
        rows = encoded_rows(make_data(kind), base.spec, base.spec.load_tokenizer()).train
        return base.model, LayerInputs(base.model, rows, task, seed)

    return make


def begun(model, inputs, spec=SPEC):
    with AdapterHooks.of(model).given(layer_inputs=inputs):
        return attached(spec, model)


@pytest.mark.parametrize("scheme", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "distilbert"])
def test_a_is_the_principal_directions_of_all_inputs_of_the_layer(fed, family, scheme):
    model, inputs = fed(family, scheme)
    adapter = begun(model, inputs)
    for name, delta in list(adapter.adapted())[::5]:
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
        )
        with torch.no_grad():
            for row in permutation(len(inputs.train), 0, 0)[: len(inputs.train)]:
                model(**inputs._inputs(inputs.train[row]))
        handle.remove()
        x = torch.cat(seen)
        values, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)[1:]
        cosines = (delta.lora_A.double() * directions[:4]).sum(1).abs()
        distinct = values[:4] > 1.02 * values[1:5]  # a direction is defined where its value is not its neighbour's
        distinct &= torch.cat([torch.tensor([True]), distinct[:-1]])
        assert bool(distinct.any())
        torch.testing.assert_close(cosines[distinct], torch.ones(int(distinct.sum())).double(), rtol=1e-5, atol=0)
        assert not delta.lora_B.any()


def test_a_spans_what_pefts_eva_spans(load_base, make_data):
    """On rows of one length in one batch, where PEFT's incremental decomposition has nothing to approximate but r."""
    base = load_base()
    rows = encoded_rows(make_data("pairs"), base.spec, base.spec.load_tokenizer()).train
    adapter = begun(base.model, LayerInputs(base.model, rows, "causal_lm", 0))
    batch = collate(rows, "causal_lm", 0)
    del batch["labels"]
    config = LoraConfig(
        r=4, init_lora_weights="eva", target_modules=adapter.module_names, eva_config=EvaConfig(rho=1, tau=0.999)
    )
    adapter.detach()
    whole = DataLoader([batch], batch_size=None)
    theirs = get_eva_state_dict(load_base().model, whole, config, show_progress_bar=False)
    for name, delta in adapter.adapted():
        overlap = torch.linalg.svdvals(delta.lora_A @ theirs[name].float().t())
        assert float(overlap[:3].min()) > 0.98, name  # PEFT's is a randomized decomposition: the fourth may be loose


def test_training_starts_at_the_base(fed, inputs):
    model, given = fed()
    bare = model.eval()(**inputs()).logits
    adapter = begun(model, given)
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        assert torch.equal(model(**inputs()).logits, bare)


def test_the_start_follows_the_seed_and_is_cut_from_a_higher_rank(fed, monkeypatch):
    monkeypatch.setattr(layer_inputs, "ROWS", 5)
    model, inputs = fed()
    other = LayerInputs(model, inputs.train, "causal_lm", 1)
    starts = [begun(model, given).state_dict() for given in (inputs, inputs, other)]
    higher = begun(model, inputs, LoRA(r=8, init_lora_weights="eva")).state_dict()
    again = begun(model, inputs).state_dict()
    for key in [key for key in starts[0] if key.endswith("lora_A")]:
        assert torch.equal(starts[0][key], starts[1][key])
        assert not torch.equal(starts[0][key], starts[2][key])
        assert torch.equal(starts[0][key], higher[key][:4])
        assert torch.equal(starts[0][key], again[key])


def test_layers_in_several_passes_have_the_same_directions(fed, monkeypatch):
    model, inputs = fed()
    together = begun(model, inputs).state_dict()
    AdapterHooks.of(model).decomposed.clear()
    monkeypatch.setattr(layer_inputs, "ROOM", 1)
    alone = begun(model, inputs).state_dict()
    assert all(map(torch.equal, together.values(), alone.values()))


def test_trials_share_the_passes_over_equal_rows(fed, monkeypatch):
    passes = []
    real = LayerInputs._pass
    monkeypatch.setattr(LayerInputs, "_pass", lambda self, moments: (passes.append(len(moments)), real(self, moments)))
    model, inputs = fed()
    for r in (4, 2, 4):
        begun(model, LayerInputs(model, inputs.train, "causal_lm", 0), LoRA(r=r, init_lora_weights="eva"))
    assert passes == [14]


def test_no_rows_too_few_tokens_and_files_of_it(fed, load_base, monkeypatch, tmp_path):
    model, inputs = fed()
    with pytest.raises(ConfigError, match="init_lora_weights=eva takes what enters the layers on training rows"):
        attached(SPEC, model)
    adapter = begun(model, inputs)
    save(adapter, tmp_path / "adapter")
    again = load(tmp_path / "adapter", load_base().model)
    assert all(map(torch.equal, adapter.state_dict().values(), again.state_dict().values()))
    monkeypatch.setattr(layer_inputs, "ROWS", 1)
    AdapterHooks.of(model).decomposed.clear()
    with pytest.raises(ConfigError, match=r"adapter.r=60: what enters model.layers.0.self_attn.q_proj in \d+ tokens"):
        begun(model, inputs, LoRA(r=60, init_lora_weights="eva"))


def test_packed_eva_is_solo_bit_for_bit(make_spec, curve):
    def two(prefix):
        return [make_spec(f"{prefix}{i}", adapter=SPEC, seed=i, quantization=FourBit()) for i in range(2)]

    packed, solo = two("packed"), two("solo")
    records = Runner().run(packed)
    assert [one["status"] for one in records] == ["completed"] * 2, records[0]["error"]
    assert [one["pack"]["size"] for one in records] == [2, 2]
    assert records[0]["adapter"]["note"].startswith("EVA: A begins as the principal directions")
    for one, other in zip(packed, solo, strict=True):
        Runner().run([other])
        assert curve(one.folder) == curve(other.folder)
