"""``loralab merge``: what it writes is opened as it says, and what it cannot do is refused with nothing written."""

import errno
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from loralab.adapters.export import save as export
from loralab.adapters.ia3 import IA3
from loralab.adapters.lora import LoRA, LoRAAdapter
from loralab.adapters.low_rank import LoRADelta
from loralab.artifacts import merge as merge_command
from loralab.artifacts import merged_files
from loralab.artifacts.reopen import open_run
from loralab.artifacts.swap import DENSE, Merger
from loralab.artifacts.text import completion
from loralab.cli.main import run as loralab
from loralab.errors import ConfigError

PLAIN = {"t5": AutoModelForSeq2SeqLM, "distilbert": AutoModelForSequenceClassification}


def merge(folder, out, *words):
    return loralab(["merge", str(folder), "--out", str(out), *words])


@pytest.fixture(scope="module")
def merged(finished, tmp_path_factory):
    """The folder and merge.json of a merged run of ``family``."""
    made = {}

    def folder(family, *words):
        if (family, *words) not in made:
            out = tmp_path_factory.mktemp("out") / "merged"
            assert merge(finished(family, *words), out) == 0
            made[family, *words] = out, json.loads((out / "merge.json").read_text())
        return made[family, *words]

    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_merged_model_writes_the_runs_text(finished, merged, family):
    out, _ = merged(family)
    opened = open_run(finished(family))
    wanted = completion(opened, "alpha beta ", {"max_new_tokens": 12})
    assert wanted != completion(opened, "alpha beta ", {"max_new_tokens": 12}, adapted=False)
    opened.close()
    model = PLAIN.get(family, AutoModelForCausalLM).from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("alpha beta ", return_tensors="pt", add_special_tokens=family == "t5")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    made = model.generate(**ids, **ends, do_sample=False, max_new_tokens=12)
    skipped = 1 if family == "t5" else ids["input_ids"].shape[1]
    assert tokenizer.decode(made[0, skipped:], skip_special_tokens=True) == wanted


def test_weights_that_are_rounded_as_the_checkpoint_is_are_said_to_be(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_command, "_stored_dtype", lambda run: torch.bfloat16)
    for name, words in (("short", ()), ("asked", ("--dtype", "bfloat16")), ("long", ("--dtype", "float32"))):
        assert merge(finished("llama"), tmp_path / name, "--no-measure", *words) == 0
        figures = json.loads((tmp_path / name / "merge.json").read_text())
        assert figures["dtype"] == ("float32" if name == "long" else "bfloat16")
        said = [note for note in figures["notes"] if "rounded to bfloat16" in note]
        assert len(said) == (name == "short")
        assert all("the run had float32: --dtype float32" in note for note in said)


