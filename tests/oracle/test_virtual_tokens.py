"""Over all of transformers' architectures: with virtual tokens a row's logits are PEFT's, and what they are without
padding; or the architecture is refused by name."""

import copy

import breadth
import plain
import pytest
import torch
import transformers
from peft import PeftModel

from loralab.adapters.attached import attached
from loralab.adapters.export import save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.prefix import Prefix
from loralab.adapters.prompt import Prompt
from loralab.errors import ConfigError
from loralab.models import architecture

METHODS = {"prefix": Prefix(num_virtual_tokens=5), "prompt": Prompt(num_virtual_tokens=5)}
QUICK = {("causal_lm", "gemma3_text"), ("causal_lm", "falcon"), ("seq2seq_lm", "pegasus")}
QUICK |= {("sequence_classification", kind) for kind in ("electra", "gpt2", "mt5", "ctrl")}
NO_STACK = {"llama4_text", "eurobert", "longformer"}
NO_CACHE = """
deepseek_v2 deepseek_v32 deepseek_v4 minicpm3 glm4_moe_lite glm_moe_dsa mamba mamba2 rwkv openai-gpt xlm flaubert
minimax olmo_hybrid qwen3_next qwen3_5_text albert deberta deberta-v2 distilbert esm modernbert mpnet mra nomic_bert
squeezebert
"""
REFUSED = {"prefix": NO_STACK.union(NO_CACHE.split()), "prompt": NO_STACK | {"mamba", "mamba2", "rwkv", "deepseek_v4"}}
LANGUAGES = {"xlm"}  # as a language model it writes text in a way of its own


def cases():
    made = [(method, task, kind) for method in METHODS for task in breadth.TABLE for kind in breadth.TABLE[task]]
    return [pytest.param(*case, marks=[] if case[1:] in QUICK else pytest.mark.slow) for case in made]


def bases(kind, task):
    """Twice the same."""
    config = breadth.config_of(kind, task)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        attention = architecture.attention("auto", task, config)
        model = plain.AUTO[task].from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
        breadth.spread(model)
    return model, copy.deepcopy(model)


def rows(task):
    """(two rows of 12 tokens, the same with the second cut to 8, that one alone); a text ends in the end token."""
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1
    target = {"decoder_input_ids": ids[:, :7]} if task == "seq2seq_lm" else {}
    short, mask = ids.clone(), torch.ones_like(ids)
    short[1, 7], short[1, 8:], mask[1, 8:] = 1, 0, 0
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **target}
    padded = {"input_ids": short, "attention_mask": mask, **target}
    own = {"input_ids": short[1:, :8], "attention_mask": mask[1:, :8], **{k: v[1:] for k, v in target.items()}}
    return whole, padded, own


def logits(model, adapter, given):
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, len(given["input_ids"]))):
        return model(**given).logits


def pefts(model, folder, given):
    """None where PEFT cannot compute with virtual tokens."""
    try:
        with torch.no_grad():
            return PeftModel.from_pretrained(model, folder).eval()(**given).logits
    except (AttributeError, NotImplementedError, ValueError, TypeError, IndexError, RuntimeError):
        return None


@pytest.mark.parametrize(("method", "task", "kind"), cases())
def test_logits_are_pefts_and_those_of_a_row_without_padding(method, task, kind, tmp_path):
    transformers.logging.set_verbosity_error()
    model, other = bases(kind, task)
    if kind in REFUSED[method] or (kind in LANGUAGES and task == "causal_lm"):
        with pytest.raises(ConfigError, match="valid: another base"):
            attached(METHODS[method], model)
        return
    adapter = attached(METHODS[method], model)
    whole, padded, own = rows(task)
    ours = logits(model, adapter, whole)
    beside, by_itself = logits(model, adapter, padded)[1], logits(model, adapter, own)[0]
    beside = beside[: len(by_itself)] if by_itself.dim() > 1 else beside
    torch.testing.assert_close(beside, by_itself, rtol=1e-5, atol=1e-5 * max(3.0, float(ours.abs().max())))
    save(adapter, tmp_path / "adapter")
    theirs = pefts(other, tmp_path / "adapter", whole)
    if theirs is not None:
        shown = theirs[:, -ours.shape[1] :] if theirs.dim() > 2 else theirs
        torch.testing.assert_close(ours, shown, rtol=1e-5, atol=1e-5)
    elif task != "sequence_classification":
        assert kind == "gpt_bigcode"
