"""model.compile: the numbers of a run without it, few compilations, and one paragraph where a graph cannot be made."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from loralab.adapters.bottleneck import Bottleneck
from loralab.adapters.lora import LoRA
from loralab.adapters.low_rank import LoRADelta
from loralab.cli import main
from loralab.errors import ConfigError
from loralab.forward import compiled
from loralab.quantization.four_bit import FourBit
from loralab.records import record
from loralab.running.runner import Runner
from loralab.training import compiling
from loralab.training.passes import stack_batches


@pytest.fixture
def pack(make_spec, make_model, make_data):
    """Two trials over one NF4 block, on rows of differing lengths, and some of one length."""

    def make(name, steps=4, **changes):
        model = make_model(config={"num_hidden_layers": 1, "max_position_embeddings": 256}, max_length=200)
        model = replace(model, compile="blocks", **changes)
        adapters = [LoRA(r=r, target_modules=["q_proj"], modules_to_save=[]) for r in (2, 4)]
        data = make_data("ragged", batch_size=2)
        return [
            make_spec(f"{name}{i}", seed=i, model=model, adapter=adapter, data=data, max_steps=steps,
                      quantization=FourBit())
            for i, adapter in enumerate(adapters)
        ]  # fmt: skip

    return make


def finished(specs):
    records = Runner().run(specs)
    assert [one["status"] for one in records] == ["completed"] * len(specs), records[0]["error"]
    return records


@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_pack_has_eagers_bits_and_few_forms(pack, weights, curve, monkeypatch, checkpointing):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", counter)
    monkeypatch.setattr(compiled, "MULTIPLE", 8)  # so that there are several widths
    theirs, ours = (pack(name, 8, gradient_checkpointing=checkpointing) for name in ("eager", "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "switch_on", lambda model, how: None)
        expected = finished(theirs)
    assert counter.frame_count == 0
    records = finished(ours)
    # one length, any length, and rows of one length, which have no mask
    assert 1 <= counter.frame_count <= 3
    for one, other, spec, twin in zip(records, expected, ours, theirs, strict=True):
        assert one["metrics"] == other["metrics"]
        assert curve(spec.folder) == curve(twin.folder)
        left, right = weights(spec.folder), weights(twin.folder)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.slow
def test_validations_on_the_way_are_not_compiled(pack, curve, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", counter)
    theirs, ours = (
        [replace(one, trainer=replace(one.trainer, val_check_interval=2)) for one in pack(name, 6)]
        for name in ("eager", "whole")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "switch_on", lambda model, how: None)
        finished(theirs)
    finished(ours)
    assert 1 <= counter.frame_count <= 3  # the forms of training, made once
    for key in ("train/loss", "val/loss"):
        assert curve(ours[0].folder, key) == curve(theirs[0].folder, key)
    assert len(curve(ours[0].folder, "val/loss")) == 3


@pytest.mark.slow
def test_inductors_losses_are_eagers_to_rounding(pack, curve, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "switch_on", lambda model, how: None)
        finished(theirs := pack("eager"))
    finished(ours := pack("whole"))
    for spec, twin in zip(ours, theirs, strict=True):
        assert curve(spec.folder) == pytest.approx(curve(twin.folder), rel=1e-6)


def test_blocks_are_switched_on_behind_the_first_pass_and_off_at_the_end(pack, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: seen.append(options) or call)
    runner = Runner()
    specs = pack("trial")
    assert {one["status"] for one in runner.run(specs)} == {"completed"}
    assert seen == [{"fullgraph": True, "backend": "inductor", "mode": None}]
    assert all(module._compiled_call_impl is None for module in runner.inputs._base.model.modules())


def test_each_block_has_a_code_object_of_its_own(load_base):
    model = load_base("llama", "nf4").model
    first, second = (compiled._call_of(block) for block in compiled.blocks(model))
    assert first.__code__ is not second.__code__
    x = torch.randn(1, 4, 64)
    places = torch.arange(4)[None]
    given = {"position_ids": places, "position_embeddings": model.model.rotary_emb(x, places)}
    out = [one[0] if isinstance(one, tuple) else one for one in (first(x, **given), model.model.layers[0](x, **given))]
    assert torch.equal(*out)


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2", "roberta", "distilbert"])
def test_every_family_has_its_blocks(load_base, family):
    assert len(compiled.blocks(load_base(family).model)) == (4 if family == "t5" else 2)


@pytest.mark.parametrize(("length", "room", "padded"), [(1, None, 64), (64, None, 64), (65, 100, 100), (65, 60, 65)])
def test_rows_are_padded_to_a_multiple_as_far_as_there_are_positions(length, room, padded):
    ids = torch.ones(2, length, dtype=torch.int64)

    def stacked(own):
        tensors = {"input_ids": ids, "attention_mask": ids, "labels": own}
        return stack_batches({0: {"tensors": tensors}}, 9, torch.device("cpu"), room, always=True)

    inputs, labels = stacked(ids.clone())
    assert inputs["input_ids"].shape == labels.shape == (2, padded)
    assert (inputs["input_ids"][:, length:] == 9).all()
    assert not inputs["attention_mask"][:, length:].any()
    assert (labels[:, length:] == -100).all()
    of_rows = torch.ones(2, dtype=torch.int64)
    assert stacked(of_rows)[1] is of_rows


def test_a_graph_that_breaks_is_one_paragraph_and_exit_2(pack, monkeypatch):
    real = LoRADelta.forward_grouped

    def broken(x, y, slices):
        torch._dynamo.graph_break("a delta of one's own")
        return real(x, y, slices)

    monkeypatch.setattr(LoRADelta, "forward_grouped", staticmethod(broken))
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    runner = Runner()
    records = runner.run(pack("trial"))
    assert [one["exit_code"] for one in records] == [2, 2], records[0]["error"]
    assert all(module._compiled_call_impl is None for module in runner.inputs._base.model.modules())
    text = records[0]["error"]
    assert text.startswith("model.compile=blocks: a block with adapter=lora over quantization=nf4 cannot be compiled")
    assert text.endswith("; valid: model.compile=none")
    assert "\n" not in text
    assert not record.read(pack("trial")[0].folder)["metrics"]


def test_a_machine_without_a_compiler_is_told_so():
    from torch._dynamo.exc import TorchDynamoException

    refused = pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*valid: model.compile=none")
    with refused, compiled.explained("blocks", "lora", "nf4"):
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found in ...")


@pytest.mark.parametrize(
    ("adapter", "key"),
    [(LoRA(r=2, lora_dropout=0.1), "lora_dropout"), (Bottleneck(bottleneck_size=2, dropout=0.1), "dropout")],
    ids=["lora", "bottleneck"],
)
def test_dropout_is_refused_before_the_first_step_and_named_by_its_own_key(pack, adapter, key):
    specs = [replace(spec, adapter=adapter) for spec in pack("trial")]
    records = Runner().run(specs)
    assert {one["exit_code"] for one in records} == {2}
    assert f"the dropout of adapter={adapter.method} (0.1)" in records[0]["error"]
    assert f"valid: adapter.{key}=0, or model.compile=none" in records[0]["error"]
    assert records[0]["time"]["steps"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.compile=graphs"], "model.compile=graphs records CUDA graphs, and this run is on the CPU; valid: "),
        (["model.compile=block"], "did you mean blocks"),
        (["model.compile=blocks", "data.packing=true"], "model.compile=blocks pads rows"),
    ],
)
def test_what_cannot_be_compiled_is_exit_2_in_one_sentence(
    tiny_arguments, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", *tiny_arguments, *words, "hydra.run.dir=run"]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
