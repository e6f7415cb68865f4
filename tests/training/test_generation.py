"""Completions of a padded batch are those of each prompt alone."""

import json
from itertools import pairwise

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.data.base import Row
from loralab.data.fields import TemplateText
from loralab.errors import ConfigError
from loralab.forward.texts import rouge_l, scores
from loralab.running.runner import Runner
from loralab.training.generation import Writer, answers, complete, evaluating

PROMPTS = ["a", "some more words", "four", "a prompt of quite another length"]


def score(writer, rows, **options):
    return rouge_l(*answers(writer, rows, **options))


def moved(base):
    adapter = LoRA(r=4).attach(base.model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, delta in adapter.adapted():
            delta.lora_B.copy_(torch.randn(delta.lora_B.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_padding_changes_no_completion(load_base, family):
    base = load_base(family)
    adapter, task = moved(base), base.spec.task
    together = complete(base.model, base.tokenizer, adapter, PROMPTS, task, 8, 64)
    apart = [complete(base.model, base.tokenizer, adapter, [one], task, 8, 64)[0] for one in PROMPTS]
    assert together == apart
    assert together != complete(base.model, base.tokenizer, None, PROMPTS, task, 8, 64)


def test_a_long_prompt_is_cut_from_the_left(load_base):
    base = load_base()
    long = complete(base.model, base.tokenizer, None, ["x" * 500 + "tail of it"], "causal_lm", 8, 18)
    assert long == complete(base.model, base.tokenizer, None, ["tail of it"], "causal_lm", 8, 18)


def test_generating_leaves_the_mode_of_the_base_as_it_was(load_base):
    model = load_base().model
    for training in (True, False):
        model.train(training)
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
        assert model.training is training


def test_a_detached_adapter_leaves_the_bare_base(load_base):
    base = load_base()
    bare = complete(base.model, base.tokenizer, None, PROMPTS, "causal_lm", 8, 64)
    adapter = moved(base)
    assert complete(base.model, base.tokenizer, None, PROMPTS, "causal_lm", 8, 64) == bare
    adapter.detach()
    assert complete(base.model, base.tokenizer, adapter, PROMPTS, "causal_lm", 8, 64) == bare


def test_the_score_is_the_mean_rouge_l_of_the_completions_over_all_batches(load_base):
    base = load_base()
    adapter = moved(base)
    targets = ["alpha beta", "gamma", "delta", "x" * 20]
    made = complete(base.model, base.tokenizer, adapter, PROMPTS, "causal_lm", 24, 64)
    targets[2] = made[2][:10]  # one that is partly right, so that the mean is not zero
    rows = [Row(prompt, target=target) for prompt, target in zip(PROMPTS, targets, strict=True)]
    writer = Writer(base.model, base.tokenizer, adapter, "causal_lm", 64)
    assert score(writer, rows, batch_size=3) == pytest.approx(rouge_l(made, targets))


def chain(load_base, text, **changes):
    """A base that knows which letter follows which in ``text``, in which none comes twice, and then ends."""
    base = load_base(config={"hidden_size": 260, "num_hidden_layers": 1, **changes})
    model, end = base.model, base.tokenizer.eos_token_id
    ids = [*base.tokenizer(text, add_special_tokens=False)["input_ids"], end]
    assert len(set(ids)) == len(ids)
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(258, 260))
        for one, other in pairwise(ids):
            model.lm_head.weight[other, one] = 1.0
        model.lm_head.weight[ids[1], end] = 0.5  # behind an end it would begin anew
    return base


ALPHABET = "q wertyuiopasdfghjklzxcvbnm0123456789"


@torch.no_grad()
def greedy(model, ids, most, end):
    """Token by token, nothing but argmax."""
    made = []
    while len(made) < most and (not made or made[-1] != end):
        made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def framing(tokenizer, single):
    """``tokenizer`` with other tokens around a text: bos is <pad>, whose id is 0."""
    import copy

    from tokenizers import processors

    made = copy.deepcopy(tokenizer)
    marks = [("<pad>", tokenizer.pad_token_id), ("</s>", tokenizer.eos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    return made


@pytest.mark.parametrize("single", ["$A", "$A </s>", "<pad> $A </s>", "<pad> $A"])
def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(load_base, single):
    base = chain(load_base, ALPHABET[:12])
    writer = Writer(base.model, framing(base.tokenizer, single), None, "causal_lm", 64)
    assert score(writer, [Row("q", ALPHABET[1:12])]) == 1.0


@pytest.mark.parametrize("length", [36, 37, 40, 96])
def test_what_fits_in_training_fits_in_scoring(load_base, length):
    base = chain(load_base, ALPHABET)
    rows = [Row("q", ALPHABET[1:24]), Row("xx" * 30 + "q", ALPHABET[1:24])]
    base = chain(load_base, ALPHABET[:24])
    assert score(Writer(base.model, base.tokenizer, None, "causal_lm", length), rows) == 1.0


def test_the_first_token_of_a_long_prompt_stays(load_base):
    base = load_base()
    tokenizer = framing(base.tokenizer, "<pad> $A </s>")
    (made,) = complete(base.model, tokenizer, None, ["y" * 40 + "x" * 9], "causal_lm", 8, 18)
    ids = [tokenizer.pad_token_id, *tokenizer("x" * 9, add_special_tokens=False)["input_ids"]]
    end = tokenizer.eos_token_id
    right = [one for one in greedy(base.model, ids, 8, end) if one != end]
    assert made == tokenizer.decode(right)


STORED = [
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 20},
    {"num_beams": 3, "length_penalty": 5.0},
    {"do_sample": True, "temperature": 9.0},
    {"max_new_tokens": 2},
    {"suppress_tokens": [100, 101]},
]


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: next(iter(stored)))
def test_what_the_checkpoint_says_of_generation_is_left_out_unless_asked_for(load_base, stored):
    base = load_base()
    prompts = ["abc abc abc", "the the the"]
    plain = complete(base.model, base.tokenizer, None, prompts, "causal_lm", 12, 64)
    own = base.model.generation_config
    for key, value in stored.items():
        setattr(own, key, value)
    assert complete(base.model, base.tokenizer, None, prompts, "causal_lm", 12, 64) == plain
    assert base.model.generation_config is own
    end = base.tokenizer.eos_token_id
    for prompt, made in zip(prompts, plain, strict=True):
        ids = greedy(base.model, base.tokenizer(prompt)["input_ids"], 12, end)
        assert made == base.tokenizer.decode([one for one in ids if one != end])


def test_what_is_asked_for_is_used_as_transformers_uses_it(load_base):
    base = load_base()
    options = {"repetition_penalty": 5.0, "min_new_tokens": 4}
    writer = Writer(base.model, base.tokenizer, None, "causal_lm", 64, options)
    ids = base.tokenizer("abc abc abc")["input_ids"]
    right = base.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False, **options,
        eos_token_id=base.tokenizer.eos_token_id, pad_token_id=base.tokenizer.pad_token_id,
    )[0, len(ids) :].tolist()  # fmt: skip
    assert writer.complete([ids], [12]) == [writer.cut(right)]
    assert writer.settings() == {"do_sample": False, "num_beams": 1, **options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 2}, r"data\.generation\.num_beam is not an option.*num_beams"),
        ({"eos_token_id": 2}, r"data\.generation\.eos_token_id is not an option"),
        ({"num_return_sequences": 2}, r"data\.generation\.num_return_sequences is not an option"),
        ({"max_new_tokens": -3}, r"data\.generation=.*transformers refuses it"),
        ({"num_beams": 0}, r"data\.generation\.num_beams=0 is out of range; valid: a whole number from 1"),
        ({"num_beams": 1.5}, r"num_beams=1\.5 is out of range"),
        ({"do_sample": True, "temperature": -1}, r"temperature=-1 is out of range; valid: a number above 0"),
        ({"do_sample": True, "top_p": 2.0}, r"top_p=2\.0 is out of range; valid: a number above 0, at most 1"),
        ({"do_sample": True, "min_p": "x"}, r"min_p=x is out of range; valid: a number from 0 to 1"),
    ],
)
def test_an_option_of_generation_that_there_is_not_is_refused(make_data, options, message):
    with pytest.raises(ConfigError, match=message):
        make_data(generation=options)


