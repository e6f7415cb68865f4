"""What architectures call the projections that methods are defined by: keys, values, outputs of attention and MLP.

A model is recognized by the names it has, not by its class.
"""

from dataclasses import dataclass

from torch import nn

from loralab.errors import ConfigError
from loralab.quantization.base import base_linears


@dataclass(frozen=True)
class Names:
    """How the names of an architecture's layers end."""

    attention_output: str
    mlp_output: str
    keys_values: tuple[str, ...]  # one where they are fused, with the query


@dataclass(frozen=True)
class Projections:
    """Names of a model's layers, in its order; attention is a block's own, without that to an encoder."""

    attention_outputs: list[str]
    mlp_outputs: list[str]
    keys_values: list[str]


ARCHITECTURES = (
    Names("self_attn.o_proj", "mlp.down_proj", ("k_proj", "v_proj")),  # Llama, Mistral, Qwen2, Gemma
    Names("self_attn.o_proj", "mlp.down_proj", ("qkv_proj",)),  # Phi-3
    Names("self_attn.dense", "mlp.fc2", ("k_proj", "v_proj")),  # Phi
    Names("self_attn.out_proj", "fc2", ("k_proj", "v_proj")),  # OPT, BART, mBART, Pegasus
    Names("attn.c_proj", "mlp.c_proj", ("attn.c_attn",)),  # GPT-2, GPTBigCode
    Names("attn.attention.out_proj", "mlp.c_proj", ("k_proj", "v_proj")),  # GPT-Neo
    Names("attn.out_proj", "mlp.fc_out", ("k_proj", "v_proj")),  # GPT-J
    Names("attn.out_proj", "mlp.fc_out", ("qkv_proj",)),  # CodeGen
    Names("attn.out_proj", "ffn.down_proj", ("Wqkv",)),  # MPT
    Names("attention.dense", "mlp.dense_4h_to_h", ("query_key_value",)),  # GPT-NeoX, Pythia
    Names("self_attention.dense", "mlp.dense_4h_to_h", ("query_key_value",)),  # BLOOM, Falcon
    Names("attention.output.dense", "output.dense", ("self.key", "self.value")),  # BERT, RoBERTa, ELECTRA
    Names("attention.output.dense", "output.dense", ("self.key_proj", "self.value_proj")),  # DeBERTa-v2
    Names("attention.output.dense", "output.dense", ("self.in_proj",)),  # DeBERTa
    Names("attention.dense", "ffn_output", ("attention.key", "attention.value")),  # ALBERT
    Names("attention.out_lin", "ffn.lin2", ("k_lin", "v_lin")),  # DistilBERT
    Names("SelfAttention.o", "DenseReluDense.wo", ("k", "v")),  # T5, FLAN-T5, mT5
)


def projections(model: nn.Module, method: str) -> Projections:
    """Those of ``model``, as many attentions as MLPs. Raises ConfigError where its names are not known."""
    linears = base_linears(model)
    for names in ARCHITECTURES:
        found = _found(names, linears)
        if found.keys_values and found.mlp_outputs and len(found.attention_outputs) == len(found.mlp_outputs):
            return found
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    raise ConfigError(
        f"adapter={method} does not know the attention and MLP projections of {type(model).__name__} by their names; "
        f"valid: adapter.target_modules with names of its own, among {', '.join(leaves)}"
    )


def _found(names: Names, linears: list[str]) -> Projections:
    attention = [name for name in linears if f".{name}".endswith(f".{names.attention_output}")]
    ends = tuple(f".{one}" for one in names.keys_values)
    return Projections(
        attention_outputs=attention,
        mlp_outputs=[n for n in linears if f".{n}".endswith(f".{names.mlp_output}") and n not in attention],
        keys_values=[name for name in linears if f".{name}".endswith(ends)],
    )
