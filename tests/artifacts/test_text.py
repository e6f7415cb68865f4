"""Texts and classes of opened runs beside plain transformers and PEFT."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from loralab.artifacts.reopen import open_run
from loralab.artifacts.text import _head, class_probabilities, completion
from loralab.cli.main import run
from loralab.data.base import Row
from loralab.data.encoder import Encoder
from loralab.errors import ConfigError

PLAIN = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


def peft_text(family, base, folder, prompt, **options):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(PLAIN[family].from_pretrained(base), folder / "adapter").eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=family == "t5")
    made = model.generate(**ids, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options)
    skipped = 1 if family == "t5" else ids["input_ids"].shape[1]
    return tokenizer.decode(made[0, skipped:], skip_special_tokens=True)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_completion_is_what_peft_generates(finished, base_folder, family, beams):
    opened = open_run(finished(family))
    ours = completion(opened, "alpha beta ", {"max_new_tokens": 12, "num_beams": beams})
    opened.close()
    expected = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
    assert ours == peft_text(family, base_folder(family), opened.folder, "alpha beta ", **expected)


@pytest.mark.parametrize("family", PLAIN)
def test_special_tokens_of_a_prompt_are_special_as_those_of_a_template(finished, base_folder, family):
    opened = open_run(finished(family))
    prompt = f"alpha {opened.base.tokenizer.eos_token}beta"
    made = completion(opened, prompt, {"max_new_tokens": 12})
    assert made == peft_text(family, base_folder(family), opened.folder, prompt, max_new_tokens=12, do_sample=False)
    plain = replace(opened.spec.data, prompt=f"alpha {opened.base.tokenizer.eos_token}{{q}}")
    row = Row(plain.templates()["prompt"].render({"q": "beta"}), "gamma")
    opened.close()
    encoder = Encoder(opened.base.tokenizer, opened.spec.model.task, 64)
    (example,) = encoder.examples([row])
    head = _head(opened, encoder, prompt)
    assert head == example.input_ids[: len(head)]
    assert opened.base.tokenizer.eos_token_id in head[:-1]


def test_a_start_that_the_prompt_writes_itself_is_not_doubled(finished):
    opened = open_run(finished("llama"))
    opened.close()
    encoder = Encoder(opened.base.tokenizer, "causal_lm", 64)
    encoder.prefix = [encoder.eos]  # as of a tokenizer that puts it in front
    assert _head(opened, encoder, f"{opened.base.tokenizer.eos_token}a") == _head(opened, encoder, "a")


def test_a_classifier_of_pairs_takes_no_single_text_and_none_an_option_of_decoding(finished, capsys):
    opened = open_run(finished("roberta"))
    opened.close()
    paired = replace(opened, spec=replace(opened.spec, data=replace(opened.spec.data, text=["{t}", "{t}"])))
    assert run(["generate", str(opened.folder), "--prompt", "alpha", "top_p=0.5"]) == 2
    assert "classifies, and top_p= is of decoding" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="classifies pairs of texts, data.text=.* and --prompt is one text"):
        class_probabilities(paired, "alpha")


def test_sampling_follows_its_seed_and_the_base_alone_writes_other_text(finished):
    opened = open_run(finished("llama"))
    sampled = {"do_sample": True, "max_new_tokens": 12}
    texts = [completion(opened, "alpha ", sampled, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    short = {"max_new_tokens": 12}
    assert completion(opened, "alpha ", short) != completion(opened, "alpha ", short, adapted=False)
    opened.close()


def test_class_probabilities_are_those_of_peft(finished, base_folder):
    opened = open_run(finished("distilbert"))
    ours = class_probabilities(opened, "alpha beta")
    with pytest.raises(ConfigError, match="the prompt is longer than the 512 tokens"):
        class_probabilities(opened, "a" * 513)
    opened.close()
    base = AutoModelForSequenceClassification.from_pretrained(base_folder("distilbert"), num_labels=3)
    model = PeftModel.from_pretrained(base, opened.folder / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(base_folder("distilbert"))("alpha beta", return_tensors="pt")
    with torch.no_grad():
        shares = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits.softmax(-1)[0]
    names = opened.record["data"]["id2label"]
    assert list(ours.values()) == sorted(ours.values(), reverse=True)
    assert ours == pytest.approx({names[str(index)]: float(share) for index, share in enumerate(shares)}, abs=1e-6)


def test_a_prompt_without_room_and_an_unknown_option_are_refused(finished):
    opened = open_run(finished("gpt2"))
    with pytest.raises(ConfigError, match="the prompt has 128 tokens, and .* has room for 128"):
        completion(opened, "a" * 128, {})
    with pytest.raises(ConfigError, match="top_q is not an option of Decoding; did you mean top_p"):
        completion(opened, "a", {"top_q": 1})
    with pytest.raises(
        ConfigError, match=r"temperature=0\.5 is of sampling, and decoding is greedy; valid: do_sample=true"
    ):
        completion(opened, "a", {"temperature": 0.5})
    opened.close()


def test_the_command_shows_runs_side_by_side(finished, capsys):
    folders = [str(finished("llama")), str(finished("llama", "adapter.r=2"))]
    words = ["generate", *folders, "--prompt", "alpha\\n", "max_new_tokens=5"]
    assert run([*words, "--base", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["prompt"] == "alpha\n"
    assert [one["run"] for one in made["runs"]] == ["the base", *folders]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert all(f"== {one['run']}\n{one['text']}" in out for one in made["runs"][1:])


def test_the_base_beside_a_full_fine_tune_is_the_one_before_it(finished, base_folder, capsys):
    folder = finished("llama", "adapter=full")
    assert run(["generate", str(folder), "--base", "--json", "--prompt", "alpha beta ", "max_new_tokens=12"]) == 0
    made = json.loads(capsys.readouterr().out)["runs"]
    tokenizer = AutoTokenizer.from_pretrained(base_folder("llama"))
    ids = tokenizer("alpha beta ", return_tensors="pt", add_special_tokens=False)
    texts = []
    for weights in (base_folder("llama"), folder / "adapter"):
        model = AutoModelForCausalLM.from_pretrained(weights)
        ids_out = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(ids_out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert texts[0] != texts[1]
    assert [one["text"] for one in made] == texts


def test_a_run_may_have_an_equals_sign_in_its_name(finished, tmp_path, capsys):
    (tmp_path / "lr=0.05").symlink_to(finished("llama"))
    assert run(["generate", str(tmp_path / "lr=0.05"), "--prompt", "alpha", "max_new_tokens=null"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["num_beams=0"], "num_beams must be at least 1, or null, got 0"),
        (["num_beams=1.5"], "num_beams must be a whole number or null, got 1.5"),
        (["max_new_tokens=true"], "max_new_tokens must be a whole number or null, got True"),
        (["do_sample=maybe"], "do_sample must be true or false or null, got 'maybe'"),
        (["do_sample=true", "temperature=0"], "temperature must be a positive number or null, got 0"),
        (["do_sample=true", "top_p=2"], "top_p must be a number above 0, at most 1 or null, got 2"),
        (["do_sample=true", "top_p.x=2"], "top_p must be a number above 0, at most 1 or null, got {'x': 2}"),
        (["repetition_penalty=0"], "repetition_penalty must be a positive number or null, got 0"),
        (["bad_words_ids=3"], "bad_words_ids must be a list of lists of token ids or null, got 3"),
        (["bad_words_ids=[]"], "bad_words_ids must be a list of lists of token ids or null, got []"),
        (["bad_words_ids=[[99999]]"], "decoding with {'bad_words_ids': [[99999]]} is refused: The model vocabulary"),
        (["top_p=0.9"], "top_p=0.9 is of sampling, and decoding is greedy; valid: do_sample=true"),
        (["min_new_tokens=9", "max_new_tokens=4"], "min_new_tokens=9 is more than max_new_tokens=4"),
        (["seed=99999999999999999999"], "seed=99999999999999999999 is not a seed"),
        (["seed=true"], "seed=True is not a seed"),
        (["top_k=[1,"], "top_k=[1, cannot be read"),
    ],
)
def test_an_option_of_decoding_with_a_wrong_value_is_refused(finished, words, says, capsys):
    assert run(["generate", str(finished("llama")), "--prompt", "alpha", *words]) == 2
    assert f"loralab: {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--prompt", "a"], 2, "needs the folder of a run"),
        (["nowhere"], 2, "needs --prompt"),
        (["nowhere", "--prompt", "a"], 4, "nowhere: no such folder"),
        (["nowhere", "--prompt", "a", "seed=-1"], 2, "seed=-1 is not a seed"),
    ],
)
def test_wrong_words_are_one_sentence(words, code, text, capsys):
    assert run(["generate", *words]) == code
    assert text in capsys.readouterr().err
