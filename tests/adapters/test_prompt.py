"""Prompt tuning: embeddings before those of the tokens."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.prompt import Prompt, PromptEmbeddings
from loralab.adapters.virtual import Share
from loralab.errors import ConfigError
from loralab.models import pretrained
from loralab.planning.count import count
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

LLAMA_3B = {
    **{"model_type": "llama", "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "head_dim": 128},
    **{"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8},
}


def logits(model, given, *slices):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(*slices):
        return model(**given).logits


def test_prompts_of_several_trials_are_each_ones_own_repeated_for_its_rows(load_base):
    model = load_base("llama").model
    one, other = (attached(Prompt(num_virtual_tokens=3), model, seed).virtual[1] for seed in (0, 1))
    found = PromptEmbeddings.forward_grouped([Share(one, 2), Share(other, 1)], torch.float32)
    assert found.shape == (3, 3, 64)
    assert all(torch.equal(row, own()) for row, own in zip(found, (one, one, other), strict=True))


def test_a_prompt_of_a_texts_embeddings_computes_as_the_text_before_the_row(load_base):
    base = load_base("llama")
    text = "some words"
    words = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"]] * 2)
    spec = Prompt(num_virtual_tokens=words.shape[1], prompt_tuning_init="text", prompt_tuning_init_text=text)
    adapter = attached(spec, base.model)
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([words, ids], 1)
    mask = torch.ones_like(whole)
    expected = logits(base.model, {"input_ids": whole, "attention_mask": mask})[:, words.shape[1] :]
    given = {"input_ids": ids, "attention_mask": mask[:, words.shape[1] :]}
    assert torch.equal(logits(base.model, given, BatchSlice(adapter, 2)), expected)


def test_a_text_is_repeated_or_cut_to_the_number_of_virtual_tokens(load_base):
    base = load_base("llama")
    table, (first, second) = (
        base.model.get_input_embeddings().weight,
        base.tokenizer("ab", add_special_tokens=False)["input_ids"],
    )
    for size in (1, 5):
        spec = Prompt(num_virtual_tokens=size, prompt_tuning_init="text", prompt_tuning_init_text="ab")
        found = attached(spec, base.model).virtual[1]()
        assert torch.equal(found, table[[first, second, first, second, first][:size]])


def test_a_text_and_the_way_to_use_it_go_together(load_base):
    with pytest.raises(ConfigError, match="prompt_tuning_init_text"):
        Prompt(prompt_tuning_init="text")
    with pytest.raises(ConfigError, match="prompt_tuning_init_text"):
        Prompt(prompt_tuning_init_text="words")
    base = load_base("llama")
    base.hooks.tokenizer = None
    with pytest.raises(ConfigError, match="without a tokenizer"):
        attached(Prompt(prompt_tuning_init="text", prompt_tuning_init_text="words"), base.model)


def test_a_text_is_not_needed_again_to_load_what_was_trained(load_base, tmp_path, inputs):
    base, other = load_base("llama"), load_base("llama")
    spec = Prompt(num_virtual_tokens=4, prompt_tuning_init="text", prompt_tuning_init_text="words")
    adapter = attached(spec, base.model)
    with torch.no_grad():
        adapter.virtual[1].embedding.mul_(3)
    save(adapter, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", other.model)
    ours = logits(base.model, inputs(), BatchSlice(adapter, 2))
    assert torch.equal(logits(other.model, inputs(), BatchSlice(loaded, 2)), ours)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "roberta"])
def test_as_many_parameters_train_as_in_peft(load_base, family):
    """But for what PEFT reserves for a decoder's prompt, which it does not read."""
    base = load_base(family)
    task = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}
    config = PromptTuningConfig(task_type=task[base.spec.task], num_virtual_tokens=6, num_transformer_submodules=1)
    theirs = get_peft_model(load_base(family).model, config)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert attached(Prompt(num_virtual_tokens=6), base.model).trainable_parameters() == trained


def test_the_count_of_a_published_run():
    """PEFT's own result for Llama-3.2-3B."""
    found = count(pretrained.Random(config=LLAMA_3B), NoQuantization(), Prompt(num_virtual_tokens=200))
    assert found["trainable_parameters"] == 614_400


def test_a_decoders_classifier_looks_at_the_last_token_and_an_encoders_at_the_first_virtual_one(load_base):
    ids = torch.randint(2, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for family, head in (("llama", "score"), ("distilbert", "pre_classifier")):
        base = load_base(family, task="sequence_classification")
        adapter = attached(Prompt(num_virtual_tokens=3), base.model)
        seen = []
        base.model.get_submodule(head).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        stack = base.model.base_model
        stack.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.last_hidden_state))
        logits(base.model, given, BatchSlice(adapter, 1))
        states, read = seen[:2]
        if family == "llama":
            assert states.shape[1] == read.shape[1] == 9
        else:
            assert states.shape[1] == 12
            assert torch.equal(read, states[:, 0])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradient_checkpointing_changes_no_loss(make_spec, make_model, curve, family):
    plain = make_spec("plain", family, adapter=Prompt(num_virtual_tokens=4))
    model = make_model(family, gradient_checkpointing=True)
    lean = make_spec("lean", family, adapter=Prompt(num_virtual_tokens=4), model=model)
    for spec in (plain, lean):
        (record,) = Runner().run([spec])
        assert record["status"] == "completed", record["error"]
    assert curve(lean.folder) == pytest.approx(curve(plain.folder), rel=1e-6)
