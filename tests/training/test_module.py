"""The loss, its normalisation and the metrics, against transformers' own numbers and sums by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.data.batches import collate
from loralab.data.encoding import encode
from loralab.forward.metrics import names, nll
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.running.runner import Runner


def batch_of(base, data, count=3):
    encoded = encode(data.splits(), base.tokenizer, base.spec.task, base.spec.max_length)
    examples = [encoded.train[i] for i in range(count)]
    return collate(examples, base.spec.task, base.tokenizer.pad_token_id)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "ragged"), ("gpt2", "ragged"), ("t5", "ragged"), ("distilbert", "labels")]
)
def test_the_loss_is_transformers_own(load_base, make_data, family, kind):
    base = load_base(family)
    base.model.eval()
    tensors = batch_of(base, make_data(kind))
    with torch.no_grad():
        theirs = base.model(**tensors).loss
        labels = tensors.pop("labels")
        if base.spec.task == "seq2seq_lm":
            tensors["decoder_input_ids"] = base.model.prepare_decoder_input_ids_from_labels(labels)
        total, predictions, targets = nll(base.model(**tensors).logits, labels, base.spec.task)
    assert predictions.shape[: predictions.dim() - (kind == "labels")] == targets.shape == (targets.numel(),)
    torch.testing.assert_close(total / targets.numel(), theirs)


def by_hand(base, adapter, data, split="validation"):
    """(sum of nll, targets), one unpadded row at a time."""
    encoded = encode(data.splits(), base.tokenizer, "causal_lm", base.spec.max_length)
    total, count = 0.0, 0
    base.model.eval()
    for example in encoded[split]:
        with torch.no_grad(), AdapterHooks.of(base.model).batch(BatchSlice(adapter, 1)):
            logits = base.model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        labels = torch.tensor(example.labels)
        keep = labels[1:] != -100
        total += float(F.cross_entropy(logits[:-1][keep], labels[1:][keep], reduction="sum"))
        count += int(keep.sum())
    return total, count


def test_val_loss_is_the_sum_of_nll_over_the_number_of_target_tokens(make_spec, make_data, weights, load_base):
    data = make_data("ragged", batch_size=3)
    spec = make_spec(data=data, max_steps=3)
    record = Runner().run([spec])[0]
    base = load_base("llama")
    adapter = spec.adapter.attach(base.model)
    stored = weights(spec.folder)
    with torch.no_grad():
        for name, delta in adapter.adapted():
            delta.lora_A.copy_(stored[f"base_model.model.{name}.lora_A.weight"])
            delta.lora_B.copy_(stored[f"base_model.model.{name}.lora_B.weight"])
    total, count = by_hand(base, adapter, data)
    assert record["metrics"]["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert record["metrics"]["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_first_train_loss_is_nll_over_target_tokens_of_the_whole_step(make_spec, make_data, curve, load_base):
    data = make_data("ragged", batch_size=20, limit=20)
    spec = make_spec(data=data, max_steps=1)
    Runner().run([spec])
    base = load_base("llama")
    total, count = by_hand(base, LoRA(r=4).attach(base.model), data, "train")
    assert curve(spec.folder)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("quantization", [None, FourBit()], ids=["none", "nf4"])
@pytest.mark.parametrize("kind", ["pairs", "ragged"])
def test_two_accumulated_halves_equal_the_whole_batch(make_spec, make_data, curve, weights, kind, quantization):
    shared = {} if quantization is None else {"quantization": quantization}
    # eps keeps Adam from turning rounding of near-zero gradients into whole steps
    shared.update(max_steps=3, optimizer=AdamW(lr=1e-3, eps=1e-3), gradient_clip_val=0.5)
    whole = make_spec("whole", data=make_data(kind, batch_size=4), **shared)
    halves = make_spec("halves", data=make_data(kind, batch_size=2), accumulate_grad_batches=2, **shared)
    for spec in (whole, halves):
        assert Runner().run([spec])[0]["status"] == "completed"
    assert len(curve(halves.folder)) == 3
    assert curve(halves.folder) == pytest.approx(curve(whole.folder), rel=1e-6)
    ours, theirs = weights(halves.folder), weights(whole.folder)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


def test_a_constant_schedule_with_warm_up_really_warms_up(make_spec, curve):
    spec = make_spec(optimizer=AdamW(lr=0.08), schedule=Schedule(warmup_steps=4), max_steps=6)
    Runner().run([spec])
    assert curve(spec.folder, "train/lr") == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, 0.08])


def test_the_first_step_of_adam_moves_every_weight_by_the_learning_rate(make_spec, weights):
    spec = make_spec(optimizer=AdamW(lr=1e-3, eps=1e-20), max_steps=1, gradient_clip_val=None)
    Runner().run([spec])
    moved = [value for key, value in weights(spec.folder).items() if "lora_B" in key]
    for value in moved:
        torch.testing.assert_close(value.abs(), torch.full_like(value, 1e-3), rtol=1e-3, atol=0)


def test_clipping_scales_the_step_and_the_norm_logged_is_the_one_before(make_spec, curve, weights):
    # a large eps makes Adam's step proportional to the gradient
    shared = {"optimizer": AdamW(lr=1.0, eps=1e6), "max_steps": 1}
    free = make_spec("free", gradient_clip_val=None, **shared)
    bound = make_spec("bound", gradient_clip_val=0.01, **shared)
    for spec in (free, bound):
        Runner().run([spec])
    norm = curve(free.folder, "train/grad_norm")[0]
    assert curve(bound.folder, "train/grad_norm")[0] == norm > 0.01
    key = next(key for key in weights(free.folder) if "lora_B" in key)
    ratio = weights(bound.folder)[key] / weights(free.folder)[key]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.01 / norm), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_changes_no_loss_and_really_recomputes(
    make_spec, make_model, curve, family, monkeypatch
):
    adapter = LoRA(r=4, lora_dropout=0.1)
    plain = make_spec("plain", family, adapter=adapter)
    lean = make_spec("lean", family, adapter=adapter, model=make_model(family, gradient_checkpointing=True))
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    for spec in (plain, lean):
        runner = Runner()
        record = runner.run([spec])[0]
        assert record["status"] == "completed", record["error"]
    assert runner.inputs._base.model.is_gradient_checkpointing
    assert curve(lean.folder) == pytest.approx(curve(plain.folder), rel=2e-6)


def test_the_own_dropout_of_a_base_is_kept_or_switched_off(make_spec, make_model, curve):
    found = {}
    for name, dropout in (("keep", "keep"), ("off", 0.0)):
        specs = [make_spec(f"{name}{i}", "gpt2", model=make_model("gpt2", dropout=dropout)) for i in (0, 1)]
        for spec in specs:
            Runner().run([spec])
        found[name] = [curve(spec.folder) for spec in specs]
        assert found[name][0] == found[name][1]
    assert found["keep"] != found["off"]


def test_a_stored_base_keeps_its_dropout_and_its_checkpointing_in_training(make_spec, load_base, tmp_path, curve):
    """from_pretrained hands a model over in evaluation mode, where both would silently rest."""
    from loralab.models.pretrained import Pretrained

    base = load_base("gpt2", dropout="keep")
    base.model.save_pretrained(tmp_path / "stored")
    base.tokenizer.save_pretrained(tmp_path / "stored")
    curves = []
    for name, dropout in (("keep", "keep"), ("off", 0.0)):
        model = Pretrained(name_or_path=str(tmp_path / "stored"), max_length=64, dropout=dropout)
        spec = make_spec(name, "gpt2", model=model)
        runner = Runner()
        record = runner.run([spec])[0]
        assert record["status"] == "completed", record["error"]
        curves.append(curve(spec.folder))
        assert runner.inputs._base.model.training
    assert curves[0] != curves[1]


def test_rouge_l_is_scored_for_the_rows_asked_for(make_spec, make_data):
    record = Runner().run([make_spec(data=make_data(generate_rows=3), max_steps=2)])[0]
    assert 0.0 <= record["metrics"]["val/rouge_l"] <= 1.0
    assert "val/rouge_l" not in Runner().run([make_spec("none", max_steps=2)])[0]["metrics"]


def test_classification_scores_are_those_of_the_whole_split(make_spec, make_data):
    spec = make_spec("labels", "distilbert", data=make_data("labels", batch_size=3), max_steps=3)
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    assert {"val/loss", "val/accuracy", "val/f1"} <= set(record["metrics"])
    rows = record["data"]["rows"]["validation"]
    assert record["metrics"]["val/accuracy"] * rows == pytest.approx(round(record["metrics"]["val/accuracy"] * rows))
    rows = [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3


@pytest.mark.parametrize("family", ["llama", "t5", "distilbert"])
def test_a_run_ends_with_exactly_the_metrics_it_promises(make_spec, make_data, family):
    kind = "labels" if family == "distilbert" else "pairs"
    spec = make_spec(family, family, data=make_data(kind, generate_rows=2))
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    assert set(record["metrics"]) == set(names(spec.model.task, generated=True, tested=False))


def test_the_test_split_is_scored_where_it_is_asked_for(make_spec, make_data, rows):
    spec = make_spec(data=make_data(test=str(rows["pairs", "validation"])), test=True)
    metrics = Runner().run([spec])[0]["metrics"]
    assert metrics["test/loss"] == pytest.approx(metrics["val/loss"])
