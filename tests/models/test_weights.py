"""A stored base that is not what its config.json says, not readable or not finite is refused with the reason."""

import json
import logging
import pickle
import time

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import enable_progress_bar

from loralab.errors import ConfigError
from loralab.models import loading, pretrained, weights
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax
from loralab.quantization.none import NoQuantization

QUERY = "model.layers.0.self_attn.q_proj.weight"
SCHEMES = pytest.mark.parametrize("quantizer", [NoQuantization(), FourBit(), Int8Absmax()], ids=lambda q: q.name)


@pytest.fixture
def stored(load_base, tmp_path):
    """Writes a checkpoint, its tensors and config.json changed, and returns its spec."""

    def store(change=None, family="llama", config=None, **fields):
        base = load_base(family)
        folder = tmp_path / "base"
        base.model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        if change:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**whole, **(config or {})}))
        return pretrained.Pretrained(
            **{"name_or_path": str(folder), "task": base.spec.task, "max_length": 64, **fields}
        )

    return store


def load(spec, quantizer=None, labels=None):
    return loading.load(spec, quantizer or NoQuantization(), None, labels)


def refused(spec, match, quantizer=None, labels=None):
    with pytest.raises(ConfigError, match=match) as caught:
        load(spec, quantizer, labels)
    assert "\n" not in str(caught.value)


@SCHEMES
def test_a_missing_tensor_is_named_whatever_the_scheme(stored, quantizer):
    refused(stored(lambda tensors: tensors.pop(QUERY)), f"lacks {QUERY}, which LlamaForCausalLM", quantizer)


@SCHEMES
def test_layers_that_config_json_does_not_have_are_named(stored, quantizer):
    match = r"holds model\.layers\.1\.\S+ and 8 more tensors, which"
    refused(stored(config={"num_hidden_layers": 1}), match, quantizer)


def test_a_bias_that_the_architecture_lacks_is_named(stored):
    extra = {QUERY.replace("weight", "bias"): torch.ones(64)}
    refused(stored(lambda tensors: tensors.update(extra)), r"q_proj\.bias, which LlamaForCausalLM has no place for")


def test_surplus_layers_are_named_in_a_checkpoint_without_the_prefix(load_base, tmp_path):
    load_base("roberta").model.roberta.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**whole, "num_hidden_layers": 1}))
    refused(pretrained.Pretrained(str(tmp_path), "sequence_classification", 64), r"encoder\.layer\.1\.", labels=3)


@pytest.mark.parametrize(
    ("family", "names"),
    {
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight", "other.head.bias"],
        "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
        "roberta": ["roberta.pooler.dense.weight", "roberta.embeddings.position_ids", "lm_head.dense.weight"],
        "distilbert": ["vocab_transform.weight"],
        "t5": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "classification_head.bias"],
    }.items(),
)
def test_what_other_heads_and_releases_stored_is_harmless(stored, family, names):
    spec = stored(lambda tensors: tensors.update({name: torch.ones(3) for name in names}), family)
    assert load(spec, labels=3).size.parameters


def test_a_head_of_other_labels_is_named_by_its_key(stored):
    spec = stored(lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}), task="sequence_classification")
    refused(spec, r"score\.weight is \(2, 64\) in the checkpoint and \(3, 64\) by model\.num_labels", labels=3)


@SCHEMES
def test_a_weight_of_another_shape_is_named(stored, quantizer):
    spec = stored(lambda tensors: tensors.update({QUERY: torch.ones(32, 64)}))
    refused(spec, rf"{QUERY} is \(32, 64\) in the checkpoint and \(64, 64\)", quantizer)


def to_int8(tensors):
    tensors[QUERY] = (100 * tensors[QUERY]).to(torch.int8)


