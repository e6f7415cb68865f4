"""PiSSA and LoftQ: starts that are computed from the weight, held against PEFT's and against the singular values."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.adapters.low_rank import LoRADelta
from loralab.errors import ConfigError
from loralab.models import loading, pretrained
from loralab.quantization.base import dense_weight, linear_shape
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

FAMILIES = ["llama", "gpt2"]  # Linear and Conv1D
VARIED = {
    "plain": {"lora_alpha": 12.0},
    "rslora": {"use_rslora": True, "lora_alpha": 3.0},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"down_proj": 5.0, "c_fc": 5.0}},
    "both": {"use_rslora": True, "rank_pattern": {"q_proj": 2, "c_attn": 2}},
}


def fitting(fields, family):
    """The patterns whose key is a layer of the family."""
    own = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}[family]
    return {
        field: {key: one for key, one in value.items() if key in own} if isinstance(value, dict) else value
        for field, value in fields.items()
    }


def logits(model, given, *adapters):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(*(BatchSlice(adapter, 2) for adapter in adapters)):
        return model(**given).logits


def moved(adapter, seed=1):
    """With noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return adapter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a small Llama with weights of differing singular values."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=258, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    return folder


def loaded(folder, quantizer=None, **changes):
    spec = pretrained.Pretrained(name_or_path=str(folder), max_length=64, **changes)
    return loading.load(spec, quantizer or NoQuantization(), None).model


