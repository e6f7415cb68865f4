"""A base for which a row in a batch is not what it is alone is refused, and where it is, it runs."""

import pytest

from loralab.running.runner import Runner

LONGROPE = {
    **{"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0, "original_max_position_embeddings": 24},
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24},
        **{"short_factor": [1.0] * 16, "long_factor": [4.0] * 16},
    },
}
BART = {
    **{"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
    **{"vocab_size": 258, "eos_token_id": 1, "pad_token_id": 0, "forced_eos_token_id": None},
}
NLLB = {
    **BART,
    **{"model_type": "nllb-moe", "num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "decoder_start_token_id": 1,
}
NLLB.pop("forced_eos_token_id")


@pytest.fixture
def outcome(make_spec, make_data, make_model, vary):
    """The record of an untrained run."""

    def run(name, config, kind, batch_size, task="causal_lm", **changes):
        model = vary(make_model("llama"), config=config, task=task)
        spec = make_spec(name, model=model, data=make_data(kind, batch_size=batch_size), max_steps=0, **changes)
        return Runner().run([spec])[0]

    return run


def test_positions_that_turn_all_rows_by_the_longest_are_refused_for_a_batch_on_both_sides(outcome, make_model):
    config = {**make_model("llama").config, **LONGROPE, "max_position_embeddings": 128}
    record = outcome("two", config, "ragged", 2)
    assert record["exit_code"] == 2, record["error"]
    assert "data.batch_size=2: the base's positions (rope_type=longrope)" in record["error"]
    assert "valid: model.max_length=24, or data.batch_size=1" in record["error"]
    assert outcome("one", config, "ragged", 1)["exit_code"] == 0
    assert outcome("equal", config, "pairs", 2)["exit_code"] == 0  # all rows are longer


def test_a_classifier_that_looks_for_an_ending_is_refused_where_rows_have_none(outcome):
    record = outcome("bart", BART, "labels", 2, "sequence_classification")
    assert record["exit_code"] == 2, record["error"]
    assert "does not end a text with the end-of-sequence token (id 1), from which a bart classifier" in record["error"]


def test_experts_that_take_a_bounded_number_of_a_batch_are_refused_by_name(outcome):
    record = outcome("moe", NLLB, "ragged", 2, "seq2seq_lm")
    assert record["exit_code"] == 2, record["error"]
    assert "NllbMoeForConditionalGeneration (model_type=nllb-moe)" in record["error"]
