"""Every architecture of transformers that can be had small by its config's own keys, and its weights drawn widely."""

import torch
import transformers
from torch import nn

SIZES = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "d_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 2),
    **{"num_decoder_layers": 2, "head_dim": 16, "d_kv": 16, "d_head": 16},
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 130),
    "vocab_size": 258,
}
DECODER = {"is_decoder": True}
WINDOW = {"sliding_window": 8}  # shorter than a row
MLA = {
    **{"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
QWEN = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
OWN = {  # {architecture: keys}
    **dict.fromkeys(("bert", "roberta", "electra", "camembert", "xlm-roberta", "ernie", "megatron-bert"), DECODER),
    **dict.fromkeys(("roc_bert", "roformer", "rembert", "data2vec-text", "bert-generation"), DECODER),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl"), DECODER),
    "big_bird": {**DECODER, "attention_type": "original_full"},
    **dict.fromkeys(("gemma3_text", "mistral", "cohere2", "ministral", "phi3", "gpt_oss", "starcoder2"), WINDOW),
    **dict.fromkeys(("exaone4", "olmo3", "granite_swa"), WINDOW),
    **dict.fromkeys(("qwen2", "qwen3"), QWEN),
    "gemma2": {**WINDOW, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "llama4_text": {"attention_chunk_size": 8},
    "granite": {
        **{"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
        "attention_multiplier": 0.2,
    },
    "cohere": {"logit_scale": 0.25},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "window_size": 8,
    },
    "gptj": {"rotary_dim": 8},
    "xlm": {"causal": True},
    "mpt": {"max_seq_len": 96},
    "deepseek_v2": MLA,
    "mamba2": {"num_heads": 4, "n_groups": 1, "state_size": 8},
    "longt5": {"local_radius": 4},
    **{name: {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]} for name in ("deberta", "deberta-v2")},
    "longformer": {"attention_window": 8},
    "modernbert": {"local_attention": 8},
}
CAUSAL = """
afmoe apertus arcee aria_text bart beam bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot
blenderbot-small bloom camembert cohere cohere2 cohere2_moe ctrl data2vec-text deepseek_v2 deepseek_v32 deepseek_v4
diffllama doge electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo gemma gemma2 gemma3_text glm
glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe internlm3 jais2
jetmoe lfm2 llama llama4_text mamba mamba2 marian mbart megatron-bert minicpm3 minimax minimax_m2 ministral ministral3
mistral mixtral mpt mvp nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3
phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next rembert roberta roberta-prelayernorm roc_bert
roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm xlm-roberta xlm-roberta-xl
"""
SEQ2SEQ = """
bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 mt5 mvp pegasus pegasus_x switch_transformers t5
umt5
"""
CLASSES = """
albert arcee bart bert big_bird bigbird_pegasus biogpt bloom camembert ctrl data2vec-text deberta deberta-v2
deepseek_v2 diffllama distilbert doge electra ernie esm eurobert exaone4 falcon flaubert gemma gemma2 gemma3_text glm
glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj helium hunyuan_v1_dense hunyuan_v1_moe jetmoe llama
longformer mbart megatron-bert minicpm3 minimax ministral ministral3 mistral mixtral modernbert mpnet mpt mra mt5 mvp
nemotron nomic_bert olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe
qwen3_next rembert roberta roberta-prelayernorm roc_bert roformer seed_oss smollm3 squeezebert stablelm starcoder2 t5
umt5 xlm xlm-roberta xlm-roberta-xl
"""
NAMES = {"causal_lm": CAUSAL, "seq2seq_lm": SEQ2SEQ, "sequence_classification": CLASSES}
TABLE = {task: names.split() for task, names in NAMES.items()}


def config_of(kind, task):
    """The architecture's own config made small, without dropout; pad 0, end 1."""
    default = transformers.AutoConfig.for_model(kind)
    given = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    if kind == "falcon":
        del given["head_dim"]
    if getattr(default, "layer_types", None) and kind not in ("mamba", "mamba2"):
        given["layer_types"] = [default.layer_types[0], default.layer_types[-1]]
    start = {"decoder_start_token_id": 0} if default.is_encoder_decoder and task != "causal_lm" else {}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    own = {key: value for key, value in OWN.get(kind, {}).items() if task == "causal_lm" or key != "is_decoder"}
    config = transformers.AutoConfig.for_model(kind, **{**given, **ends, **start, **own})
    for key, value in list(vars(config).items()):
        if ("drop" in key or key == "router_jitter_noise") and isinstance(value, float):
            setattr(config, key, 0.0)
    config.num_labels = 3
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


@torch.no_grad()
def spread(model):
    """Matrices keep the size of what passes through them, vectors are far from 0 and 1."""
    owners = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for parameter in model.parameters():
        owner = owners.get(id(parameter))
        if isinstance(owner, nn.Embedding):
            parameter.normal_(0.0, 1.0)
        elif isinstance(owner, nn.Linear):
            parameter.normal_(0.0, 1.5 / owner.in_features**0.5)
        elif parameter.dim() > 1:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3)).add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5)).add_(0.3 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("final_logits_bias"):
            buffer.normal_(0.0, 1.0)
