"""A run is a pack of one: trials that share a pass compute what they compute alone, bit for bit."""

import hashlib
import re

import pytest
import torch

from loralab.adapters.hooks import AdapterHooks
from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.memory.budget import PlanSpec
from loralab.memory.phases import PhaseMemory
from loralab.models import loading
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.quantization.linear import frozen_layers, keep_dense
from loralab.records import schema
from loralab.records.environment import environment
from loralab.running.runner import Runner

NF4 = FourBit(quant_type="nf4", double_quant=True)


def unlike(make_spec, make_data, prefix="", **shared):
    """Two trials that differ in all that the trials of a pack may differ in."""
    first = make_spec(
        prefix + "first",
        adapter=LoRA(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
        optimizer=AdamW(lr=1e-2, weight_decay=0.1),
        schedule=Schedule(kind="linear", warmup_steps=2),
        data=make_data(batch_size=2),
        gradient_clip_val=0.05,
        max_steps=4,
        seed=1,
        **shared,
    )
    second = make_spec(
        prefix + "second",
        adapter=LoRA(r=8, lora_alpha=32, lora_dropout=0.2, use_rslora=True),
        optimizer=AdamW(lr=3e-3, betas=[0.8, 0.95]),
        schedule=Schedule(kind="cosine"),
        data=make_data(batch_size=3),
        gradient_clip_val=None,
        max_steps=7,
        seed=2,
        **shared,
    )
    return first, second


def alone(specs):
    return [Runner().run([spec])[0] for spec in specs]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("quantization", "accumulate"),
    [
        pytest.param(None, 1, id="none-1"),
        pytest.param(NF4, 2, id="nf4-2"),
        pytest.param(None, 2, id="none-2", marks=pytest.mark.slow),
        pytest.param(NF4, 1, id="nf4-1", marks=pytest.mark.slow),
    ],
)
def test_two_unlike_trials_in_a_pack_equal_two_solo_runs_bit_for_bit(
    make_spec, make_data, curve, weights, quantization, accumulate
):
    shared = {"accumulate_grad_batches": accumulate}
    if quantization is not None:
        shared["quantization"] = quantization
    packed = unlike(make_spec, make_data, "packed_", **shared)
    solo = unlike(make_spec, make_data, "solo_", **shared)
    together, apart = Runner().run(list(packed)), alone(solo)
    assert [r["status"] for r in (*together, *apart)] == ["completed"] * 4, together[0]["error"]
    for ours, theirs in zip(packed, solo, strict=True):
        losses = curve(ours.folder)
        assert len(losses) == ours.trainer.max_steps
        assert losses == curve(theirs.folder)
        assert curve(ours.folder, "train/grad_norm") == curve(theirs.folder, "train/grad_norm")
        assert same(weights(ours.folder), weights(theirs.folder))
    assert [r["metrics"]["val/loss"] for r in together] == [r["metrics"]["val/loss"] for r in apart]
    assert [r["pack"] for r in together] == [{"size": 2, "index": 0}, {"size": 2, "index": 1}]


@pytest.mark.parametrize("family", ["gpt2", "t5", "distilbert", "roberta", "phi"])
def test_a_pack_of_any_shape_of_base_equals_solo_runs_bit_for_bit(
    make_spec, make_data, rows, tmp_path, curve, weights, family
):
    path = tmp_path / "alike.jsonl"  # texts of one length, so that a pack pads nothing more than a solo run does
    labels = ["no", "yes", "maybe"]
    path.write_text("".join(f'{{"t": "text {i:02d}", "y": "{labels[i % 3]}"}}\n' for i in range(12)))
    pairs = {"prompt": "{q}", "target": "{a}"}
    if family in ("distilbert", "roberta"):
        changes = {"train": str(path), "validation": str(path)}
        data = make_data("labels", **changes)
    elif family == "t5":  # source and target each of one length
        path.write_text("".join(f'{{"q": "source {i:02d}", "a": "tgt {i * i:03d}"}}\n' for i in range(12)))
        data = make_data("pairs", train=str(path), validation=str(path), **pairs)
    else:
        data = make_data("pairs")

    def two(prefix):
        first = make_spec(prefix + "1", family, data=data, adapter=LoRA(r=2, lora_dropout=0.1), seed=1, max_steps=3)
        second = make_spec(prefix + "2", family, data=data, adapter=LoRA(r=8, lora_dropout=0.2), seed=2, max_steps=5)
        return [first, second]

    packed, solo = two("packed"), two("solo")
    together, apart = Runner().run(packed), alone(solo)
    assert [r["status"] for r in (*together, *apart)] == ["completed"] * 4, together[0]["error"]
    for ours, theirs in zip(packed, solo, strict=True):
        assert curve(ours.folder) == curve(theirs.folder)
        assert same(weights(ours.folder), weights(theirs.folder))
    assert [r["metrics"] for r in together] == [r["metrics"] for r in apart]


