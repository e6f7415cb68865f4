"""Bits per byte of plain text: the sum over the raw text, whatever the tokenizer and the length of a block."""

import math
from pathlib import Path

import pytest
import torch

import loralab
from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.data.files import Files
from loralab.models import loading
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

TEXT = "The caf\u00e9 \u4f60\u597d said \U0001f600:\n\n  it is 12.5 degrees, not more.\nAnd so on.\n"
BPE = str(Path(loralab.__file__).parent / "tiny")


@torch.no_grad()
def bits_by_hand(model, tokenizer, text, length):
    """The document between two ends of text, read in windows that overlap by one token."""
    end = tokenizer.eos_token_id
    ids = [end, *tokenizer(text, add_special_tokens=False)["input_ids"], end]
    total = 0.0
    for start in range(0, len(ids) - 1, length - 1):
        window = ids[start : start + length]
        known = torch.log_softmax(model(torch.tensor([window])).logits[0, :-1].double(), -1)
        total -= float(known.gather(1, torch.tensor(window[1:])[:, None]).sum()) / math.log(2)
    return total


@pytest.mark.parametrize("tokenizer", [None, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("length", [9, 64, 128])
def test_it_is_the_sum_over_the_raw_text(make_spec, make_model, tmp_path, tokenizer, length):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8", newline="")
    changes = {"tokenizer": tokenizer, "config": {"vocab_size": 8192}} if tokenizer else {}
    model = make_model(max_length=length, **changes)
    data = Files(train=str(path), validation=str(path), test=str(path), batch_size=3)
    record = Runner().run([make_spec(model=model, data=data, max_steps=0, test=True)])[0]
    assert record["status"] == "completed", record["error"]
    base = loading.load(model, NoQuantization(), model.load_tokenizer())
    bits = bits_by_hand(base.model.eval(), base.tokenizer, TEXT, length)
    for split in ("val", "test"):
        assert record["metrics"][f"{split}/bits_per_byte"] == pytest.approx(bits / len(TEXT.encode()), rel=1e-5)


def test_rows_with_prompts_have_no_bits_per_byte(make_spec):
    assert "val/bits_per_byte" not in Runner().run([make_spec(max_steps=0)])[0]["metrics"]


def test_a_text_whose_characters_are_unknown_is_said_to_be_that(make_spec, make_model, tmp_path, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "so": 2, "on": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    made.save_pretrained(tmp_path / "words")
    path = tmp_path / "text.txt"
    path.write_text("so on and so on\n")
    model = make_model(tokenizer=str(tmp_path / "words"))
    data = Files(train=str(path), validation=str(path), batch_size=1)
    record = Runner().run([make_spec(model=model, data=data, max_steps=0)])[0]
    assert record["status"] == "completed", record["error"]
    assert "2 tokens of text.txt are <unk>" in caplog.text


def test_it_is_a_metric_of_plain_text_alone_and_lower_is_better(tmp_path):
    words = ["data=files", f"data.train={tmp_path}/a.txt", "metric=val/bits_per_byte"]
    assert trial_spec(compose(words), tmp_path).metric == "val/bits_per_byte"
    with pytest.raises(Exception, match="lower is better"):
        trial_spec(compose([*words, "metric_mode=max"]), tmp_path)
    with pytest.raises(Exception, match="val/bits_per_byte.* is not measured by this run"):
        trial_spec(compose([*words, "data.prompt={q}", "data.target={a}"]), tmp_path)