def test_a_special_token_in_a_target_is_read_alike_on_both_sides(load_base):
    base = load_base()
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "<done>"]})
    base.model.resize_token_embeddings(264)
    ids = base.tokenizer("q<call>x<done>")["input_ids"]
    order = [*ids, base.tokenizer.eos_token_id]
    table = dict(pairwise(order))

    def forward(module, args, kwargs, out):
        given = kwargs["input_ids"]
        out.logits = torch.nn.functional.one_hot(torch.tensor([[table.get(int(t), 3) for t in r] for r in given]), 264)
        out.logits = out.logits.float()
        return out

    handle = base.model.register_forward_hook(forward, with_kwargs=True)
    target = TemplateText("<call>x<done>", ((0, 6), (7, 13)))
    writer = Writer(base.model, base.tokenizer, None, "causal_lm", 64)
    assert score(writer, [Row("q", target)]) == 1.0
    table[ids[0]] = ids[2]  # leaves the call out
    assert score(writer, [Row("q", target)]) < 1.0
    handle.remove()


def test_how_texts_are_made_and_counted_is_in_the_record(make_spec, make_data):
    data = make_data(generate_rows=2, generation={"num_beams": 2}, rouge="published")
    record = Runner().run([make_spec(data=data, max_steps=1)])[0]
    assert record["status"] == "completed", record["error"]
    assert record["data"]["generation"] == {"do_sample": False, "num_beams": 2}
    assert (record["data"]["rouge"], record["data"]["bleu"]) == ("published", "13a")
    assert Runner().run([make_spec(name="none", max_steps=1)])[0]["data"]["generation"] is None


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_generating_leaves_the_random_numbers_and_is_the_same_again(load_base, options):
    base = load_base()
    writer = Writer(base.model, base.tokenizer, None, "causal_lm", 64, options)
    before = torch.random.get_rng_state()
    made = [writer.complete([[5, 6, 7]], [12]) for _ in range(2)]
    assert made[0] == made[1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_encoder_with_positions_reads_no_padding_before_a_text(load_base):
    pytest.importorskip("transformers")
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 257, "eos_token_id": 256, "bos_token_id": 256, "decoder_start_token_id": 256}
    model = BartForConditionalGeneration(BartConfig(vocab_size=258, init_std=0.3, **sizes, **heads, **tokens)).eval()
    tokenizer = load_base().tokenizer
    together = complete(model, tokenizer, None, PROMPTS, "seq2seq_lm", 8, 64)
    assert together == [complete(model, tokenizer, None, [one], "seq2seq_lm", 8, 64)[0] for one in PROMPTS]


