"""A base is loaded whole, from a folder or by drawing it, or refused with the reason."""

import json
from dataclasses import replace

import pytest
import torch

from loralab.errors import ConfigError
from loralab.models import loading, pretrained
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization


@pytest.fixture
def saved(load_base, tmp_path, tokenizer_folder):
    """A checkpoint on disk and the spec that names it."""

    def make(family="llama"):
        base = load_base(family)
        folder = tmp_path / f"{family} checkpoint"
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        spec = pretrained.Pretrained(name_or_path=str(folder), task=base.spec.task, max_length=64, dropout=0.0)
        return base, spec, folder

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "distilbert", "roberta", "phi"])
@pytest.mark.parametrize("quantizer", [NoQuantization(), FourBit()], ids=["none", "nf4"])
def test_a_saved_model_comes_back_from_its_folder(saved, family, quantizer):
    base, spec, _ = saved(family)
    labels = 3 if spec.task == "sequence_classification" else None
    again = loading.load(spec, quantizer, spec.load_tokenizer(), labels)
    assert again.size.parameters == base.size.parameters
    assert not any(parameter.is_meta for parameter in again.model.parameters())
    if isinstance(quantizer, NoQuantization):
        before, after = dict(loading.tensors(base.model)), dict(loading.tensors(again.model))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    else:
        assert again.size.bits_per_parameter == pytest.approx(4.5)
        assert again.size.bytes < base.size.bytes


def test_weights_that_the_config_narrows_are_named_and_asking_keeps_them(saved, caplog):
    _, spec, folder = saved()
    loading.load(spec, NoQuantization(), None)
    assert "are stored in" not in caplog.text
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "dtype": "bfloat16"}))
    narrowed = loading.load(spec, NoQuantization(), None).model
    assert narrowed.dtype == torch.bfloat16
    assert "of its 21 tensors are stored in float32 and loaded in bfloat16, since its config.json says" in caplog.text
    caplog.clear()
    kept = loading.load(replace(spec, dtype="float32"), NoQuantization(), None).model
    assert kept.dtype == torch.float32
    assert "are stored in" not in caplog.text


def test_weights_that_are_not_there_are_named(saved):
    _, spec, folder = saved()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        loading.load(spec, NoQuantization(), None)


def test_a_checkpoint_of_another_architecture_is_refused(saved):
    _, spec, folder = saved()
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="the checkpoint lacks"):
        loading.load(spec, NoQuantization(), spec.load_tokenizer())


def test_a_truncated_weight_file_is_refused(saved):
    _, spec, folder = saved()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cannot be loaded, model\.safetensors: SafetensorError"):
        loading.load(spec, NoQuantization(), spec.load_tokenizer())


def test_a_head_the_checkpoint_lacks_is_new_and_drawn_by_the_seed(load_base, tmp_path):
    from loralab.adapters.lora import LoRA

    bare = load_base("distilbert").model.distilbert
    bare.save_pretrained(tmp_path)
    load_base("distilbert").tokenizer.save_pretrained(tmp_path)
    spec = pretrained.Pretrained(name_or_path=str(tmp_path), task="sequence_classification", max_length=64)
    base = loading.load(spec, NoQuantization(), spec.load_tokenizer(), 3)
    heads = []
    for seed in (1, 1, 2):
        adapter = LoRA(r=2).attach(base.model, seed)
        heads.append({name: module.weight.detach().clone() for name, module in adapter.saved_modules()})
        adapter.detach()
    assert set(heads[0]) == {"pre_classifier", "classifier"}
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not any(torch.equal(heads[0][name], heads[2][name]) for name in heads[0])


def test_a_hub_id_out_of_reach_says_that_a_local_folder_would_do(monkeypatch, tokenizer_folder):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pretrained.weights._offline.cache_clear()
    spec = pretrained.Pretrained(name_or_path="nobody/nothing", tokenizer=str(tokenizer_folder))
    with pytest.raises(ConfigError, match="no local folder of that name either"):
        loading.load(spec, NoQuantization(), spec.load_tokenizer())