@pytest.mark.parametrize(
    ("what", "lr", "lora_alpha"), [("loss", 1e20, 16.0), ("gradient", 1e-2, 1e38)], ids=["loss", "gradient"]
)
def test_a_trial_that_diverges_leaves_the_other_bit_identical(
    make_spec, make_data, curve, weights, what, lr, lora_alpha
):
    _, solo = unlike(make_spec, make_data, "solo_")
    wild, packed = unlike(make_spec, make_data, "packed_")
    adapter, optimizer = LoRA(r=4, lora_alpha=lora_alpha), AdamW(lr=lr)
    wild = make_spec("wild", adapter=adapter, data=wild.data, optimizer=optimizer, max_steps=7)
    Runner().run([solo])
    broken, sound = Runner().run([wild, packed])
    assert (broken["status"], broken["exit_code"]) == ("diverged", 5)
    assert what in broken["error"]
    assert "optimizer.lr" in broken["error"]
    assert sound["status"] == "completed"
    assert curve(packed.folder) == curve(solo.folder)
    assert same(weights(packed.folder), weights(solo.folder))
    assert not (wild.folder / "adapter").exists()


def test_trials_that_disagree_in_quantization_do_not_share_a_pack(make_spec):
    records = Runner().run([make_spec("one"), make_spec("two", quantization=NF4)])
    assert [r["exit_code"] for r in records] == [2, 2]
    assert "must share model, quantization" in records[0]["error"]


