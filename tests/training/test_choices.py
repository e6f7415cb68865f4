"""Multiple choice by likelihood, beside what plain transformers gives for the same rows."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.data.base import Row
from loralab.data.encoding import Encoder
from loralab.data.files import Files
from loralab.errors import ConfigError, DataError
from loralab.models import loading
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner
from loralab.training.choices import choice_accuracy, log_likelihoods
from loralab.training.generation import Writer, answers

LETTERS = ["A", "B", "C", "D"]
LONG = {"config": {"max_position_embeddings": 1024}, "max_length": 1024}


def moved(base):
    adapter = LoRA(r=4).attach(base.model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, delta in adapter.adapted():
            delta.lora_B.copy_(torch.randn(delta.lora_B.shape, generator=generator))
    return adapter


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def mmlu():
    folder = os.environ.get("LORALAB_TEST_DATA")
    path = Path(folder or "none") / "mmlu_qlora_zero_shot_val" / "validation.jsonl.gz"
    if not path.is_file():
        pytest.skip("LORALAB_TEST_DATA names no folder with mmlu_qlora_zero_shot_val")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return [row for row in rows if len(row["input"].encode()) < 900][:40]


def test_mmlu_is_scored_as_the_next_tokens_logits_score_it(make_spec, make_model, mmlu, tmp_path):
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mmlu))
    data = Files(
        train=str(path), validation=str(path), prompt="{input}", target="{output}", choices=LETTERS, batch_size=8
    )
    model = make_model(**LONG)
    spec = make_spec(model=model, data=data, max_steps=0, metric="val/choice_accuracy", metric_mode="max")
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    base = loading.load(model, NoQuantization(), model.load_tokenizer())
    letters = [ids(base.tokenizer, letter)[0] for letter in LETTERS]
    chosen, likely = [], []
    with torch.no_grad():
        for row in mmlu:
            logits = base.model.eval()(torch.tensor([ids(base.tokenizer, row["input"])])).logits[0, -1]
            likely.append(torch.log_softmax(logits, -1)[letters].tolist())
            chosen.append(LETTERS[int(logits[letters].argmax())])
    right = sum(one == row["output"] for one, row in zip(chosen, mmlu, strict=True))
    assert record["metrics"]["val/choice_accuracy"] == right / len(mmlu)
    rows = data.splits().validation
    found = log_likelihoods(base.model, None, Encoder(base.tokenizer, "causal_lm", 1024), rows, 8)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(likely), atol=1e-4, rtol=1e-5)


ROWS = [
    Row("the sky is", " blue", choices=(" blue", " green as grass", " x")),
    Row("two and two make", " five", choices=(" four", " five")),
    Row("q", "a", choices=("a", "bc", "def", "g")),
]


@torch.no_grad()
def by_hand(base, row, choice):
    """The answer's tokens, one sequence at a time, nothing padded."""
    model, tokenizer = base.model.eval(), base.tokenizer
    answer = ids(tokenizer, choice)
    if base.spec.task == "seq2seq_lm":
        from loralab.quantization.sequences import decoder_input_ids

        source = torch.tensor([[*ids(tokenizer, row.prompt), *Encoder(tokenizer, "seq2seq_lm", 64).suffix]])
        start = decoder_input_ids(model, torch.tensor([answer]))
        logits = model(input_ids=source, decoder_input_ids=start).logits[0]
    else:
        prefix = [*Encoder(tokenizer, "causal_lm", 64).prefix, *ids(tokenizer, row.prompt)]
        start = prefix or [0]
        logits = model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
    known = torch.log_softmax(logits.double(), -1)
    return float(known[torch.arange(len(answer)), torch.tensor(answer)].sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("size", [1, 4])
def test_answers_of_several_tokens_are_summed_in_batches_as_alone(load_base, family, size):
    base = load_base(family)
    encoder = Encoder(base.tokenizer, base.spec.task, 64)
    wanted = [[by_hand(base, row, choice) for choice in row.choices] for row in ROWS]
    found = log_likelihoods(base.model, None, encoder, ROWS, size)
    for row, one, other in zip(ROWS, found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-4), row
    right = [row.choices[max(range(len(one)), key=one.__getitem__)] for row, one in zip(ROWS, wanted, strict=True)]
    share = sum(row.target == one for row, one in zip(ROWS, right, strict=True)) / len(ROWS)
    assert choice_accuracy(base.model, None, encoder, ROWS, size) == share
    changed = log_likelihoods(base.model, moved(base), encoder, ROWS, size)
    assert changed[0] != pytest.approx(wanted[0], abs=1e-2)


def test_answers_that_are_equally_likely_are_no_choice(load_base):
    base = load_base()
    with torch.no_grad():
        base.model.lm_head.weight.zero_()
    encoder = Encoder(base.tokenizer, "causal_lm", 64)
    assert choice_accuracy(base.model, None, encoder, [Row("q", "a", choices=("a", "b"))], 2) == 0.0


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")])
def test_choices_and_texts_are_of_the_precision_of_the_passes(make_spec, tmp_path, monkeypatch, precision, dtype):
    def watched(real):
        def watch(module, *given):
            model = module.model if isinstance(module, Writer) else module
            layer = model.get_submodule("model.layers.0.self_attn.q_proj")
            handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
            try:
                return real(module, *given)
            finally:
                handle.remove()

        return watch

    seen = []
    monkeypatch.setattr("loralab.running.finish.choice_accuracy", watched(choice_accuracy))
    monkeypatch.setattr("loralab.training.generation.answers", watched(answers))
    rows = [{"q": "one", "a": "yes"}, {"q": "two", "a": "no"}]
    data = Files(**write(tmp_path, rows), choices=["yes", "no"], generate_rows=1, batch_size=1)
    (done,) = Runner().run([make_spec(data=data, max_steps=1, precision=precision)])
    assert done["status"] == "completed", done["error"]
    assert len(seen) > 2
    assert set(seen) == {getattr(torch, dtype)}


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "validation": str(path), "prompt": "{q}", "target": " {a}"}


