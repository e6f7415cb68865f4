"""What a classifier is fed with and scored by is what transformers would feed and score."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from loralab.adapters.lora import LoRA
from loralab.data.files import Files
from loralab.errors import ConfigError, DataError
from loralab.models import pretrained
from loralab.models.feeding import encoded_rows
from loralab.running.runner import Runner

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = [
    ("a man", "b woman eats"),
    ("longer text here", "c"),
    ("b", "d e f"),
    ("some more", "words of it"),
    ("x y", "z"),
]
NAMES = ["pos", "neg", "mixed"]


@pytest.fixture(scope="module")
def words():
    """A BERT tokenizer of letters, with [CLS] text [SEP] pair [SEP]."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece
    from tokenizers.processors import TemplateProcessing

    letters = "abcdefghijklmnopqrstuvwxyz[]</>"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    backend = Tokenizer(WordPiece({piece: at for at, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    given = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    given["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **given)


@pytest.fixture
def make_base(tmp_path, words):
    """A saved BERT classifier whose weights have a wide spread."""

    def make(labels=3, **changes):
        names = {"id2label": dict(enumerate(changes.pop("names"))), "num_labels": labels} if "names" in changes else {}
        keys = {"vocab_size": len(words), "num_labels": labels, **SMALL, **names}
        config = transformers.BertConfig(**keys, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.4)
        model.save_pretrained(tmp_path / "base")
        words.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def checkpoint(folder, **changes):
    return pretrained.Pretrained(name_or_path=str(folder), task="sequence_classification", max_length=24, **changes)


def rows_of(values):
    return [{"p": p, "h": h, "y": value} for (p, h), value in zip(TEXTS, values, strict=True)]


@torch.no_grad()
def alone(folder, words, pairs=True, **options):
    """Logits of each row by plain transformers."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    made = [
        words(*(both if pairs else both[:1]), return_tensors="pt", truncation=True, max_length=24) for both in TEXTS
    ]
    return torch.cat([model(**one).logits for one in made])


def trained(make_spec, folder, path, steps=0, **changes):
    options = {key: changes.pop(key) for key in ("text", "num_labels", "labels") if key in changes}
    data = Files(
        train=path, validation=path, text=options.get("text", "{p}"), label="y", labels=options.get("labels", [])
    )
    model = checkpoint(folder, num_labels=options.get("num_labels"))
    spec = make_spec("run", "roberta", model=model, data=data, max_steps=steps, **changes)
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    return record, spec


@pytest.mark.parametrize("scheme", ["alone", "padded"])
def test_a_pair_is_scored_as_transformers_scores_it(make_spec, make_base, tmp_path, words, scheme):
    base = make_base()
    path = write(tmp_path / "r.jsonl", rows_of([0, 1, 2, 1, 0]))
    record, _ = trained(make_spec, base, path, text=["{p}", "{h}"])
    targets = torch.tensor([0, 1, 2, 1, 0])
    right = torch.nn.functional.cross_entropy(alone(base, words), targets)
    assert record["metrics"]["val/loss"] == pytest.approx(float(right), rel=1e-5)
    one = torch.nn.functional.cross_entropy(alone(base, words, pairs=False), targets)
    assert abs(float(one - right)) > 0.01


def test_the_parts_of_a_pair_are_told_apart_and_cut_as_the_tokenizer_cuts(make_base, tmp_path, words):
    long = [{"p": "abc " * 9, "h": "de " * 3, "y": 0}, {"p": "a", "h": "b [SEP] c", "y": 1}]
    path = write(tmp_path / "r.jsonl", long)
    data = Files(train=path, validation=path, text=["{p}", "{h}"], label="y")
    made = encoded_rows(data, checkpoint(make_base()), words)
    right = words(long[0]["p"], long[0]["h"], truncation=True, max_length=24)
    assert made.train[0].input_ids == right["input_ids"]
    assert made.train[0].token_type_ids == right["token_type_ids"]
    assert [one.truncated for one in made.train] == [True, False]
    plain = words("a", "b [SEP] c", split_special_tokens=True)
    assert made.train[1].input_ids == plain["input_ids"]
    assert made.train[1].token_type_ids == plain["token_type_ids"]
    assert made.train[1].input_ids.count(words.sep_token_id) == 2


def test_a_base_without_types_of_tokens_is_fed_none(make_model, make_data, words, tmp_path):
    path = write(tmp_path / "r.jsonl", rows_of([0, 1, 1, 0, 1]))
    data = Files(train=path, validation=path, text=["{p}", "{h}"], label="y")
    made = encoded_rows(data, make_model("distilbert"), words)
    assert made.train[0].token_type_ids is None
    assert made.train[0].input_ids == words(*TEXTS[0])["input_ids"]


def test_a_separator_written_by_hand_is_remarked(make_base, tmp_path, words, caplog):
    path = write(tmp_path / "r.jsonl", rows_of([0, 1, 1, 0, 1]))
    data = Files(train=path, validation=path, text="{p} [SEP] {h}", label="y")
    made = encoded_rows(data, checkpoint(make_base()), words)
    assert made.train[0].input_ids.count(words.sep_token_id) == 2
    assert "data.text writes the separator '[SEP]' by hand" in caplog.text
    caplog.clear()
    encoded_rows(Files(train=path, validation=path, text=["{p}", "{h}"], label="y"), checkpoint(make_base()), words)
    assert "by hand" not in caplog.text


@pytest.mark.parametrize("text", [["{p}"], ["{p}", ""], ["{p}", "{h}", "{p}"], [], 3, ["{p}", None]])
def test_a_pair_is_two_templates(text):
    with pytest.raises(ConfigError, match=r"data\.text(=.*valid: two | must be a template .* or two .*, got )"):
        Files(text=text, label="y")


def test_a_language_model_reads_no_pair(make_model, tmp_path):
    path = write(tmp_path / "r.jsonl", rows_of([0, 1, 1, 0, 1]))
    spec = make_model("llama")
    with pytest.raises(ConfigError, match=r"pair of texts, which model\.task=causal_lm"):
        encoded_rows(Files(train=path, validation=path, text=["{p}", "{h}"], label="y"), spec, spec.load_tokenizer())


def test_a_trained_head_keeps_its_classes(make_spec, make_base, tmp_path, words, caplog):
    base = make_base(names=NAMES)
    said = alone(base, words, pairs=False).argmax(-1)
    path = write(tmp_path / "r.jsonl", rows_of([NAMES[at] for at in said]))
    record, _ = trained(make_spec, base, path)
    assert record["metrics"]["val/accuracy"] == 1.0
    assert record["data"]["id2label"] == dict(enumerate(NAMES))
    assert "numbered as in the base's own head: pos, neg, mixed" in caplog.text
    record, _ = trained(make_spec, base, path, labels=["mixed", "neg", "pos"])
    assert record["metrics"]["val/accuracy"] == 1.0


def test_a_head_of_more_classes_than_the_data_keeps_them_all(make_spec, make_base, tmp_path, words):
    base = make_base(names=["Pos", "Neg", "Mixed"])
    said = alone(base, words, pairs=False)[:, :2].argmax(-1)
    path = write(tmp_path / "r.jsonl", rows_of([NAMES[at] for at in said]))
    record, _ = trained(make_spec, base, path)
    right = torch.nn.functional.cross_entropy(alone(base, words, pairs=False), said)
    assert record["metrics"]["val/loss"] == pytest.approx(float(right), rel=1e-5)
    names = ["pos", "neg"] if len(set(said.tolist())) > 1 else ["Pos", "neg"]
    assert record["data"]["id2label"] == dict(enumerate([*names, "Mixed"]))


def test_classes_that_are_not_the_bases_own_are_sorted_and_said(make_base, tmp_path, words, caplog):
    path = write(tmp_path / "r.jsonl", rows_of(["tea", "pos", "neg", "tea", "pos"]))
    made = encoded_rows(
        Files(train=path, validation=path, text="{p}", label="y"), checkpoint(make_base(names=NAMES)), words
    )
    assert made.splits.labels == ["neg", "pos", "tea"]
    assert "the base's own classes (pos, neg, mixed) are not the data's (neg, pos, tea)" in caplog.text


def test_the_names_of_the_classes_go_with_the_adapter(make_spec, make_base, tmp_path, words):
    from peft import PeftModel

    base = make_base()
    path = write(tmp_path / "r.jsonl", rows_of(["tea", "pos", "neg", "tea", "pos"]))
    adapter = LoRA(r=4, modules_to_save=["classifier"])
    record, spec = trained(make_spec, base, path, steps=3, adapter=adapter)
    names = {0: "neg", 1: "pos", 2: "tea"}
    assert record["data"]["id2label"] == names
    assert record["data"]["label2id"] == {name: at for at, name in names.items()}
    stored = json.loads((spec.folder / "adapter" / "adapter_config.json").read_text())
    named = {"label2id": stored["label2id"], "id2label": {int(at): name for at, name in stored["id2label"].items()}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **named)
    model = PeftModel.from_pretrained(model, spec.folder / "adapter").eval()
    with torch.no_grad():
        logits = torch.cat([model(**words(text, return_tensors="pt")).logits for text, _ in TEXTS])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 1, 0, 2, 1]))
    assert record["metrics"]["val/loss"] == pytest.approx(float(loss), rel=1e-4)
    pipe = transformers.pipeline("text-classification", model=model.merge_and_unload(), tokenizer=words)
    assert pipe(TEXTS[0][0])[0]["label"] == names[int(logits[0].argmax())]
    assert load_file(spec.folder / "adapter" / "adapter_model.safetensors")


SCORES = [1.5, -100.0, 2.25, 0.0, 4.0]


@pytest.mark.parametrize("size", [1, 3])
def test_one_label_is_regression(make_spec, make_base, tmp_path, words, size):
    base = make_base(labels=1)
    path = write(tmp_path / "r.jsonl", rows_of(SCORES))
    data = Files(train=path, validation=path, text=["{p}", "{h}"], label="y", batch_size=size)
    spec = make_spec("run", "roberta", model=checkpoint(base, num_labels=1), data=data, max_steps=0)
    record = Runner().run([spec])[0]
    said = alone(base, words, num_labels=1)[:, 0]
    scores = torch.tensor(SCORES)
    right = {
        "val/loss": float(torch.nn.functional.mse_loss(said, scores)),
        "val/pearson": np.corrcoef(said, scores)[0, 1],
        "val/spearman": np.corrcoef(said.argsort().argsort(), scores.argsort().argsort())[0, 1],
    }
    assert record["status"] == "completed", record["error"]
    assert record["metrics"] == pytest.approx(right, rel=1e-5)


def test_regression_steps_as_transformers_and_peft(make_spec, make_base, tmp_path, words, weights):
    base = make_base(labels=1)
    path = write(tmp_path / "r.jsonl", rows_of([1.5, 1.0, 2.25, 0.0, 4.0]))
    before, _ = trained(make_spec, base, path, num_labels=1, text=["{p}", "{h}"])
    record, _ = trained(make_spec, base, path, steps=30, num_labels=1, text=["{p}", "{h}"])
    assert record["metrics"]["val/loss"] < 0.5 * before["metrics"]["val/loss"]
    assert "val/accuracy" not in record["metrics"]
    assert record["data"]["id2label"] is None


def test_a_class_that_is_no_number_cannot_be_regressed_on(make_base, tmp_path, words):
    path = write(tmp_path / "r.jsonl", rows_of([1, 2.5, "good", 1, 2]))
    data = Files(train=path, validation=path, text="{p}", label="y")
    with pytest.raises(DataError, match=r"r\.jsonl:3: field 'y' is 'good'; model\.num_labels=1 is regression"):
        encoded_rows(data, checkpoint(make_base(labels=1), num_labels=1), words)


@pytest.mark.parametrize("labels", [3, 1])
def test_pairs_train_packed_as_they_train_alone(make_spec, make_base, tmp_path, words, curve, labels):
    path = write(tmp_path / "r.jsonl", rows_of([0, 1, 2, 1, 0]))
    model = checkpoint(make_base(labels=labels), num_labels=labels)
    data = Files(train=path, validation=path, text=["{p}", "{h}"], label="y", batch_size=2)

    def make(name, seed):
        return make_spec(name, "roberta", model=model, data=data, seed=seed, max_steps=3)

    packed = Runner().run([make("one", 0), make("two", 1)])
    alone = [Runner().run([make("three", 0)])[0], Runner().run([make("four", 1)])[0]]
    assert [one["status"] for one in packed + alone] == ["completed"] * 4, packed[0]["error"]
    for together, single in zip(packed, alone, strict=True):
        assert together["metrics"] == pytest.approx(single["metrics"], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "kinds", "error", "says"),
    [
        ("{a}", "$A", ConfigError, "does not end a text with the end-of-sequence token (id 3)"),
        ("{a}[SEP]", "$A [SEP]", None, ""),
        (
            "{a} {b}[SEP]",
            "$A [SEP]",
            DataError,
            "train.jsonl:1: holds the end-of-sequence token (id 3) 2 times, other rows 1",
        ),
    ],
    ids=["no end", "two in each", "one cut off"],
)
def test_a_classifier_with_a_decoder_takes_its_class_from_an_end_that_each_row_has(
    tmp_path, words, text, kinds, error, says
):
    from tokenizers.processors import TemplateProcessing

    words.backend_tokenizer.post_processor = TemplateProcessing(single=kinds, special_tokens=[("[SEP]", 3)])
    rows = [{"a": "a b", "b": "", "label": "x"}, {"a": "b", "b": "a b c d e f g h", "label": "y"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "train.jsonl")] * 2
    data = Files(train=files[0], validation=files[1], text=text, label="label")
    base = pretrained.Random(
        task="sequence_classification",
        max_length=8,
        config={"model_type": "bart", "d_model": 16, "vocab_size": len(words), "eos_token_id": 3},
    )
    if error is None:
        encoded_rows(data, base, words)
        return
    with pytest.raises(error) as raised:
        encoded_rows(data, base, words)
    assert says in str(raised.value)