def to_bin(spec):
    folder = pretrained.Path(spec.path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


@SCHEMES
@pytest.mark.parametrize("binary", [False, True])
def test_a_weight_in_integers_is_named(stored, quantizer, binary):
    spec = stored(to_int8)
    file = to_bin(spec).name if binary else "model.safetensors"
    refused(spec, f"{QUERY} is stored as torch.int8 in {file}", quantizer)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", QUERY])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_named(stored, name, value):
    spec = stored(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    refused(spec, f"{name}, .* holds nan or infinite values")


def test_weights_too_large_for_the_dtype_are_named(stored):
    change = {"model.norm.weight": torch.full((64,), 1e6)}
    spec = stored(lambda tensors: tensors.update(change), dtype="float16")
    refused(spec, r"model\.norm\.weight, \(64,\) in torch\.float16, holds nan or infinite values; .*model\.dtype")


class Code:
    def __reduce__(self):
        return pytest.fail, ("the pickle's code was run",)


@pytest.mark.parametrize("content", [b"", b"hello world", pickle.dumps({"a": Code()}, protocol=2)])
def test_a_pickle_that_holds_no_tensors_is_refused_and_never_run(stored, content):
    spec = stored()
    to_bin(spec).write_bytes(content)
    refused(spec, r"pytorch_model\.bin: the weights are no pickle of plain tensors")


def test_a_pickle_of_tensors_is_read(stored):
    spec = stored()
    before = load(spec).model.state_dict()
    to_bin(spec)
    after = load(spec).model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ([1, 2], r"config\.json holds a JSON list"),
        ({"hidden_size": -1}, "hidden.size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size=0; valid: a whole number of at least 1"),
        ({"quantization_config": "nf4"}, "quantization_config='nf4'; valid"),
        ({"dtype": "float33"}, "float33"),
        ({"model_type": "t5"}, "T5Config"),
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "mine"}, r"model\.trust_remote_code=true"),
    ],
    ids=str,
)
def test_a_config_json_that_cannot_be_is_refused(stored, config, match):
    spec = stored()
    path = pretrained.Path(spec.path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config} if isinstance(config, dict) else config))
    refused(spec, match)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_size": 0}, r"model\.config\.hidden_size=0; valid"),
        ({"hidden_size": -64}, r"model\.config\.hidden_size=-64; valid"),
        ({"num_hidden_layers": 0}, r"model\.config\.num_hidden_layers=0; valid"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3; valid: a divisor of the 4"),
        ({"hidden_act": "nope"}, "nope"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_an_architecture_that_cannot_be_is_refused(make_model, config, match):
    refused(make_model(config=config), match)
    with pytest.raises(ConfigError, match=match):
        loading.skeleton(make_model(config=config))


def test_sizes_are_named_as_the_architecture_names_them(make_model):
    refused(make_model("gpt2", config={"n_layer": 0}), r"model\.config\.n_layer=0")


def test_an_architecture_of_another_task_is_refused(make_model):
    refused(make_model("t5", task="causal_lm"), "no model for model.task=causal_lm can be built .*T5Config")


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, bits=4, group_size=128"),
        ({"load_in_8bit": True}, "bitsandbytes, int8"),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, "bitsandbytes, fp4, double quantization off"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bitsandbytes, nf4, double quantization on",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"fp8, weight_block_size=\[128, 128\]"),
    ],
)
@SCHEMES
def test_a_quantized_checkpoint_and_the_runs_own_scheme_are_both_named(stored, config, scheme, quantizer):
    match = rf"already quantized \({scheme}\), and this run asks for quantization={quantizer.name}\b"
    spec = stored(config={"quantization_config": config})
    refused(spec, match, quantizer)
    installed = "bitsandbytes [0-9.]+ is installed" if "bitsandbytes" in scheme else "dense checkpoint"
    refused(spec, installed, quantizer)


def test_random_weights_are_drawn_for_the_architecture_of_a_quantized_checkpoint(stored):
    spec = stored(config={"quantization_config": {"load_in_4bit": True}})
    assert load(pretrained.Random(name_or_path=spec.path, max_length=64)).size.parameters


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, an empty cache; how often the hub was asked."""
    asked = []
    monkeypatch.setattr(weights, "hub_reachable", lambda: bool(asked.append(1)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    weights._offline.cache_clear()
    yield asked
    weights._offline.cache_clear()


def test_an_unreachable_hub_is_asked_once_and_answers_at_once(no_hub, caplog):
    spec = pretrained.Pretrained(name_or_path="gpt2")
    started = time.monotonic()
    for attempt in (lambda: load(spec), spec.load_tokenizer):
        with pytest.raises(ConfigError, match=r"'gpt2'.* hub cannot be reached, .* a local folder .* works"):
            attempt()
    assert no_hub == [1]
    assert time.monotonic() - started < 5
    assert not caplog.records


def test_what_the_cache_holds_loads_without_the_hub(no_hub, stored, tmp_path, caplog):
    folder = tmp_path / "hub" / "models--who--what"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots").mkdir()
    spec = stored()
    pretrained.Path(spec.path).rename(folder / "snapshots" / ("a" * 40))
    started = time.monotonic()
    assert load(pretrained.Pretrained(name_or_path="who/what", max_length=64)).size.parameters
    assert time.monotonic() - started < 10
    assert not [record for record in caplog.records if "etry" in record.getMessage()]


def test_a_local_folder_asks_no_hub(no_hub, stored):
    load(stored())
    assert not no_hub


class Written(logging.Handler):
    """What a logger lets through."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.mark.parametrize("quantizer", [NoQuantization(), FourBit()], ids=["none", "nf4"])
def test_our_words_replace_transformers_table_and_bars(stored, quantizer, capfd, caplog):
    spec, theirs = stored(task="sequence_classification"), Written()
    enable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(theirs)
    capfd.readouterr()
    with caplog.at_level(logging.INFO, "loralab"):
        load(spec, quantizer, 3)
    logger.warning("LOAD REPORT of another's")
    logger.removeHandler(theirs)
    assert theirs.texts == ["LOAD REPORT of another's"]  # nothing of ours, and only while we load
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert "has no score.weight: drawn by the seed" in caplog.text