@pytest.mark.parametrize("variant", VARIED)
@pytest.mark.parametrize("family", FAMILIES)
def test_pissa_trains_as_pefts_whose_base_is_the_residual(load_base, inputs, family, variant):
    """Starts, losses, gradients and weights after steps are those of PEFT's PiSSA, dense base, up to rounding."""
    fields = fitting(VARIED[variant], family)
    base, given = load_base(family), inputs()
    ours = attached(LoRA(r=4, init_lora_weights="pissa", **fields), base.model)
    theirs = get_peft_model(
        load_base(family).model,
        LoraConfig(r=4, init_lora_weights="pissa", target_modules=ours.module_names, **_pefts(fields, ours)),
    )
    own = {
        parameter: theirs.get_parameter(f"base_model.model.{name}.{factor}.default.weight")
        for name, delta in ours.adapted()
        for factor, parameter in (("lora_A", delta.lora_A), ("lora_B", delta.lora_B))
    }
    for mine, other in own.items():
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.data, other.data)
    optimizers = [torch.optim.SGD(list(group), lr=0.05) for group in (own.keys(), own.values())]
    for _ in range(3):
        with AdapterHooks.of(base.model).batch(BatchSlice(ours, 2)):
            losses = [model(**given).logits.float().square().mean() for model in (base.model, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for mine, other in own.items():
        torch.testing.assert_close(mine.data, other.data, rtol=1e-4, atol=1e-5)


def _pefts(fields, adapter):
    """Fields of LoraConfig, whose patterns may name no layer that is not there."""
    names = adapter.module_names
    return {"lora_alpha": 16.0, "fan_in_fan_out": any("c_attn" in name for name in names), **fields}


@pytest.mark.parametrize("variant", VARIED)
@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_pissas_files_are_a_plain_lora_of_twice_the_rank_over_the_original_base(
    load_base, inputs, tmp_path, variant, scheme
):
    spec = LoRA(r=4, init_lora_weights="pissa", **fitting(VARIED[variant], "llama"))
    adapter = moved(attached(spec, load_base().model))
    save(adapter, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stored["r"], stored["init_lora_weights"]) == (8, True)
    assert stored["rank_pattern"].keys() == {name for name in adapter.module_names if spec.rank(name) != 4}
    base = load_base("llama", scheme).model
    again = load(tmp_path / "adapter", base)
    for name, delta in again.adapted():
        assert all(
            torch.equal(value, adapter.deltas[name.replace(".", "/")][0].state_dict()[key])
            for key, value in delta.state_dict().items()
        )
    if scheme == "none":
        ours = logits(base, inputs(), again)
        theirs = PeftModel.from_pretrained(load_base().model, tmp_path / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(**inputs()).logits, ours, rtol=1e-5, atol=1e-5)
            merged = theirs.merge_and_unload()(**inputs()).logits
        torch.testing.assert_close(merged, ours, rtol=1e-5, atol=1e-5)


def test_pissas_a0_and_b0_come_from_the_state_whatever_was_computed(load_base):
    """Another machine's decomposition may have other signs."""
    stored = moved(attached(LoRA(r=4, init_lora_weights="pissa"), load_base().model)).state_dict()
    other = attached(LoRA(r=4, init_lora_weights="pissa"), load_base().model)
    with torch.no_grad():
        for buffer in other.buffers():
            buffer.neg_()
    other.load_state_dict(stored, strict=True)
    assert all(map(torch.equal, stored.values(), other.state_dict().values()))
    assert sum("initial_" in key for key in stored) == 2 * len(other.module_names)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_pissa_adds_to_the_weight_is_what_its_layer_computes(load_base, inputs, family):
    model = load_base(family).model
    adapter = moved(attached(LoRA(r=4, init_lora_weights="pissa"), model))
    ours = logits(model, inputs(), adapter)
    adapter.detach()
    with torch.no_grad():
        for name, delta in adapter.adapted():
            dense_weight(model.get_submodule(name)).add_(delta.delta_weight())
    torch.testing.assert_close(logits(model, inputs()), ours, rtol=1e-5, atol=1e-5)


def test_pissas_dropout_acts_on_the_trained_part_alone(load_base):
    """As in PEFT, where the other part belongs to the base."""
    adapter = attached(LoRA(r=4, init_lora_weights="pissa", lora_dropout=0.5), load_base().model)
    delta = moved(next(delta for _, delta in adapter.adapted()))
    plain = LoRA(r=4, lora_dropout=0.5).delta("any", load_base().model.model.layers[0].self_attn.q_proj, "cpu")
    plain.begin(delta.lora_A, delta.lora_B)
    x, zero = torch.randn(6, 64), torch.zeros(6, 64)
    frozen = delta.scaling * x @ delta.initial_A.T @ delta.initial_B.T
    torch.testing.assert_close(delta(x, zero, 7), plain(x, zero, 7) - frozen)


def test_pissa_over_a_quantized_base_takes_the_original_weight_and_says_what_it_is_not(checkpoint, caplog):
    caplog.set_level("INFO")
    model = loaded(checkpoint, FourBit())
    adapter = attached(LoRA(r=4, init_lora_weights="pissa"), model)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, delta in adapter.adapted():
        values = torch.linalg.svdvals(tensors[f"{name}.weight"])
        residual = tensors[f"{name}.weight"] - delta.scaling * delta.initial_B @ delta.initial_A
        torch.testing.assert_close(torch.linalg.svdvals(residual)[:5], values[4:9])
    assert "this is not QPiSSA" in adapter.note
    assert [record.getMessage() for record in caplog.records if "PiSSA" in record.getMessage()] == [adapter.note]
    assert attached(LoRA(r=4, init_lora_weights="pissa"), loaded(checkpoint)).note == ""


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
@pytest.mark.parametrize("quantizer", [FourBit(), FourBit(double_quant=True), Int8Blockwise()], ids=lambda q: q.name)
def test_loftq_starts_at_pefts_decomposition_of_what_quantization_lost(checkpoint, quantizer, fields):
    model = loaded(checkpoint, quantizer)
    spec = LoRA(r=4, init_lora_weights="loftq", **fields)
    adapter = attached(spec, model)
    tensors = load_file(checkpoint / "model.safetensors")
    lost = left = whole = 0.0
    for name, delta in adapter.adapted():
        weight, quantized = tensors[f"{name}.weight"], dense_weight(model.get_submodule(name))
        theirs = _low_rank_decomposition(weight - quantized, reduced_rank=spec.rank(name))
        torch.testing.assert_close(delta.delta_weight(), theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-6)
        lost, whole = lost + (weight - quantized).square().sum(), whole + weight.square().sum()
        left = left + (weight - quantized - delta.delta_weight()).square().sum()
    assert left < lost
    assert f"norm {(lost / whole).sqrt():.2%} is lost, {(left / whole).sqrt():.2%} with B A" in adapter.note


def test_loftq_with_dora_starts_at_the_same_matrix_as_without(checkpoint, inputs):
    model = loaded(checkpoint, FourBit())
    plain, dora = (attached(LoRA(r=4, init_lora_weights="loftq", use_dora=dora), model) for dora in (False, True))
    torch.testing.assert_close(logits(model, inputs(), dora), logits(model, inputs(), plain), rtol=1e-5, atol=1e-5)


def test_trials_of_several_ranks_share_one_quantized_base_and_start_as_alone(checkpoint):
    together = loaded(checkpoint, FourBit())
    before = [tensor.clone() for layer in together.modules() for tensor in getattr(layer, "packed", list)()]
    for r in (2, 8, 4):
        spec = LoRA(r=r, init_lora_weights="loftq")
        first, alone = (attached(spec, model) for model in (together, loaded(checkpoint, FourBit())))
        assert all(map(torch.equal, first.state_dict().values(), alone.state_dict().values()))
    after = [tensor for layer in together.modules() for tensor in getattr(layer, "packed", list)()]
    assert all(map(torch.equal, before, after))


def test_a_renamed_and_a_transposed_tensor_are_found_again(checkpoint, tmp_path, tokenizer_folder):
    """A checkpoint of the base alone, whose names lack its prefix, and one of Conv1D layers, whose matrices are (in,
    out)."""
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(checkpoint).base_model.save_pretrained(bare)
    assert "layers.0.self_attn.q_proj.weight" in load_file(bare / "model.safetensors")
    head = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    save_file(
        {**load_file(bare / "model.safetensors"), "lm_head.weight": head}, bare / "model.safetensors", {"format": "pt"}
    )
    spec = LoRA(r=4, init_lora_weights="loftq")
    states = [attached(spec, loaded(folder, FourBit())).state_dict() for folder in (checkpoint, bare)]
    assert all(map(torch.equal, *(state.values() for state in states)))


def test_conv1d_layers_are_read_as_out_times_in(load_base, tmp_path):
    dense = load_base("gpt2").model
    dense.save_pretrained(tmp_path)
    model = loaded(tmp_path, FourBit())
    adapter = attached(LoRA(r=60, init_lora_weights="loftq"), model)
    for name, delta in adapter.adapted():
        weight, quantized = dense_weight(dense.get_submodule(name)), dense_weight(model.get_submodule(name))
        left = weight - quantized - delta.delta_weight()
        assert left.norm() < 0.2 * (weight - quantized).norm()


def test_layers_that_stay_dense_start_as_plain_lora_beside_quantized_ones(checkpoint):
    model = loaded(checkpoint, FourBit(skip_modules=["q_proj"]))
    deltas = dict(attached(LoRA(r=4, init_lora_weights="loftq"), model).adapted())
    plain = dict(attached(LoRA(r=4), model).adapted())
    for name, delta in deltas.items():
        assert torch.equal(delta.lora_A, plain[name].lora_A) == name.endswith("q_proj")


def test_weights_that_changed_since_the_base_was_loaded_are_refused(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    model = loaded(tmp_path, FourBit())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="its files have changed since the base was loaded"):
        attached(LoRA(r=4, init_lora_weights="loftq"), model)


def test_weights_in_a_pickle_are_refused(checkpoint, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    dense.config.save_pretrained(tmp_path)
    torch.save(dense.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"read one by one from \*\.safetensors alone"):
        attached(LoRA(r=4, init_lora_weights="loftq"), loaded(tmp_path, FourBit()))


def test_a_weight_that_is_no_tensor_of_the_checkpoint_is_refused(checkpoint):
    model = loaded(checkpoint, FourBit())
    model.model.layers[0].self_attn.q_proj.stored_key = None
    with pytest.raises(ConfigError, match="weight of model.layers.0.self_attn.q_proj before quantization is no tensor"):
        attached(LoRA(r=4, init_lora_weights="loftq"), model)


def test_a_dense_base_has_nothing_for_loftq(make_spec, load_base):
    (record,) = Runner().run([make_spec(adapter=LoRA(r=4, init_lora_weights="loftq"))])
    assert (record["status"], record["exit_code"]) == ("failed", 2)
    assert "starts B A at what quantization lost of each weight" in record["error"]


@pytest.mark.parametrize("init", ["pissa", "loftq", "eva"])
def test_more_ranks_than_directions_are_refused(checkpoint, init):
    with pytest.raises(
        ConfigError, match=f"adapter.r=65: model.layers.0.self_attn.q_proj is 64 x 64, .*{init}; valid: at most 64"
    ):
        attached(LoRA(r=65, init_lora_weights=init), loaded(checkpoint, FourBit()))


def test_a_delta_of_ones_own_that_would_add_the_principal_part_again_is_refused(load_base):
    class Own(LoRA):
        def delta(self, name, layer, device):
            return LoRADelta(*reversed(linear_shape(layer)), self.r, self.scaling(name), 0.0, device)

    with pytest.raises(ConfigError, match="init_lora_weights=pissa does not know how LoRADelta of model.layers.0"):
        Own(r=4, init_lora_weights="pissa").attach(load_base().model)


def test_pissa_with_dora_is_refused_and_pefts_true_is_kaiming():
    with pytest.raises(ConfigError, match="adapter.use_dora=true does not go with adapter.init_lora_weights=pissa"):
        LoRA(init_lora_weights="pissa", use_dora=True)
    assert LoRA(init_lora_weights=True) == LoRA()


def test_packed_loftq_is_solo_bit_for_bit_and_the_record_holds_the_note(make_spec, curve):
    def three(prefix):
        adapters = [LoRA(r=r, init_lora_weights=init) for r, init in ((2, "loftq"), (4, "loftq"), (4, "pissa"))]
        return [
            make_spec(f"{prefix}{i}", adapter=one, seed=i, quantization=FourBit(), val_check_interval=2)
            for i, one in enumerate(adapters)
        ]

    packed, solo = three("packed"), three("solo")
    records = Runner().run(packed)
    assert [one["pack"]["size"] for one in records] == [3] * 3
    assert [one["adapter"]["note"].split()[0] for one in records] == ["LoftQ:", "LoftQ:", "PiSSA"]
    for one, other in zip(packed, solo, strict=True):
        Runner().run([other])
        for key in ("train/loss", "val/loss"):
            assert curve(one.folder, key) == curve(other.folder, key)