def test_a_generation_config_that_transformers_would_not_write_is_kept(opened, tmp_path):
    run = opened("llama", LoRA(r=4))
    run.model.generation_config.temperature = 0.5  # without do_sample
    merged = Merger(run, torch.float32).merge(DENSE)
    with merged.on():
        merged_files.save(run, merged, tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    assert run.model.generation_config.temperature == 0.5


def test_a_classifier_keeps_the_names_of_its_classes(finished, merged):
    out, found = merged("distilbert")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    names = open_run(finished("distilbert")).record["data"]["id2label"]
    assert {str(place): name for place, name in model.config.id2label.items()} == names
    assert set(model.config.label2id) == {"no", "yes", "maybe"}
    assert found["ways"]["merged"]["kl"] < 1e-10 < found["without_adapter"]["kl"]


def test_full_fine_tuning_is_measured_against_the_base_that_it_changed(finished, merged, base_folder):
    out, found = merged("llama", "adapter=full")
    base = load_file(base_folder("llama") / "model.safetensors")
    after = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    rms = float((after[name] - base[name]).square().mean().sqrt())
    assert found["layers"][name]["delta_rms"] == pytest.approx(rms, rel=1e-5)
    assert set(found["layers"]) == set(base)
    run = open_run(finished("llama"))  # over the same base
    assert found["measured"]["loss"] < found["without_adapter"]["loss"]
    assert found["ways"]["merged"] == {"loss": found["measured"]["loss"], "kl": 0.0, "weight_error": 0.0}
    assert found["base"]["fingerprint"] == run.record["base"]["fingerprint"]
    out, found = merged("gpt2", "adapter=full")  # whose head is its embedding: one tensor, as in its base
    assert set(load_file(out / "model.safetensors")) == set(load_file(base_folder("gpt2") / "model.safetensors"))
    assert not found["untied"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", [LoRA(r=4), LoRA(r=4, use_dora=True), IA3()], ids=["lora", "dora", "ia3"])
def test_weights_are_those_of_pefts_own_merge(opened, tmp_path, family, spec):
    run = opened(family, spec)
    run.model.save_pretrained(tmp_path / "base")
    export(run.adapter, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untouched = {name: one.clone() for name, one in base.named_parameters()}
    theirs = dict(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    with Merger(run, torch.float32).merge(DENSE).on():
        ours = dict(run.model.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
    changed = [name for name, weight in theirs.items() if (weight - untouched[name]).abs().max() > 1e-2]
    assert len(changed) >= 4


@pytest.mark.parametrize(("name", "why"), [("bottleneck", "non-linearity"), ("prefix", "keys"), ("prompt", "inputs")])
def test_a_method_that_no_weight_can_hold_is_refused(finished, tmp_path, capsys, name, why):
    assert merge(finished("llama", f"adapter={name}"), tmp_path / "out") == 2
    assert f"adapter={name} cannot be merged: " in (message := capsys.readouterr().err)
    assert why in message
    assert not list(tmp_path.iterdir())


class DoubledDelta(LoRADelta):
    """Computes something else than its parent, whose ``merged`` it inherits."""

    def forward(self, x, y, key):
        return y + 2 * super().forward(x, torch.zeros_like(y), key)


@dataclass(frozen=True)
class Doubled(LoRA):
    packable = tokenwise = layerwise = True

    def delta(self, name, layer, device):
        return DoubledDelta(layer.in_features, layer.out_features, self.rank(name), self.scaling(name), 0.0, device)


@dataclass(frozen=True)
class Elsewhere(LoRA):
    """Does not say that it acts on single layers."""


class Kept(LoRAAdapter):
    export = LoRAAdapter.export

    def lost(self):
        return ""


Doubled.makes = Elsewhere.makes = Kept


@pytest.mark.parametrize(
    ("spec", "why"), [(Doubled, "DoubledDelta of .* no `merged`"), (Elsewhere, "layerwise = True")]
)
def test_a_class_that_inherits_another_ones_formula_is_refused(opened, spec, why):
    run = opened("llama", spec(r=4))
    with pytest.raises(ConfigError, match=why):
        Merger(run, torch.float32)


def copied(finished, tmp_path, **model):
    """A copy of a run whose base is another."""
    copy = shutil.copytree(finished("llama"), tmp_path / "run")
    record = json.loads((copy / "result.json").read_text())
    record["config"]["model"].update(model)
    (copy / "result.json").write_text(json.dumps(record))
    return copy


def test_a_base_that_has_changed_or_is_gone_is_refused(finished, base_folder, tmp_path, capsys):
    base = shutil.copytree(base_folder("llama"), tmp_path / "base")
    run = copied(finished, tmp_path, name_or_path=str(base))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    assert merge(run, tmp_path / "out") == 4
    assert "does not fit its base any more" in capsys.readouterr().err
    shutil.rmtree(base)
    assert merge(run, tmp_path / "out") == 2
    assert f"model.name_or_path='{base}'" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"run"}


def test_nothing_is_overwritten(finished, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert merge(finished("llama"), tmp_path / "full") == 2
    assert "full is not empty, and nothing is overwritten" in capsys.readouterr().err
    assert merge(finished("llama"), tmp_path / "file") == 2
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert merge(finished("llama"), tmp_path / "empty", "--no-measure") == 0
    assert {one.name for one in tmp_path.iterdir()} == {"full", "file", "empty"}


def test_a_full_disk_leaves_nothing(finished, tmp_path, monkeypatch, capsys):
    written = PreTrainedModel.save_pretrained

    def full(model, folder, **options):
        written(model, folder, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert merge(finished("llama"), tmp_path / "out") == 7
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_that_are_gone_are_named_and_not_needed(finished, tmp_path, capsys):
    run = shutil.copytree(finished("llama"), tmp_path / "run")
    record = json.loads((run / "result.json").read_text())
    record["config"]["data"].update(train=str(tmp_path / "gone.jsonl"), validation=str(tmp_path / "gone.jsonl"))
    (run / "result.json").write_text(json.dumps(record))
    assert merge(run, tmp_path / "out") == 3
    assert "gone.jsonl" in (message := capsys.readouterr().err)
    assert "--no-measure merges without the run's data" in message
    assert merge(run, tmp_path / "out", "--no-measure") == 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nowhere"], 2, "needs the folder of one run and --out DIR"),
        (["--out", "out"], 2, "needs the folder of one run and --out DIR"),
        (["nowhere", "--out", "out"], 4, "nowhere: no such folder"),
        (["RUN", "--out", "out", "--dtype", "float8"], 2, "--dtype float8 is unknown; did you mean float32?"),
        (["RUN", "--out", "out", "--onto", "base"], 2, "--onto base is unknown"),
        (["RUN", "--out", "out", "--onto", "original"], 2, "--onto original is of a quantized base"),
        (["RUN", "--out", "out", "--requantize"], 2, "--requantize is of a quantized base"),
        (["RUN", "--out", "out", "--rows", "0"], 2, "--rows 0; valid: a whole number from 1"),
        (["NF4", "--out", "out", "--requantize", "--onto", "original"], 2, "does not go with --onto original"),
    ],
)
def test_wrong_words_are_one_sentence(finished, tmp_path, monkeypatch, capsys, words, code, text):
    monkeypatch.chdir(tmp_path)
    runs = {"RUN": lambda: finished("llama"), "NF4": lambda: finished("llama", "quantization=nf4", "optimizer.lr=0.02")}
    assert loralab(["merge", *(str(runs[word]()) if word in runs else word for word in words)]) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_has_the_figures_of_the_file(finished, tmp_path, capsys):
    assert merge(finished("llama"), tmp_path / "out", "--rows", "3") == 0
    found = json.loads((tmp_path / "out" / "merge.json").read_text())
    text = capsys.readouterr().out
    assert f"{found['ways']['merged']['loss']:.4f}" in text
    assert {"delta_rms", *found["ways"]["merged"]} <= set(found["definitions"])
    assert f"on 3 of 7 validation rows at even distances, {found['measured']['targets']} targets" in text
    assert merge(finished("llama"), tmp_path / "again", "--rows", "3", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "out": ""} == {**found, "out": ""}