def digest(model):
    whole = hashlib.sha256()
    for name, tensor in loading.tensors(model):
        whole.update(name.encode() + tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("scheme", [None, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "distilbert", "roberta", "phi"])
def test_training_and_validation_leave_every_byte_of_the_base_alone(make_spec, make_model, family, scheme):
    runner, shared = Runner(), {} if scheme is None else {"quantization": scheme}
    spec = make_spec(family, family, val_check_interval=1, max_steps=2, **shared)
    tokenizer = spec.model.load_tokenizer()
    labels = 3 if spec.model.task == "sequence_classification" else None
    untouched = loading.load(spec.model, spec.quantization, tokenizer, labels)
    record = runner.run([spec])[0]
    assert record["status"] == "completed", record["error"]
    base = runner.inputs._base.model
    kept = [layer for layer in frozen_layers(base) if layer.resident is not None]
    assert all(torch.equal(layer.resident, layer.dense(torch.float32)) for layer in kept)
    keep_dense(base, "per_use")
    assert digest(base) == digest(untouched.model)
    assert not any(p.requires_grad for p in base.parameters())
    assert record["base"]["fingerprint"] == untouched.fingerprint


@pytest.mark.parametrize("scheme", [None, NF4], ids=["none", "nf4"])
def test_validation_in_between_changes_nothing(make_spec, curve, weights, scheme):
    shared = {"adapter": LoRA(r=4, lora_dropout=0.1), **({} if scheme is None else {"quantization": scheme})}
    often, once = make_spec("often", val_check_interval=1, **shared), make_spec("once", **shared)
    Runner().run([often])
    Runner().run([once])
    assert len(curve(often.folder, "val/loss")) == 4
    assert len(curve(once.folder, "val/loss")) == 1
    assert curve(often.folder) == curve(once.folder)
    assert same(weights(often.folder), weights(once.folder))


def test_the_seed_alone_decides_a_result(make_spec, curve, weights):
    adapter = LoRA(r=4, lora_dropout=0.1)
    specs = [make_spec(name, adapter=adapter, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    torch.manual_seed(1)
    Runner().run([specs[0]])
    torch.manual_seed(2)
    runner = Runner()
    runner.run([specs[2]])
    runner.run([specs[1]])
    assert curve(specs[0].folder) == curve(specs[1].folder) != curve(specs[2].folder)
    assert same(weights(specs[0].folder), weights(specs[1].folder))


def test_a_base_trained_whole_serves_no_other_trial(make_spec, curve):
    from loralab.adapters.full import Full

    first, full, last = make_spec("first"), make_spec("full", adapter=Full()), make_spec("last")
    runner = Runner()
    records = [runner.run([spec])[0] for spec in (first, full, last)]
    assert [r["status"] for r in records] == ["completed"] * 3
    assert curve(first.folder) == curve(last.folder)
    assert records[1]["adapter"]["trainable_parameters"] == records[1]["base"]["parameters"]


def test_a_full_model_does_not_share_a_pass(make_spec):
    from loralab.adapters.full import Full

    records = Runner().run([make_spec("one"), make_spec("two", adapter=Full())])
    assert records[0]["exit_code"] == 2
    assert "cannot share a pass" in records[0]["error"]


def test_out_of_memory_is_named_in_the_record(make_spec, monkeypatch):
    def full_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loading, "load", full_memory)
    record = Runner().run([make_spec()])[0]
    assert (record["status"], record["exit_code"]) == ("out_of_memory", 6)
    assert "data.batch_size" in record["error"]


def test_a_run_that_dies_of_memory_leaves_what_it_used_in_its_record(make_spec, monkeypatch):
    from loralab.training.module import FineTuner

    def third_fails(self, *arguments):
        if self.trials[0].step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments)

    step = FineTuner.training_step
    monkeypatch.setattr(FineTuner, "training_step", third_fails)
    record = Runner().run([make_spec(callbacks={"memory": PhaseMemory})])[0]
    assert (record["status"], record["exit_code"]) == ("out_of_memory", 6)
    assert record["memory"]["resident_by_phase"]["backward"] > 0
    assert record["optimizer"]["state_bytes"] == 8 * record["adapter"]["trainable_parameters"]
    assert (record["time"]["steps"], record["time"]["train_s"] > 0) == (2, True)


def test_flat_and_unflat_state_do_not_share_a_pack(make_spec):
    records = Runner().run([make_spec("one"), make_spec("two", optimizer=AdamW(flat=True))])
    assert [r["exit_code"] for r in records] == [2, 2]


def test_a_full_disk_is_exit_7_and_keeps_the_finished_steps(make_spec, monkeypatch, curve):
    from safetensors import SafetensorError

    from loralab.adapters import files

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    spec = make_spec()
    record = Runner().run([spec])[0]
    assert (record["status"], record["exit_code"]) == ("failed", 7)
    assert "the disk is full" in record["error"]
    assert len(curve(spec.folder)) == 4


def test_a_fault_of_our_own_is_recorded_with_exit_code_1(make_spec, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *args: 1 / 0)
    record = Runner().run([make_spec()])[0]
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    assert "ZeroDivisionError" in record["error"]


def test_no_trial_is_a_configuration_error():
    from loralab.running.runner import check_pack

    with pytest.raises(ConfigError, match="no trial"):
        check_pack([])


def test_the_record_counts_what_the_run_did(make_spec, make_data):
    spec = make_spec(accumulate_grad_batches=2, max_steps=3)
    record = Runner().run([spec])[0]
    assert record["time"]["steps"] == 3
    assert record["time"]["tokens"] == 3 * 2 * 2 * 25  # steps x passes x rows x (24 bytes and </s>)
    assert record["data"]["rows"] == {"train": 20, "validation": 7, "test": 0}
    assert re.fullmatch("[0-9a-f]{16}", record["data"]["targets"])
    assert record["adapter"]["modules"] == [
        f"model.layers.{i}.{name}"
        for i in (0, 1)
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    ]


def test_the_record_says_on_how_many_threads_it_was_made(make_spec):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert environment()["threads"] == 2
    finally:
        torch.set_num_threads(before)
    assert Runner().run([make_spec(max_steps=0)])[0]["environment"]["threads"] == before


@pytest.mark.parametrize("size", [1, 2])
def test_every_key_of_a_record_is_in_its_sections(make_spec, size):
    observed = {"callbacks": {"memory": PhaseMemory}, "plan": PlanSpec(), "optimizer": AdamW(name="paged_adamw_8bit")}
    specs = [make_spec(f"t{i}", seed=i, quantization=FourBit(), **observed) for i in range(size)]
    for found in Runner().run(specs):
        assert found["status"] == "completed", found["error"]
        for section, keys in schema.KEYS.items():
            assert set(found[section]) <= set(keys), section
        assert found["memory"]["by_phase"]["evaluation"] > 0
        assert found["memory"]["alone_peak_bytes"] > 0
        assert found["adapter"]["never_called"] == []


def test_a_pack_that_is_refused_leaves_no_adapter_on_the_base(make_spec):
    runner = Runner()
    specs = [make_spec("sound", max_steps=1), make_spec("nowhere", max_steps=1, adapter=LoRA(target_modules=["nope"]))]
    assert [stored["exit_code"] for stored in runner.run(specs)] == [2, 2]
    assert not AdapterHooks.of(runner.inputs._base.model)._hooks
    assert not any(module._forward_hooks for module in runner.inputs._base.model.modules())
