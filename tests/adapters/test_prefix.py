"""Prefix tuning: keys and values before those of the tokens."""

import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DynamicCache

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.prefix import PROJECTION, Prefix, PrefixStates, Shape
from loralab.adapters.virtual import Share
from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.errors import ConfigError
from loralab.models import pretrained
from loralab.planning.count import count
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

LLAMA_3B = {
    **{"model_type": "llama", "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "head_dim": 128},
    **{"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8},
}
GPT3 = {"model_type": "gpt2", "n_embd": 12_288, "n_layer": 96, "n_head": 96, "n_positions": 2048}


def logits(model, given, adapter):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        return model(**given).logits


def drawn(size, hidden=None, seed=0):
    states = PrefixStates(size, Shape(3, 2, 4), hidden, torch.device("cpu"))
    states.draw(torch.Generator().manual_seed(seed))
    return states


@pytest.mark.parametrize("hidden", [None, 6])
def test_states_of_several_trials_are_each_ones_own_repeated_for_its_rows(hidden):
    one, other = drawn(5, hidden), drawn(5, hidden, seed=1)
    found = PrefixStates.forward_grouped([Share(one, 2), Share(other, 3)], torch.float32)
    assert found.shape == (6, 5, 2, 5, 4)  # keys and values of three layers, rows, heads, virtual tokens, width
    for row, states in enumerate([one, one, other, other, other]):
        own = states().view(5, 6, 2, 4)
        for part in range(6):
            for head in range(2):
                assert torch.equal(found[part, row, head], own[:, part, head])


def test_it_is_attention_over_keys_and_values_that_stand_first(load_base, inputs):
    """Equation 4 of the paper, with the prefix handed to the base as its past by hand."""
    model, given = load_base("llama").model, inputs()
    adapter = attached(Prefix(num_virtual_tokens=3), model)
    ((_, states),) = adapter.adapted()
    parts = states().detach().view(3, 4, 2, 32).permute(1, 2, 0, 3)[:, None].expand(-1, 2, -1, -1, -1)
    past = DynamicCache()
    for layer in range(2):
        past.update(parts[2 * layer], parts[2 * layer + 1], layer)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), given["attention_mask"]], 1)
    with torch.no_grad():
        expected = model.eval()(input_ids=given["input_ids"], attention_mask=mask, past_key_values=past).logits
    assert torch.equal(logits(model, given, adapter), expected)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_projection_is_kept_beside_pefts_file_which_holds_what_it_makes(load_base, inputs, tmp_path, family):
    base = load_base(family)
    given = inputs(base.spec.task)
    spec = Prefix(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7)
    adapter = attached(spec, base.model)
    ours = logits(base.model, given, adapter)
    save(adapter, tmp_path / "adapter")
    model = load_base(family).model
    loaded = load(tmp_path / "adapter", model)
    assert torch.equal(logits(model, given, loaded), ours)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), adapter.parameters(), strict=True))
    assert load_file(tmp_path / "adapter" / PROJECTION).keys() == dict(adapter.virtual[1].named_parameters()).keys()
    theirs = PeftModel.from_pretrained(load_base(family).model, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "roberta"])
def test_as_many_parameters_train_as_in_peft(load_base, family, projection):
    base = load_base(family)
    spec = Prefix(num_virtual_tokens=6, prefix_projection=projection, encoder_hidden_size=10 if projection else None)
    task = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}
    given = {"num_virtual_tokens": 6, "prefix_projection": projection, "encoder_hidden_size": 10}
    theirs = get_peft_model(load_base(family).model, PrefixTuningConfig(task_type=task[base.spec.task], **given))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert attached(spec, base.model).trainable_parameters() == trained


def test_counts_of_published_runs():
    """PEFT's own result for Llama-3.2-3B, and layers times width of GPT-3 (LoRA, table 2: prefix-layer)."""
    found = count(pretrained.Random(config=LLAMA_3B), NoQuantization(), Prefix(num_virtual_tokens=50))
    assert found["trainable_parameters"] == 2_867_200
    found = count(pretrained.Random(config=GPT3), NoQuantization(), Prefix(num_virtual_tokens=8))
    assert found["trainable_parameters"] == 96 * 2 * 12_288 * 8


def test_a_base_without_a_cache_is_refused_by_name(make_spec):
    (record,) = Runner().run([make_spec(family="distilbert", adapter=Prefix())])
    assert record["exit_code"] == 2
    assert "DistilBertForSequenceClassification" in record["error"]
    assert "past_key_values" in record["error"]


def test_gradient_checkpointing_is_refused(make_spec, make_model):
    """transformers would drop the prefix without a word that stops the run."""
    model = make_model("llama", gradient_checkpointing=True)
    (record,) = Runner().run([make_spec(adapter=Prefix(), model=model)])
    assert record["exit_code"] == 2
    assert "model.gradient_checkpointing=false" in record["error"]


def test_a_layer_that_forgets_what_is_far_is_refused(load_base):
    model = load_base("llama").model
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="do not attend to all tokens before"):
        attached(Prefix(), model)


def test_a_width_of_a_perceptron_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"adapter\.encoder_hidden_size=8"):
        Prefix(encoder_hidden_size=8)


def test_the_yaml_is_peft_s_choice():
    spec = build(plain(compose(["adapter=prefix"]))["adapter"], "adapter")
    assert (spec.method, spec.virtual_tokens, spec.prefix_projection) == ("prefix", 20, False)


def test_the_config_says_what_peft_reads(load_base, tmp_path):
    save(attached(Prefix(num_virtual_tokens=3), load_base("t5").model), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("PREFIX_TUNING", "SEQ_2_SEQ_LM")
    assert (config["num_layers"], config["token_dim"], config["num_attention_heads"]) == (4, 64, 2)
