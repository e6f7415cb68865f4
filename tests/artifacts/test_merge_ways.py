"""The ways of merging over a quantized base, and their figures beside plain transformers, bitsandbytes and numpy."""

import json

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loralab.adapters.lora import LoRA
from loralab.artifacts import merged_files
from loralab.artifacts.reopen import open_run
from loralab.artifacts.swap import DEQUANTIZED, ORIGINAL, REQUANTIZED, Merger
from loralab.cli.main import run as loralab
from loralab.models import loading
from loralab.models.pretrained import Pretrained
from loralab.quantization.base import dense_weight, is_frozen
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.none import NoQuantization
from loralab.quantization.stored import unfit_for_cpus
from loralab.running.inputs import Inputs

SCHEMES = {"nf4": FourBit(), "nf4_double": FourBit(double_quant=True), "int8": Int8Absmax(), "llm_int8": LLMInt8()}
LAYER = "model.layers.1.mlp.down_proj"


def logits(run, given, rows=None):
    with run.adapted(rows) if rows else run.bare():
        return run.model(**given).logits


def bits(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(one), one.clone()) for name, one in tensors]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_way_adds_the_update_to_the_weights_that_it_says(opened, inputs, make_model, scheme):
    quantizer = SCHEMES[scheme]
    run, given = opened("llama", LoRA(r=4, target_modules=["q_proj", "down_proj"]), quantizer), inputs()
    dense = loading.load(make_model("llama"), NoQuantization(), None).model
    layer = run.model.get_submodule(LAYER)
    (delta,) = [one.delta_weight().detach() for name, one in run.adapter.adapted() if name == LAYER]
    wanted, merger = logits(run, given, 2), Merger(run, torch.float32)
    assert merger.ways == [DEQUANTIZED, ORIGINAL, REQUANTIZED]
    trained, untouched = layer.dense(torch.float32) + delta, "model.layers.0.mlp.up_proj"
    again = torch.nn.Linear(*reversed(trained.shape), bias=False)
    again.weight.data = trained
    expected = {
        DEQUANTIZED: (trained, dense_weight(run.model.get_submodule(untouched))),
        ORIGINAL: (dense.get_parameter(f"{LAYER}.weight") + delta, dense.get_parameter(f"{untouched}.weight")),
        REQUANTIZED: (dense_weight(quantizer.convert(again)), dense_weight(run.model.get_submodule(untouched))),
    }
    for way, weights in expected.items():
        with merger.merge(way).on():
            for name, weight in zip((LAYER, untouched), weights, strict=True):
                torch.testing.assert_close(dense_weight(run.model.get_submodule(name)), weight, rtol=1e-6, atol=1e-7)
            difference = (logits(run, given) - wanted).abs().max()
        rounded = scheme == "llm_int8"  # of the activations, which no dense weight rounds
        assert (difference < 1e-5) == (way == DEQUANTIZED and not rounded)


