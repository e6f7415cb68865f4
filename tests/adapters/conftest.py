"""Small random bases of the architectures that methods look for names in."""

import pytest
import torch

from loralab.adapters.hooks import BatchSlice
from loralab.forward.stacked import Forward
from loralab.models import loading, pretrained
from loralab.quantization.base import dense_weight, is_frozen
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.none import NoQuantization

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SHAPE, "intermediate_size": 128}
SHAPES = {
    "bert": WIDE,
    "electra": {**WIDE, "embedding_size": 64},
    "gpt_neox": WIDE,
    "mistral": {**WIDE, "num_key_value_heads": 1},
    "qwen2": {**WIDE, "num_key_value_heads": 1},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},
    "falcon": {**SHAPE, "new_decoder_architecture": False},
    "opt": {**SHAPE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bart": {
        **{"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
    },
}
TASKS = {"t5": "seq2seq_lm", "bart": "seq2seq_lm"}
FAMILIES = ("llama", "gpt2", "t5", "distilbert", "roberta", "phi")  # of tests/conftest.py
ENCODERS = ("bert", "electra")


@pytest.fixture
def load_any(make_model, tokenizer_folder):
    """A base of one of FAMILIES or SHAPES: (family, scheme none, int8 or nf4)."""

    def load(family, scheme="none"):
        quantizer = {"nf4": FourBit, "int8": Int8Blockwise}.get(scheme, NoQuantization)()
        spec = make_model(family) if family in FAMILIES else _spec(family, str(tokenizer_folder))
        labels = 3 if spec.task == "sequence_classification" else None
        return loading.load(spec, quantizer, spec.load_tokenizer(), labels).model

    return load


def _spec(family, tokenizer):
    task = TASKS.get(family, "sequence_classification" if family in ENCODERS else "causal_lm")
    keys = {"model_type": family, "vocab_size": 258, **SHAPES[family]}
    return pretrained.Random(tokenizer=tokenizer, task=task, max_length=64, dropout=0.0, dtype="float32", config=keys)


@pytest.fixture
def fed(inputs):
    """Inputs of a family's task."""
    return lambda family: inputs(TASKS.get(family, "causal_lm"))


@pytest.fixture
def dense_twin(load_any):
    """A base without quantization whose weights are what the codes of ``model`` stand for."""

    def make(family, model):
        twin = load_any(family)
        for name, module in model.named_modules():
            if is_frozen(module):
                weight = dense_weight(module).t() if module.transposed else dense_weight(module)
                with torch.no_grad():
                    twin.get_submodule(name).weight.copy_(weight)
        return twin

    return make


@pytest.fixture
def curves():
    """(our losses, PEFT's) of six steps of AdamW on one batch: of an adapter, and of the PEFT model beside it."""

    def train(model, adapter, theirs, inputs, labels, rate):
        forward = Forward(model, "causal_lm")

        def ours():
            (scores,) = forward(dict(inputs), labels, [BatchSlice(adapter, 2, 1)])
            return scores[0] / len(scores[2])

        trained = [p for p in theirs.parameters() if p.requires_grad]
        return (
            _losses(ours, list(adapter.parameters()), rate),
            _losses(lambda: theirs(**inputs, labels=labels).loss, trained, rate),
        )

    return train


def _losses(loss_now, parameters, rate):
    optimizer, losses = torch.optim.AdamW(parameters, lr=rate), []
    for _ in range(6):
        loss = loss_now()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
