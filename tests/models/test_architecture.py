"""What follows from the architecture where the configuration leaves it open: attention and the length of rows."""

import time

import pytest
import torch

from loralab.errors import ConfigError
from loralab.models import architecture, loading, pretrained
from loralab.models.architecture import auto_class
from loralab.quantization.none import NoQuantization
from loralab.records import record
from loralab.running.runner import Runner

LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL = {  # {model_type: keys}, each of two layers
    "llama": {**LLAMA, "num_hidden_layers": 2},
    "gemma2": {**LLAMA, "num_hidden_layers": 2, "head_dim": 16},
    "gpt_oss": {**LLAMA, "num_hidden_layers": 2, "head_dim": 16, "num_local_experts": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        **{"attention_layers": ["global", "local"]},
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "xglm": {"d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
SDPA = ("llama", "falcon", "gpt2")


@pytest.fixture
def small(tokenizer_folder):
    """The spec of a random base of SMALL, with what else is given."""

    def make(kind, **changes):
        config = {"model_type": kind, "vocab_size": 258, **SMALL[kind]}
        given = {"tokenizer": str(tokenizer_folder), "config": config, "dtype": "float32", "dropout": 0.0}
        return pretrained.Random(**{**given, **changes})

    return make


@pytest.mark.parametrize("kind", SMALL)
def test_attention_auto_is_what_transformers_takes_by_itself(small, kind):
    spec = small(kind)
    base = loading.load(spec, NoQuantization(), spec.load_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(spec.draw)
        other = auto_class(spec.task).from_config(spec.prepared_config(None), dtype=torch.float32)
    assert base.record()["attn_implementation"] == ("sdpa" if kind in SDPA else "eager")
    assert base.record()["attn_implementation"] == other.config._attn_implementation
    other.requires_grad_(False)  # torch convolves by another kernel where a weight could have a gradient
    ids = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(base.model.eval()(ids).logits, other.eval()(ids).logits, rtol=0, atol=0)


def trains(make_spec, spec):
    started = time.monotonic()
    done = Runner().run([make_spec(model=spec, max_steps=2)])[0]
    assert done["status"] == "completed", done["error"]
    assert done["metrics"]["val/loss"] > 0
    assert time.monotonic() - started < 60
    return done


def test_an_architecture_without_sdpa_trains(make_spec, small):
    assert trains(make_spec, small("gemma2"))["base"]["attn_implementation"] == "eager"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_every_architecture_trains(make_spec, small, kind):
    trains(make_spec, small(kind))


def test_a_choice_is_kept_and_one_that_the_architecture_lacks_is_refused(small):
    assert small("llama", attn_implementation="eager").attention(small("llama").prepared_config(None)) == "eager"
    with pytest.raises(ConfigError, match="sdpa: transformers has none for Gemma2ForCausalLM; valid: auto, or eager"):
        small("gemma2", attn_implementation="sdpa").attention(small("gemma2").prepared_config(None))
    with pytest.raises(ConfigError, match="model.attn_implementation='spda' is unknown; did you mean sdpa?"):
        small("llama", attn_implementation="spda")


BOUNDED = {  # {model_type: (task, keys)}: learned positions, so that one token more is an IndexError
    "gpt2": ("causal_lm", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 20}),
    "opt": ("causal_lm", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "max_position_embeddings": 20}),
    "bart": (
        "seq2seq_lm",
        {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 20},
    ),
    **dict.fromkeys(
        ("bert", "roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "data2vec-text", "ibert"),
        ("sequence_classification", {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 20}),
    ),
    "distilbert": ("sequence_classification", {"dim": 32, "hidden_dim": 32, "max_position_embeddings": 20}),
}
LAYERS = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 2),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_positions_are_the_tokens_of_the_longest_row_that_the_model_takes(kind):
    from transformers import AutoConfig

    task, keys = BOUNDED[kind]
    config = AutoConfig.for_model(kind)
    few = {key: value for key, value in LAYERS.items() if hasattr(config, key)}
    config = AutoConfig.for_model(kind, vocab_size=50, **few, **keys)
    model = auto_class(task).from_config(config).eval()
    room = architecture.positions(config)

    def run(tokens):
        with torch.no_grad():
            model(torch.full((1, tokens), 7))

    run(room)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(room + 1)


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("llama", {"max_position_embeddings": 128}, 128),
        ("t5", {}, None),  # positions are relative
        ("bloom", {}, None),  # ALiBi
        ("mpt", {"max_seq_len": 64}, None),
        ("mamba", {}, None),
        ("xlnet", {}, None),  # says -1
        ("roberta", {"max_position_embeddings": 514}, 512),
        ("led", {}, 1024),
        ("gemma3", {}, 131072),  # in its text_config
    ],
)
def test_positions_of_an_architecture(kind, keys, expected):
    from transformers import AutoConfig

    assert architecture.positions(AutoConfig.for_model(kind, **keys)) == expected


def test_rows_are_as_long_as_both_the_default_and_the_base_allow():
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert pretrained.Random(config={**shape, "max_position_embeddings": 100}).length == 100
    assert pretrained.Random(config={**shape, "max_position_embeddings": 4096}).length == 256
    assert pretrained.Random(config={**shape, "max_position_embeddings": 4096}, max_length=300).length == 300
    assert pretrained.Pretrained().length == 512  # the shipped base's own
    assert pretrained.Pretrained(config={"model_type": "llama", "max_position_embeddings": 4096}).length == 512


def test_a_length_above_the_positions_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"exceeds the 100 positions .*; valid: at most 100, or null, which is 100"):
        _ = pretrained.Random(config={"max_position_embeddings": 100}, max_length=101).length
    roberta = {"model_type": "roberta", "max_position_embeddings": 514}
    spec = pretrained.Pretrained(task="sequence_classification", config=roberta, max_length=514)
    with pytest.raises(ConfigError, match=r"512 positions of the base model \(514 less 2 .*valid: at most 512"):
        _ = spec.length


def test_the_record_holds_the_length_and_the_attention_in_effect(make_spec, make_model, tmp_path):
    spec = make_spec(model=make_model("llama", max_length=None), max_steps=1)
    Runner().run([spec])
    stored = record.read(spec.folder)
    assert (stored["data"]["max_length"], stored["base"]["attn_implementation"]) == (128, "sdpa")
