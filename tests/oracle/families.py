"""Tiny configurations of many architectures, and their weights: drawn so widely that no operation is negligible."""

import torch
import transformers

VOCABULARY = 258
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KV = {"num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96}
BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 96},
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
START = {"decoder_start_token_id": 1}
CAUSAL = {
    "llama": {**SMALL, "num_key_value_heads": 1},
    "gpt2": GPT2,
    "gemma2": {
        **{**SMALL, **KV, "sliding_window": 8, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 2.0},
        "final_logit_softcapping": 5.0,
    },
    "mistral": {**SMALL, **KV, "sliding_window": 8},
    "qwen2": {**SMALL, "num_key_value_heads": 1},
    "qwen3": {**SMALL, **KV},
    "gemma": {**SMALL, **KV},
    "gemma3_text": {**SMALL, **KV, "sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 1},
    "phi": {**SMALL, "partial_rotary_factor": 0.5},
    "phi3": {**SMALL, "pad_token_id": 0},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 8, "intermediate_size": 64},
        **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 96},
    },
    "gptj": {**GPT2, "rotary_dim": 8},
    "gpt_neox": SMALL,
    "codegen": {**GPT2, "n_head": 4, "rotary_dim": 8},
    "gpt_bigcode": GPT2,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 96},
    "stablelm": {**SMALL, "num_key_value_heads": 2},
    "starcoder2": {**SMALL, "num_key_value_heads": 1},
    "granite": {
        **{**SMALL, "num_key_value_heads": 1, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
        **{"residual_multiplier": 0.5, "attention_multiplier": 0.2},
    },
    "cohere": {**SMALL, "num_key_value_heads": 1, "logit_scale": 0.25},
    "cohere2": {**SMALL, "num_key_value_heads": 1, "logit_scale": 0.25, "sliding_window": 8},
    "olmo": {**SMALL, "clip_qkv": 1.0},
    "olmo2": SMALL,
    "nemotron": {**SMALL, "num_key_value_heads": 1},
    "persimmon": SMALL,
    "biogpt": {**SMALL, "max_position_embeddings": 96},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 96},
    "glm": {**SMALL, **KV, "pad_token_id": 0},
    "smollm3": {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0},
    "helium": {**SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "mixtral": {**SMALL, "num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True},
    "qwen2_moe": {
        **{**SMALL, "num_key_value_heads": 1, "moe_intermediate_size": 32},
        **{"shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
    "openai-gpt": GPT2,
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 64, "n_positions": 96},
    "bert": {**SMALL, "is_decoder": True, "max_position_embeddings": 96},
    "roberta": {**SMALL, "is_decoder": True, "max_position_embeddings": 98},
    "electra": {**SMALL, "embedding_size": 16, "is_decoder": True, "max_position_embeddings": 96},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 96, "causal": True},
}
SEQ2SEQ = {
    "t5": {**T5, **START},
    "mt5": {**T5, **START},
    "umt5": {**T5, **START},
    "bart": {**BART, **START},
    "mbart": {**BART, **START},
    "pegasus": {**BART, **START},
    "marian": {**BART, **START},
    "m2m_100": {**BART, **START},
    "blenderbot": {**BART, **START},
    "led": {**BART, **START, "attention_window": 16, "max_encoder_position_embeddings": 96},
    "longt5": {**T5, **START, "local_radius": 4},
    "switch_transformers": {**T5, **START, "num_experts": 2, "num_sparse_encoder_layers": 1},
}
ENCODER = {**SMALL, "max_position_embeddings": 98}
CLASSIFICATION = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 96},
    "albert": {**ENCODER, "embedding_size": 16},
    "electra": {**ENCODER, "embedding_size": 16},
    "deberta": {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "mpnet": ENCODER,
    "funnel": {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1]},
    "modernbert": {**SMALL, "local_attention": 8, "pad_token_id": 0},
    "squeezebert": {**ENCODER, "embedding_size": 32},
    "gpt2": GPT2,
    "llama": {**SMALL, "num_key_value_heads": 1},
    "gemma2": CAUSAL["gemma2"],
    "opt": CAUSAL["opt"],
    "phi": SMALL,
    "bloom": CAUSAL["bloom"],
    "mistral": CAUSAL["mistral"],
    "openai-gpt": GPT2,
}
REFUSED = {  # what they give a row depends on its padding
    "prophetnet": {
        **{"hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 2},
        **{"num_decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **START},
        **{"max_position_embeddings": 96},
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
}
READ_PADDING = {  # classifiers whose rows depend on the padding behind them
    "fnet": {key: value for key, value in ENCODER.items() if key != "num_attention_heads"},
    "convbert": {**ENCODER, "embedding_size": 32, "num_attention_heads": 4},
    "nystromformer": ENCODER,
    "yoso": ENCODER,
    "mobilebert": {
        **{"hidden_size": 32, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 96},
    },
}
TABLE = {
    **{"causal_lm": CAUSAL, "seq2seq_lm": SEQ2SEQ, "sequence_classification": {**CLASSIFICATION, **READ_PADDING}},
    **{"pairs": CLASSIFICATION, "regression": CLASSIFICATION},
}
LABELS = {"sequence_classification": 3, "pairs": 3, "regression": 1}
TARGETS = {"mamba": ["in_proj", "x_proj"]}  # PEFT refuses the others there
NARROW = {"mobilebert"}  # nothing in it is normalized, and 24 products in a row would saturate
SPECIAL = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 1}  # the tokenizer's


def config_of(family, task, **changes):
    """The config, without dropout."""
    keys = {"vocab_size": VOCABULARY, **SPECIAL, **TABLE[task].get(family, REFUSED.get(family)), **changes}
    keys.update({"forced_eos_token_id": None} if task == "seq2seq_lm" else {})
    keys.update({"num_labels": LABELS[task]} if task in LABELS else {})
    config = transformers.AutoConfig.for_model(family, **keys)
    for key, value in list(vars(config).items()):
        if ("dropout" in key or key == "router_jitter_noise" or key.endswith(("_pdrop", "layerdrop"))) and isinstance(
            value, int | float
        ):
            setattr(config, key, 0.0)
    return config


def save(auto, family, task, folder, wide=True, **changes):
    """A checkpoint with matrices of deviation 1 / sqrt(in) or 1, and vectors moved by 0.3 from where they start; not
    ``wide``: as transformers draws it."""
    torch.manual_seed(0)
    model = auto.from_config(config_of(family, task, **changes), dtype=torch.float32)
    if not wide or family in NARROW:
        model.save_pretrained(folder)
        return
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                width = 1.0 if id(parameter) in embeddings else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn_like(parameter) * width)
    model.save_pretrained(folder)
