"""A trial's losses say nothing of the size of its batches, whatever its base and whatever scales its activations."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from loralab.adapters.hooks import BatchSlice
from loralab.adapters.lora import LoRA
from loralab.data.batches import collate
from loralab.data.encoding import encode
from loralab.forward.stacked import Forward
from loralab.models import loading
from loralab.quantization.int8_product import Int8Product
from loralab.quantization.sequences import Sequences, decoder_input_ids
from loralab.running.runner import Runner

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
OPT = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
PADDED = {"pad_token_id": 40}  # in the base's config: a token of the text, and not what the tokenizer pads with
DECODERS = {  # classifiers that read their class at a row's last token
    "llama": PADDED,
    "gpt2": PADDED,
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, **PADDED},
    "opt": {
        **{"model_type": "opt", **OPT, "ffn_dim": 128, "word_embed_proj_dim": 64, **PADDED},
        "max_position_embeddings": 130,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 2, **PADDED},
    "gpt_neo": {
        **{"model_type": "gpt_neo", "hidden_size": 64, "num_layers": 2, "num_heads": 2, **PADDED},
        **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 130},
    },
}


@pytest.fixture
def losses(make_spec, make_data):
    """val/loss at three batch sizes of an untrained base, its spec given."""

    def found(model, kind, sizes=(1, 2, 7), **changes):
        values = []
        for size in sizes:
            data = make_data(kind, batch_size=size)
            record = Runner().run([make_spec(f"size{size}", model=model, data=data, max_steps=0, **changes)])[0]
            assert record["status"] == "completed", record["error"]
            values.append(record["metrics"]["val/loss"])
        return values

    return found


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("llama", "opt") else pytest.mark.slow) for f in DECODERS]
)
def test_a_decoder_as_classifier_pools_at_the_last_token_whatever_its_config_pads_with(make_model, losses, family):
    model = make_model(family if family in ("llama", "gpt2") else "llama", task="sequence_classification")
    own = model.config if "model_type" not in DECODERS[family] else {"vocab_size": 258}
    model = replace(model, config={**own, **DECODERS[family]})
    found = losses(model, "labels")
    assert found == [pytest.approx(found[0], rel=1e-5)] * 3


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", "ragged"), ("t5", "ragged"), ("distilbert", "labels"), ("roberta", "labels")),
        *(pytest.param(family, "ragged", marks=pytest.mark.slow) for family in ("gpt2", "phi")),
    ],
)
def test_the_validation_loss_is_the_same_at_every_batch_size(make_model, losses, family, kind):
    found = losses(make_model(family), kind)
    assert found == [pytest.approx(found[0], rel=1e-5)] * 3


def in_double(spec, data, quantizer, size):
    """Mean loss over the validation rows in batches of ``size``, all but the int8 products in float64.

    A product is the same for the same sequence, but it jumps where an activation lies at half a code or at the
    threshold. In float32 GEMMs of other batch sizes round otherwise by 1e-7, and of 1e5 activations a few jump, by 1e-4
    to 1e-3 of the loss, on one machine and not on another. In float64 none lies that near."""
    base = loading.load(spec, quantizer, spec.load_tokenizer(), 3 if spec.task == "sequence_classification" else None)
    model = base.model.double().eval()
    rows = encode(data.splits(), base.tokenizer, spec.task, spec.length).validation
    adapter, forward = LoRA(r=2).attach(model), Forward(model, spec.task)
    total = count = 0.0
    for start in range(0, len(rows), size):
        examples = [rows[i] for i in range(start, min(start + size, len(rows)))]
        tensors = collate(examples, spec.task, base.tokenizer.pad_token_id)
        labels = tensors.pop("labels")
        if spec.task == "seq2seq_lm":
            tensors["decoder_input_ids"] = decoder_input_ids(model, labels)
        with torch.no_grad():
            ((loss, _, targets),) = forward(tensors, labels, [BatchSlice(adapter, len(examples))])
        total, count = total + float(loss), count + len(targets)
    return total / count


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize(("family", "kind"), [("llama", "ragged"), ("t5", "ragged"), ("distilbert", "labels")])
def test_scales_and_outlier_columns_of_an_int8_product_are_those_of_a_row_alone(
    make_model, make_data, family, kind, threshold
):
    quantizer = Int8Product(granularity="tensor", threshold=threshold)
    found = [in_double(make_model(family), make_data(kind), quantizer, size) for size in (1, 2, 3)]
    assert found == [pytest.approx(found[0], rel=1e-6)] * 3


def test_scales_taken_over_a_whole_batch_would_be_seen(make_model, make_data, monkeypatch):
    monkeypatch.setattr(Sequences, "each", lambda self, x, width, product: product(x.reshape(-1, x.shape[-1])))
    quantizer = Int8Product(granularity="tensor", threshold=1.0)
    found = [in_double(make_model("llama"), make_data("ragged"), quantizer, size) for size in (1, 2, 3)]
    assert found != [pytest.approx(found[0], rel=1e-6)] * 3


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "ragged"), ("t5", "ragged"), ("roberta", "labels")])
def test_a_checkpoint_whose_tokenizer_pads_on_the_left_is_fed_the_same(
    make_spec, make_data, make_model, tokenizer_folder, tmp_path, family, kind
):
    shutil.copytree(tokenizer_folder, tmp_path / "left")
    file = tmp_path / "left" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    found = []
    for name, folder in (("right", tokenizer_folder), ("left", tmp_path / "left")):
        data = make_data(kind, batch_size=3, generate_rows=0 if kind == "labels" else 3)
        model = make_model(family, tokenizer=str(folder))
        assert model.load_tokenizer().padding_side == name
        spec = make_spec(name, model=model, data=data, max_steps=2)
        found.append(Runner().run([spec])[0]["metrics"])
    assert found[0] == found[1]
    assert "val/loss" in found[0]