@pytest.mark.parametrize(
    ("name", "match"),
    [("", "model.tokenizer is empty"), ("/nope", "model.tokenizer='/nope': there is no such folder")],
)
def test_a_tokenizer_that_is_not_there_is_blamed_on_its_own_key(name, match):
    with pytest.raises(ConfigError, match=match):
        pretrained.Pretrained(tokenizer=name).load_tokenizer()


@pytest.mark.parametrize("content", ["{nope", "[]", "{}"])
@pytest.mark.parametrize("own", [True, False])
def test_a_broken_tokenizer_file_is_named(saved, content, own):
    _, spec, folder = saved()
    (folder / "tokenizer.json").write_text(content)
    spec = replace(pretrained.Pretrained(), tokenizer=str(folder)) if own else spec
    with pytest.raises(ConfigError) as caught:
        spec.load_tokenizer()
    assert str(folder / "tokenizer.json") in str(caught.value)
    assert ("name_or_path" in str(caught.value)) <= (not own)


def test_a_folder_without_a_tokenizer_asks_for_one(saved):
    _, spec, folder = saved()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"beside its weights \(model\.tokenizer can name another\) cannot be"):
        spec.load_tokenizer()


@pytest.mark.parametrize("count", [0, -2])
def test_a_number_of_labels_below_one_is_refused_and_stated(count):
    with pytest.raises(ConfigError, match=rf"model\.num_labels must be at least 1, .*, got {count}$"):
        pretrained.Pretrained(num_labels=count)


def test_a_tokenizer_larger_than_the_embedding_is_refused(make_model):
    spec = make_model(config={"vocab_size": 200})
    with pytest.raises(ConfigError, match="258 tokens exceed the 200 embeddings"):
        loading.load(spec, NoQuantization(), spec.load_tokenizer())


def test_the_draw_alone_decides_a_random_model(make_model):
    spec = make_model()
    torch.manual_seed(1)
    one = loading.load(spec, NoQuantization(), spec.load_tokenizer()).fingerprint
    torch.manual_seed(2)
    assert loading.load(spec, NoQuantization(), spec.load_tokenizer()).fingerprint == one
    other = loading.load(replace(spec, draw=1), NoQuantization(), spec.load_tokenizer())
    assert other.fingerprint != one


def test_a_real_llama_loads_and_reads_its_language(real_data):
    folder = real_data / "weights" / "stories260K-hf"
    spec = pretrained.Pretrained(name_or_path=str(folder), max_length=128)
    tokenizer = spec.load_tokenizer()
    text = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")["input_ids"]
    losses = {}
    for name, quantizer in (("none", NoQuantization()), ("nf4", FourBit())):
        model = loading.load(spec, quantizer, tokenizer).model.eval()
        with torch.no_grad():
            losses[name] = float(model(input_ids=text, labels=text).loss)
    assert losses["none"] < 0.3
    assert losses["none"] < losses["nf4"] < 1.0


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 1), ("vocab_size", 5), ("model_type", "gpt2")])
def test_a_checkpoint_of_another_architecture_than_asked_for_is_refused(key, value):
    spec = pretrained.Pretrained("loralab/tiny", config={key: value})
    with pytest.raises(ConfigError, match=rf"model.config.{key}={value!r}: the checkpoint of .*tiny.* says"):
        loading.load(spec, NoQuantization(), spec.load_tokenizer())


def test_keys_that_are_the_checkpoints_are_taken():
    spec = pretrained.Pretrained("loralab/tiny", config={"num_hidden_layers": 4})
    assert spec.architecture().hidden_size == 256


def test_a_token_whose_id_has_no_embedding_is_refused_though_there_are_fewer_tokens_than_embeddings(
    make_model, tokenizer_folder, tmp_path
):
    stored = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["a"] = 300  # ids with holes
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    spec = make_model("llama", tokenizer=str(tmp_path))
    tokenizer = spec.load_tokenizer()
    assert len(tokenizer) <= 258
    with pytest.raises(ConfigError, match="its 301 tokens exceed the 258 embeddings"):
        loading.load(spec, NoQuantization(), tokenizer)
    larger = make_model("llama", tokenizer=str(tmp_path), config={"vocab_size": 320})
    loading.load(larger, NoQuantization(), tokenizer)
