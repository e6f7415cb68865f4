"""Texts and classes of opened runs beside plain transformers and PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from loralab.artifacts.reopen import open_run
from loralab.artifacts.text import class_probabilities, completion
from loralab.cli.main import run
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
    with pytest.raises(ConfigError, match="top_q is not an option of decoding; did you mean top_p"):
        completion(opened, "a", {"top_q": 1})
    with pytest.raises(ConfigError, match=r"temperature=0\.5 acts on sampling alone; valid: with do_sample=true"):
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


def test_decoding_options_of_a_classifier_are_refused(finished, capsys):
    folder = str(finished("distilbert"))
    assert run(["generate", folder, "--prompt", "alpha", "num_beams=3"]) == 2
    assert f"num_beams is of writing text, and {folder} classifies" in capsys.readouterr().err
    assert run(["generate", folder, "--prompt", "alpha", "seed=1"]) == 0
