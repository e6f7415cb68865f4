"""What the classes of lab.py promise, and a short run from Python."""

import json
from pathlib import Path

import lab
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loralab
from loralab.adapters.hooks import AdapterHooks, BatchSlice

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def base():
    """A small random Llama: no download."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def adapted(model, adapter):
    """The logits with the adapter acting on every row."""
    with AdapterHooks.of(model).batch(BatchSlice(adapter, len(IDS))):
        return model(IDS).logits


def test_the_adapter_changes_nothing_at_the_start(base):
    before = base(IDS).logits
    assert torch.equal(adapted(base, lab.Scaled().attach(base)), before)


def test_all_of_the_adapter_trains_and_nothing_of_the_base(base):
    adapter = lab.Scaled(target_modules="all-linear").attach(base)
    adapted(base, adapter).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_the_adapter_is_its_formula(base):
    adapter = lab.Scaled(target_modules=["q_proj"]).attach(base)
    layer, x = base.model.layers[0].self_attn.q_proj, torch.randn(3, 16)
    (name, delta), *_ = adapter.adapted()
    assert name == "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        delta.s.fill_(0.5)
        expected = x @ (1.5 * layer.weight).T
        assert torch.allclose(delta(x, layer(x), None), expected, atol=1e-6)
        assert torch.allclose(x @ delta.merged({"weight": layer.weight})["weight"].T, expected, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_code_is_off_by_at_most_half_a_step(bits):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    packed = lab.Uniform(bits=bits).pack(weight, None)
    step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((packed.dense(torch.float32) - weight).abs() <= step / 2 + 1e-6).all()
    stored = sum(8 * tensor.nbytes for tensor in packed.packed())
    assert stored == lab.Uniform(bits=bits).storage_bits(8, 32)


def test_the_rows_are_sums():
    splits = lab.Sums(rows=40).splits()
    assert (len(splits.train), len(splits.validation)) == (40, 10)
    for row in splits.train:
        a, b = row.prompt.removesuffix("=").split("+")
        assert int(row.target) == int(a) + int(b)


def test_two_steps_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # conf/ and lab.py are looked up in the current folder
    short = ["trainer.max_steps=2", "data.rows=16", "callbacks.norm.every_n_steps=1", "logger=none"]
    record = loralab.train(["+experiment=sums", "quantization=uniform", *short, f"hydra.run.dir={tmp_path}"])
    metrics = record["metrics"]
    assert metrics["val/token_error"] == pytest.approx(1 - metrics["val/token_accuracy"])
    assert record["adapter"]["method"] == "scaled"
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "own/adapter_norm" in row] == [1, 2]