def test_choices_are_a_list_or_a_column_and_take_the_white_space_of_the_target(tmp_path):
    given = write(tmp_path, [{"q": "one", "a": 2, "all": [1, 2, 3]}, {"q": "two", "a": "x", "all": ["x", "y"]}])
    rows = Files(**given, choices="all").splits().validation
    assert [row.choices for row in rows] == [(" 1", " 2", " 3"), (" x", " y")]
    plain = write(tmp_path, [{"q": "one", "a": "yes"}, {"q": "two", "a": "no"}])
    rows = Files(**plain, choices=["yes", "no"]).splits()
    assert {row.choices for row in rows.train} == {(" yes", " no")}
    assert rows.fingerprint != Files(**plain, choices=["no", "yes"]).splits().fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"q": "one", "a": "z", "all": ["x", "y"]},
            r"rows\.jsonl:1: the target 'z' is none of the choices \('x', 'y'\)",
        ),
        ({"q": "one", "a": "x", "all": "x"}, r"field 'all' is str, a list of answers"),
        ({"q": "one", "a": "x", "all": ["x"]}, r"field 'all' holds 1 answer, which is no choice"),
        ({"q": "one", "a": "x", "all": []}, r"field 'all' holds 0 answers"),
        ({"q": "one", "a": "x", "all": ["x", " "]}, r"field 'all' holds an empty answer"),
        ({"q": "one", "a": "x", "all": ["x", "x "]}, r"field 'all' holds an answer twice"),
        ({"q": "one", "a": "x", "all": ["x", None]}, r"field 'all' is null"),
        ({"q": "one", "a": "x"}, r"field 'all' is missing"),
    ],
)
def test_a_row_whose_answer_is_no_choice_is_bad(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        Files(**write(tmp_path, [row]), choices="all").splits()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"choices": ["A"]}, r"data\.choices=\['A'\] holds 1 answer, which is no choice; valid"),
        ({"choices": ["A", "A"]}, r"holds an answer twice"),
        ({"choices": 5}, r"data\.choices must be a list of answers such as \[A, B, C, D\], or"),
        (
            {"choices": ["A", "B"], "prompt": None, "target": None, "text": "{t}"},
            r"needs data\.prompt and data\.target",
        ),
    ],
)
def test_choices_that_are_none_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Files(**{"train": "x.jsonl", "prompt": "{q}", "target": "{a}", **given})


def test_choice_accuracy_is_measured_where_there_are_choices_and_higher_is_better(tmp_path):
    words = ["data=files", "data.train=a.jsonl", "data.prompt={q}", "data.target={a}", "metric=val/choice_accuracy"]
    with pytest.raises(ConfigError, match="is not measured by this run"):
        trial_spec(compose([*words, "metric_mode=max"]), tmp_path)
    with pytest.raises(ConfigError, match="higher is better"):
        trial_spec(compose([*words, "data.choices=[A,B]"]), tmp_path)
    assert trial_spec(compose([*words, "data.choices=[A,B]", "metric_mode=max"]), tmp_path).data.choices == ["A", "B"]
