"""What blocks below every adapter give is computed once a row, kept, and the same to the last bit."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from loralab.adapters.base import Adapter
from loralab.adapters.biases import BiasDelta
from loralab.adapters.blocks import stack
from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.forward import prefix, stacked
from loralab.forward.prefix import Pass, Prefix, States
from loralab.forward.unpadded import mask_of
from loralab.memory.limits import MemorySpec
from loralab.models import loading, pretrained
from loralab.optim.optimizers import AdamW
from loralab.quantization.four_bit import FourBit
from loralab.records import record
from loralab.running.runner import Runner
from loralab.training.first_batch import FirstBatch

LAST = {  # the last of two blocks
    "llama": r".*\.layers\.1\..*",
    "phi": r".*\.layers\.1\..*",
    "gpt2": r".*\.h\.1\..*",
    "roberta": r".*\.layer\.1\..*",
    "bert": r".*\.layer\.1\..*",
    "distilbert": r".*\.layer\.1\..*",
}
BERT = {"model_type": "bert", "max_position_embeddings": 130}
OFF, ON = MemorySpec(prefix_cache=0.0), MemorySpec(prefix_cache=0.1)


@pytest.fixture
def plain(monkeypatch):
    """Switches the prefix off altogether."""

    def off():
        monkeypatch.setattr(Prefix, "_pass", lambda *_: None)

    return off


@pytest.fixture
def seen(monkeypatch):
    """Rows that block 0 really computed, call by call; the pass that checks the model is left out."""
    rows = []
    narrowed = Prefix._forward

    def watched(self, found, last, keep, forward, *args, **kwargs):
        if keep and forward.__self__ is self.blocks[0]:
            rows.append(0)
            count = forward

            def forward(hidden, *more, **named):
                masks = [one for one in (*more, *named.values()) if hasattr(one, "loralab_lengths")]
                rows[-1] += len(masks[0].loralab_lengths) if masks else len(hidden)
                return count(hidden, *more, **named)

        return narrowed(self, found, last, keep, forward, *args, **kwargs)

    monkeypatch.setattr(Prefix, "_forward", watched)
    monkeypatch.setattr(FirstBatch, "on_train_start", lambda *_: None)  # which adds passes of its own
    return rows


def trials(make_spec, family="llama", **shared):
    """Four that differ in all that a pack may differ in but the order of rows."""
    last = LAST[family]
    kinds = [
        (LoRA(r=2, target_modules=last), 1e-2, 1.0),
        (LoRA(r=8, lora_alpha=4, target_modules=last, lora_dropout=0.1), 3e-3, 0.1),
        (LoRA(r=4, target_modules=last.replace(r"\..*", r"\..*(q_proj|query|c_attn|v_proj|q_lin)")), 1e-3, None),
        (LoRA(r=1, lora_alpha=32, target_modules=last), 2e-3, 1.0),
    ]
    shape = "roberta" if family == "bert" else family
    return [
        make_spec(f"{i}", shape, adapter=adapter, optimizer=AdamW(lr=lr), gradient_clip_val=clip, **shared)
        for i, (adapter, lr, clip) in enumerate(kinds)
    ]


def renamed(specs, vary, name):
    return [vary(spec, folder=spec.folder.with_name(f"{name}{spec.id}")) for spec in specs]


def completed(specs, runner=None):
    entries = (runner or Runner()).run(specs)
    assert [entry["status"] for entry in entries] == ["completed"] * len(specs), [e["error"] for e in entries]
    return entries


def same(left, right, curve, weights):
    """Every loss, metric and trained number, to the last bit."""
    for one, other in zip(left, right, strict=True):
        assert curve(one.folder) == curve(other.folder)
        assert record.read(one.folder)["metrics"] == record.read(other.folder)["metrics"]
        ours, theirs = weights(one.folder), weights(other.folder)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_pack_with_a_prefix_trains_like_each_trial_alone_without(
    make_spec, make_data, real_data, vary, plain, seen, curve, weights
):
    model = pretrained.Pretrained(
        name_or_path=str(real_data / "weights" / "stories260K-hf"), max_length=64, dtype="float32"
    )
    count = len(stack(loading.skeleton(model)))
    shared = {"data": make_data("ragged", batch_size=4), "max_steps": 30, "model": model, "memory": OFF}
    specs = [
        vary(spec, adapter=vary(spec.adapter, target_modules=rf".*\.layers\.{count - 1}\..*"))
        for spec in trials(make_spec, **shared)
    ]
    full = [4] * 30 + [4, 3]  # of one trial, not of four; and its validation
    completed(specs)
    assert seen == full
    seen.clear()
    kept = renamed([vary(spec, memory=ON) for spec in specs], vary, "kept")
    completed(kept)
    assert sum(seen) < 0.5 * sum(full)
    assert 0 in seen
    plain()
    alone = renamed(specs, vary, "alone")
    for spec in alone:
        completed([spec])
    same(specs, alone, curve, weights)
    same(kept, alone, curve, weights)


@pytest.mark.parametrize("quantization", [None, pytest.param(FourBit(), marks=pytest.mark.slow)], ids=["none", "nf4"])
@pytest.mark.parametrize("family", ["gpt2", "phi", "roberta", "bert", "distilbert"])
def test_families_with_other_blocks_masks_and_positions(
    make_spec, make_model, make_data, vary, plain, seen, curve, weights, family, quantization
):
    shared = {"data": make_data("labels" if family in ("roberta", "bert", "distilbert") else "ragged", batch_size=3)}
    if family == "bert":
        shared["model"] = make_model("roberta", config=BERT)
    if quantization:
        shared["quantization"] = quantization
    specs = trials(make_spec, family, memory=ON, max_steps=16, **shared)
    completed(specs)
    assert len(seen) == 16 + 3
    assert max(seen) == 3
    assert min(seen) < 3
    plain()
    completed(renamed(specs, vary, "plain"))
    same(specs, renamed(specs, vary, "plain"), curve, weights)


def test_two_seeds_are_two_groups_of_rows(make_spec, make_data, vary, plain, seen, curve, weights):
    specs = trials(make_spec, data=make_data("pairs", batch_size=3), memory=OFF)
    specs = [vary(spec, seed=index % 2) for index, spec in enumerate(specs)]
    completed(specs)
    assert all(3 <= rows <= 6 for rows in seen[:4])
    assert max(seen[:4]) > 3
    assert seen[4:] == [3, 3, 1]  # the validation is everybody's
    plain()
    completed(renamed(specs, vary, "plain"))
    same(specs, renamed(specs, vary, "plain"), curve, weights)


def test_a_run_alone_computes_each_row_in_one_epoch_only(make_spec, make_data, vary, plain, seen, curve, weights):
    """All rows of ``pairs`` have one length, so that no padding stands between them."""
    one = {"data": make_data("pairs", batch_size=4), "max_steps": 15, "val_check_interval": 5}
    specs = trials(make_spec, memory=ON, **one)[:1]
    completed(specs)
    assert seen[:5] == [4] * 5
    assert seen[5:7] == [4, 3]
    assert len(seen) == 15 + 3 * 2
    assert not any(seen[7:])
    plain()
    completed(renamed(specs, vary, "plain"))
    same(specs, renamed(specs, vary, "plain"), curve, weights)


def test_the_next_pack_on_a_base_finds_what_the_last_one_kept(make_spec, make_data, vary, seen):
    specs = trials(make_spec, data=make_data("pairs", batch_size=4), max_steps=5, memory=ON)
    runner = Runner()
    completed(specs, runner)
    assert sum(seen) == 27
    completed(renamed(specs, vary, "again"), runner)
    assert sum(seen) == 27
    other = renamed([vary(spec, data=make_data("pairs", batch_size=4, limit=8)) for spec in specs], vary, "other")
    completed(other, runner)
    assert sum(seen) > 27


@pytest.mark.parametrize("states", [0, 3, 10])
def test_no_more_is_kept_than_the_budget(make_spec, make_data, seen, states):
    size = 25 * 64 * 4  # tokens with </s>, width, float32
    memory = MemorySpec(prefix_cache=(states * size + 1) / 2**30)
    runner = Runner()
    completed(trials(make_spec, data=make_data("pairs", batch_size=4), max_steps=5, memory=memory), runner)
    kept = runner.inputs._base.prefix_states
    assert kept.bytes == sum(one.nbytes for one in kept._kept.values()) == states * size


def test_states_are_not_taken_for_another_padding_or_block():
    kept = States()
    data = object()
    kept.open([data], 1000)
    kept.put({(1, 8, True, None, 5, 0): torch.ones(8, 4)}, 1000)
    assert kept.find([(1, 8, True, None, 5, 0)])
    assert not kept.find([(2, 8, True, None, 5, 0), (1, 9, False, None, 5, 0), (1, 8, False, None, 5, 0)])
    kept.open([data], 1000)
    assert kept.bytes == 128
    kept.open([object()], 1000)
    assert not kept.bytes
    assert not kept.find([(1, 8, True, None, 5, 0)])


def test_states_of_a_card_are_waited_for_where_they_are_looked_for():
    kept, data, asked = States(), object(), []
    kept.open([data], 1000)
    kept.put_later(lambda: asked.append(1) or {(5,): torch.ones(8, 4), (6,): torch.ones(64, 4)}, 500)
    assert (asked, kept.bytes) == ([], 0)
    assert list(kept.find([(5,), (6,)])) == [(5,)]  # both exceeded the bound
    assert list(kept.find([(5,)])) == [(5,)]
    assert (asked, kept.bytes) == ([1], 128)
    kept.put_later(lambda: pytest.fail("of other data"), 500)
    kept.open([object()], 1000)
    assert not kept.find([(5,)])


def test_what_comes_from_a_card_a_pass_later_is_what_it_computed(
    make_spec, make_data, vary, monkeypatch, curve, weights
):
    """A stand-in for a card: a copy that nobody has before the pass is over."""
    taken = []
    specs = trials(make_spec, data=make_data("pairs", batch_size=4), max_steps=5, memory=ON)
    completed(specs)

    def received(tensor):
        copy = tensor.clone()
        return lambda: taken.append(len(copy)) or copy

    monkeypatch.setattr(prefix, "HOST", set())
    monkeypatch.setattr(prefix, "received", received)
    completed(renamed(specs, vary, "later"))
    assert taken
    same(specs, renamed(specs, vary, "later"), curve, weights)


def test_rows_computed_and_rows_known_end_in_their_places():
    keys = [("a",), ("b",), ("a",), ("c",), ("b",)]
    states = torch.arange(5.0).reshape(5, 1, 1) + torch.zeros(5, 3, 2)
    found = Pass(1, keys, [3, 2, 3, 1, 2], False, {("b",): torch.full((2, 2), 9.0)})
    fed = found.narrow(states)
    assert fed[:, 0, 0].tolist() == [0.0, 3.0]
    wide = found.widen(fed, states)
    assert wide[:, 0, 0].tolist() == [0.0, 9.0, 0.0, 3.0, 9.0]
    assert wide[1].tolist() == [[9.0, 9.0], [9.0, 9.0], [0.0, 0.0]]
    assert found.narrow((None, torch.ones(1, 5), torch.ones(5)))[2].shape == (5,)


def test_numbers_of_rows_go_to_the_device_once_a_pass(monkeypatch):
    moved = []
    monkeypatch.setattr(prefix, "sent", lambda tensor, device: moved.append(tensor.dtype) or tensor)
    keys = [("a",), ("b",), ("a",), ("c",), ("b",)]
    states = torch.ones(5, 3, 2)
    found = Pass(1, keys, [3, 2, 3, 1, 2], False, {("b",): torch.full((2, 2), 9.0)})
    for _ in range(4):  # blocks
        fed = found.narrow((states, torch.ones(5, 3), torch.ones(5, 1, 3, 3)))
    assert moved == [torch.int64]
    found.widen(fed[0], states)
    assert moved == [torch.int64, torch.float32, torch.int64]  # those known, and where all belong


def test_without_padding_rows_are_found_by_their_tokens():
    keys, lengths = [("a",), ("b",), ("a",), ("c",), ("b",)], [3, 2, 3, 1, 2]
    states = torch.repeat_interleave(torch.arange(5.0), torch.tensor(lengths))[None, :, None]
    found = Pass(1, keys, lengths, True, {("b",): torch.full((2, 1), 9.0)})
    fed = found.narrow(states)
    assert fed.flatten().tolist() == [0.0, 0.0, 0.0, 3.0]
    assert found.narrow(mask_of(lengths)).loralab_lengths == (3, 1)
    assert found.widen(fed, states).flatten().tolist() == [0, 0, 0, 9, 9, 0, 0, 0, 3, 9, 9]


def test_gradient_checkpointing_goes_with_it(make_spec, make_model, make_data, vary, plain, seen, curve, weights):
    shared = {"model": make_model(gradient_checkpointing=True), "data": make_data("ragged", batch_size=3)}
    specs = trials(make_spec, memory=ON, max_steps=8, **shared)
    completed(specs)
    assert max(seen) == 3
    plain()
    completed(renamed(specs, vary, "plain"))
    same(specs, renamed(specs, vary, "plain"), curve, weights)


def test_a_trial_that_ends_early_leaves_the_others_their_prefix(make_spec, make_data, vary, plain, curve, weights):
    specs = trials(make_spec, data=make_data("ragged", batch_size=2), memory=ON, max_steps=6)
    specs[1] = vary(specs[1], trainer=vary(specs[1].trainer, max_steps=3))
    whole = vary(specs[3], adapter=LoRA(r=2), trainer=vary(specs[3].trainer, max_steps=2))
    specs[3] = whole  # adapts block 0, so that only later passes have a prefix
    completed(specs)
    plain()
    completed(renamed(specs, vary, "plain"))
    same(specs, renamed(specs, vary, "plain"), curve, weights)


def test_an_encoder_with_a_decoder_has_no_prefix(make_spec, make_data, seen):
    adapter = LoRA(r=2, target_modules=r".*decoder\.block\.1\..*")
    completed([make_spec(str(i), "t5", adapter=adapter, data=make_data("ragged")) for i in range(2)])
    assert not seen


def test_the_bases_own_dropout_keeps_training_rows_apart(make_spec, make_model, make_data, seen):
    shared = {"model": make_model("gpt2", dropout=0.1), "data": make_data("pairs"), "max_steps": 12, "memory": ON}
    completed(trials(make_spec, "gpt2", **shared)[:1])
    assert seen == [2, 2, 2, 1]  # the validation has none


@pytest.mark.parametrize(
    "targets", ["all-linear", ["c_attn"], r"transformer\.h\.0\.mlp\.c_fc"], ids=["all", "list", "block 0"]
)
def test_adapters_in_the_first_block_leave_nothing_to_share(make_spec, make_data, seen, targets):
    completed([make_spec("all", "gpt2", adapter=LoRA(r=2, target_modules=targets), memory=ON)])
    assert not seen


@dataclass(frozen=True)
class Early(LoRA):
    """Adapts the norm of the embeddings as well."""

    packable = layerwise = True
    makes = Adapter

    def attach(self, model, seed=0):
        adapter = super().attach(model, seed)
        adapter.add("roberta.embeddings.LayerNorm", BiasDelta(model.roberta.embeddings.LayerNorm.bias))
        return adapter


def test_an_adapted_embedding_leaves_nothing_to_share(make_spec, seen, caplog):
    adapter = Early(r=2, target_modules=LAST["roberta"])
    with caplog.at_level(logging.INFO, "loralab.forward.prefix"):
        completed([make_spec(str(i), "roberta", adapter=adapter, memory=ON) for i in range(2)])
    assert not seen
    assert len([one for one in caplog.messages if "an adapted LayerNorm comes before them" in one]) == 1


class Folding(nn.Module):
    """A block whose rows are not independent."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, *args, **kwargs):
        return self.block(hidden + hidden.mean(0), *args, **kwargs)


def test_a_model_that_mixes_rows_is_found_out_and_said_once(make_spec, make_data, monkeypatch, caplog, seen):
    load = loading.load

    def folding(*args):
        base = load(*args)
        base.model.model.layers[0] = Folding(base.model.model.layers[0])
        return base

    monkeypatch.setattr(loading, "load", folding)
    monkeypatch.setattr(stacked, "can_unpad", lambda _: False)  # there would be no rows to fold
    with caplog.at_level(logging.INFO, "loralab.forward.prefix"):
        completed(trials(make_spec, data=make_data("pairs")))
    assert not seen
    said = [one.message for one in caplog.records if one.name == "loralab.forward.prefix"]
    assert len(said) == 1
    assert "for each trial, since its blocks do not treat rows one by one" in said[0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"memory\.prefix_cache"):
        MemorySpec(prefix_cache=value)


def test_where_memory_is_measured_nothing_is_kept():
    assert MemorySpec(prefix_cache=2.0).prefix_bytes == 2 * 2**30
    assert MemorySpec(prefix_cache=2.0, solo=True).prefix_bytes == 0
