"""Mixtures of experts: planned without a word of torch's, and what nothing takes is named with how much it is."""

import pytest

from loralab.cli import main
from loralab.models import loading, pretrained
from loralab.quantization.base import out_of_reach_weights

SMALL = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1},
}
KINDS = {
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "qwen3_moe": {**LLAMA, **QWEN},
    "deepseek_v3": {**LLAMA, **DEEPSEEK},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "head_dim": 8},
}
FALCON = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# three matrices of hidden x intermediate an expert, and a router's row; gpt-oss has biases too
EXPERTS = {
    "mixtral": 2 * 4 * (3 * 32 * 64 + 32),
    "qwen3_moe": 2 * 4 * (3 * 32 * 16 + 32),
    "deepseek_v3": 1 * 4 * (3 * 32 * 16 + 32),
    "gpt_oss": 2 * 4 * (3 * 32 * 64 + 32 + 2 * 64 + 32),
}


def words(kind, keys):
    config = [f"+model.config.{key}={value}" for key, value in {"model_type": kind, **keys}.items()]
    return ["model=random", "model.max_length=16", "quantization=nf4", "quantization.block_size=32", *config]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_no_linear_layer_are_named_with_how_much_they_are(kind):
    found = out_of_reach_weights(loading.skeleton(pretrained.Random(config={"model_type": kind, **KINDS[kind]})))
    assert sum(found.values()) == EXPERTS[kind]
    assert any("experts" in name for name in found)


@pytest.mark.parametrize("kind", [*KINDS, "falcon"])
def test_a_plan_answers_and_names_them_without_a_traceback(kind, capfd):
    dense = KINDS.get(kind, FALCON).get("first_k_dense_replace", 0)  # layers before the first of experts
    keys = {**KINDS.get(kind, FALCON), "num_hidden_layers": 1 + dense}
    assert main.run(["plan", "plan.device=cpu", *words(kind, keys)]) == 0
    message = capfd.readouterr()
    assert "predicted peak" in message.out
    assert "Traceback" not in message.err + message.out
    assert "fake" not in message.err.lower()