@pytest.mark.parametrize(("family", "quantizer"), [("llama", FourBit()), ("gpt2", FourBit()), ("gpt2", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_the_base_back_bit_for_bit(opened, inputs, family, quantizer, dtype):
    targets = ["wte", "c_attn", "c_proj"] if family == "gpt2" else "all-linear"
    run, given = opened(family, LoRA(r=4, target_modules=targets), quantizer), inputs()
    before, computed = bits(run.model), [logits(run, given), logits(run, given, 2)]
    merger = Merger(run, dtype)
    for way in merger.ways:
        merged = merger.merge(way)
        merged.put()
        assert (logits(run, given) - computed[0]).abs().max() > 1e-2
        merged.unmerge()
        after = bits(run.model)
        assert [one[:2] for one in after] == [one[:2] for one in before]  # the very same tensors ...
        assert all(torch.equal(one[2], old[2]) for one, old in zip(after, before, strict=True))  # ... and values
        assert torch.equal(logits(run, given), computed[0])
        assert torch.equal(logits(run, given, 2), computed[1])


@pytest.mark.parametrize("scheme", ["nf4", "nf4_double", "llm_int8"])
def test_requantized_is_a_checkpoint_that_transformers_and_loralab_open(opened, inputs, tmp_path, scheme):
    run = opened("llama", LoRA(r=4), SCHEMES[scheme])
    given = {key: value[:1] for key, value in inputs().items()}  # without padding, which bitsandbytes takes for tokens
    merger = Merger(run, torch.float32)
    packed, why = merged_files.packed_config(run, list(merger.frozen), torch.float32)
    assert not why
    merged = merger.merge(REQUANTIZED)
    with merged.on():
        merged_files.save(run, merged, tmp_path / "merged", packed)
        wanted = logits(run, given)
        layers = {name: one.packed() for name, one in run.model.named_modules() if is_frozen(one)}
    ours = loading.load(Pretrained(name_or_path=str(tmp_path / "merged"), max_length=64), SCHEMES[scheme], None).model
    assert len(layers) == 14
    for name, tensors in layers.items():
        assert all(torch.equal(a, b) for a, b in zip(ours.get_submodule(name).packed(), tensors, strict=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(theirs.get_submodule(LAYER)).__module__.startswith("bitsandbytes")
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**given).logits, wanted, rtol=1e-5, atol=1e-5)
        difference = theirs(**given).logits.float() - wanted
    assert difference.norm() < 0.02 * wanted.norm()  # on some CPUs bitsandbytes computes in bfloat16


def test_codes_that_bitsandbytes_cannot_use_on_some_cpus_are_known():
    found = [one.convert(torch.nn.Linear(64, n)) for one in (FourBit(), LLMInt8()) for n in (64, 40)]
    assert [unfit_for_cpus(layer) for layer in found] == [False, True, False, False]
    codes, state = functional.quantize_4bit(torch.randn(40, 64), quant_type="nf4")
    with pytest.raises(AssertionError, match="divisible"):
        functional._convert_weight_packed_for_cpu(codes, state)


@pytest.fixture(scope="module")
def merged_run(finished, tmp_path_factory):
    """(run, folder, merge.json) of a run over a quantized base."""

    def make(scheme, *words):
        run, out = (
            finished("llama", f"quantization={scheme}", "optimizer.lr=0.02"),
            tmp_path_factory.mktemp("out") / "m",
        )
        assert loralab(["merge", str(run), "--out", str(out), "--rows", "5", *words]) == 0
        return run, out, json.loads((out / "merge.json").read_text())

    return make


def quantized(scheme, weight):
    """(codes, values) of a weight by bitsandbytes' functions, or by numpy."""
    if scheme == "nf4":
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()
        return nibbles.numpy(), functional.dequantize_4bit(codes, state)
    values = weight.numpy()
    scale = np.abs(values).max(1, keepdims=True) / 127
    codes = np.rint(values / scale)
    return codes.ravel(), torch.from_numpy(codes * scale)


@pytest.mark.parametrize("scheme", ["nf4", "int8_absmax"])
def test_loss_kl_and_shares_are_those_of_an_independent_computation(merged_run, base_folder, scheme):
    folder, _, found = merged_run(scheme)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    plain = {way: AutoModelForCausalLM.from_pretrained(base_folder("llama")).eval() for way in (*found["ways"], "base")}
    changed = codes = kept = square = 0
    errors = dict.fromkeys(found["ways"], 0.0)
    for key in (key for key in adapter if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        original = plain["base"].get_parameter(f"{name}.weight").data.clone()
        delta = 16 / 8 * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
        before, base = quantized(scheme, original)
        after, again = quantized(scheme, base + delta)
        weights = {"dequantized": base + delta, "original": original + delta, "requantized": again, "base": base}
        for way, weight in weights.items():
            plain[way].get_parameter(f"{name}.weight").data.copy_(weight)
        changed, codes = changed + int((before != after).sum()), codes + before.size
        square += float(delta.square().sum())
        kept += float(((again - base) * delta).sum())
        for way in errors:
            errors[way] += float((weights[way] - base - delta).square().sum())
        row = found["layers"][f"{name}.weight"]
        assert row["delta_rms"] == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-4)
        assert row["ways"]["requantized"]["codes_changed"] == pytest.approx((before != after).mean(), abs=1e-3)
    run = open_run(folder)
    split = Inputs().rows(run.spec).validation
    rows = [split[place] for place in (0, 1, 2, 4, 5)]  # 5 of 7 at even distances
    assert (found["measured"]["rows"], found["measured"]["of"], found["written"]) == (5, 7, "dequantized")
    scores = {}
    for way, model in plain.items():
        loss = divergence = targets = 0.0
        for one in rows:
            ids, labels = torch.tensor([one.input_ids]), torch.tensor(one.labels)[1:]
            chosen = labels != -100
            with run.adapted(1):
                p = run.model(input_ids=ids).logits[0, :-1][chosen].double().log_softmax(-1)
            with torch.no_grad():
                q = model(input_ids=ids).logits[0, :-1][chosen].double().log_softmax(-1)
            loss -= float(q.gather(1, labels[chosen][:, None]).sum())
            divergence += float((p.exp() * (p - q)).sum())
            targets += int(chosen.sum())
        scores[way] = loss / targets, divergence / targets
    assert found["measured"]["targets"] == targets
    for way, row in {**found["ways"], "base": found["without_adapter"]}.items():
        assert row["loss"] == pytest.approx(scores[way][0], rel=1e-4)
        assert row["kl"] == pytest.approx(scores[way][1], rel=1e-2, abs=1e-12)
    for way, error in errors.items():
        assert found["ways"][way]["weight_error"] == pytest.approx((error / square) ** 0.5, rel=1e-3, abs=1e-5)
    again = found["ways"]["requantized"]
    assert again["codes_changed"] == pytest.approx(changed / codes, abs=1e-3)
    assert again["delta_kept"] == pytest.approx(kept / square, abs=1e-3)
    assert found["ways"]["dequantized"]["kl"] < 1e-10 < found["ways"]["original"]["kl"]
    assert 0 < again["codes_changed"] < 1


def test_what_is_written_is_what_was_asked_for(merged_run, base_folder):
    """int8 codes are no checkpoint of bitsandbytes: their values are written dense, and the figures say so."""
    folder, out, found = merged_run("int8_absmax", "--requantize")
    assert (found["written"], found["format"]) == ("requantized", "dense")
    assert any("the dense float32 values of their codes: bitsandbytes has no int8_absmax" in n for n in found["notes"])
    run = open_run(folder)
    with Merger(run, torch.float32).merge(REQUANTIZED).on():
        wanted = {name: dense_weight(one) for name, one in run.model.named_modules() if is_frozen(one)}
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[f"{name}.weight"], weight) for name, weight in wanted.items())
    _, out, found = merged_run("nf4", "--requantize")
    assert (found["written"], found["format"]) == ("requantized", "bitsandbytes")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    _, out, found = merged_run("nf4", "--onto", "original", "--dtype", "bfloat16", "--no-measure")
    assert (found["written"], found["dtype"], found["measured"]) == ("original", "bfloat16", None)
    assert {one.dtype for one in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_base_that_lies_quantized_has_no_original_weights(merged_run, arguments, tmp_path, capsys):
    _, base, _ = merged_run("nf4", "--requantize", "--no-measure")
    words = [word for word in arguments("llama") if not word.startswith("model.name_or_path")]
    run = tmp_path / "run"
    given = [f"model.name_or_path={base}", "quantization=nf4", f"hydra.run.dir={run}"]
    assert loralab(["train", *words, *given]) == 0
    assert loralab(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert set(found["ways"]["original"]) == {"undefined"}
    assert any("original: not merged, since --onto original: " in note for note in found["notes"])
    assert found["ways"]["dequantized"]["kl"] < 1e-10
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    capsys.readouterr()
    assert loralab(["merge", str(run), "--out", str(tmp_path / "again"), "--onto", "original"]) == 2
    assert "which holds it quantized, or fused with others; valid: --onto dequantized" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_notes_say_where_a_way_is_no_fair_one(finished, tmp_path):
    run = finished("llama", "quantization=llm_int8", "adapter.init_lora_weights=loftq", "optimizer.lr=0.001")
    assert loralab(["merge", str(run), "--out", str(tmp_path / "out"), "--rows", "2"]) == 0
    notes = json.loads((tmp_path / "out" / "merge.json").read_text())["notes"]
    assert any("rounds what enters a layer as well" in note for note in notes)
    assert "original: B A begins as what quantization lost, and the original weights have not lost it" in notes


def test_a_regression_has_squared_errors_and_no_divergence(finished, tmp_path, rows):
    scores = {}
    for split in ("train", "validation"):
        texts = [json.loads(line)["t"] for line in rows["labels", split].read_text().splitlines()]
        scores[split] = tmp_path / f"{split}.jsonl"
        scores[split].write_text("".join(json.dumps({"t": t, "y": place / 7}) + "\n" for place, t in enumerate(texts)))
    files = [f"data.{split}={path}" for split, path in scores.items()]
    scored = ["model.task=sequence_classification", "model.num_labels=1", "data.text='{t}'", "data.label=y"]
    words = [*scored, "data.prompt=null", "data.target=null", *files, "optimizer.lr=0.01"]
    run = finished("llama", "quantization=nf4", *words)
    assert loralab(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "merge.json").read_text())
    recorded = json.loads((run / "result.json").read_text())["metrics"]["val/loss"]
    assert found["measured"]["loss"] == pytest.approx(recorded, rel=1e-4)
    assert found["ways"]["dequantized"]["loss"] == pytest.approx(recorded, rel=1e-4)
    assert found["ways"]["original"]["kl"] is None
    assert found["ways"]["original"]["undefined"]["kl"] == "a score is no distribution"
