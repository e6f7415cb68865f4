"""The base's own dropout follows each trial's key: what a trial computes in a pack it computes alone."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.adapters.dropout import dropped, length_of
from loralab.adapters.hooks import AdapterHooks, BatchSlice, NotPackable
from loralab.adapters.lora import LoRA
from loralab.forward.dropout import KeyedDropout, base_dropout
from loralab.forward.stacked import Forward
from loralab.forward.unpadded import NAME, mask_of
from loralab.models import loading
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.running.runner import Runner
from loralab.scheduling.members import alone

MORE_FAMILIES = ["roberta", "distilbert", "bert"]
FAMILIES = ["gpt2", "t5", *MORE_FAMILIES]
SCHEMES = {"none": {}, "nf4": {"quantization": FourBit(quant_type="nf4")}}
BERT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = 12


@pytest.fixture
def with_dropout(make_model):
    """The spec of a small base with its config's own dropout, 0.1."""

    def make(family, **changes):
        changes = {"dropout": "keep", **changes}
        if family != "bert":
            return make_model(family, **changes)
        config = {"model_type": "bert", "vocab_size": 258, "max_position_embeddings": 130, **BERT}
        return make_model("roberta", **{**changes, "config": config})

    return make


@pytest.fixture
def loaded(with_dropout):
    """A base with dropout, in training mode, and two unlike adapters on it."""

    def load(family, **changes):
        spec = with_dropout(family, **changes)
        labels = 3 if spec.task == "sequence_classification" else None
        base = loading.load(spec, FourBit(), spec.load_tokenizer(), labels)
        adapters = [LoRA(r=r, lora_dropout=0.1).attach(base.model, seed=r) for r in (2, 4)]
        for adapter in adapters:
            for _, delta in adapter.adapted():
                nn.init.normal_(delta.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
        base.model.train()
        return base, adapters

    return load


@pytest.fixture
def level(tmp_path):
    """Paths of labelled texts of one length."""
    paths = {}
    for split, count in (("train", 20), ("validation", 7)):
        rows = [{"t": f"{i * i * 37 % 101:03d} text {i:02d}", "y": ["no", "yes", "maybe"][i % 3]} for i in range(count)]
        paths[split] = str(tmp_path / f"{split}.jsonl")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def trials(make_spec, make_data, with_dropout, level):
    """Trials unlike in rank, rate and LoRA dropout, over rows of one length."""

    def make(prefix, family, count=3, **changes):
        if family == "gpt2":
            data = make_data()
        elif family == "t5":
            data = make_data(prompt="{q}{a}", target="{q}{a}")
        else:
            # BERT's pooler sees a token a row, and a product of fewer than four rows takes another kernel
            data = make_data("labels", batch_size=4, **level)
        given = {"model": with_dropout(family), "data": data, "max_steps": STEPS, **changes}
        return [
            make_spec(
                f"{prefix}{i}",
                "roberta" if family == "bert" else family,
                adapter=LoRA(r=1 + 3 * i, lora_dropout=0.1 * i),
                optimizer=AdamW(lr=1e-2 / (1 + i)),
                schedule=Schedule(kind="cosine" if i else "constant"),
                seed=i,
                **given,
            )
            for i in range(count)
        ]

    return make


@pytest.mark.parametrize("scheme", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["gpt2", "t5", *(pytest.param(f, marks=pytest.mark.slow) for f in MORE_FAMILIES)])
def test_a_pack_over_a_base_with_dropout_equals_its_trials_alone(trials, curve, weights, family, scheme):
    packed, solo = (trials(prefix, family, **SCHEMES[scheme]) for prefix in ("packed", "solo"))
    together = Runner().run(packed)
    apart = [Runner().run([spec])[0] for spec in solo]
    assert [one["status"] for one in (*together, *apart)] == ["completed"] * 6, together[0]["error"]
    assert [one["pack"] for one in together] == [{"size": 3, "index": i} for i in range(3)]
    for ours, theirs in zip(packed, solo, strict=True):
        assert len(curve(ours.folder)) == STEPS
        assert curve(ours.folder) == curve(theirs.folder)
        left, right = weights(ours.folder), weights(theirs.folder)
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_without_padding_rows_of_any_length_draw_what_they_draw_alone(trials, make_data, curve):
    packed, solo = (trials(prefix, "gpt2", data=make_data("ragged", batch_size=3)) for prefix in ("packed", "solo"))
    assert [one["pack"]["size"] for one in Runner().run(packed)] == [3, 3, 3]
    for ours, theirs in zip(packed, solo, strict=True):
        Runner().run([theirs])
        assert curve(ours.folder) == curve(theirs.folder)


def batch(task, lengths=(12, 5, 9)):
    ids = torch.randint(2, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    given = {"input_ids": ids, "attention_mask": mask}
    if task == "sequence_classification":
        return given, torch.tensor([0, 2, 1])
    if task == "seq2seq_lm":
        given["decoder_input_ids"] = ids[:, :7]
        return given, ids[:, :7].clone()
    return given, ids.masked_fill(mask == 0, -100)


def losses(base, slices, rows=slice(None)):
    """Each share's loss, and the gradients of their sum."""
    given, labels = batch(base.spec.task)
    forward = Forward(base.model, base.spec.task)
    scores = forward({name: value[rows] for name, value in given.items()}, labels[rows], slices)
    parameters = [p for part in slices for p in part.owner.parameters()]
    found = [loss for loss, _, _ in scores]
    gradients = torch.autograd.grad(sum(found), parameters, allow_unused=True) if found[0].requires_grad else []
    return found, [g for g in gradients if g is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_padded_alike_have_their_own_losses_and_gradients(loaded, family, checkpointing):
    base, adapters = loaded(family, gradient_checkpointing=checkpointing)
    slices = [BatchSlice(adapters[0], 1, 7), BatchSlice(adapters[1], 2, 8)]
    together, gradients = losses(base, slices)
    apart = [losses(base, [part], rows) for part, rows in zip(slices, (slice(1), slice(1, 3)), strict=True)]
    for packed, (own, _) in zip(together, apart, strict=True):
        torch.testing.assert_close(packed, own[0], rtol=1e-6, atol=1e-6)
    for packed, own in zip(gradients, [g for _, found in apart for g in found], strict=True):
        torch.testing.assert_close(packed, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_draws_again_what_was_drawn(loaded, family):
    plain, lean = (loaded(family, gradient_checkpointing=on) for on in (False, True))
    for own, other in zip(
        *(
            losses(base, [BatchSlice(a, n, n) for a, n in zip(adapters, (1, 2), strict=True)])
            for base, adapters in (plain, lean)
        ),
        strict=True,
    ):
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_seed_decides_every_mask(make_spec, with_dropout, curve):
    curves = []
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        torch.manual_seed(len(curves))
        spec = make_spec(name, "gpt2", model=with_dropout("gpt2"), adapter=LoRA(r=2), seed=seed)
        Runner().run([spec])
        curves.append(curve(spec.folder))
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_has_no_dropout_and_training_does(loaded, family):
    base, (adapter, _) = loaded(family)
    drawn = [losses(base, [BatchSlice(adapter, 3, key)])[0][0] for key in (1, 2)]
    assert drawn[0] != drawn[1]
    base.model.eval()
    dry, (same, _) = loaded(family, dropout=0.0)
    dry.model.eval()
    with torch.no_grad():
        assert torch.equal(losses(base, [BatchSlice(adapter, 3)])[0][0], losses(dry, [BatchSlice(same, 3)])[0][0])


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_a_base_without_dropout_is_left_as_it_is(loaded, family):
    base, _ = loaded(family, dropout=0.0)
    assert base_dropout(base.model) == 0.0
    assert not any(isinstance(module, KeyedDropout) for module in base.model.modules())
    assert all(
        module.config._attn_implementation == "sdpa" for module in base.model.modules() if hasattr(module, "config")
    )


@pytest.fixture
def layer():
    """A keyed dropout of 0.25, training, and its sites."""
    made = KeyedDropout(0.25)
    return made, AdapterHooks.of(made)


def test_a_mask_has_the_asked_mean_and_share_and_depends_on_its_key_alone(layer):
    drop, hooks = layer
    a, b = BatchSlice(nn.Identity(), 3, 5), BatchSlice(nn.Identity(), 2, 6)
    x = torch.ones(5, 40, 100)
    with hooks.batch(a, b):
        y = drop(x)
    assert abs(float(y.mean()) - 1.0) < 0.02
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.01
    with hooks.batch(b):
        assert torch.equal(drop(x[3:]), y[3:])
    with hooks.batch(BatchSlice(nn.Identity(), 3, 5, 70), BatchSlice(nn.Identity(), 1, 6, 50)):  # flat
        flat = drop(torch.ones(1, 120, 100))
    with hooks.batch(BatchSlice(nn.Identity(), 1, 6, 50)):
        assert torch.equal(drop(torch.ones(1, 50, 100)), flat[:, 70:])
    with hooks.batch(a, b), pytest.raises(NotPackable):
        drop(torch.ones(4, 2))


def test_a_layer_used_twice_in_a_pass_draws_twice_and_a_recomputed_one_again(layer):
    drop, hooks = layer
    x = torch.ones(1, 400)
    with hooks.batch(BatchSlice(nn.Identity(), 1, 5)):
        _, again = hooks.replayed()
        first, second = drop(x), drop(x)
        with again:
            replayed = drop(x)
        with again:
            assert torch.equal(drop(x), replayed)
        third = drop(x)
    assert torch.equal(first, replayed)
    assert len({tuple(one[0].tolist()) for one in (first, second, third)}) == 3


@pytest.mark.parametrize("length", [1, 4, 9])
def test_longer_padding_changes_no_mask(length):
    """A pack pads a trial's rows as long as its longest row, whoever brought that one."""

    def mask(positions):
        x = torch.ones(3, positions, 20)
        return dropped(x, 0.5, [(2 * positions * 20, 3), (positions * 20, 4)], length_of(x))

    assert torch.equal(mask(length), mask(12)[:, :length])


def test_a_trial_with_lora_dropout_is_the_same_beside_longer_rows(make_spec, make_data, tmp_path):
    """With padding, which is computed: as near as padding leaves it, which moves no mask."""
    texts = {"short": "ab", "long": "ab" * 30}
    for name, text in texts.items():
        rows = [{"t": f"{text} {i % 3}", "y": ["no", "yes", "maybe"][i % 3]} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def spec(prefix, name):
        path = str(tmp_path / f"{name}.jsonl")
        data = make_data("labels", batch_size=4, train=path, validation=path)
        adapter = LoRA(r=4, lora_dropout=0.3)
        return make_spec(f"{prefix}-{name}", "distilbert", adapter=adapter, data=data, max_steps=4)

    packed = Runner().run([spec("packed", "short"), spec("packed", "long")])
    assert [one["pack"]["size"] for one in packed] == [2, 2], packed[0]["error"]
    (alone,) = Runner().run([spec("alone", "short")])
    assert packed[0]["metrics"]["val/loss"] == pytest.approx(alone["metrics"]["val/loss"], rel=1e-5)


def test_dropout_keeps_nothing_for_backward_and_the_gradient_has_the_same_mask(layer):
    drop, hooks = layer
    x = torch.ones(2, 30, 20, requires_grad=True)
    kept = []
    with hooks.batch(BatchSlice(nn.Identity(), 1, 5), BatchSlice(nn.Identity(), 1, 6)):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            y = drop(x)
        hooks.begin_pass(())  # the next one
        y.transpose(1, 2).contiguous().sum(0).t().sum().backward()
    assert kept == []
    assert torch.equal(x.grad, y.detach())
    turned = torch.ones(20, 30).t()  # a gradient of other strides
    assert torch.equal(dropped(turned, 0.5, [(600, 3)]), dropped(torch.ones(30, 20), 0.5, [(600, 3)]))


def attention(hooks, mask, flat=False, heads=(4, 2), **kwargs):
    module = nn.Identity()
    module.loralab_hooks, module.num_key_value_groups = hooks, heads[0] // heads[1]
    rows = (1, 12) if flat else (3, 7)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(rows[0], h, rows[1], 8, generator=generator) for h in (heads[0], heads[1], heads[1]))
    return module, (q, k, v, mask), kwargs


@pytest.mark.parametrize("kind", ["none", "boolean", "float", "one for all", "bias", "flat", "flat, level"])
def test_attention_drops_by_key_whatever_its_mask_and_nothing_on_average(loaded, kind):
    loaded("gpt2")  # registers it
    attend, sdpa = ALL_ATTENTION_FUNCTIONS[NAME], ALL_ATTENTION_FUNCTIONS["sdpa"]
    hooks = AdapterHooks()
    mask, bias = None, None
    generator = torch.Generator().manual_seed(4)
    if kind in ("boolean", "float"):
        mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
        mask[1, ..., 4:] = False
        mask = mask if kind == "boolean" else torch.where(mask, 0.0, -1e9)
    if kind in ("one for all", "bias"):
        bias = torch.randn(1 if kind == "one for all" else 3, 4, 7, 7, generator=generator)
    flat = kind.startswith("flat")
    lengths = (4, 4, 4) if kind == "flat, level" else (5, 3, 4)
    mask = mask_of(lengths) if flat else mask
    module, (q, k, v, mask), given = attention(hooks, mask, flat, position_bias=bias, scaling=0.3)
    tokens = (lengths[0], sum(lengths[1:])) if flat else (None, None)
    slices = [BatchSlice(nn.Identity(), 1, 5, tokens[0]), BatchSlice(nn.Identity(), 2, 6, tokens[1])]
    with hooks.batch(*slices):
        together, _ = attend(module, q, k, v, mask, dropout=0.5, **given)
    cut, dim = (tokens[0], 1) if flat else (1, 0)
    own = [x[:, :, cut:] if flat else x[1:] for x in (q, k, v)]
    own_mask = mask_of(lengths[1:]) if flat else mask if mask is None else mask[1:]
    given["position_bias"] = bias if bias is None or len(bias) == 1 else bias[1:]
    with hooks.batch(slices[1]):
        alone_, _ = attend(module, *own, own_mask, dropout=0.5, **given)
    assert torch.equal(together.narrow(dim, cut, together.shape[dim] - cut), alone_)
    with hooks.batch(BatchSlice(nn.Identity(), 2, 9, tokens[1])):
        drawn = [attend(module, *own, own_mask, dropout=0.5, **given)[0] for _ in range(2000)]
        plain = attend(module, *own, own_mask, **given)[0]
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(torch.stack(drawn).mean(0), plain, atol=0.15, rtol=0)
    if not flat:
        torch.testing.assert_close(plain, sdpa(module, *own, own_mask, **given)[0])


def test_a_base_that_calls_dropout_by_itself_dissolves_its_pack(make_spec, make_model, vary, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: functional.dropout(real(self, x), 0.1, self.training))
    spec = make_spec(model=make_model(dropout=0.1))
    records = Runner().run([vary(spec, id=f"{i}", folder=tmp_path / f"{i}", seed=i) for i in range(2)])
    assert [one["status"] for one in records] == ["completed"] * 2, records[0]["error"]
    assert all("calls dropout by itself (model.dropout=0" in one["pack"]["why"] for one in records)


def test_a_base_whose_masks_cannot_be_drawn_apart_runs_its_trials_alone_and_says_why(
    make_spec, with_dropout, vary, tmp_path
):
    eager = make_spec(family="gpt2", model=with_dropout("gpt2", attn_implementation="eager"), max_steps=2)
    records = Runner().run([vary(eager, id=f"{i}", folder=tmp_path / f"{i}", seed=i) for i in range(2)])
    assert [one["status"] for one in records] == ["completed"] * 2, records[0]["error"]
    assert {one["pack"]["why"] for one in records} == {alone(eager)}
    assert "model.attn_implementation=eager" in alone(eager)
    assert alone(vary(eager, model=with_dropout("gpt2"))) == ""
    assert alone(vary(eager, model=vary(eager.model, dropout=0.0))) == ""
    bart = {"model_type": "bart", "d_model": 16, "encoder_layerdrop": 0.2, "vocab_size": 258}
    assert "skips layers at random" in alone(vary(eager, model=vary(eager.model, config=bart)))
