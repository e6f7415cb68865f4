"""Modules that are trained whole, against PEFT: embeddings, a pooler that the checkpoint lacks, and tied weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.adapters.attached import attached
from loralab.adapters.hooks import AdapterHooks
from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.models import loading, pretrained
from loralab.planning.count import count
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

RATE = 1e-2


def batch(count=3):
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def start_alike(adapter, theirs):
    """PEFT begins at our A."""
    drawn = {f"base_model.model.{name}": delta for name, delta in adapter.adapted()}
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if name in drawn and hasattr(module, "lora_A"):
                module.lora_A["default"].weight.copy_(drawn[name].lora_A)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_trained_whole_train_as_pefts(load_base, curves, tied, caplog):
    base = load_base("llama", config={"tie_word_embeddings": tied})
    other = load_base("llama", config={"tie_word_embeddings": tied}).model
    adapter = attached(LoRA(r=4, modules_to_save=["embed_tokens"], target_modules=["q_proj"]), base.model)
    assert ("lm_head" in caplog.text) == tied  # whose weight stays the base's
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = get_peft_model(other, config)
    start_alike(adapter, theirs)
    ours, pefts = curves(base.model, adapter, theirs, *batch(), RATE)
    assert ours == pytest.approx(pefts, rel=1e-4)
    assert ours[-1] < 0.9 * ours[0]


def test_a_run_trains_embeddings_whole_and_exports_them(make_spec, weights):
    spec = make_spec(adapter=LoRA(r=2, modules_to_save=["embed_tokens"]), quantization=FourBit())
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    assert "base_model.model.model.embed_tokens.weight" in weights(spec.folder)


def test_a_list_of_modules_leaves_the_new_head_trained_as_peft_does(load_base):
    base = load_base("distilbert")
    saved = dict(LoRA(r=2, modules_to_save=["word_embeddings"]).attach(base.model).saved_modules())
    assert set(saved) == {"distilbert.embeddings.word_embeddings", "classifier"}


def test_a_target_within_a_module_that_is_trained_whole_is_left_out_and_alone_refused(load_base):
    base = load_base("llama")
    adapter = LoRA(r=2, modules_to_save=["model.layers.0.mlp"]).attach(base.model)
    assert not any("layers.0.mlp" in name for name, _ in adapter.adapted())
    assert any("layers.1.mlp" in name for name, _ in adapter.adapted())
    adapter.detach()
    with pytest.raises(ConfigError, match=r"down_proj lies in model\.layers\.0\.mlp, which adapter\.modules_to_save"):
        LoRA(r=2, modules_to_save=["mlp"], target_modules=["down_proj"]).attach(base.model)


@pytest.fixture
def masked(make_model, tokenizer_folder, tmp_path):
    """The spec of a classifier whose checkpoint is a masked language model's, so without a pooler."""
    keys = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=258, max_position_embeddings=130, **keys)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    spec = {"task": "sequence_classification", "max_length": 64, "dtype": "float32", "dropout": 0.0}
    return pretrained.Pretrained(str(tmp_path / "masked"), tokenizer=str(tokenizer_folder), **spec)


@pytest.mark.parametrize("scheme", [NoQuantization(), FourBit()], ids=["none", "nf4"])
def test_a_masked_language_models_new_pooler_is_drawn_by_the_seed_trained_and_exported(
    masked, make_spec, make_data, weights, caplog, scheme
):
    caplog.set_level("INFO")
    stored = {}
    for name, seed, steps in (("start", 1, 0), ("again", 1, 0), ("other", 2, 0), ("trained", 1, 3)):
        spec = make_spec(name, "roberta", model=masked, seed=seed, max_steps=steps, quantization=scheme)
        record = Runner().run([spec])[0]
        assert record["status"] == "completed", record["error"]
        stored[name] = weights(spec.folder)["base_model.model.bert.pooler.dense.weight"]
    assert "has no bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" in caplog.text
    assert torch.equal(stored["start"], stored["again"])
    assert not torch.equal(stored["start"], stored["other"])
    assert not torch.equal(stored["start"], stored["trained"])
    assert "bert.pooler" in record["adapter"]["modules"]
    assert "bert.pooler.dense" not in record["adapter"]["modules"]  # LoRA inside of it would act on nothing
    counted = count(masked, scheme, spec.adapter, 3)
    assert counted["trainable_parameters"] == record["adapter"]["trainable_parameters"]
    if scheme.name == "none":  # PEFT computes the same from the files
        bare = transformers.AutoModelForSequenceClassification.from_pretrained(masked.path, num_labels=3)
        theirs = PeftModel.from_pretrained(bare, spec.folder / "adapter").eval()
        rows = [json.loads(line) for line in Path(make_data("labels").validation).read_text().splitlines()]
        tokenizer, names = masked.load_tokenizer(), make_data("labels").splits().labels
        with torch.no_grad():
            nll = [
                torch.nn.functional.cross_entropy(
                    theirs(**tokenizer(row["t"], return_tensors="pt")).logits, torch.tensor([names.index(row["y"])])
                )
                for row in rows
            ]
        assert record["metrics"]["val/loss"] == pytest.approx(float(torch.stack(nll).mean()), rel=1e-5)


def test_a_checkpoint_that_lacks_more_than_a_pooler_is_refused(masked):
    config = transformers.AutoConfig.from_pretrained(masked.path)
    config.num_hidden_layers = 3
    config.save_pretrained(masked.path)
    with pytest.raises(ConfigError, match=r"the checkpoint lacks bert\.encoder\.layer\.2"):
        loading.load(masked, NoQuantization(), masked.load_tokenizer(), 3)


def test_a_head_tied_to_the_embeddings_is_adapted_with_a_warning_and_merges_after_the_remedy(
    make_model, make_spec, tmp_path, caplog
):
    spec = make_spec(
        model=make_model("gpt2"), adapter=LoRA(r=4, lora_alpha=64, target_modules=["lm_head", "c_attn"]), max_steps=8
    )
    record = Runner().run([spec])[0]
    assert "the weight of lm_head is also that of transformer.wte" in caplog.text
    base = loading.load(spec.model, NoQuantization(), spec.model.load_tokenizer()).model
    inputs, labels = batch()
    losses = {}
    for name in ("adapted", "merged as it is", "untied and merged"):
        base.save_pretrained(tmp_path / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if name == "untied and merged":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            model.config.tie_word_embeddings = False
        theirs = PeftModel.from_pretrained(model, spec.folder / "adapter").eval()
        if name != "adapted":
            theirs.merge_and_unload().save_pretrained(tmp_path / name)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            losses[name] = float(theirs.eval()(**inputs, labels=labels).loss)
    assert record["status"] == "completed"
    assert losses["untied and merged"] == pytest.approx(losses["adapted"], rel=1e-5)
    assert losses["merged as it is"] != pytest.approx(losses["adapted"], rel=1e-3)  # what the warning is about
    assert AdapterHooks.of(base).slices == ()


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_a_new_head_trains_in_bfloat16(make_spec, family):
    losses = [
        Runner().run([make_spec(precision, family, precision=precision)])[0]["metrics"]["val/loss"]
        for precision in ("bf16-true", "32-true")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