def kept(folder):
    path = folder / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else None


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_generated_row_is_kept_and_scores_what_the_record_says(make_spec, make_data, rows, family):
    data = make_data(generate_rows=3, test=str(rows["pairs", "train"]))
    spec = make_spec(family, family, data=data, max_steps=1, test=True)
    record = Runner().run([spec])[0]
    made = kept(spec.folder)
    assert [(one["split"], one["row"]) for one in made] == [(s, n) for s in ("validation", "test") for n in range(3)]
    for name, prefix in (("validation", "val"), ("test", "test")):
        own = [one for one in made if one["split"] == name]
        assert [one["prompt"] for one in own] == [row.prompt for row in data.splits()[name][:3]]
        assert [one["target"] for one in own] == [row.target for row in data.splits()[name][:3]]
        again = scores([one["prediction"] for one in own], [one["target"] for one in own], "unicode", "13a")
        measured = {name: record["metrics"][f"{prefix}/{name}"] for name in again}
        assert measured == pytest.approx(again, nan_ok=True)


def test_a_run_that_generates_nothing_leaves_no_predictions_of_an_earlier_one(make_spec, make_data):
    spec = make_spec(data=make_data(generate_rows=2), max_steps=1)
    Runner().run([spec])
    assert len(kept(spec.folder)) == 2
    assert Runner().run([make_spec(max_steps=1)])[0]["status"] == "completed"
    assert kept(spec.folder) is None


def test_a_metric_of_numbers_over_rows_without_one_is_said_to_be_that(make_spec, make_data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"ask {one}", "a": one}) + "\n" for one in ("yes", "no", "perhaps")))
    data = make_data(train=str(path), validation=str(path), generate_rows=2)
    record = Runner().run([make_spec(data=data, max_steps=1, metric="val/number_match", metric_mode="max")])[0]
    assert record["exit_code"] == 3
    assert "none of the 2 rows of validation has a number in its target" in record["error"]
    assert Runner().run([make_spec("other", data=data, max_steps=1)])[0]["metrics"]["val/number_match"] is not None
